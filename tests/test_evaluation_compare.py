# SPDX-License-Identifier: Apache-2.0
"""`jai eval compare`: figures, tests and conditions of runs side by side, and the papers' figures with sources."""

import dataclasses
import html
import re
from pathlib import Path

import pytest

import jai
from jai.errors import UserError
from jai.evaluation.comparison import compare_runs
from jai.evaluation.comparison_report import draw_comparison, published_table, radar_rows, report_comparison
from jai.evaluation.options import CompareOptions
from jai.evaluation.published import published_figures
from jai.evaluation.results import FigureItems, FigurePart, Item, TaskRecord, mean_figure, open_run, read_run
from jai.evaluation.suites import JudgedSuite, read_suite, suite_names

PAPERS = Path(__file__).parents[2] / "shared/papers"
BEFORE, AFTER = [0.0] * 8 + [1.0] * 11, [1.0] * 8 + [0.0] + [1.0] * 10  # nine changed, eight for the better


def make_run(
    folder: Path,
    scores: list[float],
    *,
    model="org/model",
    suite="thai-exam",
    expected="A",
    finished=True,
    conditions=(),
    notes=(),
    figure="mean over questions",
    **record,
) -> Path:
    """A run of a suite with two tasks, to which the items belong in turns; figures of one task and of both."""
    items = [
        Item(suite, f"task {number % 2}", str(number), "acc", score, texts={"expected": expected})
        for number, score in enumerate(scores)
    ]
    with open_run(folder, model=model, revision="c0ffee", conditions=dict(conditions)) as run:
        run.add(items)
        parts = {name: [item for item in items if name in (item.task, "both")] for name in ("task 0", "both")}
        figures = [
            mean_figure(some, suite=suite, name=name.replace("both", figure), metric="acc")
            for name, some in parts.items()
        ]
        run.replace_figures(suite, [each for each in figures if each])
        for task in ("task 0", "task 1"):
            values = {"version": "1", "prompt_hash": "a" * 64, "data": "owner/data", **record}
            run.replace_task(TaskRecord(suite, task, **values))
        run.results.notes = list(notes)
        run.finish() if finished else run.save()
    return folder


def test_runs_are_tested_on_their_items(tmp_path):
    first, second = make_run(tmp_path / "a", BEFORE), make_run(tmp_path / "b", AFTER, model="org/other")
    comparison = compare_runs([first, second])
    assert [run.name for run in comparison.runs] == ["model", "other"]
    task, mean = comparison.rows
    assert (task.name, mean.name) == ("task 0", "mean over questions")
    assert [figure.value for figure in mean.figures] == [11 / 19, 18 / 19]
    difference = mean.differences[1]
    assert difference.value == pytest.approx(7 / 19)
    assert difference.p_value == pytest.approx(20 / 512, abs=0.006)  # 2 · (1 + 9) / 2^9, of the binomial
    assert (difference.items, difference.unpaired) == (19, 0)
    assert task.differences[1].items == 10
    assert mean.differences[0] is None
    assert list(comparison.notes) == []


def test_figures_find_their_items_with_their_weights(tmp_path):
    items = [Item("s", "a", "0", "acc", 1.0), Item("s", "b", "0", "acc", 0.0), Item("s", "b", "1", "acc", 1.0)]
    weights = {"a": 0.5, "b": 0.5}
    figure = mean_figure(items, suite="s", name="mean", metric="acc", weights=weights)
    found, shares = FigureItems(items).of(figure)
    again = mean_figure(found, suite="s", name="mean", metric="acc", weights=shares)
    assert (again.value, again.low, again.high) == (figure.value, figure.low, figure.high) == (0.75, 0.5, 1.0)
    # Of the first item of each task alone, the parts do not say which items they are.
    some = mean_figure(items[:2], suite="s", name="first", metric="acc")
    assert FigureItems(items).of(some) is None
    with open_run(tmp_path / "run", model="m", revision="r") as run:
        run.replace_figures("s", [figure])
        run.finish()
    assert read_run(tmp_path / "run")[0].figures == [figure]


