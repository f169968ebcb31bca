# SPDX-License-Identifier: Apache-2.0
"""`jai eval contamination`: training text beside the questions of suites, and a run's figures without those it has."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from jai.errors import UserError
from jai.evaluation.comparison_report import print_table
from jai.evaluation.contamination import ContaminationSearch, ItemOverlap, SuiteQuestion, article_title, texts_of
from jai.evaluation.data import parsed_rows, rows_file
from jai.evaluation.options import ContaminationOptions
from jai.evaluation.progress import quiet_libraries
from jai.evaluation.results import Figure, FigureItems, Item, mean_figure, read_run
from jai.evaluation.suites import JudgedSuite, Suite
from jai.files import new_folder
from jai.reports import ReportTable
from jai.tokenization.corpus import HubDataset, Source, TextFile

_NOTHING = "–"


@dataclass(frozen=True)
class FigureWithout:
    """A figure of a run, with and without some of its items.

    Attributes:
        figure: as the run has it.
        clean: over the items that do not overlap with the training text; None where a task has none.
        other_articles: over those that are of no article that the training text has.
    """

    figure: Figure
    clean: Figure | None
    other_articles: Figure | None


def report_contamination(
    options: ContaminationOptions,
    suites: Sequence[Suite | JudgedSuite],
    sources: Sequence[Source],
    *,
    console: Console | None = None,
) -> list[ItemOverlap]:
    """Read training text once, say what of the suites' questions it has, and write what the options ask for.

    Args:
        options: of the command line.
        suites: whose questions are looked for.
        sources: the training text.
        console: where to print; None is standard output.

    Returns:
        What was found of each question.

    Raises:
        UserError: if the suites' questions, the text or the run cannot be had.
    """
    console = console or Console()
    for suite in suites:
        if isinstance(suite, Suite) and suite.metadata:
            raise UserError(
                f"The questions of {suite.name} are generated for each model, so no training data has them. Leave the "
                "suite out."
            )
    quiet_libraries()
    items = [item for suite in suites for item in suite_items(suite, options.data)]
    run = read_run(options.run) if options.run is not None else None
    search = ContaminationSearch(items, options.ngram)
    rows = _read_all(sources, search)
    overlaps = search.overlaps()
    sections = [("Overlap", overlap_table(overlaps)), ("By column", column_table(overlaps))]
    notes = [f"{rows:,} rows of training text were read; n is {options.ngram}."]
    if run is not None:
        figures, unknown = figures_without(run[0].figures, run[1], overlaps)
        sections.append((f"Figures of {options.run}", figures_table_without(figures)))
        if unknown:
            notes.append(
                f"{unknown} of the run's figures cannot be taken apart: they are of other suites, or not of single "
                "questions."
            )
    else:
        figures = []
    for title, table in sections:
        print_table(title, table, console)
    for note in notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
    if options.out is not None:
        _write(options.out, sections, notes, overlaps, figures)
        console.print(f"The report is in {options.out}.", markup=False, highlight=False, soft_wrap=True)
    return overlaps


# --- Questions ---


def suite_items(suite: Suite | JudgedSuite, data: Path | None) -> Iterator[SuiteQuestion]:
    """The questions of a suite with all their texts.

    Raises:
        UserError: if they cannot be had.
    """
    if isinstance(suite, JudgedSuite):
        yield from _judged_items(suite, data)
        return
    from jai.evaluation.measure import plan_suite  # lm-eval, which takes seconds
    from jai.evaluation.tasks import TaskLoader

    plan = plan_suite(suite, TaskLoader(data=data))
    for task in (task for tasks in plan.tasks.values() for task in tasks):
        for number, doc in enumerate(task.eval_docs):
            texts = {name: texts for name, value in doc.items() if (texts := list(texts_of(value)))}
            yield SuiteQuestion(suite.name, task.task_name, str(number), texts, article_title(doc))


def _judged_items(suite: JudgedSuite, data: Path | None) -> Iterator[SuiteQuestion]:
    from jai.evaluation.judged.command import plan_judged

    plan = plan_judged(suite, data=data, limit=None)
    path = rows_file(data / suite.file) if data else None
    rows = list(parsed_rows(path, dict)) if path else []
    articles = [article_title(row) for row in rows] or [None] * len(plan.questions)
    for question, article in zip(plan.questions, articles, strict=True):
        said = {
            name: list(texts_of(value)) for name, value in asdict(question).items() if name not in ("id", "category")
        }
        yield SuiteQuestion(
            suite.name, "", question.id, {name: texts for name, texts in said.items() if texts}, article
        )


# --- Training text ---


def _read_all(sources: Sequence[Source], search: ContaminationSearch) -> int:
    """Look through everything, and count its rows."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    rows, shown = 0, 0.0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Reading")
        for part in (part for source in sources for part in source.parts):
            for number, row in enumerate(training_rows(part), 1):
                place = f"{part.name}, row {number}"
                for text in texts_of(row):
                    search.look_through(text, place)
                if title := article_title(row):
                    search.see_article(title, place)
                rows += 1
                if time.monotonic() - shown > 0.1:
                    progress.update(task, description=f"{part.name}: {rows:,} rows in all")
                    shown = time.monotonic()
    return rows


