# SPDX-License-Identifier: Apache-2.0
"""A suite measured by lm-eval: outcomes of items from its samples, and figures from these."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate

from jai.errors import UserError
from jai.evaluation.consistency import CONSISTENCY_METRICS, ParallelAnswers, parallel_answers
from jai.evaluation.kept_answers import KeptAnswers
from jai.evaluation.results import EvaluationRun, Figure, FigurePart, Item, TaskRecord, mean_figure, value_of_items
from jai.evaluation.suites import Suite, SuiteMean, SuitePair, SuiteTask
from jai.evaluation.tasks import TaskLoader
from jai.evaluation.translation import BLEU_COUNTS

if TYPE_CHECKING:
    from lm_eval.api.task import Task

_NO_SCORE = -1.0  # of lm-eval's RULER, for the lengths that an item does not have


@dataclass(frozen=True)
class SuitePlan:
    """A suite with its tasks loaded.

    Attributes:
        suite: the suite.
        tasks: the tasks of each row, by its label.
    """

    suite: Suite
    tasks: Mapping[str, Sequence["Task"]]

    @property
    def task_count(self) -> int:
        """How many tasks all rows have."""
        return sum(map(len, self.tasks.values()))


def plan_suite(suite: Suite, loader: TaskLoader) -> SuitePlan:
    """Load a suite's tasks with their data.

    Raises:
        UserError: as `TaskLoader.load`; if two rows have a task in common, or a task lacks a metric or a filter.
    """
    tasks: dict[str, list[Task]] = {}
    owners: dict[str, str] = {}
    for row in suite.tasks:
        tasks[row.label] = loader.load(row.task, shots=row.shots, settings=row.settings)
        for task in tasks[row.label]:
            other = owners.setdefault(task.task_name, row.label)
            if other != row.label:
                raise UserError(f"In {suite.name}, the rows {other!r} and {row.label!r} have {task.task_name!r} both.")
            _check_row(row, task)
    return SuitePlan(suite, tasks)


def _check_row(row: SuiteTask, task: "Task") -> None:
    """Refuse what a task does not have, as far as that is known before the model has answered for hours.

    Raises:
        UserError: naming what it has.
    """
    filters = [each.name for each in task._filters]
    if row.filter is not None and row.filter not in filters:
        raise UserError(f"The task {task.task_name} has no filter {row.filter!r}. It has: {', '.join(filters)}.")
    # A function of a metric may give several by other names, as that of code does: those of choices do not.
    makes_its_own = (
        task.OUTPUT_TYPE != "multiple_choice"
        or task.config.process_results
        or type(task).process_results is not ConfigurableTask.process_results
    )
    known = task.aggregation()
    for metric in row.metrics if not makes_its_own else ():
        if metric not in known:
            raise UserError(f"The task {task.task_name} has no metric {metric!r}. It has: {', '.join(sorted(known))}.")


def measure_suite(
    plan: SuitePlan,
    model: KeptAnswers,
    run: EvaluationRun,
    *,
    limit: int | None,
    seed: int,
    tell: Callable[[str], None],
) -> list[Figure]:
    """Ask a suite's questions, keep the outcomes, and set the suite's figures.

    Args:
        plan: the suite.
        model: what answers.
        run: where outcomes go.
        limit: questions of each task, None for all.
        seed: of sampling and of the intervals.
        tell: called with the name of each task as it begins.

    Returns:
        The figures.

    Raises:
        UserError: if a task does not give what the suite takes of it.
    """
    suite = plan.suite
    higher: dict[tuple[str, str], bool] = {}
    for row in suite.tasks:
        for task in plan.tasks[row.label]:
            tell(task.task_name)
            higher |= _measure_task(suite, row, task, model, run, limit=limit, seed=seed)
            run.save()
    for pair in suite.pairs:
        answers = _parallel_answers(plan, pair, run)
        run.add(answers.items(pair.name))
        if answers.unpaired:
            _note(run, f"{suite.name}, {pair.name}: {answers.unpaired} questions have an outcome in one language only.")
    figures = [*_figures(plan, run, higher, seed), *_consistency_figures(suite, run, seed)]
    run.replace_figures(suite.name, figures)
    run.save()
    return figures


def _measure_task(
    suite: Suite,
    row: SuiteTask,
    task: "Task",
    model: KeptAnswers,
    run: EvaluationRun,
    *,
    limit: int | None,
    seed: int,
) -> dict[tuple[str, str], bool]:
    from transformers import set_seed

    set_seed(seed)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # as lm-eval's command line does
    model.too_long.clear()
    _fit_answers(task, model, run)
    name = task.task_name
    asked = _first_of_each_length(suite, task, limit)
    results = evaluate(
        lm=model,
        task_dict={"tasks": {name: task}},
        limit=limit if asked is None else None,
        samples=None if asked is None else {name: asked},
        bootstrap_iters=0,
        apply_chat_template=suite.chat,
        fewshot_as_multiturn=suite.chat,
        confirm_run_unsafe_code=suite.runs_code,
    )
    found = results["samples"][name]
    reading = row.filter or (found[0]["filter"] if found else "none")
    samples = [sample for sample in found if sample["filter"] == reading]
    _begin_record(run, _record(suite, row, task, reading, samples))
    for metric in row.metrics:
        scored = [sample for sample in samples if metric in sample]
        if not scored:
            raise UserError(f"The task {name} has no metric {metric!r}. It has: {', '.join(_metrics(samples))}.")
        items = [item for sample in scored for item in _items(suite, row, name, metric, sample)]
        _check_figure(items, row.scale, name, metric, results["results"][name].get(f"{metric},{reading}"))
        run.add(items)
    if count := model.too_long[name]:
        _note(run, f"{name}: requests that are longer than the model takes and lost their beginning: {count}.")
    if task.OUTPUT_TYPE == "multiple_choice" and (count := sum(map(_has_equal_choices, samples))):
        _note(run, f"{name}: questions with two choices alike, of which the first counts as chosen: {count}.")
    if row.task == name:  # the tasks of a group may each take their part of the same data
        _note_left_out(task, run)
    higher = results["higher_is_better"].get(name, {})
    return {(name, metric): higher.get(metric) is not False for metric in row.metrics}


def _first_of_each_length(suite: Suite, task: "Task", limit: int | None) -> list[int] | None:
    """Numbers of the questions that a limit leaves of a task of long contexts, whose questions come by their lengths;
    None for other tasks, of which lm-eval itself takes the first."""
    if limit is None or "max_seq_lengths" not in (suite.metadata or {}):
        return None
    numbers: dict[int, list[int]] = {}
    for number, doc in enumerate(task.eval_docs):
        numbers.setdefault(doc["max_length"], []).append(number)
    return sorted(number for of_length in numbers.values() for number in of_length[:limit])


def _fit_answers(task: "Task", model: KeptAnswers, run: EvaluationRun) -> None:
    """Let answers take half of what the model takes in all, where the task would let them take everything."""
    wanted = (task.config.generation_kwargs or {}).get("max_gen_toks")
    length = getattr(model.lm, "max_length", None)
    if wanted is not None and length is not None and wanted >= length:
        room = length // 2
        task.set_config("generation_kwargs", {"max_gen_toks": room}, update=True)
        _note(
            run,
            f"{task.task_name}: answers end after {room} tokens, where the task gives them {wanted}: the model takes "
            f"{length} in all.",
        )


def _parallel_answers(plan: SuitePlan, pair: SuitePair, run: EvaluationRun) -> ParallelAnswers:
    def answers(label: str) -> list[tuple[Item, Mapping[str, Any]]]:
        (task,) = plan.tasks[label]
        docs = task.eval_docs
        items = run.of(plan.suite.name, task=task.task_name, metric=pair.metric)
        return [(item, docs[int(item.id)]) for item in items]

    return parallel_answers(answers(pair.english), answers(pair.thai), key=pair.key, same=pair.same)


def _items(suite: Suite, row: SuiteTask, task: str, metric: str, sample: Mapping[str, Any]) -> Iterator[Item]:
    value, name = sample[metric], str(sample["doc_id"])
    group = _group(row, task, sample["doc"])
    parts = value if isinstance(value, list) else [value]
    for number, part in enumerate(parts):
        if part == _NO_SCORE:
            continue
        score, counts = (part.get("score"), part.get(BLEU_COUNTS, ())) if isinstance(part, dict) else (part, ())
        if not isinstance(score, bool | int | float) or not math.isfinite(score):
            raise UserError(
                f"The metric {metric!r} of {task} gives {part!r} for an item; a suite takes a mean of numbers."
            )
        if counts and row.scale != 1:
            raise UserError(f"The metric {metric!r} of {task} is BLEU, from 0 to 1, and takes no scale.")
        yield Item(
            suite.name,
            task,
            f"{name}.{number}" if isinstance(value, list) else name,
            metric,
            float(score) * row.scale,
            group if not isinstance(value, list) or group else f"{task}:{name}",
            _texts(sample),
            tuple(counts),
        )


def _metrics(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({metric for sample in samples for metric in sample["metrics"]})


def _group(row: SuiteTask, task: str, doc: Mapping[str, Any]) -> str | None:
    if row.group_by is None:
        return None
    if row.group_by not in doc:
        raise UserError(f"The task {task} has no column {row.group_by!r} to group by. It has: {', '.join(doc)}.")
    return f"{row.group_by}:{hashlib.sha256(str(doc[row.group_by]).encode()).hexdigest()[:16]}"


def _texts(sample: Mapping[str, Any]) -> dict[str, str]:
    """What was expected and what was answered: of choices, the one with the highest log-likelihood."""
    answers = sample["filtered_resps"]
    if all(isinstance(answer, list | tuple) and len(answer) == 2 for answer in answers):
        choices = [str(arguments[1]).strip() for arguments in sample["arguments"]]
        best = max(range(len(answers)), key=lambda index: answers[index][0])
        target = sample["target"]
        expected = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else str(target)
        return {"expected": expected, "answer": choices[best]}
    return {"expected": str(sample["target"]), "answer": "\n".join(str(each[0]) for each in sample["resps"])}


def _check_figure(items: Sequence[Item], scale: float, task: str, metric: str, theirs: Any) -> None:
    """Refuse a metric that lm-eval does not take the mean of: its figure would be another than lm-eval's."""
    ours = value_of_items(items)
    if ours is None or not isinstance(theirs, int | float):
        return
    if abs(ours - theirs * scale) > 1e-9 * max(1.0, abs(theirs * scale)):
        raise UserError(f"The metric {metric!r} of {task} is not a mean over its items, so a suite cannot take it.")


