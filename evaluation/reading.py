# SPDX-License-Identifier: Apache-2.0
"""Scores of answers that are taken from a text, as SQuAD has them (Rajpurkar et al., 2016)."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jai.evaluation.text import plain_text, split_thought, with_ascii_digits

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether an answer is the one that is expected, and the F1 of its words, for lm-eval's `process_results`."""
    given, expected = _words(results[0]), _words(doc["answers"]["text"][0])
    return {"exact_match": float(given == expected), "f1": _f1(given, expected)}


def short_answer_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """As `squad_results`, of a reply in the chat form: of what follows its thought, and look-alikes made one."""
    texts = [split_thought(results[0]).answer, doc["answers"]["text"][0]]
    given, expected = (_words(with_ascii_digits(plain_text(text))) for text in texts)
    return {"exact_match": float(given == expected), "f1": _f1(given, expected)}


def _words(text: str) -> list[str]:
    """Without case, punctuation and English articles. What has no space between it, as a Thai phrase, is one word."""
    return _ARTICLE.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def _f1(given: Sequence[str], expected: Sequence[str]) -> float:
    shared = sum((Counter(given) & Counter(expected)).values())
    if not given or not expected:
        return float(given == expected)
    return 2 * shared / (len(given) + len(expected))
