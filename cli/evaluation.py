# SPDX-License-Identifier: Apache-2.0
"""`jai eval`: a group of verbs, in which a first word that is no verb is the checkpoint to measure."""

import os
from pathlib import Path
from typing import Any

import typer

from jai.cli.verb import PlainGroup, verb
from jai.errors import UserError
from jai.evaluation.judged.options import PairwiseOptions
from jai.evaluation.options import CompareOptions, ContaminationOptions, EvalOptions, LanguageOptions
from jai.evaluation.suites import JudgedSuite, read_suite, read_suites, suite_names
from jai.tokenization.corpus import open_sources

_MEASURE = "run"


class _EvalGroup(PlainGroup):
    """Takes `jai eval CKPT …` for `jai eval run CKPT …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = [_MEASURE, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        _refuse_several_processes()
        return super().invoke(ctx)


def _refuse_several_processes() -> None:
    """Refuse a launcher's processes: each would measure all, and all but one would find the run's folder taken."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdecimal() and int(count) > 1:
        raise UserError(
            f"`jai eval` runs in one process, and a launcher has started {count} (WORLD_SIZE). Start it without the "
            "launcher: --parallelize spreads a model over all GPUs, and runs with other suites may go side by side, "
            "each with its --device and --out."
        )


app = typer.Typer(
    cls=_EvalGroup, no_args_is_help=True, help="Evaluate checkpoints: jai eval CKPT is jai eval run CKPT."
)


@verb(
    app,
    EvalOptions,
    name=_MEASURE,
    group=("eval",),
    config="eval.yaml",
    examples=(
        "jai eval sft --suite thai-exam thai-nlu --card",
        "jai eval sft --suite mt-bench-th --judge-model gpt-4o-2024-08-06 \\\n"
        "    --judge-url https://api.openai.com/v1",
        "jai eval sft     # lists the suites",
    ),
)
def evaluate(options: EvalOptions) -> None:
    """Run suites of tasks on a checkpoint, with error bars.

    If interrupted, run the same command again to resume."""
    suites = read_suites(options.suite)
    if not suites:
        _list_suites()
        return
    if any(isinstance(suite, JudgedSuite) for suite in suites):
        options.check_judge()
    options.check()
    # tqdm reads it when it is imported; lm-eval shows a bar for each task, and there is one of ours.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from jai.evaluation.command import evaluate_suites

    run = evaluate_suites(options, suites)
    if options.card:
        from jai.hub_card.evaluation import record_run  # numpy and the Hub's client

        record_run(Path(options.model), run.results, suites)


@verb(
    app,
    CompareOptions,
    group=("eval",),
    examples=("jai eval compare eval/sft eval/dpo --paper --figure compared.png",),
)
def compare(options: CompareOptions) -> None:
    """Compare runs with each other and with the papers' results.

    Each run is tested against the first, on the items they share. Differences in their settings are reported."""
    options.check()
    from jai.evaluation.comparison_report import report_comparison

    report_comparison(options)


@verb(
    app,
    ContaminationOptions,
    group=("eval",),
    examples=("jai eval contamination corpus.jsonl.gz --suite thai-exam --run eval/sft",),
)
def contamination(options: ContaminationOptions) -> None:
    """Find evaluation questions that occur in training data.

    Searches by n-grams, and by Wikipedia article where rows have a title or URL."""
    options.check()
    suites = read_suites(options.suite)
    sources = open_sources(options.texts)
    from jai.evaluation.contamination_report import report_contamination

    report_contamination(options, suites, sources)


@verb(
    app,
    PairwiseOptions,
    group=("eval",),
    examples=(
        "jai eval pairwise eval/dpo/answers-mt-bench-th.jsonl \\\n"
        "    eval/sft/answers-mt-bench-th.jsonl --judge-model gpt-4o-2024-08-06 \\\n"
        "    --judge-url https://api.openai.com/v1",
    ),
)
def pairwise(options: PairwiseOptions) -> None:
    """Let a judge compare two models' answers, in both orders.

    If interrupted, run the same command again to resume."""
    options.check()
    from jai.evaluation.judged.side_by_side import compare_answers

    compare_answers(options)


@verb(
    app,
    LanguageOptions,
    group=("eval",),
    examples=("jai eval language replies.jsonl --language th",),
)
def language(options: LanguageOptions) -> None:
    """Measure how often replies are in the right language.

    Reports language accuracy and think accuracy, which docs/evaluation.md defines."""
    options.check()
    from jai.evaluation.generations import report_language

    report_language(options)


def _list_suites() -> None:
    typer.echo("Give one or more with --suite:\n")
    for name in suite_names():
        suite = read_suite(name)
        typer.echo(f"{name:<22} {suite.title}")
