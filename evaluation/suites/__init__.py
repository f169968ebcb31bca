# SPDX-License-Identifier: Apache-2.0
"""Suites: what is asked, with how many examples, and how the mean is taken. Each is a small YAML file."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from jai.errors import UserError
from jai.options import check_values, option, options_of, read_yaml, refuse_unknown

MeanOver = Literal["items", "tasks"]
CRITERION_NAMES = ("facts", "fluency")
_FOLDER = Path(__file__).parent


@dataclass(kw_only=True)
class SuiteTask:
    """A row of a suite."""

    task: str = option(help="Name of a task, group or tag of lm-eval, or of one of ours.")
    metric: str = option(help="What the row's figure is the mean of.")
    also: list[str] = option([], help="More metrics of the same answers, shown beside.")
    filter: str | None = option(None, help="Which of the task's ways to read an answer; none is its first.")
    shots: int | None = option(None, help="Examples before each question; none leaves it to the task.", at_least=0)
    name: str | None = option(None, help="Of the row; none is the task's.")
    mean: MeanOver = option("items", help="Of a group: over all its items, or over its tasks.")
    group_by: str | None = option(
        None, help="Column of the data; questions with the same value are drawn together for the interval."
    )
    scale: float = option(1.0, help="What scores are multiplied by.", above=0)
    settings: Any = option(None, help="Of the task's YAML, in place of its own.")

    def __post_init__(self) -> None:
        check_values(self)
        _check_mapping("settings", self.settings)

    @property
    def label(self) -> str:
        """Name of the row."""
        return self.name or self.task

    @property
    def metrics(self) -> list[str]:
        """The row's metric, and the others."""
        return [self.metric, *self.also]


@dataclass(kw_only=True)
class SuiteMean:
    """A mean over rows."""

    name: str = option(help="Of the figure.")
    over: MeanOver = option("tasks", help="The rows' means, or all their items.")
    rows: list[str] = option([], help="Labels of the rows; none is all.")
    metrics: list[str] = option([], help="Other metrics than the rows' own; of several, the mean over all.")

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(kw_only=True)
class SuitePair:
    """Two rows with the same questions in two languages, for cross-lingual consistency."""

    name: str = option(help="Of the figures.")
    english: str = option(help="Label of the row in English.")
    thai: str = option(help="Label of the row in Thai.")
    metric: str = option(help="Of both rows; an answer is right where it is 1, wrong where it is 0.")
    key: str | None = option(None, help="Column that a question has the same in both; none is its position.")
    same: str | None = option(None, help="Column that must be the same in both, as proof that they are parallel.")

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(kw_only=True)
class Suite:
    """What is measured together."""

    name: str = option(help="Of the suite; that of its file, where it is not given.")
    title: str = option(help="For people.")
    about: str = option(help="What it measures, and what a reader of its figures must know.")
    language: str | None = option(None, help="th or en; none for several.")
    chat: bool = option(False, help="Whether the questions are asked in the model's chat form.")
    runs_code: bool = option(False, help="Whether it runs what the model writes.")
    metadata: Any = option(None, help="For tasks that make their data, such as RULER's lengths.")
    tasks: list[Any] = option(help="The rows.")
    means: list[Any] = option([], help="Means over rows.")
    pairs: list[Any] = option([], help="Rows with the same questions in two languages.")

    def __post_init__(self) -> None:
        check_values(self)
        _check_mapping("metadata", self.metadata)
        self.tasks = [_entry(SuiteTask, each, f"task {number}") for number, each in enumerate(self.tasks, 1)]
        self.means = [_entry(SuiteMean, each, f"mean {number}") for number, each in enumerate(self.means, 1)]
        self.pairs = [_entry(SuitePair, each, f"pair {number}") for number, each in enumerate(self.pairs, 1)]
        self._check_names()
        self._check_pairs()

    def rows_of(self, mean: SuiteMean) -> list[SuiteTask]:
        """The rows that a mean is over."""
        return [row for row in self.tasks if not mean.rows or row.label in mean.rows]

    def _check_names(self) -> None:
        labels = [row.label for row in self.tasks]
        if not labels:
            raise UserError("it has no tasks.")
        for label in labels:
            if labels.count(label) > 1:
                raise UserError(f"two rows are named {label!r}. Give one of them a name.")
        for mean in self.means:
            for label in mean.rows:
                if label not in labels:
                    raise UserError(f"the mean {mean.name!r} is over {label!r}, which is not a row.")
            for row in self.rows_of(mean):
                if missing := sorted(set(mean.metrics) - set(row.metrics)):
                    raise UserError(
                        f"the mean {mean.name!r} takes {missing[0]!r}, which the row {row.label!r} does not have."
                    )

    def _check_pairs(self) -> None:
        rows = {row.label: row for row in self.tasks}
        for pair in self.pairs:
            for label in (pair.english, pair.thai):
                if label not in rows:
                    raise UserError(f"the pair {pair.name!r} is of {label!r}, which is not a row.")
                if pair.metric not in rows[label].metrics:
                    raise UserError(f"the pair {pair.name!r} takes {pair.metric!r}, which {label!r} does not have.")


