# SPDX-License-Identifier: Apache-2.0
"""A judged suite from its questions to its outcomes: the model answers, then the judge reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jai.evaluation.endpoint import EndpointClient
from jai.evaluation.judged.answers import Asker, ChatAnswers, answer_chats
from jai.evaluation.judged.hall_bench import (
    CRITERIA,
    criterion_cases,
    hall_bench_figures,
    hall_bench_items,
)
from jai.evaluation.judged.judging import Judgement, judge_cases, judgement_notes
from jai.evaluation.judged.mt_bench import GRADING_PROMPTS, grading_cases, mt_bench_figures, mt_bench_items
from jai.evaluation.judged.options import JUDGE_PARAMETERS
from jai.evaluation.judged.prompts import prompts_hash
from jai.evaluation.judged.questions import ChatQuestion, FactQuestion, questions_hash
from jai.evaluation.reply_cache import ChatRequest
from jai.evaluation.results import Figure, Item

_PROBE = "Answer with the word yes, and nothing else."


@dataclass(frozen=True)
class Judge:
    """Who judges, and how.

    Attributes:
        client: of its endpoint.
        parameters: of its sampling.
        repeats: how often each case is judged.
    """

    client: EndpointClient
    parameters: Mapping[str, Any] = field(default_factory=lambda: dict(JUDGE_PARAMETERS))
    repeats: int = 1

    def probe(self) -> None:
        """Ask for one word, so that a wrong key or address is found before the model has answered for hours.

        Raises:
            UserError: as `EndpointClient.ask`.
        """
        quiet = EndpointClient(self.client.endpoint, self.client.cache)
        quiet.ask([ChatRequest([{"role": "user", "content": _PROBE}], self.parameters)])


@dataclass(frozen=True)
class JudgedOutcome:
    """What came of a suite.

    Attributes:
        items: the outcomes.
        figures: the numbers.
        answers: what the model said.
        prompt_hash: SHA-256 of the questions, in their order.
        judge_prompt_hash: SHA-256 of what the judge is told.
        judgements: what the judge said of them.
        unanswered: turns that the model did not answer.
        without_reference: questions of one right answer that come without it.
    """

    items: list[Item]
    figures: list[Figure]
    answers: list[ChatAnswers]
    prompt_hash: str
    judge_prompt_hash: str
    judgements: Sequence[Judgement]
    unanswered: int
    without_reference: int = 0

    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        said = [
            (self.unanswered, "turns have no answer; they count for nothing"),
            (self.without_reference, "questions of one right answer come without it; the judge had to know it"),
        ]
        return [*judgement_notes(self.judgements), *(f"{count:,} {what}." for count, what in said if count)]


def measure_mt_bench(
    suite: str, questions: Sequence[ChatQuestion], ask: Asker, judge: Judge, *, max_tokens: int, seed: int = 0
) -> JudgedOutcome:
    """MT-Bench: the model answers every turn, the judge grades every answer.

    Args:
        suite: name of the suite.
        questions: what is asked.
        ask: asks the model.
        judge: who judges.
        max_tokens: of each answer.
        seed: of the intervals.

    Raises:
        UserError: if the judge or the model cannot be asked; what they said is kept.
    """
    answers = answer_chats(questions, ask, max_tokens=max_tokens)
    cases = [case for question, given in zip(questions, answers) for case in grading_cases(question, given.answers)]
    judgements = judge_cases(cases, judge.client, parameters=judge.parameters, repeats=judge.repeats)
    items = mt_bench_items(suite, questions, answers, judgements)
    return JudgedOutcome(
        items=items,
        figures=mt_bench_figures(suite, items, seed),
        answers=answers,
        prompt_hash=questions_hash(questions),
        judge_prompt_hash=prompts_hash(GRADING_PROMPTS),
        judgements=judgements,
        unanswered=sum(len(question.turns) for question in questions) - len(cases),
        without_reference=sum(question.lacks_reference for question in questions),
    )


def measure_hall_bench(
    suite: str,
    questions: Sequence[FactQuestion],
    ask: Asker,
    judge: Judge,
    *,
    criteria: Sequence[str],
    max_tokens: int,
    seed: int = 0,
) -> JudgedOutcome:
    """JAI-Hall-Bench: the model answers, the judge decides on each criterion.

    The model answers at temperature 0; the paper does not say how it did.

    Args:
        criteria: which of `CRITERIA`; the others as of `measure_mt_bench`.

    Raises:
        UserError: if the judge or the model cannot be asked; what they said is kept.
    """
    chats = [ChatQuestion(question.id, question.category, (question.question,)) for question in questions]
    answers = answer_chats(chats, ask, max_tokens=max_tokens, temperature=0.0)
    texts = [each.answers[0] if each.answers else None for each in answers]
    cases = [
        case
        for question, text in zip(questions, texts)
        if text is not None
        for case in criterion_cases(question, text, criteria)
    ]
    judgements = judge_cases(cases, judge.client, parameters=judge.parameters, repeats=judge.repeats)
    items = hall_bench_items(suite, questions, texts, judgements, criteria)
    return JudgedOutcome(
        items=items,
        figures=hall_bench_figures(suite, items, criteria, seed),
        answers=answers,
        prompt_hash=questions_hash(questions),
        judge_prompt_hash=prompts_hash([CRITERIA[criterion] for criterion in criteria]),
        judgements=judgements,
        unanswered=sum(text is None for text in texts),
    )