@pytest.mark.parametrize(
    ("other", "obstacle", "note"),
    [
        ({"version": "2"}, "other version", "thai-exam, task 0, task 1: version: model 1, other 2."),
        ({"data": "owner/new"}, "other data", "data: model owner/data, other owner/new."),
        ({"judge": "j"}, "other judge", "judge: model none, other j."),
        (
            {"judge_names": ("j-2024", "j-2025")},
            "other names that the judge gives itself",
            'names that the judge gives itself: model [], other ["j-2024", "j-2025"].',
        ),
        (
            {"judge_parameters": {"temperature": 1}},
            "other parameters of the judge",
            'parameters of the judge: model none, other {"temperature": 1}.',
        ),
        ({"filter": "last"}, "other filter", "filter: model none, other last."),
        ({"scale": 100.0}, "other scale", "scale: model 1.0, other 100.0."),
        ({"answer_tokens": 9}, "", "longest answer in tokens: model none, other 9."),
        ({"expected": "B"}, "other questions", None),
        ({"prompt_hash": "b" * 64}, "", "thai-exam, task 0, task 1: prompts differ: other questions, examples or chat"),
        ({"shots": 5}, "", "examples before a question: model 0, other 5."),
        ({"conditions": {"limit": 20}}, "", "The limit differs: model none, other 20."),
        ({"conditions": {"dtype": "float16"}}, "", "The dtype differs: model none, other float16."),
        ({"finished": False}, "", "other is not finished"),
        ({"notes": ["s: half was left out"]}, "", "other: s: half was left out"),
    ],
)
def test_what_differs_is_said(tmp_path, other, obstacle, note):
    first = make_run(tmp_path / "a", BEFORE)
    second = make_run(tmp_path / "b", AFTER, model="other", **other)
    comparison = compare_runs([first, second])
    assert {row.obstacles[1] for row in comparison.rows} == {obstacle}
    assert {row.differences[1] is None for row in comparison.rows} == {bool(obstacle)}
    if note:
        assert note in "\n".join(comparison.notes)
    else:
        assert not comparison.notes


@pytest.mark.parametrize(
    ("weights", "metric", "obstacle"),
    [
        ((0.5, 0.5), "acc", ""),
        ((None, None), "acc", "other tasks or weights in the mean"),
        ((0.25, 0.75), "acc", "other tasks or weights in the mean"),
        ((0.5, 0.5), "acc_norm", "other tasks or weights in the mean"),
    ],
)
def test_a_mean_that_is_taken_otherwise_is_not_tested(tmp_path, weights, metric, obstacle):
    """As after a change of the suite's file: both figures bear one name."""
    folders = []
    for name, shares, measured in (("a", (0.5, 0.5), "acc"), ("b", weights, metric)):
        parts = tuple(FigurePart(f"task {number}", measured, share) for number, share in enumerate(shares))
        folders.append(make_run(tmp_path / name, BEFORE))
        with open_run(folders[-1], model="org/model", revision="c0ffee") as run:
            some, mean = run.results.figures
            run.replace_figures(mean.suite, [some, dataclasses.replace(mean, parts=parts)])
            run.finish()
    assert [row.obstacles[1] for row in compare_runs(folders).rows] == ["", obstacle]


def test_items_of_one_run_only_are_counted(tmp_path):
    first, second = make_run(tmp_path / "a", BEFORE), make_run(tmp_path / "b", AFTER[:12])
    row = compare_runs([first, second]).rows[1]
    assert (row.differences[1].items, row.differences[1].unpaired) == (12, 7)
    third = make_run(tmp_path / "c", AFTER, suite="onet")
    rows = compare_runs([first, third]).rows
    assert {row.obstacles[1] for row in rows} == {"not measured in both"}


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [make_run(tmp_path / name, BEFORE) for name in ("x", "y", "deep/x")]
    assert [run.name for run in compare_runs(folders[:2]).runs] == ["x", "y"]
    assert [run.name for run in compare_runs(folders).runs] == [str(tmp_path / "x"), "y", str(tmp_path / "deep/x")]


