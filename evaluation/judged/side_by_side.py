# SPDX-License-Identifier: Apache-2.0
"""`jai eval pairwise`: two files of answers to the same questions, compared by a judge in both orders."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from jai.errors import UserError
from jai.evaluation.data import parsed_rows
from jai.evaluation.endpoint import EndpointClient
from jai.evaluation.figure_table import print_figures
from jai.evaluation.judged.answers import ChatAnswers, chat_answers
from jai.evaluation.judged.command import REPLIES_FILE, JudgedPlan, plan_judged
from jai.evaluation.judged.judging import (
    Judgement,
    judge_cases,
    judge_name_notes,
    judge_names,
    judgement_notes,
    refuse_unjudged,
)
from jai.evaluation.judged.options import PairwiseOptions
from jai.evaluation.judged.pairwise import (
    COMPARISON_PROMPTS,
    AnswerPair,
    comparison_cases,
    pair_answers,
    pairwise_figures,
    pairwise_items,
)
from jai.evaluation.judged.prompts import prompts_hash
from jai.evaluation.judged.questions import questions_hash
from jai.evaluation.reply_cache import ReplyCache
from jai.evaluation.results import EvaluationRun, TaskRecord, open_run
from jai.evaluation.suites import JudgedSuite, read_suite
from jai.files import sha256
from jai.provenance import versions

_VERSION = "1"


def compare_answers(options: PairwiseOptions, *, console: Console | None = None) -> EvaluationRun:
    """Compare two files of answers.

    Args:
        options: of the command line.
        console: where to print; None is standard output.

    Returns:
        The run: the win rate of the first file's model, with its interval, and what the judge's places are worth.

    Raises:
        UserError: if a file is malformed, the two have no question in common, or the judge cannot be asked; what came
            is kept.
    """
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    options.check()
    plan = _plan(options)
    first, second = (_read_answers(path) for path in (options.first, options.second))
    pairs = pair_answers(plan.chats, first, second)
    if not pairs:
        raise UserError(
            f"{options.first} and {options.second} have no answers to the same questions of {plan.data}. Give the "
            "answers of two runs of one suite."
        )
    name, revision = _names(options.first, options.second)
    name_of_suite = f"{plan.suite.name}-pairwise"
    conditions = {"limit": options.limit, "judge": options.judge_model, "repeats": options.repeats}
    with open_run(options.folder, model=name, revision=revision, conditions=conditions) as run:
        run.results.versions = versions("openai")
        run.results.seeds = {"bootstrap": options.seed}
        judge = EndpointClient(options.endpoint_of_judge(), ReplyCache(run.folder / REPLIES_FILE), console=console)
        cases = [case for pair in pairs for case in comparison_cases(pair)]
        parameters = options.parameters_of_judge()
        judgements = judge_cases(cases, judge, parameters=parameters, repeats=options.repeats)
        items = pairwise_items(name_of_suite, pairs, judgements)
        figures = pairwise_figures(name_of_suite, items, options.seed)
        run.replace_items(name_of_suite, items)
        run.replace_figures(name_of_suite, figures)
        run.replace_notes(name_of_suite, _notes(plan, pairs, judgements, judge))
        for task in dict.fromkeys(item.task for item in items):
            run.replace_task(
                TaskRecord(
                    suite=name_of_suite,
                    task=task,
                    version=_VERSION,
                    prompt_hash=questions_hash(plan.chats),
                    data=plan.data,
                    judge=judge.endpoint.model,
                    judge_names=judge_names(judge),
                    judge_prompt_hash=prompts_hash(COMPARISON_PROMPTS),
                    judge_parameters=parameters,
                )
            )
        run.save()
        refuse_unjudged(name_of_suite, figures, judgement_notes(judgements), run.folder)
        run.finish()
    say(f"  Judge: {judge.summary()}")
    print_figures(f"{options.first} against {options.second}", figures, console)
    for note in run.results.notes:
        say(f"  {note}")
    say(f"The run is in {run.folder}; its items.jsonl has each comparison with what the judge said.")
    return run


def _plan(options: PairwiseOptions) -> JudgedPlan:
    suite = read_suite(options.suite)
    if not isinstance(suite, JudgedSuite) or suite.judged != "mt-bench":
        raise UserError(f"The suite {options.suite} has no conversations to compare. Give one such as mt-bench-th.")
    return plan_judged(suite, data=options.data, limit=options.limit)


def _read_answers(path: Path) -> list[ChatAnswers]:
    return list(parsed_rows(path, chat_answers))


def _names(first: Path, second: Path) -> tuple[str, str]:
    return f"{first} against {second}", f"{sha256(first)} {sha256(second)}"


def _notes(
    plan: JudgedPlan, pairs: Sequence[AnswerPair], judgements: Sequence[Judgement], judge: EndpointClient
) -> list[str]:
    asked = sum(len(question.turns) for question in plan.chats)
    notes = judge_name_notes(judge)
    if missing := asked - len(pairs):
        notes.append(f"{missing:,} of {asked:,} turns lack an answer in one of the files and were not compared.")
    return [*notes, *judgement_notes(judgements)]
