# SPDX-License-Identifier: Apache-2.0
"""What candidates are worth: by a judge's grade, by facts, or by instructions that a program checks."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from jai.errors import UserError
from jai.evaluation.instructions.scoring import instruction_row, judge_instructions
from jai.evaluation.judged.hall_bench import criterion_cases
from jai.evaluation.judged.judging import Case, judge_cases
from jai.evaluation.judged.measure import Judge
from jai.evaluation.judged.prompts import LATER_TURN_GRADE, SINGLE_GRADE
from jai.evaluation.judged.questions import FactQuestion, fact_question
from jai.evaluation.judged.verdicts import read_grade
from jai.preferences.candidates import Candidate
from jai.preferences.prompts import PreferencePrompt

Scores = list[list[float | None]]
_TITLES = {"system": "instructions to the assistant", "user": "turn of the user", "assistant": "turn of the assistant"}


def scores_by_grade(
    prompts: Sequence[PreferencePrompt],
    candidates: Sequence[Sequence[Candidate]],
    judge: Judge,
    dropped: Counter[str],
) -> Scores:
    """Grades from 1 to 10 by a judge; with repeats, their mean.

    Args:
        prompts, candidates: of each prompt, its answers.
        judge: who grades.
        dropped: is told how many grades could not be had.

    Raises:
        UserError: if the judge cannot be asked.
    """
    cases = [_grading_case(prompt, each) for prompt, some in zip(prompts, candidates) for each in some]
    return _judged(candidates, cases, judge, dropped)


def _grading_case(prompt: PreferencePrompt, candidate: Candidate) -> Case[float]:
    before = tuple((_TITLES[message["role"]], message["content"]) for message in prompt.messages[:-1])
    told = LATER_TURN_GRADE if any(message["role"] == "assistant" for message in prompt.messages) else SINGLE_GRADE
    shown = (*before, ("question of the user", prompt.text), ("answer of the assistant", candidate.answer))
    return Case(told, shown, read_grade)


def fact_questions(prompts: Sequence[PreferencePrompt]) -> list[FactQuestion]:
    """The facts that come with prompts.

    Raises:
        UserError: naming a prompt that has none.
    """
    questions = []
    for prompt in prompts:
        try:
            questions.append(fact_question({**prompt.row, "id": prompt.id, "question": prompt.text}))
        except ValueError as error:
            raise UserError(f"Prompt {prompt.id} cannot be judged by facts: {error}.") from None
    return questions


def scores_by_facts(
    questions: Sequence[FactQuestion],
    candidates: Sequence[Sequence[Candidate]],
    judge: Judge,
    dropped: Counter[str],
) -> Scores:
    """1 for answers that a judge finds right by the facts, 0 for hallucinations (JAI-1 paper, section 7.2.3)."""
    cases = [
        case
        for question, some in zip(questions, candidates)
        for each in some
        for case in criterion_cases(question, each.answer, ["facts"])
    ]
    return _judged(candidates, cases, judge, dropped)


def _judged(
    candidates: Sequence[Sequence[Candidate]], cases: Sequence[Case[float]], judge: Judge, dropped: Counter[str]
) -> Scores:
    judgements = judge_cases(cases, judge.client, parameters=judge.parameters, repeats=judge.repeats)
    dropped["judgements that cannot be read"] += sum(each.unreadable for each in judgements)
    dropped["judgements that failed"] += sum(each.failed for each in judgements)
    left = iter(judgements)
    return [
        [sum(each.readable) / len(each.readable) if (each := next(left)).readable else None for _ in some]
        for some in candidates
    ]


def scores_by_checks(
    prompts: Sequence[PreferencePrompt], candidates: Sequence[Sequence[Candidate]], language: Literal["th", "en"]
) -> Scores:
    """Share of a prompt's instructions that an answer follows, strictly; 1 is all of them (section 7.2.2).

    Raises:
        UserError: naming a prompt without instructions that can be checked.
    """
    rows = [instruction_row(prompt.row, language) for prompt in prompts]
    scores: Scores = []
    for row, some in zip(rows, candidates):
        followed = [judge_instructions(row, each.text).strict for each in some]
        scores.append([sum(each) / len(each) for each in followed])
    return scores
