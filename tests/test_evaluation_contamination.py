# SPDX-License-Identifier: Apache-2.0
"""`jai eval contamination`: n-grams of words and of Thai characters, articles, kinds of files, and a run without."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation_data import write_rows

from jai.errors import UserError
from jai.evaluation.contamination import ContaminationSearch, ItemOverlap, SuiteQuestion, article_title, texts_of
from jai.evaluation.contamination_report import (
    column_table,
    figures_without,
    overlap_table,
    report_contamination,
    suite_items,
)
from jai.evaluation.options import ContaminationOptions
from jai.evaluation.results import Item, TaskRecord, mean_figure, open_run
from jai.evaluation.suites import read_suites
from jai.tokenization.corpus import open_sources

WORDS = [f"word{number}" for number in range(40)]
THAI = "ประเทศไทยมีกรุงเทพมหานครเป็นเมืองหลวงและมีแม่น้ำเจ้าพระยาไหลผ่านกลางเมืองไปลงทะเลที่อ่าวไทย"


def found(text: str, training: str, n: int = 13) -> dict[str, float]:
    search = ContaminationSearch([SuiteQuestion("s", "t", "0", {"q": [text]})], n)
    search.look_through(training, "file, row 1")
    (overlap,) = search.overlaps()
    assert overlap.overlaps == any(overlap.columns.values())
    return overlap.columns


def test_thirteen_words_in_a_row_are_an_overlap_and_twelve_are_none():
    text = " ".join(WORDS[:20])  # eight 13-grams
    assert found(text, " ".join(WORDS[:13])) == {"q": 1 / 8}
    assert found(text, " ".join(WORDS[:12])) == {"q": 0}
    assert found(text, " ".join(["x", *WORDS[3:20], "y"])) == {"q": 5 / 8}
    assert found(text, " ".join([*WORDS[:12], "other", *WORDS[12:24]])) == {"q": 0}
    assert found(text, " ".join(WORDS[:12]), n=12) == {"q": 1 / 9}


def test_sixty_five_characters_of_thai_are_an_overlap_and_sixty_four_are_none():
    count = len(THAI) - 65 + 1
    assert found(THAI, THAI) == {"q": 1}
    assert found(THAI, f"ก{THAI[:65]}") == {"q": 1 / count}
    assert found(THAI, THAI[:64]) == {"q": 0}
    # Nine words and 20 characters are 13 words.
    mixed = " ".join(WORDS[:9]) + THAI[:20]
    assert found(mixed, f"ก {mixed} ก") == {"q": 1}
    assert found(mixed, " ".join(WORDS[:9]) + THAI[:19]) == {"q": 0}


@pytest.mark.parametrize(
    "look_alike",
    [
        lambda text: text.upper(),
        lambda text: text.replace(" ", ",\n- "),
        lambda text: text.replace("word1", "\u200bword๑"),
        lambda text: text.replace("ำ", "ํา"),
        lambda text: text.replace("ไทย", " ไทย"),
    ],
)
def test_look_alikes_make_no_difference(look_alike):
    text = " ".join(WORDS[:13]) + THAI
    assert look_alike(text) != text
    assert found(text, look_alike(text)) == {"q": 1}


def test_a_short_text_is_looked_for_as_a_whole_and_a_shorter_one_is_not():
    nine = " ".join(WORDS[:9])
    assert found(nine, f"x {nine} y") == {"q": 1}
    assert found(nine, " ".join([*WORDS[:8], "x"])) == {"q": 0}
    assert found(" ".join(WORDS[:7]), " ".join(WORDS)) == {}
    assert found(THAI[:40], THAI) == {"q": 1}
    assert found(THAI[:39], THAI) == {}
    # No word ends where the text is cut.
    assert found(nine, f"x {nine}th") == {"q": 0}


def test_a_word_is_one_with_its_combining_marks():
    seven = " ".join(["नमस्ते"] * 7)
    assert found(seven, seven) == {}
    assert found(f"{seven} नमस्ते", f"{seven} नमस्ते") == {"q": 1}


def test_what_is_found_several_times_is_said_where_it_came_first():
    item = SuiteQuestion("s", "t", "0", {"q": [" ".join(WORDS[:20])]}, article="a")
    search = ContaminationSearch([item], 13)
    for place, words in (("row 1", WORDS[:13]), ("row 2", WORDS[5:20])):
        search.look_through(" ".join(words), place)
        search.see_article("a", place)
    (overlap,) = search.overlaps()
    assert (overlap.place, overlap.article_place) == ("row 1", "row 1")


def test_texts_and_articles_of_rows():
    row = {"messages": [{"role": "user", "content": "a"}], "n": 1, "more": ["b", ["c"]], "none": None}
    assert list(texts_of(row)) == ["user", "a", "b", "c"]
    assert article_title({"title": "Super_Bowl 50", "url": "x"}) == "super bowl 50"
    assert article_title({"url": "https://th.wikipedia.org/wiki/%E0%B8%81_%E0%B8%82?x=1#y"}) == "ก ข"
    assert article_title({"meta": {"title": "น้ํา"}}) == article_title({"metadata": {"title": "น้ำ"}})
    assert article_title({"url": "https://example.com/a", "title": " "}) is None


# --- Files, suites and runs ---


def xquad_row(number: int, question: str, title: str) -> dict:
    context = " ".join(f"context{number // 2}x{word}" for word in range(15))
    answers = {"text": ["a"], "answer_start": [0]}
    return {"id": f"q{number}", "title": title, "context": context, "question": question, "answers": answers}


@pytest.fixture
def data(tmp_path) -> Path:
    """Four questions on two articles, of which the first two share a paragraph."""
    rows = [
        xquad_row(0, f"{THAI} ศูนย์", "Bangkok"),
        xquad_row(1, "สั้น", "Bangkok"),
        xquad_row(2, " ".join(WORDS[:14]), "Chiang_Mai"),
        xquad_row(3, " ".join(WORDS[20:34]), "Chiang_Mai"),
    ]
    write_rows(tmp_path / "data", "google/xquad/xquad.th/validation", rows)
    (tmp_path / "suite.yaml").write_text("title: t\nabout: a\ntasks: [{task: xquad_th, metric: f1}]\n")
    return tmp_path / "data"


def run_of(folder: Path, scores: list[float], suite="suite") -> Path:
    items = [Item(suite, "xquad_th", str(number), "f1", score) for number, score in enumerate(scores)]
    with open_run(folder, model="m", revision="r") as run:
        run.add(items)
        figure = mean_figure(items, suite=suite, name="xquad_th", metric="f1")
        run.replace_figures(suite, [figure] if figure else [])
        run.replace_task(TaskRecord(suite, "xquad_th", "1", "0"))
        run.finish()
    return folder


def report(texts, suite, **options):
    options = ContaminationOptions(texts=[str(text) for text in texts], suite=[str(suite)], **options)
    options.check()
    return report_contamination(options, read_suites(options.suite), open_sources(options.texts))


def chats(*texts: str, **more: str) -> list[dict]:
    return [{"messages": [{"role": "user", "content": text}], **more} for text in texts]


def test_a_report_with_a_runs_figures(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    write_rows(tmp_path, "chats", chats("no", f"ถาม {THAI} ศูนย์ ตอบ", title="Other"))
    write_rows(tmp_path, "wiki", chats("about the north", url="https://en.wikipedia.org/wiki/Chiang_Mai"))
    run = run_of(tmp_path / "run", [1.0, 1.0, 0.5, 0.0])
    texts = [tmp_path / "chats.jsonl", tmp_path / "wiki.jsonl"]
    overlaps = report(texts, tmp_path / "suite.yaml", data=data, run=run, out=tmp_path / "out")
    assert [each.overlaps for each in overlaps] == [True, False, False, False]
    assert overlaps[0].place == "chats.jsonl, row 2"
    assert [each.article_place for each in overlaps] == [None, None, *["wiki.jsonl, row 1"] * 2]
    assert overlaps[1].columns == {"context": 0}
    said = capsys.readouterr().out
    written = (tmp_path / "out/report.md").read_text()
    for text in ("1 of 4 (25.0%)", "2 of 4 (50.0%)", "0.6250 [", "0.5000 [", "1.0000 [", "3 rows", "n is 13"):
        assert text in said, text
        assert text in written, text
    lines = [json.loads(line) for line in (tmp_path / "out/items.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == ["chats.jsonl, row 2", None, None, None]
    (figure,) = json.loads((tmp_path / "out/report.json").read_text())["figures"]
    values = {name: figure[name]["value"] for name in ("figure", "clean", "other_articles")}
    assert values == {"figure": 0.625, "clean": 0.5, "other_articles": 1.0}


def test_every_kind_of_file_is_read_with_all_its_columns(tmp_path, data):
    second = " ".join(WORDS[:14])
    pq.write_table(pa.Table.from_pylist([{"prompt": "x", "chosen": [{"content": second}]}]), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text(f"x\n{second}")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"rejected": second}) + "\n")
    for name in ("a.parquet", "b.txt", "c.jsonl.gz"):
        overlaps = report([tmp_path / name], tmp_path / "suite.yaml", data=data)
        assert [each.place for each in overlaps] == [None, None, f"{name}, row 1", None]
    longer = report([tmp_path / "b.txt"], tmp_path / "suite.yaml", data=data, ngram=15)
    assert [each.columns["question"] for each in longer if "question" in each.columns] == [0, 1, 0]


def test_judged_questions_with_their_articles(tmp_path):
    rows = [
        {"id": "a", "question": THAI, "answer": "x", "url": "https://th.wikipedia.org/wiki/กรุงเทพ"},
        {"id": "b", "question": "สั้น", "answer": "x"},
    ]
    write_rows(tmp_path, "hall_bench", rows)
    (suite,) = read_suites(["hall-bench"])
    items = list(suite_items(suite, tmp_path))
    assert [(item.key, item.article) for item in items] == [
        (("hall-bench", "", "a"), "กรุงเทพ"),
        (("hall-bench", "", "b"), None),
    ]
    search = ContaminationSearch(items, 13)
    search.see_article("กรุงเทพ", "here")
    outcomes = [Item("hall-bench", "none", id_, "correct", score) for id_, score in (("a", 1.0), ("b", 0.0))]
    figure = mean_figure(outcomes, suite="hall-bench", name="all questions", metric="correct")
    ((without,), unknown) = figures_without([figure], outcomes, search.overlaps())
    assert (without.clean.value, without.other_articles.value, unknown) == (0.5, 0.0, 0)


def test_a_figure_without_some_questions_keeps_its_weights_and_direction():
    """Outcomes are of parts of questions (`1.2`, `81 turn 2`); in task a, what overlaps is all that is right."""
    questions = [SuiteQuestion("s", *key, {}) for key in (("a", "0"), ("a", "1"), ("b", "0"), ("", "81"))]
    overlaps = [ItemOverlap(each, {}, "here" if each is questions[0] else None, None) for each in questions]
    scores = [("a", "0.1", 1.0), ("a", "1.1", 0.0), ("a", "1.2", 0.0), ("b", "0.1", 1.0), ("writing", "81 turn 2", 1.0)]
    items = [Item("s", task, id_, "m", score) for task, id_, score in scores]
    options = {"suite": "s", "metric": "m", "higher_is_better": False}
    mean = mean_figure(items[:4], name="mean", weights={"a": 0.5, "b": 0.5}, **options)
    judged = mean_figure(items[4:], name="judged", **options)
    withouts, unknown = figures_without([mean, judged], items, overlaps)
    assert unknown == 0
    assert mean.value == pytest.approx(2 / 3)
    assert [each.clean.value for each in withouts] == [0.5, 1.0]
    assert not any(each.clean.higher_is_better for each in withouts)


def test_tables_tell_what_overlaps_from_what_is_too_short():
    found = [({"q": 0.5}, "here"), ({"q": 0.0}, None), ({}, None)]
    overlaps = [
        ItemOverlap(SuiteQuestion("s", "t", str(number), {}), columns, place, None)
        for number, (columns, place) in enumerate(found)
    ]
    assert overlap_table(overlaps).rows == [["s: t", "3", "1 of 3 (33.3%)", "–", "1 of 3 (33.3%)"]]
    assert column_table(overlaps).rows == [["s: q", "1 of 2 (50.0%)", "25.0%"]]


def test_figures_of_other_questions_are_counted_and_left_out(tmp_path, data, capsys):
    run = run_of(tmp_path / "run", [1.0], suite="another")
    (tmp_path / "t.txt").write_text("x")
    report([tmp_path / "t.txt"], tmp_path / "suite.yaml", data=data, run=run)
    assert "1 of the run's figures cannot be taken apart" in capsys.readouterr().out.replace("\n", " ")


def test_bad_input_is_one_error(tmp_path, data):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    for name, message in (("bad.jsonl", "bad.jsonl, line 2"), ("bad.parquet", "bad.parquet is a damaged parquet file")):
        with pytest.raises(UserError, match=message):
            report([tmp_path / name], tmp_path / "suite.yaml", data=data, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="questions of ruler-th are generated for each model"):
        report([tmp_path / "bad.jsonl"], "ruler-th", data=data)
    with pytest.raises(UserError, match="No suite is given"):
        ContaminationOptions(texts=["x"], suite=[]).check()
    with pytest.raises(UserError, match="exists already"):
        ContaminationOptions(texts=["x"], suite=["mgsm"], out=data).check()
    with pytest.raises(UserError, match="ngram is 7; expected a whole number from 8"):
        ContaminationOptions(texts=["x"], suite=["mgsm"], ngram=7)
