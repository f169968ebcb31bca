# SPDX-License-Identifier: Apache-2.0
"""`jai eval CKPT`: measure suites on a model, and keep what comes."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jai.errors import UserError
from jai.evaluation.figure_table import print_figures
from jai.evaluation.judged.command import JudgedPlan, measure_judged, plan_judged
from jai.evaluation.kept_answers import ANSWERS_FILE, KeptAnswers
from jai.evaluation.measure import SuitePlan, measure_suite, plan_suite
from jai.evaluation.models import check_chat_template, load_answering_model, revision_of
from jai.evaluation.options import EvalOptions
from jai.evaluation.progress import quiet_libraries
from jai.evaluation.results import EvaluationRun, Figure, open_run
from jai.evaluation.suites import JudgedSuite, Suite
from jai.evaluation.tasks import TaskLoader
from jai.files import print_next
from jai.provenance import versions

_PACKAGES = ("lm-eval", "torch", "transformers", "tokenizers", "datasets", "numpy")


def evaluate_suites(
    options: EvalOptions, suites: list[Suite | JudgedSuite], *, console: Console | None = None
) -> EvaluationRun:
    """Measure suites on a model; what a run in the same folder has measured already is taken from there.

    Args:
        options: of the command line.
        suites: what to measure.
        console: where to print; None is standard output.

    Returns:
        The run.

    Raises:
        UserError: if a suite may not run, or its tasks, its data or the model cannot be had. What was measured before
            that stays.
    """
    console = console or Console()
    for suite in suites:
        if isinstance(suite, Suite) and suite.runs_code and not options.allow_code_execution:
            raise UserError(
                f"The suite {suite.name} runs programs that the model writes. Allow it with --allow-code-execution, on "
                "a machine that has nothing to lose."
            )
    if any(isinstance(suite, Suite) and suite.runs_code for suite in suites):
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # else the metric of lm-eval's HumanEval and MBPP runs nothing
    chats = [suite.name for suite in suites if isinstance(suite, JudgedSuite) or suite.chat]
    if chats:
        check_chat_template(options)
    if chats and options.backend == "openai" and options.max_length is not None:
        raise UserError(
            f"--max-length does nothing for {chats[0]}: a server's chats are cut by the server. Leave it out."
        )
    conditions = {
        "backend": options.backend,
        "limit": options.limit,
        "dtype": options.dtype,
        "max_length": options.max_length,
        "seed": options.seed,
    }
    quiet_libraries()
    plans = [
        plan_judged(suite, data=options.data, limit=options.limit)
        if isinstance(suite, JudgedSuite)
        else plan_suite(suite, _loader(options, suite))
        for suite in suites
    ]
    with open_run(options.folder, model=options.model, revision=revision_of(options), conditions=conditions) as run:
        run.results.versions = versions(*_PACKAGES)
        run.results.seeds = {"sampling": options.seed, "bootstrap": options.seed}
        models = _Models(options, run.folder)
        for plan in plans:
            if isinstance(plan, JudgedPlan):
                figures = measure_judged(plan, run, options, lambda: models.load(chat=True), console)
            else:
                figures = _measure(plan, models.load(chat=plan.suite.chat), run, options, console)
            print_figures(plan.suite.title, figures, console)
        run.finish()
    for note in run.results.notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"The run is in {run.folder}.", markup=False, highlight=False, soft_wrap=True)
    print_next(console, ["jai", "eval", "compare", run.folder])
    return run


class _Models:
    """What answers, loaded when it is first asked."""

    def __init__(self, options: EvalOptions, folder: Path):
        self._options = options
        self._folder = folder
        self._loaded: dict[bool, KeptAnswers] = {}

    def load(self, *, chat: bool) -> KeptAnswers:
        """The model; a server has another address for chats, a checkpoint is the same."""
        key = chat and self._options.backend == "openai"
        if key not in self._loaded:
            lm = load_answering_model(self._options, chat=chat)
            self._loaded[key] = KeptAnswers(lm, self._folder / ANSWERS_FILE, self._options.batch_size)
        return self._loaded[key]


def _loader(options: EvalOptions, suite: Suite) -> TaskLoader:
    metadata: dict[str, Any] = dict(suite.metadata or {})
    if options.backend != "openai":
        metadata["pretrained"] = options.model  # what long contexts are counted with
    if options.data is not None:
        metadata["haystack_folder"] = str(options.data)
    if options.tokenizer is not None:
        metadata["tokenizer"] = options.tokenizer
    return TaskLoader(include_path=options.include_path, data=options.data, metadata=metadata)


def _measure(
    plan: SuitePlan, model: KeptAnswers, run: EvaluationRun, options: EvalOptions, console: Console
) -> list[Figure]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        overall = progress.add_task(plan.suite.title, total=plan.task_count)
        current = progress.add_task("", total=None)

        def begin(task: str) -> None:
            if progress.tasks[current].description:
                progress.advance(overall)
            progress.reset(current, description=task, total=None)

        model.tell = lambda done, total: progress.update(current, completed=done, total=total)
        return measure_suite(plan, model, run, limit=options.limit, seed=options.seed, tell=begin)