def test_bad_input_is_one_error(tmp_path):
    run = make_run(tmp_path / "a", BEFORE)
    for folders, message in [
        ([run, tmp_path / "a" / ".." / "a"], "is given twice"),
        ([tmp_path], "results.json does not exist. Give the folder of a run"),
    ]:
        with pytest.raises(UserError, match=message):
            compare_runs(folders)
    with open_run(tmp_path / "empty", model="m", revision="r"):
        pass
    with pytest.raises(UserError, match="has no figures yet"):
        compare_runs([tmp_path / "empty"])
    with pytest.raises(UserError, match=r"chart.gif has an unknown ending; expected .png, .svg, .pdf"):
        CompareOptions(runs=[str(run)], figure=Path("chart.gif")).check()
    with pytest.raises(UserError, match="none is not a folder"):
        CompareOptions(runs=["none"]).check()


def test_tables_pictures_and_the_papers_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    folders = [make_run(tmp_path / "a", BEFORE), make_run(tmp_path / "b", AFTER, model="other")]
    options = CompareOptions(
        runs=[str(each) for each in folders],
        paper=True,
        figure=tmp_path / "out" / "chart.svg",
        markdown=tmp_path / "out" / "table.md",
    )
    report_comparison(options)
    said = capsys.readouterr().out
    written = (tmp_path / "out" / "table.md").read_text()
    for text in ("0.9474", "+0.3684", "[+0.", "62.32", "94.74 [", "JAI-1, Table 7 (2025-10)", "does not say over what"):
        assert text in said
        assert text in written
    assert "JTS-1-PLM, Thai-Exam" in written
    assert (tmp_path / "out" / "chart.svg").read_text().startswith("<?xml")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["chart.svg", "table.md"]
    report_comparison(CompareOptions(runs=[str(folders[0])]))
    assert "JAI-1, Table 7" not in capsys.readouterr().out
    plain = make_run(tmp_path / "c", BEFORE, suite="mine")
    report_comparison(CompareOptions(runs=[str(plain)], paper=True))
    assert "No paper publishes any of these figures." in capsys.readouterr().out


def test_many_runs_fit_a_narrow_console(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"model-{number}" for number in range(7)] + ["a-model-with-a-name-that-is-rather-long"]
    folders = [make_run(tmp_path / name, AFTER if number else BEFORE, model=name) for number, name in enumerate(names)]
    other = make_run(tmp_path / "other", [*AFTER[:12], None], model="other", conditions={"limit": 12})
    judged = make_run(tmp_path / "judged", AFTER, model="judged", judge="j")
    report_comparison(CompareOptions(runs=[str(each) for each in (*folders, other, judged)]))
    figures = capsys.readouterr().out.partition("Figures\n")[2].partition("Note:")[0].splitlines()
    assert max(map(len, figures)) <= 80
    of_both = "\n".join(figures).partition("thai-exam: mean over questions, acc\n")[2].splitlines()
    words = [line.split() for line in of_both]
    assert words[0] == ["model-0", "0.5789", "0.3684–0.7895", "19"]
    assert words[1][:5] == ["model-1", "0.9474", words[1][2], "19", "+0.3684"]  # one line for each run
    assert words[1][5:] == words[6][5:]
    assert words[1][5].startswith("[+0.")
    long = of_both.index(next(line for line in of_both if line.strip().startswith("a-model")))
    assert "".join(line.split()[0] for line in of_both[long : long + 3]) == names[-1]
    at = next(number for number, line in enumerate(words) if line[0] == "other")
    assert words[at][3] == "12"
    said = " ".join(word for line in words[at + 1 : at + 3] for word in line)
    assert said == "1 more without a score; tested on the 12 that both have; 7 are in one run only"
    assert words[-2:] == [["judged", "0.9474", words[1][2], "19", "–"], ["not", "tested:", "other", "judge"]]