def _begin_record(run: EvaluationRun, record: TaskRecord) -> None:
    """Write down how a task is measured, before its outcomes are.

    Raises:
        UserError: if the run has outcomes of other questions, as those of other data, or that were scored otherwise.
    """
    for other in run.results.tasks:
        if (other.suite, other.task) != (record.suite, record.task):
            continue
        if other.prompt_hash != record.prompt_hash:
            raise UserError(
                f"{run.folder} has {record.task} with other questions: the data, the shots or the task has changed "
                "since. Give another output folder."
            )
        for name in ("version", "filter", "scale"):
            if (old := getattr(other, name)) != (new := getattr(record, name)):
                raise UserError(
                    f"{run.folder} has {record.task} with another {name}: it was {old} and is {new}. Give another "
                    "output folder."
                )
    run.replace_task(record)
    run.save()


def _record(
    suite: Suite, row: SuiteTask, task: "Task", reading: str, samples: Sequence[Mapping[str, Any]]
) -> TaskRecord:
    asked = json.dumps([sample["arguments"] for sample in samples], ensure_ascii=False, default=str)
    config = task.config
    return TaskRecord(
        suite=suite.name,
        task=task.task_name,
        version=str(task.VERSION),
        prompt_hash=hashlib.sha256(asked.encode()).hexdigest(),
        shots=config.num_fewshot or 0,
        filter=reading,
        scale=row.scale,
        data=" ".join(filter(None, (config.dataset_path, config.dataset_name))),
    )


