# SPDX-License-Identifier: Apache-2.0
r"""Final answers: where a text gives one, and whether it is the right one.

TRL's and math-verify's own graders take `\boxed{๔๒}`, `42 บาท` and `คำตอบคือ 42` for wrong where 42 is right. Here text
gets one notation first (digits of every script, invisible characters, Thai look-alikes, LaTeX); numbers are compared
exactly, with their units where both have one; math-verify decides on the formulae that are left.
"""

import importlib
import logging
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from jai.evaluation.quantities import read_quantity, same_quantity, with_one_notation
from jai.evaluation.text import split_thought

_logger = logging.getLogger(__name__)


class AnswerForm(Enum):
    """How a text gives its final answer, the form that counts most first."""

    BOXED = "boxed"  # \boxed{42}
    MARKED = "marked"  # #### 42, as GSM8K has it
    PHRASE = "phrase"  # The answer is 42; คำตอบคือ 42
    LAST_NUMBER = "last number"  # whatever it stands for


ANY_FORM = tuple(AnswerForm)
STATED_FORMS = (AnswerForm.BOXED, AnswerForm.MARKED, AnswerForm.PHRASE)


@dataclass(frozen=True)
class FinalAnswer:
    """The final answer of a text.

    Attributes:
        text: the answer, in one notation.
        form: how it is given.
    """

    text: str
    form: AnswerForm


def final_answer(text: str, *, question: str = "", forms: Iterable[AnswerForm] = ANY_FORM) -> FinalAnswer | None:
    """The final answer that a text gives; what stands in its thought (`<think>`) is none.

    Args:
        text: a whole reply.
        question: what was asked; a reply that repeats it word for word does not answer with it.
        forms: the forms that count. `STATED_FORMS` leaves out the last number, which may stand for anything.

    Returns:
        The last answer of the first form that the text has; None where it has none.
    """
    answer = _without_open_box(with_one_notation(split_thought(text).answer))
    if asked := with_one_notation(question).strip():
        answer = answer.replace(asked, "\n")
    for form, find in _FINDERS.items():
        if form in forms and (found := find(answer)) is not None:
            return FinalAnswer(found.strip(), form)
    return None


def is_right_answer(text: str, gold: str, *, question: str = "", forms: Iterable[AnswerForm] = ANY_FORM) -> bool:
    r"""Whether the final answer of a text is the right one.

    Args:
        text, question, forms: as of `final_answer`.
        gold: the right answer itself, such as "42", "๔๒ บาท" or r"\frac{1}{2}".
    """
    found = final_answer(text, question=question, forms=forms)
    return found is not None and same_answer(found.text, gold)


def states_right_answer(text: str, solution: str, *, question: str = "") -> bool:
    r"""Whether a text states the final answer that a solution states; a last number may stand for anything.

    Args:
        text, question: as of `final_answer`.
        solution: the right answer, or a text that states it by `\boxed{}` or `####`, as MATH and GSM8K have it.
    """
    stated = final_answer(solution, forms=STATED_FORMS)
    gold = solution if stated is None else stated.text
    return is_right_answer(text, gold, question=question, forms=STATED_FORMS)


def same_answer(answer: str, gold: str) -> bool:
    """Whether two answers are the same: as numbers with units, as text, or as formulae.

    Numbers are compared exactly: 0.5 is 1/2, but 0.33 is not 1/3. A unit counts where both have one that is known
    (100 สตางค์ is 1 บาท, 42 km is not 42 m). 42 % is 42, and 0.42 as well. What is longer than 1,000 characters is no
    answer.
    """
    if max(len(answer), len(gold)) > _LONGEST_ANSWER:
        return False
    answer, gold = _bare(with_one_notation(answer)), _bare(with_one_notation(gold))
    if not answer or not gold:
        return False
    if "=" not in gold:
        answer = _right_side(answer)
        if "=" in answer:
            return False
    mine, theirs = read_quantity(answer), read_quantity(gold)
    if mine is not None and theirs is not None:
        return same_quantity(mine, theirs)
    return _skeleton(answer) == _skeleton(gold) or _same_formula(answer, gold)


_LONGEST_ANSWER = 1000  # characters

# --- Where the answer stands ---

