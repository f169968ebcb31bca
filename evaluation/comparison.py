# SPDX-License-Identifier: Apache-2.0
"""Runs beside each other: their figures, what differs between the runs, and tests on the items that both have."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jai.errors import UserError
from jai.evaluation.results import (
    EvaluationResults,
    Figure,
    FigureItems,
    Item,
    PairedDifference,
    TaskRecord,
    paired_difference,
    read_run,
)

_SHOWN_TASKS = 3  # of those that a note is about
_QUESTION_TEXTS = ("question", "expected")  # texts of an item that depend on the question alone
# What makes two outcomes those of different questions or of different graders, and how people call it.
_MEASURE_FIELDS = {
    "version": "version",
    "filter": "filter",
    "scale": "scale",
    "data": "data",
    "judge": "judge",
    "judge_names": "names that the judge gives itself",
    "judge_prompt_hash": "prompts of the judge",
    "judge_parameters": "parameters of the judge",
}
_PROMPT_FIELDS = {
    "shots": "examples before a question",
    "prompt_hash": "prompts",
    "answer_tokens": "longest answer in tokens",
}
_HASHES = ("prompt_hash", "judge_prompt_hash")


@dataclass(frozen=True)
class ComparedRun:
    """A run with a name that no other has.

    Attributes:
        name: its model's, or its folder's where two runs are of models of one name.
        folder: where it lies.
        results: what was measured.
        items: the outcomes by the figures that are made of them.
    """

    name: str
    folder: Path
    results: EvaluationResults
    items: FigureItems

    def figure(self, key: tuple[str, str, str]) -> Figure | None:
        """The figure of that suite, name and metric; None where it was not measured."""
        return next((each for each in self.results.figures if figure_key(each) == key), None)

    def records(self, figure: Figure) -> dict[str, TaskRecord]:
        """How the tasks of a figure were measured; all of its suite where it is of none, as consistency is of two."""
        of_suite = {each.task: each for each in self.results.tasks if each.suite == figure.suite}
        return {task: of_suite[task] for part in figure.parts if (task := part.task) in of_suite} or of_suite


@dataclass(frozen=True)
class ComparedFigure:
    """A figure of several runs.

    Attributes:
        suite, name, metric, higher_is_better: of the figure.
        figures: of each run; None where it was not measured.
        differences: of each run, from the first; None for the first, and where there is no test.
        obstacles: why a run has no test against the first, empty where it has.
    """

    suite: str
    name: str
    metric: str
    higher_is_better: bool
    figures: tuple[Figure | None, ...]
    differences: tuple[PairedDifference | None, ...]
    obstacles: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        runs: at least one.
        rows: all figures that any of them has, in the order in which they come.
        notes: what differs between the runs beside the model, and what they themselves say.
    """

    runs: Sequence[ComparedRun]
    rows: Sequence[ComparedFigure]
    notes: Sequence[str]


def figure_key(figure: Figure) -> tuple[str, str, str]:
    """What tells a figure of a run from its others."""
    return figure.suite, figure.name, figure.metric


def compare_runs(folders: Sequence[Path], *, seed: int = 0) -> Comparison:
    """Put runs beside each other, and test each against the first.

    Args:
        folders: of the runs.
        seed: of the tests.

    Raises:
        UserError: as `read_run`; for a run that is given twice, and where no run has a figure.
    """
    runs = _read_runs(folders)
    keys = list(dict.fromkeys(figure_key(figure) for run in runs for figure in run.results.figures))
    if not keys:
        raise UserError(f"{runs[0].folder} has no figures yet. Let `jai eval` finish it, or give another run.")
    rows = [_row(runs, key, seed) for key in keys]
    return Comparison(runs, rows, [*_condition_notes(runs), *_task_notes(runs), *_notes_of_runs(runs)])


def _read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places):
        if places.count(place) > 1:
            raise UserError(f"The run {folder} is given twice. Give each run once.")
    found = [read_run(folder) for folder in folders]
    models = [results.model.rstrip("/").rpartition("/")[2] for results, _ in found]
    names = [model if models.count(model) == 1 else place.name for model, place in zip(models, places)]
    names = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]
    return [
        ComparedRun(name, folder, results, FigureItems(items))
        for name, folder, (results, items) in zip(names, folders, found)
    ]


def _row(runs: Sequence[ComparedRun], key: tuple[str, str, str], seed: int) -> ComparedFigure:
    figures = [run.figure(key) for run in runs]
    tests = [_test(runs[0], run, key, seed) for run in runs[1:]]
    return ComparedFigure(
        *key,
        higher_is_better=all(figure.higher_is_better for figure in figures if figure),
        figures=tuple(figures),
        differences=(None, *(test if isinstance(test, PairedDifference) else None for test in tests)),
        obstacles=("", *(test if isinstance(test, str) else "" for test in tests)),
    )


