# SPDX-License-Identifier: Apache-2.0
"""Results of evaluations: outcomes of items, figures with their intervals, and the folder of a run.

A run is all that was measured of one model under one set of conditions. Its folder holds `items.jsonl`, a line for each
outcome, written as they come, and `results.json`, which says what was measured, how, and the figures. A run that was
stopped is gone on with: what is in the folder is not measured again.
"""

import dataclasses
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jai.errors import UserError
from jai.evaluation.translation import corpus_bleu
from jai.files import check_is_file, differences, from_json, make_locked_folder, read_json, write_whole

RESULTS_FILE = "results.json"
ITEMS_FILE = "items.jsonl"
_LOCK = "lock"  # the file that `lock_folder` locks; a killed run leaves it behind
LEVEL = 0.95  # of intervals
RESAMPLES = 1000  # the ends of an interval then vary by about 4 % of its width with the seed
_FLIPS = 10_000  # of a paired test: its smallest p is 1e-4
_CHUNK = 2_000_000  # numbers that a bootstrap draws at a time: 16 MB


class ItemKey(NamedTuple):
    """What tells an outcome from others."""

    suite: str
    task: str
    metric: str
    id: str


@dataclass(frozen=True)
class Item:
    """One outcome.

    Attributes:
        suite, task: what it belongs to.
        id: of the question, the same in every run on the same data.
        metric: what the score is, such as "acc".
        score: from 0 to 1, or in the metric's unit; None where none could be had, such as for a verdict that no one can
            read. Figures count these and leave them out.
        group: items of one group stand or fall together, such as questions on one paragraph or one question in two
            languages. It is looked for in all tasks of a figure, so it needs a name that no other group has.
        texts: what a reader wants to see, by name, such as the prompt and the answer.
        bleu_counts: where the score is a sentence's BLEU, what `corpus_bleu` takes the sums of: the figure is the BLEU
            of the whole text, and no mean of scores.
    """

    suite: str
    task: str
    id: str
    metric: str
    score: float | None
    group: str | None = None
    texts: dict[str, str] = field(default_factory=dict)
    bleu_counts: tuple[int, ...] = ()

    @property
    def key(self) -> ItemKey:
        return ItemKey(self.suite, self.task, self.metric, self.id)


@dataclass(frozen=True)
class FigurePart:
    """Outcomes that a figure is made of: those of one task by one metric.

    Attributes:
        task, metric: of the outcomes.
        weight: of their mean in the figure; None where the figure is the mean over all its outcomes.
    """

    task: str
    metric: str
    weight: float | None = None


@dataclass(frozen=True)
class Figure:
    """A number with its interval.

    Attributes:
        suite: what it belongs to.
        name: of the task, or of the mean over several.
        metric: what it is the mean of.
        value: the mean.
        low, high: ends of the interval of `LEVEL`.
        items: how many outcomes it is the mean of.
        unscored: how many more have no score.
        higher_is_better: which way is up.
        parts: what it is made of.
    """

    suite: str
    name: str
    metric: str
    value: float
    low: float
    high: float
    items: int
    unscored: int = 0
    higher_is_better: bool = True
    parts: tuple[FigurePart, ...] = ()


@dataclass(frozen=True)
class PairedDifference:
    """What lies between two runs on the same items, second minus first.

    Attributes:
        value: difference of the figures.
        low, high: ends of its interval of `LEVEL`.
        p_value: share of random swaps of the two runs' outcomes, by group, that set them at least as far apart.
        items: how many outcomes both have.
        unpaired: how many only one has.
    """

    value: float
    low: float
    high: float
    p_value: float
    items: int
    unpaired: int


# --- Means and their intervals ---