_PHRASE = re.compile(
    r"""
    \banswers?\b [*_"'\s]* (?: (?:is|are|equals?|was|would\ be|will\ be) \b | [:=] )
    | คำตอบ (?:สุดท้าย|ที่ถูกต้อง|ที่ถูก|ที่ได้|ข้อนี้|ของ(?:โจทย์|คำถาม|ข้อ|ปัญหา)(?:ข้อ)?นี้)? [*_"'\s]*
      (?: จึงคือ|คือ|เท่ากับ|จึงเป็น|เป็น|ได้แก่|[:=] )
    | (?<![\u0e00-\u0e7f]) (?:จึง|ขอ)?ตอบ (?=\s*(?:ว่า|คือ)?[\s:*]*[-+$฿]?\s*[\d\\(]) \s* (?:ว่า|คือ)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_AFTER_PHRASE = re.compile(r"(?:\s|[*_:=]|ว่า|คือ)*")
# Where a clause ends: with its line, its sentence, or before the reason that it gives.
_CLAUSE_END = re.compile(
    r"\n|[.;!?](?=\s|$)|,\s|,$|\s*(?:เพราะ|เนื่องจาก|เนื่องด้วย|ดังนั้น|ซึ่ง)|\s(?:because|since|so|as)\b",
    re.IGNORECASE,
)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$(?!\s)([^$\n]*?[^$\s])\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_LAST_NUMBER = re.compile(
    r"""
    (?: (?<![\w)\]}.,]) [-+] )?                # a sign, and no minus between two numbers
    (?: (?<![\w.])\.\d+ | \d+(?:,\d{3})*(?!\d)(?:\.\d+)? )
    (?: \s?/\s? \d+(?![\d/]) )?
    (?: \s?% )?
    """,
    re.VERBOSE,
)


def _boxed(text: str) -> str | None:
    r"""What the last `\boxed{…}` or `\fbox{…}` holds; it is closed."""
    *_, last = [None, *_BOX.finditer(text)]
    return text[last.end() : _end_of_braces(text, last.end())] if last else None


def _without_open_box(text: str) -> str:
    """The text up to a last box that is never closed, for nobody knows what it would have held."""
    *_, last = [None, *_BOX.finditer(text)]
    return text[: last.start()] if last and _end_of_braces(text, last.end()) is None else text


def _end_of_braces(text: str, begin: int) -> int | None:
    """Where the brace that was opened before `begin` is closed, None where it is not."""
    depth = 1
    for brace in _BRACE.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def _marked(text: str) -> str | None:
    marked = re.findall(r"^[ \t]*####[ \t]*(\S.*)$", text, re.MULTILINE)
    return marked[-1] if marked else None


def _after_phrase(text: str) -> str | None:
    for match in reversed(list(_PHRASE.finditer(text))):
        begin = _AFTER_PHRASE.match(text, match.end()).end()  # type: ignore[union-attr]  # which always matches
        if begin == len(text):
            continue
        if math := _MATH.match(text, begin):
            return next(group for group in math.groups() if group is not None)
        end = _CLAUSE_END.search(text, begin)
        return text[begin : end.start() if end else len(text)].replace("**", "")  # emphasis inside
    return None


def _last_number(text: str) -> str | None:
    numbers = _LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


_FINDERS: dict[AnswerForm, Callable[[str], str | None]] = {
    AnswerForm.BOXED: _boxed,
    AnswerForm.MARKED: _marked,
    AnswerForm.PHRASE: _after_phrase,
    AnswerForm.LAST_NUMBER: _last_number,
}

# --- What remains of an answer without its wrapping ---

_TEXT_MACRO = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_WRAPPING = re.compile(
    r"\$\$(.+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]|\\f?box(?:ed)?\s*\{(.+)\}|\{([^{}]*)\}", re.DOTALL
)
_AROUND = " \t\r\n*_\"'“”‘’`;:!"
_AT_THE_END = re.compile(r"(?:(?<!\.)[.,](?!-)|ครับ|ค่ะ|คะ|นะ|ฯ)$")
# A name, or a sum of numbers, that an equals sign tells the value of.
_LEFT_SIDE = re.compile(r"(?:[^\W\d_][^\d=+\-*/^×÷(){}]*|[\d\s.,+\-*/^×÷()]+)")


def _bare(answer: str) -> str:
    """The answer without formula signs, quotes, emphasis, politeness and a full stop around it."""
    answer = _TEXT_MACRO.sub(r" \1 ", answer)
    while True:
        shorter = _AT_THE_END.sub("", answer.strip(_AROUND))
        if wrapping := _WRAPPING.fullmatch(shorter):
            shorter = next(group for group in wrapping.groups() if group is not None)
        if shorter == answer:
            return answer
        answer = shorter


def _right_side(answer: str) -> str:
    """42 of `x = 42` and of `6 × 7 = 42`; anything else as it is."""
    left, equals, right = answer.rpartition("=")
    sides = left.split("=")
    if equals and right.strip() and all(_LEFT_SIDE.fullmatch(side.strip()) for side in sides):
        return right.strip()
    return answer


def _skeleton(answer: str) -> str:
    return re.sub(r"(?<!\d)\s|\s(?!\d)|[{}]", "", answer).casefold()  # 4 2 is not 42


# --- Formulae ---

_LONGEST_FORMULA = 300  # characters
_WORD = re.compile(r"(?<!\\)\b(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|inf|pi|ln|mod)\b)[^\W\d_]{3,}")
# A power of a power, one of thousands, and the like: to compute it may take for ever, where no alarm rings.
_HUGE = re.compile(
    r"\^[^-+=,;&]*\^|\^\s*\{?[^}]*\d{4}|\d{4}\s*!|!\s*!|\*\*|\\[dt]?binom(?!\s*\{\s*\d{1,3}\s*\}\s*\{\s*\d{1,3}\s*\})"
)


def _same_formula(answer: str, gold: str) -> bool:
    """Whether math-verify takes two formulae for equal; never where one of them is prose, or a tower of powers."""
    if not (_is_formula(answer) and _is_formula(gold)):
        return False
    try:
        import math_verify
        from math_verify.errors import TimeoutException
    except ModuleNotFoundError:
        _warn_once("math-verify is not installed, so formulae are compared as text. pip install 'jai-llm[eval]'")
        return False
    # Its alarm rings in the main thread alone, and elsewhere is an error.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    try:
        parsed = [math_verify.parse(f"${each}$", parsing_timeout=seconds) for each in (gold, answer)]
        return bool(math_verify.verify(*parsed, timeout_seconds=seconds))
    except (Exception, TimeoutException):  # of sympy, which fails in many ways on what is no formula
        return False


def _is_formula(text: str) -> bool:
    return (
        len(text) <= _LONGEST_FORMULA
        and text.isprintable()
        and not re.search(r"[\u0e00-\u0e7f]", text)
        and not _WORD.search(text)
        and not _HUGE.search(text)
        and not re.search(r"\d\s+\d", text)  # which math-verify reads as one number
    )


def require_math_verify() -> None:
    """For those whose result depends on formulae: that they cannot be compared is known before any work.

    Raises:
        ModuleNotFoundError: if math-verify is not installed.
    """
    importlib.import_module("math_verify")


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _logger.warning(message)