def _test(first: ComparedRun, second: ComparedRun, key: tuple[str, str, str], seed: int) -> PairedDifference | str:
    """The difference between two runs, or why there is none."""
    figures = first.figure(key), second.figure(key)
    if figures[0] is None or figures[1] is None:
        return "not measured in both"
    mine, theirs = first.records(figures[0]), second.records(figures[1])
    if mine.keys() != theirs.keys():
        return "other tasks"
    for field, title in _MEASURE_FIELDS.items():
        if any(getattr(mine[task], field) != getattr(theirs[task], field) for task in mine):
            return f"other {title}"
    if not _made_alike(figures[0], figures[1]):
        return "other tasks or weights in the mean"
    found, others = first.items.of(figures[0]), second.items.of(figures[1])
    if found is None or others is None:
        return "its items are not recorded"
    if not _same_questions(found[0], others[0]):
        return "other questions"
    return paired_difference(found[0], others[0], weights=found[1], seed=seed) or "no item in both"


def _made_alike(first: Figure, second: Figure) -> bool:
    """Whether two figures are the same mean of the same parts, as they are not where the suite has changed."""
    mine, theirs = ({(part.task, part.metric): part.weight for part in each.parts} for each in (first, second))
    if mine.keys() != theirs.keys() or any((mine[part] is None) != (theirs[part] is None) for part in mine):
        return False
    # Weights by the number of questions differ where one run has a limit.
    same_items = (first.items, first.unscored) == (second.items, second.unscored)
    return not same_items or all(abs((mine[part] or 0) - (theirs[part] or 0)) < 1e-9 for part in mine)


def _same_questions(first: Sequence[Item], second: Sequence[Item]) -> bool:
    """Whether items with one id are of one question, as far as their texts say."""
    texts = {item.key: item.texts for item in first}
    return all(
        texts[item.key].get(name) == item.texts.get(name)
        for item in second
        if item.key in texts
        for name in _QUESTION_TEXTS
    )


# --- Notes ---


def _condition_notes(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """What decides outcomes and is not the same in all runs."""
    settings = [{**each.results.conditions, **_prefixed("seed of ", each.results.seeds)} for each in runs]
    yield from _differing(runs, settings)
    yield from _differing(runs, [_prefixed("version of ", each.results.versions) for each in runs])


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in values.items()}


def _differing(runs: Sequence[ComparedRun], settings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for name in dict.fromkeys(name for each in settings for name in each):
        values = [each.get(name) for each in settings]
        if any(value != values[0] for value in values):
            yield f"The {name} differs: {_by_run(runs, values)}."


def _by_run(runs: Sequence[ComparedRun], values: Sequence[Any]) -> str:
    return ", ".join(f"{run.name} {_plain(value)}" for run, value in zip(runs, values))


def _plain(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _task_notes(runs: Sequence[ComparedRun]) -> Iterator[str]:
    """How tasks that several runs have were not measured alike; of a suite's tasks that differ alike, one note."""
    tasks: dict[tuple[str, str], list[tuple[ComparedRun, TaskRecord]]] = {}
    for run in runs:
        for record in run.results.tasks:
            tasks.setdefault((record.suite, record.task), []).append((run, record))
    found: dict[tuple[str, str], list[str]] = {}
    for (suite, task), measured in tasks.items():
        for field, title in {**_MEASURE_FIELDS, **_PROMPT_FIELDS}.items():
            values = [getattr(record, field) for _, record in measured]
            if any(value != values[0] for value in values):
                shown = [value[:8] if field in _HASHES and value else value for value in values]
                said = f"{title}: {_by_run([run for run, _ in measured], shown)}"
                # Hashes differ from task to task, and say nothing to a reader but that they differ.
                found.setdefault((suite, title if field in _HASHES else said), []).append(task)
    for (suite, said), names in found.items():
        more = f" and {len(names) - _SHOWN_TASKS} more" if len(names) > _SHOWN_TASKS else ""
        of = f"{', '.join(names[:_SHOWN_TASKS])}{more}"
        verb = "" if ":" in said else " differ: other questions, examples or chat template, or another limit"
        yield f"{suite}, {of}: {said}{verb}."


def _notes_of_runs(runs: Sequence[ComparedRun]) -> Iterator[str]:
    for run in runs:
        if not run.results.finished:
            yield f"{run.name} is not finished: its figures are of what was measured so far."
        yield from (f"{run.name}: {note}" for note in run.results.notes)