def _note_left_out(task: "Task", run: EvaluationRun) -> None:
    """Say how many rows a task leaves out of what it is given."""
    config = task.config
    split = config.test_split or config.validation_split
    rows = len(task.dataset[split]) if split and getattr(task, "dataset", None) is not None else 0
    left_out = rows - len(task.eval_docs)
    if left_out > 0:
        _note(run, f"{task.task_name} leaves out {left_out} of the {rows} rows of its data.")


def _has_equal_choices(sample: Mapping[str, Any]) -> bool:
    asked = [(str(context), str(choice)) for context, choice in sample["arguments"]]
    return len(set(asked)) < len(asked)


def _note(run: EvaluationRun, note: str) -> None:
    if note not in run.results.notes:
        run.results.notes.append(note)


# --- Figures ---


def _figures(
    plan: SuitePlan, run: EvaluationRun, higher: Mapping[tuple[str, str], bool], seed: int
) -> Iterator[Figure]:
    """Of each task, of each row with several tasks, and of each mean."""
    figure_of = partial(_figure, plan.suite.name, run, seed)
    for row in plan.suite.tasks:
        tasks = [task.task_name for task in plan.tasks[row.label]]
        for metric in row.metrics:
            is_higher = higher.get((tasks[0], metric), True)
            for task in tasks if len(tasks) > 1 else []:
                yield from figure_of(task, metric, [FigurePart(task, metric)], is_higher)
            weight = 1 / len(tasks) if row.mean == "tasks" else None
            yield from figure_of(row.label, metric, [FigurePart(task, metric, weight) for task in tasks], is_higher)
    for mean in plan.suite.means:
        parts = list(_parts_of_mean(plan, run, mean))
        metric = " / ".join(dict.fromkeys(part.metric for part in parts))
        yield from figure_of(mean.name, metric, parts, True)


