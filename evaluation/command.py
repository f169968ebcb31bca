# SPDX-License-Identifier: Apache-2.0
"""`jai eval CKPT`: measure suites on a model, and keep what comes."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jai.errors import UserError
from jai.evaluation.kept_answers import ANSWERS_FILE, KeptAnswers
from jai.evaluation.measure import SuitePlan, measure_suite, plan_suite
from jai.evaluation.models import load_answering_model, revision_of
from jai.evaluation.options import EvalOptions
from jai.evaluation.results import EvaluationRun, Figure, open_run
from jai.evaluation.suites import Suite
from jai.evaluation.tasks import TaskLoader
from jai.files import print_next
from jai.provenance import versions

_PACKAGES = ("lm-eval", "torch", "transformers", "tokenizers", "datasets", "numpy")


def evaluate_suites(options: EvalOptions, suites: list[Suite], *, console: Console | None = None) -> EvaluationRun:
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
        if suite.runs_code and not options.allow_code_execution:
            raise UserError(
                f"The suite {suite.name} runs programs that the model writes. Allow it with --allow-code-execution, on "
                "a machine that has nothing to lose."
            )
    conditions = {
        "backend": options.backend,
        "limit": options.limit,
        "dtype": options.dtype,
        "max_length": options.max_length,
        "seed": options.seed,
    }
    _quiet_bars()
    plans = [plan_suite(suite, _loader(options, suite)) for suite in suites]
    with open_run(options.folder, model=options.model, revision=revision_of(options), conditions=conditions) as run:
        run.results.versions = versions(*_PACKAGES)
        run.results.seeds = {"sampling": options.seed, "bootstrap": options.seed}
        models: dict[bool, KeptAnswers] = {}
        for plan in plans:
            chat = plan.suite.chat if options.backend == "openai" else False
            if chat not in models:
                lm = load_answering_model(options, chat=plan.suite.chat)
                models[chat] = KeptAnswers(lm, run.folder / ANSWERS_FILE, options.batch_size)
            figures = _measure(plan, models[chat], run, options, console)
            _print_figures(plan.suite, figures, console)
        run.finish()
    console.print(f"The run is in {run.folder}.", markup=False, highlight=False, soft_wrap=True)
    print_next(console, ["jai", "eval", "compare", run.folder])
    return run


def _quiet_bars() -> None:
    """There is one bar, ours: `datasets` and `transformers` would show one for each task and each file."""
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()


def _loader(options: EvalOptions, suite: Suite) -> TaskLoader:
    metadata: dict[str, Any] = dict(suite.metadata or {})
    if options.backend != "openai":
        metadata["pretrained"] = options.model  # RULER counts tokens with it
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


def _print_figures(suite: Suite, figures: list[Figure], console: Console) -> None:
    from rich.table import Table

    table = Table("", "metric", "score", "95 %", "items", title=suite.title, title_justify="left", box=None)
    for figure in figures:
        table.add_row(
            figure.name,
            figure.metric,
            f"{figure.value:.4f}",
            f"{figure.low:.4f}–{figure.high:.4f}",
            str(figure.items) + (f" (+{figure.unscored} without a score)" if figure.unscored else ""),
        )
    console.print(table)