def test_judged_figures_are_shown_in_the_papers_unit_with_both_judges(tmp_path):
    run = make_run(tmp_path / "a", [7.0, 7.0, 8.0, 8.0], suite="mt-bench-th", figure="all turns", judge="gpt-5")
    cut = make_run(tmp_path / "b", [7.0], suite="mt-bench-th", figure="all turns", conditions={"limit": 1})
    assert published_table(compare_runs([cut])).rows[0][-1] == "the first 1 questions of each task alone"
    table = published_table(compare_runs([run]))
    as_printed, tens = (
        [row for row in table.rows if row[0] == f"mt-bench-th: all turns (acc){scale}"] for scale in ("", " × 10")
    )
    assert as_printed == [["mt-bench-th: all turns (acc)", "model", "7.50 [7.00–8.00] n=4", str(run), "gpt-5", ""]]
    assert tens[0][2] == "75.00 [70.00–80.00] n=4"
    published = {(row[1], row[3]): row for row in table.rows}
    judge = "GPT-4o-2024-08-06"
    assert published["Merged, MT-Bench-TH", "JAI-1, Table 11 (2025-10)"][2:] == [
        "7.33",
        "JAI-1, Table 11 (2025-10)",
        judge,
        "",
    ]
    assert published["Typhoon2-70B, MT-Bench TH", "JAI-1, Table 13 (2025-10)"][2:5:2] == ["73.6", judge]
    # What several tables of a paper repeat is one row; the order is that of the scales.
    assert ("Deepseek R1 70B, MT-Bench TH", "Typhoon2-R1, Tables 1, 3, 10, 11 (2025-02)") in published
    in_our_unit = table.rows[table.rows.index(as_printed[0]) : table.rows.index(tens[0])]
    assert {float(row[2].split()[0]) <= 10 for row in in_our_unit} == {True}
    assert len(in_our_unit) > 10


def test_the_radar_has_what_all_runs_have_and_more_is_better(tmp_path):
    comparison = compare_runs([make_run(tmp_path / "a", BEFORE), make_run(tmp_path / "b", AFTER)])
    row = comparison.rows[0]
    lower = dataclasses.replace(row, name="lower", higher_is_better=False)
    half = dataclasses.replace(row, name="half", figures=(row.figures[0], None))
    rows = [dataclasses.replace(row, name=str(number)) for number in range(4)]
    some = dataclasses.replace(comparison, rows=[lower, half, *rows])
    assert [each.name for each in radar_rows(some)] == ["0", "1", "2", "3"]
    mean = dataclasses.replace(comparison.rows[1], name="mean")  # of more items
    alike = dataclasses.replace(mean, name="mean of another metric")
    suites = [dataclasses.replace(each, suite=suite) for suite in "abc" for each in (*rows, mean, alike)]
    many = dataclasses.replace(comparison, rows=suites)
    assert [(each.suite, each.name) for each in radar_rows(many)] == [("a", "mean"), ("b", "mean"), ("c", "mean")]
    sizes = []
    for number, drawn in enumerate((comparison, some)):
        path = tmp_path / f"{number}.png"
        draw_comparison(drawn, path)
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(data[16:20]))
    assert sizes[1] > 1.4 * sizes[0]  # a radar stands beside the bars where there are three axes


# --- What the papers publish ---


def test_typhoons_ifeval_is_there_as_both_papers_have_it():
    found = {
        (each.paper, each.table, each.name): each.value
        for each in published_figures()
        if each.model in ("Typhoon2-70B", "Typhoon2 70B") and each.name.startswith("IFEval")
    }
    assert (found["JAI-1", "13", "IFEval EN"], found["JAI-1", "13", "IFEval TH"]) == (86.7, 81.0)
    assert (found["Typhoon2-R1", "1", "IFEval EN"], found["Typhoon2-R1", "1", "IFEval TH"]) == (88.7, 81.4)


def test_published_figures_name_suites_figures_and_metrics_that_there_are():
    suites = {name: read_suite(name) for name in suite_names()}
    for each in published_figures():
        assert set(each.suites) <= set(suites), each
        for suite in (suites[name] for name in each.suites):
            if not isinstance(suite, JudgedSuite):
                names = [row.label for row in suite.tasks] + [mean.name for mean in suite.means]
                assert any(name in names for name in each.ours) or not each.ours, each


