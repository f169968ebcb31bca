# SPDX-License-Identifier: Apache-2.0
"""JAI-Hall-Bench (JAI-1 paper, section 8.1): is the answer right about Thailand, and is it natural Thai?

Table 13's 1,298 questions count as right only where both verdicts are true; the earlier version of Table 11, with 298
questions, asks for the facts alone. Neither set of questions is published.
"""

from collections.abc import Sequence

from jai.evaluation.judged.judging import Case, Judgement
from jai.evaluation.judged.mt_bench import AGREEMENT
from jai.evaluation.judged.prompts import FACTS, FLUENCY, JudgePrompt
from jai.evaluation.judged.questions import FactQuestion
from jai.evaluation.judged.verdicts import agreement, read_yes_no
from jai.evaluation.results import Figure, Item, mean_figure

CRITERIA: dict[str, JudgePrompt] = {"facts": FACTS, "fluency": FLUENCY}
CORRECT = "correct"
_NO_CATEGORY = "questions"


def criterion_cases(question: FactQuestion, answer: str, criteria: Sequence[str]) -> list[Case[float]]:
    """What the judge decides of an answer: each criterion by itself."""
    return [Case(CRITERIA[criterion], _parts(question, answer, criterion), read_yes_no) for criterion in criteria]


def _parts(question: FactQuestion, answer: str, criterion: str) -> tuple[tuple[str, str], ...]:
    facts = [("facts", question.facts), ("right answer", question.answer or "")] if criterion == "facts" else []
    shown = [("question of the user", question.question), *facts, ("answer of the assistant", answer)]
    return tuple((title, text) for title, text in shown if text or title == "answer of the assistant")


def hall_bench_items(
    suite: str,
    questions: Sequence[FactQuestion],
    answers: Sequence[str | None],
    judgements: Sequence[Judgement[float]],
    criteria: Sequence[str],
) -> list[Item]:
    """An outcome for each criterion, and `correct` for both together.

    An outcome is the share of the repeats whose verdict is true; it is none where no verdict could be read, and
    `correct` where in no repeat both could.

    Args:
        suite: name of the suite.
        questions: what was asked.
        answers: in the same order; None where there was none.
        judgements: of `criterion_cases` of all answered questions, one after the other.
        criteria: which of `CRITERIA`.
    """
    left = iter(judgements)
    items: list[Item] = []
    for question, answer in zip(questions, answers):
        verdicts = {criterion: next(left) if answer is not None else None for criterion in criteria}
        scores = {criterion: _mean(each.verdicts) if each else None for criterion, each in verdicts.items()}
        if len(criteria) > 1:
            repeats = [each.verdicts if each else () for each in verdicts.values()]
            scores[CORRECT] = _mean([None if None in both else min(both) for both in zip(*repeats)])
        repeated = [agreement(each.readable) for each in verdicts.values() if each]
        if known := [share for share in repeated if share is not None]:
            scores[AGREEMENT] = sum(known) / len(known)
        for metric, score in scores.items():
            texts = {"question": question.question}
            if metric in criteria and (said := verdicts[metric]) is not None:
                texts |= {"answer": str(answer), "judgement": "\n\n---\n\n".join(said.replies)}
            items.append(Item(suite, question.category or _NO_CATEGORY, question.id, metric, score, texts=texts))
    return items


def _mean(verdicts: Sequence[float | None]) -> float | None:
    readable = [verdict for verdict in verdicts if verdict is not None]
    return sum(readable) / len(readable) if readable else None


def hall_bench_figures(suite: str, items: Sequence[Item], criteria: Sequence[str], seed: int = 0) -> list[Figure]:
    """Accuracy: what counts first, then each criterion and each category; and how far repeated judgements agree."""
    headline = CORRECT if len(criteria) > 1 else criteria[0]
    names: list[tuple[str, str, str | None]] = [
        ("all questions", metric, None) for metric in dict.fromkeys([headline, *criteria])
    ]
    categories = sorted({item.task for item in items})
    if len(categories) > 1:
        names += [(category, headline, category) for category in categories]
    names.append(("repeated judgements", AGREEMENT, None))
    figures = []
    for name, metric, task in names:
        some = [item for item in items if item.metric == metric and task in (None, item.task)]
        if some:
            figures.append(mean_figure(some, suite=suite, name=name, metric=metric, seed=seed))
    return [figure for figure in figures if figure is not None]
