# SPDX-License-Identifier: Apache-2.0
"""Numbers with units, as Thai, English and LaTeX write them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from jai.evaluation.text import plain_text, with_ascii_digits

_LONGEST = 300  # characters; Python refuses integers of more than 4,300 digits, and nobody answers with one
_LARGEST_EXPONENT = 300

# --- Notation ---

_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def _as_power(superscripts: re.Match[str]) -> str:
    return "^" + "".join(str(_SUPERSCRIPTS.index(each)) for each in superscripts[0])


_NOTATION: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), content)
    for pattern, content in (
        (r"[−‒–—﹣－]", "-"),
        (r"＋", "+"),
        (r"％|\\%", "%"),
        (r"[／⁄∕]", "/"),
        (r"＝", "="),
        (r"，", ","),
        (r"．", "."),
        (r"：", ":"),
        (r"[\u00a0\u2000-\u200a\u202f\u205f\u3000]", " "),
        (r"\\\$", " USD "),
        (r"\\(?:left|right|displaystyle|boldsymbol)(?![a-zA-Z])", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"(?<=\d)(?:\{,\}|\\[,;:! ]|~|,\\!)(?=\d{3}(?!\d))", ""),  # between thousands
        (r"\\[,;:! ]|~", " "),
        (r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])", "°"),
        (r"\\(?:times|cdot)(?![a-zA-Z])|(?<=[\d)])\s*[xX](?=\s*10\^)", "×"),
        (r"\\[lr]?dots(?![a-zA-Z])", "..."),
        (r"[⁰¹²³⁴-⁹]+", _as_power),
        (r"½", " 1/2"),
        (r"⅓", " 1/3"),
        (r"⅔", " 2/3"),
        (r"¼", " 1/4"),
        (r"¾", " 3/4"),
        (r"⅕", " 1/5"),
        (r"⅛", " 1/8"),
    )
]


def with_one_notation(text: str) -> str:
    r"""The text with one notation for what is written in several: digits, signs, spaces, `\dfrac`, `\$`, thousands."""
    text = with_ascii_digits(plain_text(text))
    for pattern, content in _NOTATION:
        text = pattern.sub(content, text)
    return text


# --- Units ---

_HUNDREDTH, _THOUSANDTH = Fraction(1, 100), Fraction(1, 1000)


def _named(kind: str, factor: Fraction | int, names: str) -> dict[str, tuple[str, Fraction]]:
    return {name: (kind, Fraction(factor)) for name in names.split("|")}


# What a unit measures, and how many of the kind's first it is. The full stop of an abbreviation may be missing.
_UNITS = (
    _named("length", 1, "m|metre|metres|meter|meters|เมตร|ม")
    | _named("length", 1000, "km|kilometre|kilometres|kilometer|kilometers|กิโลเมตร|กม")
    | _named("length", _HUNDREDTH, "cm|centimetre|centimetres|centimeter|centimeters|เซนติเมตร|เซ็นติเมตร|ซม")
    | _named("length", _THOUSANDTH, "mm|millimetre|millimetres|millimeter|millimeters|มิลลิเมตร|มม")
    | _named("area", 1, "m^2|sq m|square metres|square meters|ตารางเมตร|ตร.ม|ตรม")
    | _named("area", _HUNDREDTH**2, "cm^2|sq cm|square centimetres|square centimeters|ตารางเซนติเมตร|ตร.ซม|ตรซม")
    | _named("area", 1000**2, "km^2|sq km|square kilometres|square kilometers|ตารางกิโลเมตร|ตร.กม")
    | _named("area", 1600, "ไร่|rai")
    | _named("area", 400, "งาน")
    | _named("area", 4, "ตารางวา|ตร.ว")
    | _named("volume", 1, "l|litre|litres|liter|liters|ลิตร|ล")
    | _named("volume", _THOUSANDTH, "ml|millilitre|millilitres|milliliter|milliliters|มิลลิลิตร|มล|cm^3|ลบ.ซม")
    | _named("volume", 1000, "m^3|cubic metres|cubic meters|ลูกบาศก์เมตร|ลบ.ม")
    | _named("mass", 1, "g|gram|grams|กรัม")
    | _named("mass", 1000, "kg|kilogram|kilograms|กิโลกรัม|กก")
    | _named("mass", _THOUSANDTH, "mg|milligram|milligrams|มิลลิกรัม|มก")
    | _named("mass", 10**6, "tonne|tonnes|ตัน")
    | _named("time", 1, "s|sec|second|seconds|วินาที")
    | _named("time", 60, "min|minute|minutes|นาที")
    | _named("time", 3600, "h|hr|hrs|hour|hours|ชั่วโมง|ชม")
    | _named("time", 86400, "day|days|วัน")
    | _named("time", 7 * 86400, "week|weeks|สัปดาห์|อาทิตย์")
    | _named("months", 1, "month|months|เดือน")
    | _named("months", 12, "year|years|ปี")
    | _named("baht", 1, "บาท|บาทถ้วน|บ|฿|baht|thb|.-|-")
    | _named("baht", _HUNDREDTH, "สตางค์|satang")
    | _named("dollars", 1, "$|usd|dollar|dollars|us dollars|ดอลลาร์|ดอลลาร์สหรัฐ|เหรียญสหรัฐ")
    | _named("dollars", _HUNDREDTH, "cent|cents|¢|เซนต์")
    | _named("euros", 1, "€|eur|euro|euros|ยูโร")
    | _named("pounds sterling", 1, "£|gbp|ปอนด์สเตอร์ลิง")
    | _named("yen", 1, "¥|jpy|yen|เยน")
    | _named("angle", 1, "°|degree|degrees|deg|องศา")
    | _named("celsius", 1, "°c|องศาเซลเซียส|degrees celsius")
    | _named("fahrenheit", 1, "°f|องศาฟาเรนไฮต์|degrees fahrenheit")
    | _named("percent", 1, "%|percent|per cent|เปอร์เซ็นต์|เปอร์เซนต์")
)
_PERCENT = "percent"
_SCALES = {
    "ล้านล้าน": 10**12,
    "พันล้าน": 10**9,
    "ร้อยล้าน": 10**8,
    "สิบล้าน": 10**7,
    "ล้าน": 10**6,
    "แสน": 10**5,
    "หมื่น": 10**4,
    "พัน": 1000,
    "ร้อย": 100,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}

# --- Quantities ---


@dataclass(frozen=True)
class Quantity:
    """A number with its unit.

    Attributes:
        number: as it is written.
        kind: what its unit measures; None where there is no unit, or none that is known.
        factor: the unit in the first unit of its kind, such as 1000 for kilometres.
    """

    number: Fraction
    kind: str | None = None
    factor: Fraction = Fraction(1)


_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_POWER_OF_TEN = (
    r"(?:[eE](?P<e>[-+]?\d{1,4})|\s*[×*]\s*10\s*\^\s*(?:\{\s*(?P<braced>[-+]?\d{1,4})\s*\}|(?P<bare>[-+]?\d{1,4})))"
)
_SYMBOL_BEFORE = r"[$฿€£¥]|usd(?![a-z])|thb(?![a-z])"
_QUANTITY = re.compile(
    rf"""
    (?P<sign>[-+])? \s* (?P<before>{_SYMBOL_BEFORE})? \s* (?P<inner_sign>[-+])? \s*
    (?:
        (?: (?P<whole>\d+) \s* )? \\frac \s*
        (?: \{{ \s* (?P<top>{_UNSIGNED}) \s* \}} \s* \{{ \s* (?P<bottom>{_UNSIGNED}) \s* \}}
          | (?P<top_digit>\d) \s* (?P<bottom_digit>\d) )
      | (?: (?P<mixed>\d+) \s+ )? (?P<numerator>{_UNSIGNED}) \s? / \s? (?P<denominator>{_UNSIGNED})
      | (?P<number>{_UNSIGNED}) {_POWER_OF_TEN}?
    )
    (?![\d,]*\d) \.?(?!\d) \s* (?P<scale>{"|".join(_SCALES)})? (?P<after>.*)
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
# What follows a number may be a unit: words, but no second number, no operation, no doubt.
_UNIT = re.compile(r"(?P<unit>(?:[^\d=+*<>×÷^()\[\]{}\\_?|:;\n]|(?<=[a-z.])\^?[23](?![\d.])){0,40})", re.IGNORECASE)
_VARIABLE = re.compile(r"[a-z]{1,2}")
_DOUBT = re.compile(r"หรือ|ไม่|ถึง|\b(?:or|not|to|and|isn't)\b|/\s*$", re.IGNORECASE)