def training_rows(part: TextFile | HubDataset) -> Iterator[Mapping[str, Any]]:
    """The rows of a file or a data set with all their columns; of a .txt file, its text in pieces of a mebibyte.

    Raises:
        UserError: if it cannot be read, naming the row.
    """
    if isinstance(part, HubDataset):
        yield from (row for _, row in part.numbered_rows())
    elif part.path.name.lower().endswith(".txt"):
        yield from ({"text": document.text} for document in part.read_once())
    elif part.path.name.lower().endswith(".parquet"):
        yield from _parquet_rows(part.path)
    else:
        yield from parsed_rows(part.path, dict)


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is a damaged parquet file after row {number}: {error}. Fetch it again.") from error


# --- What was found ---


def overlap_table(overlaps: Sequence[ItemOverlap]) -> ReportTable:
    """Of each task, and of all: how many questions overlap, are of an article in the text, or are too short."""
    groups: dict[str, list[ItemOverlap]] = {}
    for each in overlaps:
        groups.setdefault(f"{each.item.suite}: {each.item.task}".removesuffix(": "), []).append(each)
    if len(groups) > 1:
        groups["all"] = list(overlaps)
    rows = [
        [
            name,
            str(len(some)),
            _share([each.overlaps for each in some]),
            _share([each.article_place is not None for each in some if each.item.article]),
            _share([not each.columns for each in some]),
        ]
        for name, some in groups.items()
    ]
    return ReportTable(
        ["task", "items", "overlap", "of an article in the text", "too short to check"], rows, numbers=True
    )


def column_table(overlaps: Sequence[ItemOverlap]) -> ReportTable:
    """Of each column, where it is long enough: in how many questions it overlaps, and how much of it was found."""
    found: dict[str, list[float]] = {}
    for each in overlaps:
        for name, share in each.columns.items():
            found.setdefault(f"{each.item.suite}: {name}", []).append(share)
    rows = [
        [name, _share([share > 0 for share in shares]), f"{sum(shares) / len(shares):.1%}"]
        for name, shares in found.items()
    ]
    return ReportTable(["column", "overlap", "n-grams found"], rows, numbers=True)


def _share(flags: Sequence[bool]) -> str:
    return f"{sum(flags)} of {len(flags)} ({sum(flags) / len(flags):.1%})" if flags else _NOTHING


def figures_without(
    figures: Sequence[Figure], items: Sequence[Item], overlaps: Sequence[ItemOverlap]
) -> tuple[list[FigureWithout], int]:
    """A run's figures with and without what the training text has.

    Args:
        figures, items: of the run.
        overlaps: of the suites' questions.

    Returns:
        The figures, and how many could not be taken apart: those with an outcome of no known question.
    """
    known = {each.item.key: each for each in overlaps}
    by_figure = FigureItems(items)
    result, unknown = [], 0
    for figure in figures:
        found = by_figure.of(figure)
        questions = [known.get(_question_key(item, known)) for item in found[0]] if found else []
        if not found or None in questions:
            unknown += 1
            continue
        pairs = list(zip(found[0], [each for each in questions if each]))
        result.append(
            FigureWithout(
                figure,
                clean=_figure_of(figure, found[1], pairs, lambda each: not each.overlaps),
                other_articles=_figure_of(figure, found[1], pairs, lambda each: each.article_place is None),
            )
        )
    return result, unknown


def _question_key(item: Item, known: Mapping[tuple[str, str, str], ItemOverlap]) -> tuple[str, str, str]:
    """A task's name has the metric behind it in `FigureItems`; an id may have a part of the question behind it."""
    task = item.task.removesuffix(f" {item.metric}")
    judged = (item.suite, "", item.id.partition(" turn ")[0])
    return judged if judged in known else (item.suite, task, item.id.partition(".")[0])


def _figure_of(
    figure: Figure,
    weights: Mapping[str, float] | None,
    pairs: Sequence[tuple[Item, ItemOverlap]],
    keep: Callable[[ItemOverlap], bool],
) -> Figure | None:
    return mean_figure(
        [item for item, overlap in pairs if keep(overlap)],
        suite=figure.suite,
        name=figure.name,
        metric=figure.metric,
        weights=weights,
        higher_is_better=figure.higher_is_better,
    )


def figures_table_without(figures: Sequence[FigureWithout]) -> ReportTable:
    """The figures of a run beside what is left of them."""
    rows = [
        [
            f"{each.figure.suite}: {each.figure.name} ({each.figure.metric})",
            *map(_value, (each.figure, each.clean, each.other_articles)),
        ]
        for each in figures
    ]
    return ReportTable(["figure", "all", "without overlap", "of other articles"], rows)


def _value(figure: Figure | None) -> str:
    return f"{figure.value:.4f} [{figure.low:.4f}–{figure.high:.4f}] n={figure.items}" if figure else _NOTHING


def _write(
    out: Path,
    sections: Sequence[tuple[str, ReportTable]],
    notes: Sequence[str],
    overlaps: Sequence[ItemOverlap],
    figures: Sequence[FigureWithout],
) -> None:
    with new_folder(out) as folder:
        tables = [f"## {title}\n\n{table.markdown()}" for title, table in sections]
        text = "\n\n".join([*tables, "## Notes\n\n" + "\n".join(f"- {note}" for note in notes)])
        (folder / "report.md").write_text(text + "\n", encoding="utf-8")
        report = {"notes": list(notes), "figures": [asdict(each) for each in figures]}
        (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
            for each in overlaps:
                suite, task, id_ = each.item.key
                found = {"columns": each.columns, "place": each.place, "article": each.item.article}
                row = {"suite": suite, "task": task, "id": id_, **found, "article_place": each.article_place}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
