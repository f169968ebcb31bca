# SPDX-License-Identifier: Apache-2.0
"""Verdicts in the replies of judges. What cannot be read is no verdict, and never a score."""

import re
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TypeVar

from jai.evaluation.text import split_thought

_BRACKETS = re.compile(r"\[\[\s*([^\[\]]{1,20}?)\s*\]\]")
_LOWEST, _HIGHEST = 1.0, 10.0

Verdict = TypeVar("Verdict")


def read_grade(reply: str) -> float | None:
    """The grade from 1 to 10 between double brackets; None where there is none, or several that differ.

    >>> read_grade("Mostly right. Grade: [[7]]")
    7.0
    """
    return _only_one(reply, _grade)


def read_yes_no(reply: str) -> float | None:
    """1 for [[true]], 0 for [[false]]; None where there is neither, or both."""
    return _only_one(reply, {"true": 1.0, "false": 0.0}.get)


def read_comparison(reply: str) -> str | None:
    """A, B or C (equally good); None where there is none, or several that differ."""
    return _only_one(reply, {"a": "A", "b": "B", "c": "C"}.get)


def _grade(word: str) -> float | None:
    try:
        grade = float(word.removesuffix("/10"))
    except ValueError:
        return None
    return grade if _LOWEST <= grade <= _HIGHEST else None


def _only_one(reply: str, read: Callable[[str], Verdict | None]) -> Verdict | None:
    """The verdict that the reply gives after any thought. Brackets that hold something else do not count."""
    words = _BRACKETS.findall(split_thought(reply).answer)
    found = {verdict for word in words if (verdict := read(word.lower())) is not None}
    return found.pop() if len(found) == 1 else None


def agreement(verdicts: Sequence[object]) -> float | None:
    """Share of the pairs of repeated verdicts that are equal; None for fewer than two."""
    pairs = list(combinations(verdicts, 2))
    return sum(first == second for first, second in pairs) / len(pairs) if pairs else None


def mean_distance(grades: Sequence[float]) -> float | None:
    """Mean distance of the pairs of repeated grades; None for fewer than two."""
    pairs = list(combinations(grades, 2))
    return sum(abs(first - second) for first, second in pairs) / len(pairs) if pairs else None