def read_quantity(text: str) -> Quantity | None:
    """The quantity that a text is, as a whole; None where it is something else, or more than one.

    Args:
        text: in the one notation of `with_one_notation`.
    """
    match = _QUANTITY.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    unit = _UNIT.fullmatch(match["after"].strip())
    if unit is None or _DOUBT.search(unit["unit"]):
        return None
    number = _number(match)
    name = (unit["unit"] or match["before"] or "").casefold().removesuffix(".")
    if number is None or (name not in _UNITS and _VARIABLE.fullmatch(name)):
        return None
    return Quantity(number, *_UNITS.get(name, (None, Fraction(1))))


def _number(match: re.Match[str]) -> Fraction | None:
    top = match["top"] or match["top_digit"] or match["numerator"] or match["number"]
    bottom = match["bottom"] or match["bottom_digit"] or match["denominator"] or "1"
    exponent = int(match["e"] or match["braced"] or match["bare"] or 0)
    divisor = _fraction(bottom)
    if divisor == 0 or abs(exponent) > _LARGEST_EXPONENT:
        return None
    value = _fraction(match["whole"] or match["mixed"] or "0") + _fraction(top) / divisor
    value *= Fraction(10) ** exponent * _SCALES.get((match["scale"] or "").casefold(), 1)
    return -value if "-" in (match["sign"], match["inner_sign"]) else value


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def same_quantity(mine: Quantity, theirs: Quantity) -> bool:
    """Whether two quantities are equal.

    A unit counts where both have one that is known. Of two of which one is in percent, the other may be a share:
    42 % is 42, and 0.42 as well.
    """
    if mine.kind is not None and theirs.kind is not None:
        return mine.kind == theirs.kind and mine.number * mine.factor == theirs.number * theirs.factor
    if mine.number == theirs.number:
        return True
    if _PERCENT in (mine.kind, theirs.kind):
        percent, share = (mine, theirs) if mine.kind == _PERCENT else (theirs, mine)
        return percent.number / 100 == share.number
    return False