@dataclass(frozen=True)
class _Clusters:
    """What is added up of items, by the units that are drawn.

    Attributes:
        sums: (clusters, tasks, numbers).
        combine: a value of (..., numbers) sums.
        strata: the clusters of each set that is drawn from by itself.
        weights: of the tasks' values, (tasks,); None is the value of all items together.
    """

    sums: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]
    strata: list[np.ndarray]
    weights: np.ndarray | None

    def value_of(self, sums: np.ndarray) -> np.ndarray:
        """The value of (..., tasks, numbers) sums; NaN where a task that counts has no item."""
        if self.weights is None:
            return self.combine(sums.sum(-2))
        return (self.combine(sums) * self.weights).sum(-1)

    def value(self) -> float:
        return float(self.value_of(self.sums.sum(0)))

    def interval(self, seed: int) -> tuple[float, float]:
        """Ends of the percentile bootstrap's interval."""
        rng = np.random.default_rng(seed)
        sums = np.zeros((RESAMPLES, *self.sums.shape[1:]))
        for stratum in self.strata:
            size = len(stratum)
            step = max(1, _CHUNK // (size * sums.shape[-1]))
            for begin in range(0, RESAMPLES, step):
                some = slice(begin, min(begin + step, RESAMPLES))
                drawn = stratum[rng.integers(0, size, (some.stop - begin, size))]
                for task in np.flatnonzero(self.sums[stratum[0]].any(-1)):
                    sums[some, task] += self.sums[drawn, task].sum(1)
        tail = (1 - LEVEL) / 2
        low, high = np.nanquantile(self.value_of(sums), [tail, 1 - tail])
        return float(low), float(high)

    def p_value(self, seed: int) -> float:
        """Of the hypothesis that the two halves of a cluster's numbers, two runs', might as well be swapped."""
        rng = np.random.default_rng(seed)
        observed = abs(self.value())
        first, second = np.split(self.sums, 2, axis=-1)
        middle, apart = (first + second).sum(0) / 2, ((second - first) / 2).reshape(len(first), -1)
        at_least, step = 0, max(1, _CHUNK // len(first))
        for begin in range(0, _FLIPS, step):
            signs = rng.integers(0, 2, (min(step, _FLIPS - begin), len(first)), dtype=np.int8) * 2.0 - 1
            moved = (signs @ apart).reshape(-1, *middle.shape)
            swapped = np.concatenate([middle - moved, middle + moved], axis=-1)
            at_least += int((abs(self.value_of(swapped)) >= observed - 1e-12).sum())
        return (at_least + 1) / (_FLIPS + 1)


def _clusters(
    items: Sequence[Item],
    numbers: Sequence[Sequence[float]],
    combine: Callable[[np.ndarray], np.ndarray],
    weights: Mapping[str, float] | None,
) -> _Clusters:
    """Group the items, of each of which some numbers are added up.

    Clusters that lie in the same tasks are a stratum: each task keeps its size when it is drawn.
    """
    tasks = {task: number for number, task in enumerate(weights or dict.fromkeys(item.task for item in items))}
    places: dict[tuple[str, ...], int] = {}
    cluster_of = [
        places.setdefault((item.group,) if item.group is not None else (item.task, item.id), len(places))
        for item in items
    ]
    sums = np.zeros((len(places), len(tasks), len(numbers[0])))
    for item, cluster, each in zip(items, cluster_of, numbers, strict=True):
        sums[cluster, tasks[item.task]] += each
    strata = defaultdict(list)
    for cluster, is_in in enumerate(np.any(sums != 0, axis=-1)):
        if is_in.any():
            strata[tuple(is_in)].append(cluster)
    shares = None if weights is None else np.array(list(weights.values()))
    return _Clusters(sums, combine, [np.array(each) for each in strata.values()], shares)


def _summed(items: Sequence[Item]) -> tuple[list[Sequence[float]], Callable[[np.ndarray], np.ndarray]]:
    """What is added up of items that have a score, and what makes a figure of the sums."""
    are_bleu = {bool(item.bleu_counts) for item in items}
    if are_bleu == {True}:
        return [item.bleu_counts for item in items], _bleu_of_sums
    if are_bleu == {False, True}:
        raise UserError(f"{', '.join(sorted({item.task for item in items}))}: BLEU has no mean with other scores.")
    return [(item.score or 0.0, 1.0) for item in items], _mean_of_sums


def _mean_of_sums(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def _bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    texts = sums.reshape(-1, sums.shape[-1]).tolist()
    return np.array([corpus_bleu(each) for each in texts]).reshape(sums.shape[:-1])


def value_of_items(items: Sequence[Item]) -> float | None:
    """The mean of items, or their BLEU; None where none has a score."""
    scored = [item for item in items if item.score is not None]
    return _clusters(scored, *_summed(scored), None).value() if scored else None


def mean_figure(
    items: Sequence[Item],
    *,
    suite: str,
    name: str,
    metric: str,
    weights: Mapping[str, float] | None = None,
    higher_is_better: bool = True,
    seed: int = 0,
) -> Figure | None:
    """The mean of items, or their BLEU, with the interval of a percentile bootstrap. It draws whole groups, by task.

    Args:
        items: outcomes, each once.
        suite, name, metric, higher_is_better: of the figure.
        weights: the weight of each task's mean; None is the mean over all items, whatever their tasks.
        seed: of the draws.

    Returns:
        The figure, None where no item, or none of a task with a weight, has a score.

    Raises:
        UserError: for BLEU and other scores in one figure.
    """
    scored = [item for item in items if item.score is not None]
    if not scored:
        return None
    clusters = _clusters(scored, *_summed(scored), weights)
    if math.isnan(value := clusters.value()):
        return None
    low, high = clusters.interval(seed)
    parts = tuple(
        FigurePart(task, measured, None if weights is None else weights[task])
        for task, measured in dict.fromkeys((item.task, item.metric) for item in items)
    )
    return Figure(suite, name, metric, value, low, high, len(scored), len(items) - len(scored), higher_is_better, parts)


class FigureItems:
    """The outcomes of a run, to be looked up by the figures that are made of them.

    Args:
        items: of the run.
    """

    def __init__(self, items: Iterable[Item]):
        self._items: dict[tuple[str, str, str], list[Item]] = defaultdict(list)
        for item in items:
            self._items[item.suite, item.task, item.metric].append(item)

    def of(self, figure: Figure) -> tuple[list[Item], dict[str, float] | None] | None:
        """What a figure is the mean of, in the form that `mean_figure` and `paired_difference` take.

        Each part is a task of its own there: a mean may be over several metrics of one task.

        Returns:
            Outcomes and weights; None where the parts are not all of it, as of a mean over some questions of a task.
        """
        items = [
            dataclasses.replace(item, task=f"{part.task} {part.metric}")
            for part in figure.parts
            for item in self._items[figure.suite, part.task, part.metric]
        ]
        if not items or len(items) != figure.items + figure.unscored:
            return None
        weights = {f"{part.task} {part.metric}": part.weight for part in figure.parts if part.weight is not None}
        return items, weights or None


def paired_difference(
    first: Sequence[Item], second: Sequence[Item], *, weights: Mapping[str, float] | None = None, seed: int = 0
) -> PairedDifference | None:
    """Compare two runs item by item.

    Args:
        first, second: outcomes of the same figure in both.
        weights: as of `mean_figure`.
        seed: of the draws.

    Returns:
        The difference over what both have a score for; None where that is nothing.
    """
    mine = {item.key: item for item in first if item.score is not None}
    theirs = {item.key: item for item in second if item.score is not None}
    both = [key for key in theirs if key in mine]
    if not both:
        return None
    before, after = [mine[key] for key in both], [theirs[key] for key in both]
    (old, combine), (new, _) = _summed(before), _summed(after)

    def difference(sums: np.ndarray) -> np.ndarray:
        older, newer = np.split(sums, 2, axis=-1)
        return combine(newer) - combine(older)

    clusters = _clusters(after, [(*a, *b) for a, b in zip(old, new)], difference, weights)
    if math.isnan(value := clusters.value()):
        return None
    low, high = clusters.interval(seed)
    return PairedDifference(value, low, high, clusters.p_value(seed), len(both), len(mine.keys() ^ theirs.keys()))


# --- Runs ---


@dataclass(frozen=True)
class TaskRecord:
    """How a task was measured.

    Attributes:
        suite, task: its names.
        version: of the task's definition.
        prompt_hash: SHA-256 of all that the model was asked, in the order of the items.
        shots: examples before each question.
        filter: which of the task's ways to read an answer.
        scale: what scores were multiplied by.
        data: Hub id, or path, of the questions.
        judge: id of the model that judged, None where none did.
        judge_names: what the judge calls itself in its replies.
        judge_prompt_hash: SHA-256 of what the judge is told.
        judge_parameters: of the judge's sampling.
        answer_tokens: the longest answer that is judged; None where the task itself decides.
    """

    suite: str
    task: str
    version: str
    prompt_hash: str
    shots: int = 0
    filter: str = "none"
    scale: float = 1.0
    data: str = ""
    judge: str | None = None
    judge_names: tuple[str, ...] = ()
    judge_prompt_hash: str | None = None
    judge_parameters: dict[str, Any] | None = None
    answer_tokens: int | None = None


@dataclass
class EvaluationResults:
    """The content of `results.json`.

    Attributes:
        model: folder or Hub id.
        revision: commit of the Hub, or a hash of a folder's weights.
        conditions: all else that decides the outcomes, such as the limit and the backend, as JSON.
        seeds: by what they are for.
        versions: of packages, by name.
        tasks: what was measured.
        figures: the numbers.
        notes: what a reader of the figures must know.
        finished: whether all that was asked for was measured.
    """

    model: str
    revision: str
    conditions: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    tasks: list[TaskRecord] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finished: bool = False


class EvaluationRun:
    """The folder of a run while it is written; `open_run` makes it.

    Attributes:
        folder: where it lies.
        results: what was measured; whoever measures adds to its lists, and `save`s.
        items: outcomes by their keys.
    """

    def __init__(self, folder: Path, results: EvaluationResults, items: Iterable[Item]):
        self.folder = folder
        self.results = results
        self.items = {item.key: item for item in items}

    def add(self, items: Iterable[Item]) -> None:
        """Keep outcomes, on the disk when this returns. One that is there already stays as it is."""
        new = [item for item in items if item.key not in self.items]
        with (self.folder / ITEMS_FILE).open("a", encoding="utf-8") as file:
            file.writelines(_line(item) for item in new)
        self.items.update({item.key: item for item in new})

    def of(self, suite: str, *, task: str | None = None, metric: str | None = None) -> list[Item]:
        """Outcomes of a suite, in the order in which they came; of one task and one metric where these are given."""
        return [
            item
            for item in self.items.values()
            if item.suite == suite and task in (None, item.task) and metric in (None, item.metric)
        ]

    def replace_figures(self, suite: str, figures: Iterable[Figure]) -> None:
        """Set a suite's figures."""
        others = [each for each in self.results.figures if each.suite != suite]
        self.results.figures = [*others, *figures]

    def replace_items(self, suite: str, items: Iterable[Item]) -> None:
        """Set a suite's outcomes, where all of them are found anew from what was asked before."""
        others = {key: item for key, item in self.items.items() if item.suite != suite}
        self.items = others | {item.key: item for item in items}
        write_whole(self.folder / ITEMS_FILE, "".join(map(_line, self.items.values())))

    def replace_notes(self, suite: str, notes: Iterable[str]) -> None:
        """Set what a reader of a suite's figures must know."""
        others = [each for each in self.results.notes if not each.startswith(f"{suite}: ")]
        self.results.notes = [*others, *(f"{suite}: {note}" for note in notes)]

    def replace_task(self, record: TaskRecord) -> None:
        """Set how a task was measured."""
        others = [each for each in self.results.tasks if (each.suite, each.task) != (record.suite, record.task)]
        self.results.tasks = [*others, record]

    def save(self) -> None:
        """Write `results.json`, whole or not at all."""
        content = json.dumps(dataclasses.asdict(self.results), indent=2, ensure_ascii=False)
        write_whole(self.folder / RESULTS_FILE, content + "\n")

    def finish(self) -> None:
        """Order the items, and mark the run as finished: its files are then those of a run that was never stopped."""
        self.items = dict(sorted(self.items.items(), key=lambda pair: _order(pair[0])))
        write_whole(self.folder / ITEMS_FILE, "".join(map(_line, self.items.values())))
        self.results.tasks.sort(key=lambda each: (each.suite, each.task))
        self.results.figures.sort(key=lambda each: each.suite)
        self.results.finished = True
        self.save()


@contextmanager
def open_run(
    folder: Path, *, model: str, revision: str, conditions: Mapping[str, Any] | None = None
) -> Iterator[EvaluationRun]:
    """Begin a run in a folder, or go on with the one that is there. What was added stays, however the block ends.

    Args:
        folder: of the run.
        model, revision, conditions: as of `EvaluationResults`; a run that is there must have the same. A model with the
            same files may have another path.

    Raises:
        UserError: if the folder cannot be written, is being written by another process, holds something else than a
            run, or holds a run of another model or under other conditions.
    """
    if not (folder / RESULTS_FILE).exists() and not _is_free(folder):
        raise UserError(f"{folder} exists already and is not an evaluation. Give another output folder.")
    lock = make_locked_folder(folder)
    try:
        asked = EvaluationResults(model, revision, json.loads(json.dumps(dict(conditions or {}))))
        if (folder / RESULTS_FILE).exists():
            results, items = read_run(folder)
            _refuse_other(folder, results, asked)
            results.model, results.finished = model, False
        else:
            results, items = asked, []
        run = EvaluationRun(folder, results, items)
        run.save()
        for path in folder.glob("*.jsonl"):
            _cut_torn_line(path)
        yield run
    finally:
        (folder / _LOCK).unlink(missing_ok=True)
        os.close(lock)


def read_run(folder: Path) -> tuple[EvaluationResults, list[Item]]:
    """The results and the items of a run; a last line that was cut off when the run was killed is left out.

    Raises:
        UserError: if there is no run, or a file of it is damaged, naming the file and the line.
    """
    path = folder / RESULTS_FILE
    remedy = "Give the folder of a run of `jai eval`."
    content = read_json(path, remedy)
    try:
        results = from_json(EvaluationResults, content)
    except TypeError as error:
        raise UserError(f"{path} is not a record of an evaluation ({error}). {remedy}") from None
    return results, list(_read_items(folder / ITEMS_FILE))


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that is written a line at a time, but for a last one that was cut off; none where it is not
    there.

    Raises:
        UserError: if it is no file.
    """
    if not os.path.lexists(path):
        return []
    check_is_file(path, "Remove it, or the folder.")
    return path.read_bytes().split(b"\n")[:-1]


def _read_items(path: Path) -> Iterator[Item]:
    for number, line in enumerate(whole_lines(path), 1):
        try:
            item = from_json(Item, json.loads(line))
            if item.score is not None and not math.isfinite(item.score):
                raise ValueError(f"the score is {item.score}")
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}, is not an outcome ({error}). Remove the line, or the folder."
            ) from None
        yield item


def _cut_torn_line(path: Path) -> None:
    """Cut off what a killed run wrote of its last line, for the next line to begin on its own."""
    size = sum(len(line) + 1 for line in whole_lines(path))
    if path.stat().st_size > size:
        os.truncate(path, size)


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and all(each.name == _LOCK for each in folder.iterdir()))


def _refuse_other(folder: Path, found: EvaluationResults, asked: EvaluationResults) -> None:
    old, new = ({"model": each.model, "revision": each.revision, **each.conditions} for each in (found, asked))
    if old["revision"] == new["revision"] and "://" not in new["revision"]:  # of files, not of a server's models
        del old["model"], new["model"]
    if changes := sorted(differences(old, new)):
        raise UserError(
            f"{folder} holds another evaluation: {'; '.join(changes[:3])}. Give the same settings to resume it, or "
            "another output folder."
        )


def _line(item: Item) -> str:
    values = {name: value for name, value in dataclasses.asdict(item).items() if value or name == "score"}
    return json.dumps(values, ensure_ascii=False) + "\n"


def _order(key: ItemKey) -> tuple[str, str, str, int, str]:
    """Ids that are numbers in the order of their values."""
    return key.suite, key.task, key.metric, len(key.id), key.id
