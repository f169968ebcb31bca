# SPDX-License-Identifier: Apache-2.0
"""What was measured of a checkpoint: `evaluation.json` beside the weights, which the model card reads."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from jai.errors import UserError
from jai.evaluation.results import EvaluationResults, Figure
from jai.evaluation.suites import JudgedSuite, Suite
from jai.files import read_json
from jai.options import is_number

EVALUATION_FILE = "evaluation.json"
TOKENS_PER_CHARACTER = "tokens_per_character"


@dataclass(frozen=True)
class Score:
    """One metric on one data set, of a checkpoint and of those that it was made from.

    Attributes:
        metric: identifier of the metric, such as "acc" or "tokens_per_character".
        metric_name: its name for people.
        dataset: Hub id of the data, or a short name of data that is not there.
        dataset_name: its name for people.
        language: "th" or "en" (ISO 639-1); None where it has none.
        higher_is_better: which way is up.
        values: the score of each model by name, `Evaluation.model` among them.
        intervals: the two ends of the score's 95 % interval of each model, where it was measured with one.
    """

    metric: str
    metric_name: str
    dataset: str
    dataset_name: str
    language: str | None
    higher_is_better: bool
    values: dict[str, float]
    intervals: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All that was measured of a checkpoint.

    Attributes:
        model: the name of this checkpoint in the scores.
        models: every model of the scores, in the order in which one was made from the other.
        scores: what was measured.
        router_load: share of each layer's choices that each expert gets, by language, layer and expert.
        router_load_text: the text that this was counted on.
        versions: versions of what measured, by package.
    """

    model: str
    models: list[str]
    scores: list[Score]
    router_load: dict[str, list[list[float]]] = field(default_factory=dict)
    router_load_text: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def results(self) -> list[EvalResult]:
        """This checkpoint's scores in the form of the Hub's model-index."""
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=score.dataset,
                dataset_name=score.dataset_name,
                dataset_config=score.language,
                metric_type=score.metric,
                metric_name=score.metric_name,
                metric_value=round(score.values[self.model], 4),
            )
            for score in self.scores
            if self.model in score.values
        ]


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write what was measured beside the weights."""
    text = json.dumps(dataclasses.asdict(evaluation), indent=2, ensure_ascii=False)
    (folder / EVALUATION_FILE).write_text(text + "\n", encoding="utf-8")


def record_run(folder: Path, results: EvaluationResults, suites: Sequence[Suite | JudgedSuite]) -> None:
    """Write the figures of a run of `jai eval` into the record of the checkpoint that it measured.

    What else is recorded stays; the figures of an earlier run of the same suites are replaced.

    Args:
        folder: of the checkpoint.
        results: of the run.
        suites: what was measured; of each row its figure is taken, and each mean.
    """
    before = read_evaluation(folder)
    model = before.model if before else folder.resolve().name
    new = [score for suite in suites for score in _scores(model, results, suite)]
    replaced = {score.dataset_name for score in new}
    kept = [each for each in (before.scores if before else []) if each.dataset_name not in replaced]
    evaluation = before or Evaluation(model, [model], [])
    versions = {**evaluation.versions, **results.versions}
    write_evaluation(folder, dataclasses.replace(evaluation, scores=[*kept, *new], versions=versions))


def _scores(model: str, results: EvaluationResults, suite: Suite | JudgedSuite) -> Iterator[Score]:
    shown = [figure for figure in results.figures if figure.suite == suite.name and _is_shown(figure, suite)]
    metrics_of = Counter(figure.name for figure in shown)
    for figure in shown:
        said = [suite.title, figure.name, *([figure.metric] if metrics_of[figure.name] > 1 else [])]
        yield Score(
            metric=figure.metric,
            metric_name=", ".join([*said, *_conditions(results, suite)]),
            dataset=_dataset(results, suite, figure),
            dataset_name=suite.title,
            language=suite.language,
            higher_is_better=figure.higher_is_better,
            values={model: figure.value},
            intervals={model: [figure.low, figure.high]},
        )


def _is_shown(figure: Figure, suite: Suite | JudgedSuite) -> bool:
    if isinstance(suite, JudgedSuite):
        return True
    metrics = {row.label: row.metric for row in suite.tasks}
    return figure.name in [each.name for each in (*suite.means, *suite.pairs)] or (
        metrics.get(figure.name) == figure.metric
    )


def _conditions(results: EvaluationResults, suite: Suite | JudgedSuite) -> Iterator[str]:
    """What makes a figure another than that of the whole suite, or of another judge."""
    judges = {record.judge for record in results.tasks if record.suite == suite.name and record.judge is not None}
    yield from (f"judged by {judge}" for judge in sorted(judges))
    if (limit := results.conditions.get("limit")) is not None:
        yield f"the first {limit} questions" + ("" if isinstance(suite, JudgedSuite) else " of each task")


def _dataset(results: EvaluationResults, suite: Suite | JudgedSuite, figure: Figure) -> str:
    """Hub id of a figure's data; the suite's name where it has none, or several."""
    data_of = {record.task: record.data for record in results.tasks if record.suite == suite.name}
    if isinstance(suite, JudgedSuite):
        is_from_hub = suite.dataset is not None and all(data.startswith(suite.dataset) for data in data_of.values())
        return str(suite.dataset) if is_from_hub else suite.name
    task = next((row.task for row in suite.tasks if row.label == figure.name), figure.name)
    data = data_of.get(task, "")
    return data.split()[0] if data else suite.name


def read_evaluation(folder: Path) -> Evaluation | None:
    """What was measured of the checkpoint in a folder, None where there is no record.

    Raises:
        UserError: if the record is damaged.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return None
    content = read_json(path, "Measure again, or remove the file.")
    try:
        evaluation = _parse(content)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(
            f"{path} is not a record of an evaluation ({type(error).__name__}: {error}). Measure again, or remove the "
            "file."
        ) from None
    return evaluation


def _parse(content: Any) -> Evaluation:
    scores = [Score(**score) for score in content["scores"]]
    evaluation = Evaluation(**{**content, "scores": scores})
    for score in scores:
        if not score.values:
            raise ValueError(f"{score.metric} has no values")
        if not set(score.values) <= set(evaluation.models):
            raise ValueError(f"the models of {score.metric} are not all among {evaluation.models}")
        if not all(len(ends) == 2 and all(map(is_number, ends)) for ends in score.intervals.values()):
            raise ValueError(f"the intervals of {score.metric} are not two finite numbers each")
        if not all(is_number(value) for value in score.values.values()):
            raise ValueError(f"{score.metric} has values that are not finite numbers")
    for language, layers in evaluation.router_load.items():
        if not all(is_number(share) and 0 <= share <= 1 for layer in layers for share in layer):
            raise ValueError(f"the router load of {language} has values that are not shares")
        if not layers or len({len(layer) for layer in layers}) != 1:
            raise ValueError(f"the router load of {language} does not have the same experts in each layer")
    return evaluation
