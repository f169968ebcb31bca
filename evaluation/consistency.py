# SPDX-License-Identifier: Apache-2.0
"""Whether a model gets the same questions right in two languages (Trillion-7B, section 7.1, equations 3 and 4).

The paper has Korean for Thai, and no equation for the second of its three metrics; it is taken as the mirror of the
third.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jai.errors import UserError
from jai.evaluation.results import Item


@dataclass(frozen=True)
class ConsistencyMetric:
    """The share of right answers in one language among the questions that are right, or wrong, in the other.

    Attributes:
        name: as the paper writes it; E is English, T Thai, (T) true and (F) false.
        given: language of the answers that say which questions count.
        given_score: of these answers.
        asked: language of the answers whose mean is taken.
        higher_is_better: which way the paper's arrow points.
    """

    name: str
    given: str
    given_score: float
    asked: str
    higher_is_better: bool


CONSISTENCY_METRICS = (
    ConsistencyMetric("E(T)→T(T)", "english", 1.0, "thai", higher_is_better=True),
    ConsistencyMetric("T(F)→E(T)", "thai", 0.0, "english", higher_is_better=False),
    ConsistencyMetric("E(F)→T(T)", "english", 0.0, "thai", higher_is_better=False),
)


@dataclass(frozen=True)
class ParallelAnswers:
    """Outcomes of the same questions in two languages.

    Attributes:
        english, thai: by what the two forms of a question have in common.
    """

    english: Mapping[str, Item]
    thai: Mapping[str, Item]

    @property
    def unpaired(self) -> int:
        """Questions that only one language has, or has a score for."""
        return len(self.english.keys() | self.thai.keys()) - len(self._scored())

    def _scored(self) -> list[str]:
        both = [key for key in self.english if key in self.thai]
        return [key for key in both if None not in (self.english[key].score, self.thai[key].score)]

    def items(self, name: str) -> Iterator[Item]:
        """For each metric an outcome of each question that counts; its task is the name of the pair.

        An outcome is in the group of the Thai question, such as its paragraph.

        Raises:
            UserError: for a score that is neither 0 nor 1.
        """
        for key in self._scored():
            items = {"english": self.english[key], "thai": self.thai[key]}
            scores = {language: item.score for language, item in items.items()}
            if not set(scores.values()) <= {0.0, 1.0}:
                raise UserError(f"The pair {name} takes answers that are right or wrong, and {key} scores {scores}.")
            for metric in CONSISTENCY_METRICS:
                if scores[metric.given] == metric.given_score:
                    yield replace(
                        items["thai"], task=name, id=key, metric=metric.name, score=scores[metric.asked], texts={}
                    )


def parallel_answers(
    english: Sequence[tuple[Item, Mapping[str, Any]]],
    thai: Sequence[tuple[Item, Mapping[str, Any]]],
    *,
    key: str | None,
    same: str | None,
) -> ParallelAnswers:
    """Find the two forms of each question.

    Args:
        english, thai: outcomes with their questions' rows.
        key: column that tells a question, None for its position.
        same: column that must be the same in both.

    Raises:
        UserError: if a column is not there, or the questions are not parallel.
    """
    rows: list[dict[str, Mapping[str, Any]]] = []
    items: list[dict[str, Item]] = []
    for answers in (english, thai):
        keys = [item.id if key is None else str(_cell(row, key)) for item, row in answers]
        if twice := next((each for each in keys if keys.count(each) > 1), None) if key else None:
            raise UserError(f"Two questions have the {key} {twice!r}, so their other language cannot be found.")
        rows.append(dict(zip(keys, (row for _, row in answers))))
        items.append(dict(zip(keys, (item for item, _ in answers))))
    for each in rows[0].keys() & rows[1].keys() if same else ():
        cells = [str(_cell(row[each], str(same))) for row in rows]
        if cells[0] != cells[1]:
            raise UserError(
                f"Question {each} has the {same} {cells[0]!r} in English and {cells[1]!r} in Thai. Give questions that "
                "are parallel."
            )
    return ParallelAnswers(*items)


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise UserError(f"The questions have no column {column!r} to pair them by. They have: {', '.join(row)}.")
    return row[column]
