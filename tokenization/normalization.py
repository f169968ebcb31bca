# SPDX-License-Identifier: Apache-2.0
"""One encoding for text that looks the same: replacements of strings, done in order inside `tokenizer.json`.

Plain strings, for every engine that reads the file knows them. The whole of NFC would also change text of other
scripts, and so its ids.
"""

import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

from jai.tokenization.units import SPACE, script_runs

Replacement = tuple[str, str]

_SARA_AA, _SARA_AM, _NIKHAHIT, _SARA_E, _SARA_AE = "\u0e32", "\u0e33", "\u0e4d", "\u0e40", "\u0e41"
_TONES = "\u0e48\u0e49\u0e4a\u0e4b"
_THANTHAKHAT = "\u0e4c"
_VOWELS_ABOVE_AND_BELOW = "\u0e31\u0e34\u0e35\u0e36\u0e37\u0e4d\u0e47\u0e38\u0e39"
_VOWELS_AFTER = "\u0e30\u0e32\u0e33\u0e45"

# Two signs that look like one, and marks in an order in which they look the same as in the usual one. Unicode says so
# of sara am (its compatibility decomposition) and of sara ae (a confusable), PyThaiNLP's `reorder_vowels` of all.
THAI_LOOK_ALIKES: tuple[Replacement, ...] = (
    (2 * _SARA_E, _SARA_AE),
    *((mark + vowel, vowel + mark) for mark in _TONES + _THANTHAKHAT for vowel in _VOWELS_ABOVE_AND_BELOW),
    (_NIKHAHIT + _SARA_AA, _SARA_AM),
    *((_NIKHAHIT + tone + _SARA_AA, tone + _SARA_AM) for tone in _TONES),
    *((vowel + tone, tone + vowel) for vowel in _VOWELS_AFTER for tone in _TONES),
)
_MOST_SWAPS = 64  # each is a pass over the text; Hebrew would have hundreds


def replacements(script: str, normalize_thai: bool) -> list[Replacement]:
    """What the tokenizer replaces before it encodes: NFC's order of the script's marks, and Thai look-alikes.

    NFC swaps 14 pairs of Thai marks; one pass of them is exact for two marks after a letter, which is as many as text
    that can be read has. Scripts with more than 64 such pairs keep their marks as they come.
    """
    swaps = _mark_order(script)
    if not (normalize_thai and script.casefold() == "thai"):
        return swaps
    return [*(swap for swap in swaps if swap not in THAI_LOOK_ALIKES), *THAI_LOOK_ALIKES]


def replace_all(text: str, pairs: Sequence[Replacement]) -> str:
    """The text as the tokenizer normalises it, which is what decoding its ids gives back."""
    for found, content in pairs:
        text = text.replace(found, content)
    return text


def with_replacements(normalizer: dict[str, Any] | None, pairs: Sequence[Replacement]) -> dict[str, Any] | None:
    """The normaliser of a `tokenizer.json`, with replacements after it."""
    if not pairs:
        return normalizer
    steps = [{"type": "Replace", "pattern": {"String": found}, "content": content} for found, content in pairs]
    return {"type": "Sequence", "normalizers": [*([normalizer] if normalizer else []), *steps]}


@cache  # it asks for every character that there is
def _mark_order(script: str) -> list[Replacement]:
    every_character = "".join(map(chr, range(sys.maxunicode + 1)))
    letters = "".join(script_runs(script).findall(every_character)).replace(SPACE, "")
    marks = [letter for letter in letters if unicodedata.category(letter).startswith("M")]
    swaps = [
        (first + second, composed)
        for first in letters
        for second in marks
        if (composed := unicodedata.normalize("NFC", first + second)) != first + second
    ]
    return swaps if len(swaps) <= _MOST_SWAPS else []
