# SPDX-License-Identifier: Apache-2.0
"""MT-Bench: every answer of a conversation is graded from 1 to 10 (Zheng et al., 2023).

Its figure is the mean grade over all turns of all questions; the JAI-1 paper prints ten times that in Table 13, and the
grade itself in Table 11.
"""

from collections.abc import Iterator, Sequence

from jai.evaluation.judged.answers import ChatAnswers
from jai.evaluation.judged.judging import Case, Judgement
from jai.evaluation.judged.prompts import LATER_TURN_GRADE, SINGLE_GRADE
from jai.evaluation.judged.questions import ChatQuestion
from jai.evaluation.judged.verdicts import agreement, mean_distance, read_grade
from jai.evaluation.results import Figure, Item, mean_figure

GRADE = "grade"
AGREEMENT, DISTANCE = "agreement", "distance"  # of repeated judgements
GRADING_PROMPTS = (SINGLE_GRADE, LATER_TURN_GRADE)
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_NO_CATEGORY = "questions"


def grading_cases(question: ChatQuestion, answers: Sequence[str]) -> list[Case[float]]:
    """What the judge grades: each answer, with the conversation before it."""
    return [
        Case(SINGLE_GRADE if turn == 0 else LATER_TURN_GRADE, conversation_parts(question, answers, turn), read_grade)
        for turn in range(len(answers))
    ]


def conversation_parts(
    question: ChatQuestion, answers: Sequence[str], turn: int, assistant: str = "the assistant"
) -> tuple[tuple[str, str], ...]:
    """Titles and texts of a conversation up to a turn, counted from 0, with reference answers where they are wanted."""
    parts: list[tuple[str, str]] = []
    for number in range(turn + 1):
        which = f" {number + 1}" if turn else ""
        parts.append((f"question{which} of the user", question.turns[number]))
        if question.wants_reference and any(question.references[number : number + 1]):
            parts.append((f"reference answer{which}", question.references[number]))
        parts.append((f"answer{which} of {assistant}", answers[number]))
    return tuple(parts)


def mt_bench_items(
    suite: str,
    questions: Sequence[ChatQuestion],
    answers: Sequence[ChatAnswers],
    judgements: Sequence[Judgement[float]],
) -> list[Item]:
    """An outcome for each turn: the mean of its grades, none where no grade could be read or there was no answer.

    Args:
        suite: name of the suite.
        questions, answers: of the same ids in the same order.
        judgements: of `grading_cases` of all questions, one after the other.
    """
    left = iter(judgements)
    return [
        item
        for question, given in zip(questions, answers)
        for turn in range(len(question.turns))
        for item in _turn_items(suite, question, given, turn, next(left) if turn < len(given.answers) else None)
    ]


def _turn_items(
    suite: str, question: ChatQuestion, given: ChatAnswers, turn: int, judgement: Judgement[float] | None
) -> Iterator[Item]:
    grades = judgement.readable if judgement else []
    scores = {GRADE: sum(grades) / len(grades) if grades else None}
    if len(grades) > 1:
        scores |= {AGREEMENT: agreement(grades), DISTANCE: mean_distance(grades)}
    texts = {"question": question.turns[turn]}
    if judgement:
        texts |= {"answer": given.answers[turn], "judgement": "\n\n---\n\n".join(judgement.replies)}
    for metric, score in scores.items():
        yield Item(
            suite,
            question.category or _NO_CATEGORY,
            f"{question.id} turn {turn + 1}",
            metric,
            score,
            group=f"{suite} {question.id}",
            texts=texts if metric == GRADE else {},
        )


def mt_bench_figures(suite: str, items: Sequence[Item], seed: int = 0) -> list[Figure]:
    """Mean grades: of all turns, by turn and by category; and how far repeated judgements agree."""
    graded = [item for item in items if item.metric == GRADE]
    by_turn = {int(item.id.rpartition(" ")[2]) for item in graded}
    groups = {"all turns": graded}
    groups |= {
        f"{_ORDINALS[turn - 1] if turn <= len(_ORDINALS) else f'{turn}th'} turn": [
            item for item in graded if item.id.endswith(f" turn {turn}")
        ]
        for turn in sorted(by_turn)
    }
    groups |= {task: [item for item in graded if item.task == task] for task in sorted({item.task for item in graded})}
    figures = [mean_figure(some, suite=suite, name=name, metric=GRADE, seed=seed) for name, some in groups.items()]
    for metric in (AGREEMENT, DISTANCE):
        repeated = [item for item in items if item.metric == metric]
        figures.append(
            mean_figure(
                repeated,
                suite=suite,
                name="repeated judgements",
                metric=metric,
                higher_is_better=metric == AGREEMENT,
                seed=seed,
            )
            if repeated
            else None
        )
    return [figure for figure in figures if figure is not None]