def _consistency_figures(suite: Suite, run: EvaluationRun, seed: int) -> Iterator[Figure]:
    for pair in suite.pairs:
        for metric in CONSISTENCY_METRICS:
            parts = [FigurePart(pair.name, metric.name)]
            figures = list(_figure(suite.name, run, seed, pair.name, metric.name, parts, metric.higher_is_better))
            if not figures:
                condition = f"{'right' if metric.given_score else 'wrong'} in {metric.given.capitalize()}"
                _note(run, f"{suite.name}, {pair.name}: no {metric.name}, for no question in both is {condition}.")
            yield from figures


def _parts_of_mean(plan: SuitePlan, run: EvaluationRun, mean: SuiteMean) -> Iterator[FigurePart]:
    rows = plan.suite.rows_of(mean)
    for row in rows:
        metrics = mean.metrics or [row.metric]
        for metric in metrics:
            weights = _weights_in_row(plan, run, row, metric)
            for task, weight in weights.items():
                share = weight / len(metrics) / len(rows)
                yield FigurePart(task, metric, share if mean.over == "tasks" else None)


def _weights_in_row(plan: SuitePlan, run: EvaluationRun, row: SuiteTask, metric: str) -> dict[str, float]:
    """Weights of a row's tasks in its mean, which add up to 1: all the same, or by their items."""
    tasks = [task.task_name for task in plan.tasks[row.label]]
    if row.mean == "tasks":
        return dict.fromkeys(tasks, 1 / len(tasks))
    counts = {
        task: sum(item.score is not None for item in run.of(plan.suite.name, task=task, metric=metric))
        for task in tasks
    }
    return {task: count / max(1, sum(counts.values())) for task, count in counts.items()}


def _figure(
    suite: str,
    run: EvaluationRun,
    seed: int,
    name: str,
    metric: str,
    parts: Sequence[FigurePart],
    higher_is_better: bool,
) -> Iterator[Figure]:
    """The figure of some parts, none where they have no outcomes."""
    items = [
        replace(item, task=f"{part.task} {part.metric}")
        for part in parts
        for item in run.of(suite, task=part.task, metric=part.metric)
    ]
    weights = {f"{part.task} {part.metric}": part.weight for part in parts if part.weight is not None}
    figure = mean_figure(
        items,
        suite=suite,
        name=name,
        metric=metric,
        weights=weights or None,
        higher_is_better=higher_is_better,
        seed=seed,
    )
    if figure is not None:
        yield replace(figure, parts=tuple(parts))