@dataclass(kw_only=True)
class JudgedSuite:
    """Questions whose answers a model judges.

    Attributes:
        place: folder of the suite's file.
    """

    name: str = option(help="Of the suite; that of its file, where it is not given.")
    title: str = option(help="For people.")
    about: str = option(help="What it measures, and what a reader of its figures must know.")
    language: str | None = option(None, help="th or en; none for several.")
    judged: Literal["mt-bench", "hall-bench"] = option(
        help="How: answers graded turn by turn from 1 to 10, or found right and fluent or not."
    )
    criteria: list[str] = option([], help="Of hall-bench: facts, fluency or both.")
    file: str = option(help="Name of the questions' file, without .jsonl or .jsonl.gz, in the folder of --data.")
    beside: str | None = option(None, help="File of questions that lies beside the suite's.")
    dataset: str | None = option(None, help="Hub id of the questions.")
    split: str = option("train", help="Of the data set on the Hub.")
    questions: int | None = option(None, help="How many the published set has.", at_least=1)
    place: Path = Path()

    def __post_init__(self) -> None:
        check_values(self)
        if self.judged == "hall-bench" and not self.criteria:
            raise UserError("it has no criteria. Give facts, fluency or both.")
        if self.judged == "mt-bench" and self.criteria:
            raise UserError("criteria are for hall-bench.")
        if unknown := [each for each in self.criteria if each not in CRITERION_NAMES]:
            raise UserError(f"criteria has {unknown[0]!r}; expected some of {', '.join(CRITERION_NAMES)}.")


def suite_names() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def read_suite(name: str) -> Suite | JudgedSuite:
    """A suite by its name, or from a file of one's own.

    Args:
        name: a name, or the path of a YAML file.

    Raises:
        UserError: if there is no such suite, or its file is wrong, naming the file and the key.
    """
    path = _FOLDER / f"{name}.yaml" if name in suite_names() else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"There is no suite {name!r}. Give the path of a YAML file, or one of: {', '.join(suite_names())}."
        )
    content = read_yaml(path)
    try:
        suite = _entry(JudgedSuite if "judged" in content else Suite, {"name": path.stem, **content}, "the suite")
        if isinstance(suite, JudgedSuite):
            suite.place = path.parent
        return suite
    except UserError as error:
        raise UserError(f"In {path}, {error}") from None


def read_suites(names: Sequence[str]) -> list[Suite | JudgedSuite]:
    """Suites, each once.

    Raises:
        UserError: as `read_suite`, and for two suites of one name.
    """
    suites = [read_suite(name) for name in dict.fromkeys(names)]
    found = [suite.name for suite in suites]
    for name in found:
        if found.count(name) > 1:
            raise UserError(f"Two suites are named {name!r}. Give one of them another name.")
    return suites


def _entry(kind: type, content: Any, where: str) -> Any:
    if not isinstance(content, dict):
        raise UserError(f"{where} is {content!r}; expected keys and values.")
    known = options_of(kind)
    refuse_unknown(content.keys(), known.keys(), where)
    for name, each in known.items():
        if each.default is MISSING and name not in content:
            raise UserError(f"{where} lacks {name!r}. {each.info.help}")
    return kind(**content)


def _check_mapping(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name} is {value!r}; expected keys and values.")
