# SPDX-License-Identifier: Apache-2.0
"""Judged suites of `jai eval`: their questions found, answered, judged, and put into the run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jai.errors import UserError
from jai.evaluation.data import parsed_rows, rows_file
from jai.evaluation.endpoint import Endpoint, EndpointClient
from jai.evaluation.judged.answers import Asker, write_answers
from jai.evaluation.judged.checkpoint import CheckpointAsker
from jai.evaluation.judged.hall_bench import criterion_cases
from jai.evaluation.judged.judging import Case, judge_name_notes, judge_names, refuse_unjudged, requests_of
from jai.evaluation.judged.measure import Judge, JudgedOutcome, measure_hall_bench, measure_mt_bench
from jai.evaluation.judged.mt_bench import grading_cases
from jai.evaluation.judged.questions import ChatQuestion, FactQuestion, chat_question, check_questions, fact_question
from jai.evaluation.kept_answers import KeptAnswers
from jai.evaluation.options import EvalOptions
from jai.evaluation.reply_cache import ChatRequest, ReplyCache
from jai.evaluation.results import EvaluationRun, Figure, TaskRecord
from jai.evaluation.suites import JudgedSuite

if TYPE_CHECKING:
    from rich.console import Console

REPLIES_FILE = "replies.sqlite"  # of judges and of answering endpoints
AnyQuestion = TypeVar("AnyQuestion", ChatQuestion, FactQuestion)
_VERSION = "1"  # of the judged suites: how they are asked, judged and counted


@dataclass(frozen=True)
class JudgedPlan:
    """A judged suite with its questions.

    Attributes:
        suite: the suite.
        data: where the questions come from: a file's name, or a Hub id and a split.
        chats, facts: the questions; one of the two is empty.
    """

    suite: JudgedSuite
    data: str
    chats: Sequence[ChatQuestion] = ()
    facts: Sequence[FactQuestion] = ()

    @property
    def questions(self) -> Sequence[ChatQuestion | FactQuestion]:
        return self.chats or self.facts


def plan_judged(suite: JudgedSuite, *, data: Path | None, limit: int | None) -> JudgedPlan:
    """Find and read a suite's questions: in a folder, beside the suite's file, or on the Hub.

    Args:
        suite: the suite.
        data: the folder of --data.
        limit: how many of the first questions; None is all.

    Raises:
        UserError: if there are none, or one is malformed, naming the file and the line.
    """
    path = rows_file(data / suite.file) if data else None
    if path is None and suite.beside:
        path = suite.place / suite.beside
    if suite.judged == "mt-bench":
        source, chats = _read(suite, path, chat_question)
        return JudgedPlan(suite, source, chats=chats[:limit])
    source, facts = _read(suite, path, fact_question)
    return JudgedPlan(suite, source, facts=facts[:limit])


def _read(
    suite: JudgedSuite, path: Path | None, parse: Callable[[Mapping[str, Any]], AnyQuestion]
) -> tuple[str, list[AnyQuestion]]:
    if path is not None:
        place, questions = path.name, list(parsed_rows(path, parse))
    elif suite.dataset is not None:
        place = f"{suite.dataset}, split {suite.split}"
        questions = [_parsed(f"{place}, row {number}", row, parse) for number, row in enumerate(_hub_rows(suite), 1)]
    else:
        raise UserError(
            f"The questions of {suite.name} are not published. Put yours into a folder, in a file {suite.file}.jsonl, "
            "and give the folder with --data."
        )
    check_questions(questions, str(path or place))
    return place, questions


def _parsed(place: str, row: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], AnyQuestion]) -> AnyQuestion:
    try:
        return parse(row)
    except ValueError as error:
        raise UserError(f"{place}, is not a question ({error}). Give a file of your own with --data.") from None


def _hub_rows(suite: JudgedSuite) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(str(suite.dataset), split=suite.split)
    except Exception as error:  # of many kinds: the network's, the Hub's, the data set's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"The questions of {suite.name} cannot be had from the Hub ({suite.dataset}): {reason} Check the network, "
            f"or put a file {suite.file}.jsonl into a folder and give that with --data."
        ) from error


def measure_judged(
    plan: JudgedPlan,
    run: EvaluationRun,
    options: EvalOptions,
    load_model: Callable[[], KeptAnswers],
    console: "Console",
) -> list[Figure]:
    """Have a suite's questions answered and judged, and set its outcomes and figures.

    Every reply is kept beside the run, so what is here already costs nothing.

    Args:
        plan: the suite.
        run: where outcomes go.
        options: of the command line.
        load_model: gives the checkpoint; it is not called where a server answers.
        console: where to print.

    Returns:
        The figures.

    Raises:
        UserError: if the run holds this suite as another judge saw it, the judge or the model cannot be asked, the
            model has no chat template, or no verdict can be read.
    """
    endpoint = options.endpoint_of_judge()
    suite = plan.suite
    _refuse_other_judge(suite, run, endpoint)
    cache = ReplyCache(run.folder / REPLIES_FILE)
    judge = Judge(EndpointClient(endpoint, cache, console=console), options.parameters_of_judge(), options.repeats)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"{suite.title}: {len(plan.questions):,} questions, judged by {endpoint.model} at {endpoint.url}")
    longest = judge.client.estimate(_longest_requests(plan, judge, options.max_new_tokens))
    say(f"  Judging ({endpoint.model}), if every answer is as long as may be: {longest}")
    judge.probe()
    answering: EndpointClient | CheckpointAsker
    if options.backend == "openai":
        server = Endpoint(url=str(options.base_url), model=options.model, concurrency=options.batch_size)
        answering = EndpointClient(server, cache, console=console)
    else:
        answering = CheckpointAsker(load_model(), options.model, seed=options.seed, console=console)
    outcome = _measure(plan, answering.ask, judge, options)
    if isinstance(answering, EndpointClient):
        say(f"  Answers: {answering.summary()}")
    say(f"  Judge: {judge.client.summary()}")
    _keep(plan, run, outcome, judge, answering, options.max_new_tokens)
    refuse_unjudged(suite.name, outcome.figures, outcome.notes(), run.folder)
    return outcome.figures


def _measure(plan: JudgedPlan, ask: Asker, judge: Judge, options: EvalOptions) -> JudgedOutcome:
    name, longest, seed = plan.suite.name, options.max_new_tokens, options.seed
    if plan.chats:
        return measure_mt_bench(name, plan.chats, ask, judge, max_tokens=longest, seed=seed)
    return measure_hall_bench(name, plan.facts, ask, judge, criteria=plan.suite.criteria, max_tokens=longest, seed=seed)


def _longest_requests(plan: JudgedPlan, judge: Judge, max_tokens: int) -> list[ChatRequest]:
    """What the judge would be asked if every answer had this many tokens, as `rough_tokens` counts."""
    answer = "x" * 4 * max_tokens
    cases: list[Case[float]] = []
    for chat in plan.chats:
        cases += grading_cases(chat, [answer] * len(chat.turns))
    for question in plan.facts:
        cases += criterion_cases(question, answer, plan.suite.criteria)
    return requests_of(cases, judge.parameters, judge.repeats)


def _refuse_other_judge(suite: JudgedSuite, run: EvaluationRun, endpoint: Endpoint) -> None:
    others = {each.judge for each in run.results.tasks if each.suite == suite.name} - {endpoint.model}
    if others:
        raise UserError(
            f"{run.folder} holds {suite.name} as {', '.join(map(str, others))} judged it; the judge is now "
            f"{endpoint.model}. Give another folder with --out."
        )


def _keep(
    plan: JudgedPlan,
    run: EvaluationRun,
    outcome: JudgedOutcome,
    judge: Judge,
    answering: EndpointClient | CheckpointAsker,
    answer_tokens: int,
) -> None:
    suite = plan.suite
    chats = plan.chats or [ChatQuestion(each.id, each.category, (each.question,)) for each in plan.facts]
    write_answers(run.folder / f"answers-{suite.name}.jsonl", chats, outcome.answers)
    run.replace_items(suite.name, outcome.items)
    run.replace_figures(suite.name, outcome.figures)
    for task in dict.fromkeys(item.task for item in outcome.items):
        run.replace_task(
            TaskRecord(
                suite=suite.name,
                task=task,
                version=_VERSION,
                prompt_hash=outcome.prompt_hash,
                data=plan.data,
                judge=judge.client.endpoint.model,
                judge_names=judge_names(judge.client),
                judge_prompt_hash=outcome.judge_prompt_hash,
                judge_parameters=dict(judge.parameters),
                answer_tokens=answer_tokens,
            )
        )
    run.replace_notes(suite.name, [*_notes(plan, judge, answering), *outcome.notes()])
    run.save()


def _notes(plan: JudgedPlan, judge: Judge, answering: EndpointClient | CheckpointAsker) -> list[str]:
    suite, notes = plan.suite, judge_name_notes(judge.client)
    if suite.questions is not None and len(plan.questions) != suite.questions:
        notes.append(f"{len(plan.questions):,} questions of {plan.data}; the published set has {suite.questions:,}.")
    if judge.repeats > 1:
        notes.append(f"Everything was judged {judge.repeats} times; a score is the mean.")
    if isinstance(answering, CheckpointAsker) and answering.cut:
        notes.append(f"{answering.cut:,} prompts were longer than the model takes and lost their beginning.")
    unfinished = answering.unfinished if isinstance(answering, CheckpointAsker) else answering.counts.cut_off
    if unfinished:
        notes.append(f"{unfinished:,} answers were cut off at --max-new-tokens.")
    return notes
