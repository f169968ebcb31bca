# SPDX-License-Identifier: Apache-2.0
"""Text as its reader sees it: one form of look-alikes, nothing invisible, and a thought told from its answer."""

import unicodedata
from dataclasses import dataclass

import regex

from jai.tokenization.normalization import THAI_LOOK_ALIKES, replace_all

# Format characters (zero-width spaces and joiners, byte order marks, directions), the soft hyphen among them.
_INVISIBLE = regex.compile(r"\p{Cf}")
_OPENING, _CLOSING = "<think>", "</think>"


def plain_text(text: str) -> str:
    """The text in one encoding of what it looks like: NFC, one sara am, marks in their order, nothing invisible."""
    return replace_all(unicodedata.normalize("NFC", _INVISIBLE.sub("", text)), THAI_LOOK_ALIKES)


def with_ascii_digits(text: str) -> str:
    """The text with the digits of every script as 0 to 9. Superscripts are no digits: 4² is not 42."""
    return regex.sub(r"(?![0-9])\p{Nd}", lambda match: str(unicodedata.decimal(match[0])), text)


@dataclass(frozen=True)
class Reply:
    """A reply of a model that may think first.

    Attributes:
        thought: what stands before `</think>`, None where nothing says that there is one.
        answer: what comes after; empty where the thought is not closed.
        is_well_formed: whether there is one thought, which is closed, or none.
    """

    thought: str | None
    answer: str
    is_well_formed: bool = True


def split_thought(text: str) -> Reply:
    """Cut a reply after its last `</think>`. The opening tag may be missing: many chat templates end with it."""
    before, closing, answer = text.rpartition(_CLOSING)
    if _OPENING in answer:  # another thought begins, which is never closed
        return Reply(text, "", is_well_formed=False)
    if not closing:
        return Reply(None, text)
    lead, _, thought = before.rpartition(_OPENING)
    is_well_formed = not lead.strip() and _CLOSING not in before
    return Reply(thought, answer, is_well_formed)


def is_blank(text: str) -> bool:
    """Whether the text has nothing but spaces and invisible characters."""
    return not _INVISIBLE.sub("", text).strip()
