# SPDX-License-Identifier: Apache-2.0
r"""Language accuracy and think accuracy: whether a reply is in the language it should be in, and thinks in form.

The source of the two figures (Typhoon2-R1, arXiv:2502.09056) gives no definition; these are ours, by the scripts of the
letters. Code, formulae, addresses and quoted foreign names belong to no language:

- **language**: the answer, which is what follows the thought, is not blank, and its prose has letters of the language,
  none of a third script (Han, Cyrillic, …), and in Thai no more Latin letters than Thai ones. An answer without
  letters, such as a number, is in every language.
- **think**: there is one thought, it is closed, it is not blank, and an answer follows that is not blank.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, get_args

import regex

from jai.errors import UserError
from jai.evaluation.text import is_blank, split_thought

AnswerLanguage = Literal["th", "en"]
ANSWER_LANGUAGES: tuple[str, ...] = get_args(AnswerLanguage)


class LanguageFault(Enum):
    """Why an answer is not in its language."""

    BLANK = "no answer"
    OTHER_SCRIPT = "letters of another script"
    NONE_OF_ITS_OWN = "no letter of the language"
    MORE_LATIN = "more Latin letters than Thai ones"


class ThinkFault(Enum):
    """Why a reply does not think in form."""

    NO_THOUGHT = "no thought"
    NOT_CLOSED = "the thought is not closed"
    SEVERAL = "several thoughts, or text before the thought"
    BLANK_THOUGHT = "the thought is blank"
    NO_ANSWER = "no answer after the thought"


_QUOTE_LIMIT = 80  # characters of a name or title; what is longer is a text
_WITHOUT_LANGUAGE = [
    regex.compile(pattern)
    for pattern in (
        r"(?ms)^[ \t]*(```+|~~~+).*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)",  # a block of code, which may be cut off
        r"``[^\n]+?``|`[^`\n]+`",
        r"(?:https?://|www\.)[!-~]+",
        r"[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,5}",
        r"(?i)\b[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){0,5}\.(?:com|org|net|edu|gov|io|ai|dev|app|th|jp|uk)\b(?:/[!-~]*)?",
        r"</?[a-zA-Z][^<>\n]{0,200}>",
    )
]
# Of these the Latin and Greek letters belong to no language; Han in a formula stays Han.
_FORMULA = regex.compile(
    r"(?s)\$\$[^$]+\$\$|\$(?!\s)[^$\n]*?[^$\s]\$(?!\d)|\\\((?:(?!\\\().)+?\\\)|\\\[(?:(?!\\\[).)+?\\\]"
    r"|\\begin\{(\w+\*?)\}(?:(?!\\begin).)*?\\end\{\1\}|\\[a-zA-Z]+(?:\{[^{}\n]*\})*"
)
_FORMULA_LETTERS = regex.compile(r"[\p{Latin}\p{Greek}]")
_QUOTED = regex.compile(
    rf'"[^"\n]{{1,{_QUOTE_LIMIT}}}"|“[^”\n]{{1,{_QUOTE_LIMIT}}}”|‘[^’\n]{{1,{_QUOTE_LIMIT}}}’'
    rf"|«[^»\n]{{1,{_QUOTE_LIMIT}}}»|「[^」\n]{{1,{_QUOTE_LIMIT}}}」|『[^』\n]{{1,{_QUOTE_LIMIT}}}』|《[^》\n]{{1,{_QUOTE_LIMIT}}}》"
    rf"|(?<!\p{{L}})'[^'\n]{{1,{_QUOTE_LIMIT}}}'(?!\p{{L}})"
)
_THAI, _LATIN = regex.compile(r"(?=\p{L})\p{Thai}"), regex.compile(r"(?=\p{L})\p{Latin}")
# Letters of no script in particular (µ, 𝑥) are nobody's; a Greek letter alone is a symbol.
_NEITHER = regex.compile(r"(?=\p{L})[^\p{Thai}\p{Latin}\p{Greek}\p{Common}\p{Inherited}]|\p{Greek}{2,}")


def language_fault(text: str, language: str) -> LanguageFault | None:
    """Why the answer of a reply is not in the language, None where it is.

    Args:
        text: a whole reply; its thought may be in any language.
        language: "th" or "en"; "en" stands for prose in Latin letters, which French has as well.

    Raises:
        UserError: for another language.
    """
    if language not in ANSWER_LANGUAGES:
        raise UserError(f"The language is {language!r}; expected one of {', '.join(ANSWER_LANGUAGES)}.")
    answer = split_thought(text).answer
    if is_blank(answer):
        return LanguageFault.BLANK
    with_quotes = _prose(answer)
    own = _THAI if language == "th" else _LATIN
    prose = _QUOTED.sub(" ", with_quotes)
    if not own.search(prose):  # then what is quoted is all that is said
        prose = with_quotes
    thai, latin = len(_THAI.findall(prose)), len(_LATIN.findall(prose))
    if _NEITHER.search(prose) or (language == "en" and thai):
        return LanguageFault.OTHER_SCRIPT
    if language == "th" and latin:
        if not thai:
            return LanguageFault.NONE_OF_ITS_OWN
        if latin > thai:
            return LanguageFault.MORE_LATIN
    return None


def think_fault(text: str) -> ThinkFault | None:
    """Why a reply does not think in form, None where it does.

    The opening tag may be missing, for many chat templates end with it.
    """
    reply = split_thought(text)
    if reply.thought is None:
        return ThinkFault.NO_THOUGHT
    if "</think>" not in text:
        return ThinkFault.NOT_CLOSED
    if not reply.is_well_formed:
        return ThinkFault.SEVERAL
    if is_blank(reply.thought):
        return ThinkFault.BLANK_THOUGHT
    return ThinkFault.NO_ANSWER if is_blank(reply.answer) else None


def _prose(answer: str) -> str:
    """The answer without code, addresses, and the letters of formulae."""
    for pattern in _WITHOUT_LANGUAGE:
        answer = pattern.sub(" ", answer)
    return _FORMULA.sub(lambda match: _FORMULA_LETTERS.sub(" ", match[0]), answer)


@dataclass(frozen=True)
class FormCounts:
    """What is wrong with the form of a set of replies.

    Attributes:
        replies: how many there are.
        language: how many have each fault of language.
        think: how many have each fault of thinking.
    """

    replies: int
    language: Counter[LanguageFault] = field(default_factory=Counter)
    think: Counter[ThinkFault] = field(default_factory=Counter)

    @property
    def language_accuracy(self) -> float:
        return 1 - self.language.total() / self.replies

    @property
    def think_accuracy(self) -> float:
        return 1 - self.think.total() / self.replies


def form_counts(faults: Sequence[tuple[LanguageFault | None, ThinkFault | None]]) -> FormCounts:
    """Counts of the faults that were found in each reply."""
    return FormCounts(
        len(faults),
        Counter(fault for fault, _ in faults if fault is not None),
        Counter(fault for _, fault in faults if fault is not None),
    )
