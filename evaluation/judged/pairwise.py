# SPDX-License-Identifier: Apache-2.0
"""Two models' answers to the same questions, side by side, judged in both orders (Zheng et al., 2023, section 3.4).

A judge prefers what it sees first more often than chance has it. An answer wins only if it is preferred in both orders;
all else is a tie.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jai.evaluation.judged.answers import ChatAnswers
from jai.evaluation.judged.judging import Case, Judgement
from jai.evaluation.judged.mt_bench import conversation_parts
from jai.evaluation.judged.prompts import LATER_TURN_COMPARISON, PAIR_COMPARISON
from jai.evaluation.judged.questions import ChatQuestion
from jai.evaluation.judged.verdicts import read_comparison
from jai.evaluation.results import Figure, Item, mean_figure

COMPARISON_PROMPTS = (PAIR_COMPARISON, LATER_TURN_COMPARISON)
WIN, CONSISTENT, FIRST_SHOWN = "win", "consistent", "first_shown"
_SWAPPED = {"A": "B", "B": "A", "C": "C"}
_WIN_OF = {"A": 1.0, "B": 0.0, "C": 0.5}
_NO_CATEGORY = "questions"


@dataclass(frozen=True)
class AnswerPair:
    """A turn that both models answered.

    Attributes:
        question: what was asked.
        turn: counted from 0.
        first, second: the models' answers up to this turn.
    """

    question: ChatQuestion
    turn: int
    first: tuple[str, ...]
    second: tuple[str, ...]


def pair_answers(
    questions: Sequence[ChatQuestion], first: Sequence[ChatAnswers], second: Sequence[ChatAnswers]
) -> list[AnswerPair]:
    """The turns that both models answered."""
    by_id = [{each.id: each.answers for each in some} for some in (first, second)]
    return [
        AnswerPair(question, turn, by_id[0][question.id][: turn + 1], by_id[1][question.id][: turn + 1])
        for question in questions
        if all(question.id in known for known in by_id)
        for turn in range(min(len(question.turns), *(len(known[question.id]) for known in by_id)))
    ]


def comparison_cases(pair: AnswerPair) -> list[Case[str]]:
    """What the judge compares: the two answers in one order, then in the other."""
    prompt = LATER_TURN_COMPARISON if pair.turn else PAIR_COMPARISON
    orders = ((pair.first, pair.second), (pair.second, pair.first))
    return [
        Case(prompt, _parts(pair, shown_first, shown_second), read_comparison) for shown_first, shown_second in orders
    ]


def _parts(pair: AnswerPair, first: Sequence[str], second: Sequence[str]) -> tuple[tuple[str, str], ...]:
    of_a = conversation_parts(pair.question, first, pair.turn, "assistant A")
    of_b = conversation_parts(pair.question, second, pair.turn, "assistant B")
    if pair.turn:
        return (*of_a, *of_b)
    return (*of_a, of_b[-1])  # the question and the reference stand there once


def pairwise_items(suite: str, pairs: Sequence[AnswerPair], judgements: Sequence[Judgement[str]]) -> list[Item]:
    """Outcomes of each turn: `win` is 1 where the first model won, 0 where the second did, and ½ for a tie.

    `consistent` is whether both orders came to the same; `first_shown`, in how far what was shown first was preferred.
    All are none where a verdict could not be read; repeats count by their mean.

    Args:
        suite: name of the suite.
        pairs: what was compared.
        judgements: of `comparison_cases` of all pairs, one after the other.
    """
    items = []
    for pair, there, back in zip(pairs, judgements[::2], judgements[1::2]):
        outcomes = [
            _outcomes(first, _SWAPPED[second])
            for first, second in zip(there.verdicts, back.verdicts)
            if first is not None and second is not None
        ]
        texts = {
            "question": pair.question.turns[pair.turn],
            "first": pair.first[-1],
            "second": pair.second[-1],
            "judgement": "\n\n---\n\n".join(there.replies),
            "judgement of the other order": "\n\n---\n\n".join(back.replies),
        }
        for metric in (WIN, CONSISTENT, FIRST_SHOWN):
            score = sum(each[metric] for each in outcomes) / len(outcomes) if outcomes else None
            question = pair.question
            items.append(
                Item(
                    suite,
                    question.category or _NO_CATEGORY,
                    f"{question.id} turn {pair.turn + 1}",
                    metric,
                    score,
                    group=f"{suite} {question.id}",
                    texts=texts if metric == WIN else {},
                )
            )
    return items


def _outcomes(there: str, back: str) -> dict[str, float]:
    """Of two verdicts, A being the first model in both: the second one was given with the first model shown last."""
    return {
        WIN: _WIN_OF[there] if there == back else 0.5,
        CONSISTENT: float(there == back),
        FIRST_SHOWN: (_WIN_OF[there] + 1 - _WIN_OF[back]) / 2,
    }


def pairwise_figures(suite: str, items: Sequence[Item], seed: int = 0) -> list[Figure]:
    """Win rate of the first model, by category too; how consistent the judge is, and what it prefers by place."""
    wins = [item for item in items if item.metric == WIN]
    categories = sorted({item.task for item in wins})
    groups = [("all turns", WIN, wins)]
    if len(categories) > 1:
        groups += [(category, WIN, [item for item in wins if item.task == category]) for category in categories]
    groups += [
        ("judge", metric, [item for item in items if item.metric == metric]) for metric in (CONSISTENT, FIRST_SHOWN)
    ]
    figures = [mean_figure(some, suite=suite, name=name, metric=metric, seed=seed) for name, metric, some in groups]
    return [figure for figure in figures if figure is not None]