def test_a_published_figure_is_set_beside_its_own_metric_alone():
    (figure, *_) = (each for each in published_figures() if each.metric is not None and each.suites and each.ours)
    mine = mean_figure(
        [Item(figure.suites[0], "t", "0", "m", 1.0)], suite=figure.suites[0], name=figure.ours[0], metric=figure.metric
    )
    assert figure.matches(mine)
    for changed in ({"metric": "other"}, {"name": "other"}, {"suite": "other"}):
        assert not figure.matches(dataclasses.replace(mine, **changed))


def test_published_averages_are_those_of_their_rows():
    """Typhoon2-R1's averages are of twelve columns, MT-Bench times ten; it prints 76.1 for 76.18."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for each in published_figures():
        if each.paper == "Typhoon2-R1":
            rows.setdefault((each.table, each.model), {})[each.name] = each.value
    assert len(rows) == 22
    for values in rows.values():
        tens = [value * (10 if name.startswith("MT") else 1) for name, value in values.items() if name != "Avg."]
        assert sum(tens) / 12 == pytest.approx(values["Avg."], abs=0.11)


def test_the_documentation_has_a_command_for_each_published_figure():
    """With the suites that measure the same, and no others than there are."""
    page = (Path(jai.__file__).parent / "docs/evaluation.md").read_text(encoding="utf-8")
    section = page.partition("## The papers' figures")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.split("\n") if line[:2] == "| "]
    documented = {
        (paper.strip(), table, column): command
        for paper, tables, columns, command, _ in rows[2:]
        for table in tables.split(", ")
        for column in columns.split("; ")
    }
    for each in published_figures():
        command = documented[each.paper, each.table, each.name]
        assert all(f"{suite}" in command for suite in each.suites), each
    for command in documented.values():
        for words in re.findall(r"--suite ([a-z0-9 -]+?)(?: --|`)", command):
            assert set(words.split()) <= set(suite_names())


@pytest.mark.skipif(not PAPERS.exists(), reason=f"{PAPERS} is not there: it is no part of the repository")
def test_published_figures_are_those_of_the_papers_texts():
    texts = {"JAI-1": "000_*", "Typhoon2-R1": "002_*", "Trillion-7B": "004_*"}
    grids = {paper: tables_of(next(PAPERS.glob(name)).read_text(errors="replace")) for paper, name in texts.items()}
    rows: dict[tuple[str, str, str], list[float]] = {}
    for each in published_figures():
        rows.setdefault((each.paper, each.table, each.model), []).append(each.value)
    assert len(rows) == 74
    for (paper, table, model), values in rows.items():
        grid = grids[paper][table]
        columns = [list(column) for column in zip(*grid)] if len({len(row) for row in grid}) == 1 else []
        lines = [line for line in [*grid, *columns] if bare(model) in bare(" ".join(line))]
        assert any(numbers(line)[-len(values) :] == values for line in lines), (paper, table, model, values)


def tables_of(text: str) -> dict[str, list[list[str]]]:
    """The cells of each table by its number: HTML, or lines with tabs before the caption."""
    found = {}
    for table, after in re.findall(r"(<table.*?</table>)(.*?)</details>", text, re.DOTALL):
        rows = [
            re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        ]
        cells = [[html.unescape(re.sub("<.*?>", "", cell)).strip() for cell in row] for row in rows]
        found[re.findall(r"Table (\d+):", after)[-1]] = cells
    lines = [line for line in text.split("\n") if line.strip()]
    for index, line in enumerate(lines):
        if caption := re.match(r"Table (\d+)(:| \|)", line):
            first = index
            while "\t" in lines[first - 1]:
                first -= 1
            found.setdefault(caption[1], [row.split("\t") for row in lines[first:index]])
    return found


def numbers(cells: list[str]) -> list[float]:
    plain = [re.sub(r"</?u>|%| \(\d\)", "", cell).strip() for cell in cells]
    return [float(cell) for cell in plain if re.fullmatch(r"\d+(\.\d+)?", cell)]


def bare(text: str) -> str:
    return re.sub(r"[^\wα.+]", "", text)
