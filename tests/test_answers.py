# SPDX-License-Identifier: Apache-2.0
"""Final answers: found where they stand, and right or wrong, in Thai, English and LaTeX."""

import re
import subprocess
import sys
import threading
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jai.evaluation.answers import ANY_FORM, STATED_FORMS, AnswerForm, final_answer, is_right_answer, same_answer
from jai.evaluation.quantities import read_quantity, with_one_notation

RIGHT_FOR_42 = [
    r"\boxed{๔๒}",
    r"\boxed{42}",
    r"\boxed{42.00}",
    r"\boxed{42\text{ บาท}}",
    r"\boxed{\text{42 km}}",
    r"\boxed{\frac{84}{2}}",
    r"\boxed{\dfrac{84}{2}}",
    r"\boxed{x=42}",
    r"\boxed{x = 40 + 2 = 42}",
    r"\boxed{{42}}",
    r"\[\boxed{42}\]",
    r"\fbox{42}",
    r"\boxed{42\%}",
    r"\boxed{42^\circ}",
    r"\boxed{4.2\times 10^{1}}",
    r"\boxed{2\cdot 21}",
    r"\boxed{\sqrt{1764}}",
    r"\boxed{41} เดี๋ยวก่อน \boxed{42}",
    "คำตอบคือ 41 ไม่ใช่สิ คำตอบคือ 42",
    r"ได้ 42 ดังนั้น \boxed{4",  # a box that is never closed holds nothing; the number before it stands
    r"The final answer is: $\boxed{42}$",
    "42 บาท",
    "42บาท",
    "42.",
    "+42",
    "４２",
    "๔๒",
    "๔๒.๐๐ บาท",
    "4\u200b2 บาท",
    "\u200bคำตอบคือ\u200b 42",
    "คำตอบคือ 42",
    "คำตอบคือ ๔๒ บาท",
    "ค\u0e33ตอบคือ 42",
    "ค\u0e4d\u0e32ตอบคือ 42",
    "คำตอบคือ **42** บาท",
    "คำตอบคือ “42”",
    "คำตอบคือ 42 ค่ะ",
    "คำตอบคือ 42 ครับ.",
    "คำตอบคือ 42.-",
    "คำตอบคือ ฿42",
    "คำตอบคือ $42",
    r"คำตอบคือ \$42",
    r"คำตอบคือ $42$",
    "คำตอบคือ 42 บาท เพราะ 40+2=42 ไม่ใช่ 43",
    "คำตอบสุดท้ายคือ: 42",
    "คำตอบของโจทย์ข้อนี้คือ 42",
    "คำตอบ: 42 บาทถ้วน",
    "คำตอบคือ 84/2",
    "ดังนั้นคำตอบคือ 6 × 7 = 42 บาท",
    "ตอบ 42 บาท",
    "ตอบ: ๔๒",
    "จึงตอบว่า 42",
    "The answer is 42.",
    "The answer is 42, because 6*7=42. I also looked at 43.",
    r"The answer is \(42\)",
    "The answer is 4.2e1",
    "Answer: 42",
    "**Answer:** 42",
    "**Final Answer**: $42$",
    "Answer:\n42",
    "#### 42",
    "40 + 2 = 42\n#### 42 ",
    "#### 41\n#### 42",
    "Total = 42 apples",
    "ดังนั้นได้ 6×7 = 42 บาทค่ะ",
    "<think>41</think>42",
    "อาจเป็น 41</think>คำตอบคือ 42",
    "<think>\\boxed{41}</think>คำตอบคือ 42",
]
WRONG_FOR_42 = [
    "",
    "420",
    "142",
    "4.2",
    "0.42",
    "42.5",
    "-42",
    "−42",
    "-42 บาท",
    "คำตอบคือ -42",
    "คำตอบคือ 43 ไม่ใช่ 42",
    "คำตอบคือ 42 หรือ 43",
    "คำตอบคือ 42 ไม่ใช่หรือ",
    "คำตอบคือ 42-43",
    "คำตอบคือ 42 ล้าน",
    "คำตอบคือ 42 พัน",
    "คำตอบคือไม่ทราบ",
    "The answer is not 42",
    "42 แล้วลด 2 บาท เหลือ 40",
    "42/2",
    "1/42",
    "4,2",
    "42,00",
    "4 2",
    "4²",
    "42²",
    r"\boxed{}",
    r"\boxed{42",
    r"\boxed{42} แล้วเปลี่ยนเป็น \boxed{43}",
    "คำตอบคือ 42 ไม่ใช่สิ คำตอบคือ 43",
    r"คำตอบคือ 42 \boxed{43}",  # a box counts more
    r"\boxed{42x}",
    r"\boxed{2x=42}",
    r"\boxed{42^2}",
    r"\boxed{42,43}",
    r"\boxed{(4,2)}",
    r"\boxed{4\ 2}",
    r"\boxed{42\pm 1}",
    "<think>42</think>",
    "<think>42",
    "<think>คำตอบคือ 42</think>ไม่รู้",
    r"<think>\boxed{42}</think>ไม่รู้",
    "<think>a</think>42<think>b",
]


@pytest.mark.parametrize("gold", ["42", "๔๒.๐", r"$42$"])
@pytest.mark.parametrize("text", RIGHT_FOR_42)
def test_right_answers(text, gold):
    assert is_right_answer(text, gold)


@pytest.mark.parametrize("text", WRONG_FOR_42)
def test_wrong_answers(text):
    assert not is_right_answer(text, "42")


def test_every_right_answer_is_wrong_for_its_negation():
    assert not [text for text in RIGHT_FOR_42 if is_right_answer(text, "-42") or is_right_answer(text, "43")]


@pytest.mark.parametrize("gold", ["42 บาท", "๔๒ บาท", "฿42", "42 baht", "42.-", "4,200 สตางค์"])
def test_a_unit_of_the_gold_counts_where_the_answer_has_one(gold):
    assert is_right_answer("คำตอบคือ 42 บาท", gold)
    assert not is_right_answer("คำตอบคือ 42 ดอลลาร์", gold)
    assert not is_right_answer("คำตอบคือ 43 บาท", gold)
    assert is_right_answer("คำตอบคือ 42", "42 บาท")


def test_a_number_of_the_question_is_no_answer():
    question = "มีส้ม 42 ผล ให้ไป 2 ผล เหลือกี่ผล"
    assert not is_right_answer(f"โจทย์ถามว่า {question}\nฉันไม่รู้", "2", question=question)
    assert is_right_answer(f"{question}\n40 ผล", "40", question=question)
    assert not is_right_answer("ฉันไม่รู้", "42", question="คำตอบคือ 42 ใช่ไหม")


def test_the_form_that_counts():
    reply = "คำตอบคือ 1\n#### 2\n" + r"\boxed{3} 4"
    assert final_answer(reply).form is AnswerForm.BOXED
    assert [final_answer(reply, forms=[form]).text for form in ANY_FORM] == ["3", "2", "1", "4"]
    assert final_answer("ได้ 42 บาท", forms=STATED_FORMS) is None
    assert final_answer("ได้ 42 บาท").form is AnswerForm.LAST_NUMBER
    assert final_answer("ไม่มี") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50 - 8", "8"),
        ("40-42", "42"),
        ("= -42", "-42"),
        ("(-42)", "-42"),
        ("1,234,567.50 บาท", "1,234,567.50"),
        ("12,34", "34"),
        ("0.5.", "0.5"),
        ("3/4 ของทั้งหมด", "3/4"),
        ("ร้อยละ 42 %", "42 %"),
        ("ข้อ 1.5", "1.5"),
    ],
)
def test_last_number(text, expected):
    assert final_answer(text).text == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,234", "1234"),
        ("๑,๒๓๔.๕๐ บาท", "1234.5"),
        ("1{,}234", "1234"),
        (r"1\,234", "1,234"),
        ("0.5", "1/2"),
        ("½", "0.5"),
        ("1½", "1.5"),
        ("1 1/2", "3/2"),
        (r"1\frac12", "1.5"),
        ("-1/2", r"-\frac{1}{2}"),
        (".5", "0.50"),
        ("50%", "0.5"),
        ("50 เปอร์เซ็นต์", "50%"),
        ("50", "50%"),
        ("10^{3}", "1000"),
        ("2 หมื่น", "20000"),
        ("2 ล้านบาท", "2,000,000"),
        ("1.5 million dollars", "$1,500,000"),
        ("100 สตางค์", "1 บาท"),
        ("1.5 km", "1500 m"),
        ("42 กม.", "42 km"),
        ("42 ตร.ม.", "42 m^2"),
        ("42 m²", "42 ตารางเมตร"),
        ("x² + 10⁻", "x^2 + 10⁻"),
        ("2 ชั่วโมง", "120 นาที"),
        ("18 ดอลลาร์", "$18"),
        (r"\$18.00", "18"),
        (r"\frac{\sqrt{3}}{2}", r"\frac{1}{2}\sqrt{3}"),
        (r"5\sqrt{2}", r"\sqrt{50}"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"\{1,2\}", r"\{2,1\}"),
        ("(1,2)", "(1, 2)"),
        (r"\left(1, 2\right)", "(1,2)"),
        (r"\pi/2", r"\frac{\pi}{2}"),
        ("x=1", "x=1"),
        ("กรุงเทพฯ", "กรุงเทพ"),
        ("น\u0e49\u0e4d\u0e32", "น\u0e49\u0e33"),
        ("ก.", "ก"),
        (r"\text{(C)}", "(C)"),
        ("No.", "no"),
    ],
)
def test_same_both_ways(one, other):
    assert same_answer(one, other)
    assert same_answer(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("42 km", "42 m"),
        ("42 นาที", "42 ชั่วโมง"),
        ("42 บาท", "42 ดอลลาร์"),
        ("100 สตางค์", "1"),
        ("2 ล้าน", "2"),
        ("0.33", "1/3"),
        ("1,23", "123"),
        ("0.42%", "42%"),
        ("4²", "42"),
        ("(1,2)", "(2,1)"),
        ("[0,1]", "(0,1)"),
        ("x", "y"),
        ("x=1", "x=2"),
        ("5 or 6", "5"),
        ("dog", "god"),  # as a product they are equal
        ("กรุงเทพ", "เชียงใหม่"),
        ("มาก", "มากๆ"),
        ("A", "B"),
        ("", ""),
        ("1/0", "1"),
    ],
)
def test_different_both_ways(one, other):
    assert not same_answer(one, other)
    assert not same_answer(other, one)


# Each line: the same quantity in every name of its unit. None is the same number as the first of its line, so a unit
# that is not known, or is taken for another, shows.
SAME_QUANTITIES = [
    "3.5 km|3.5 km.|3.5 kilometre|3.5 kilometres|3.5 kilometer|3.5 kilometers|3.5 กิโลเมตร|3.5 กม.|3.5 กม",
    "0.1 km|100 m|100 m.|100 metre|100 metres|100 meter|100 meters|100 เมตร|100 ม.",
    "1 m|100 cm|100 cm.|100 centimetre|100 centimetres|100 centimeter|100 centimeters|100 เซนติเมตร|100 เซ็นติเมตร"
    "|100 ซม.|100 ซม",
    "1 m|1000 mm|1000 mm.|1000 millimetre|1000 millimetres|1000 millimeter|1000 millimeters|1000 มิลลิเมตร|1000 มม."
    "|1000 มม",
    "2 km^2|2000000 m^2|2000000 sq m|2000000 square metres|2000000 square meters|2000000 ตารางเมตร|2000000 ตร.ม."
    "|2000000 ตรม.",
    "3 m^2|30000 cm^2|30000 sq cm|30000 square centimetres|30000 square centimeters|30000 ตารางเซนติเมตร|30000 ตร.ซม."
    "|30000 ตรซม.",
    "5000000 m^2|5 km^2|5 sq km|5 square kilometres|5 square kilometers|5 ตารางกิโลเมตร|5 ตร.กม.",
    "6400 m^2|4 ไร่|4 rai|16 งาน|1600 ตารางวา|1600 ตร.ว.",
    "3 m^3|3000 l|3000 litre|3000 litres|3000 liter|3000 liters|3000 ลิตร|3000 ล.",
    "2 l|2000 ml|2000 millilitre|2000 millilitres|2000 milliliter|2000 milliliters|2000 มิลลิลิตร|2000 มล.|2000 cm^3"
    "|2000 ลบ.ซม.",
    "7000 l|7 m^3|7 cubic metres|7 cubic meters|7 ลูกบาศก์เมตร|7 ลบ.ม.",
    "2 kg|2000 g|2000 gram|2000 grams|2000 กรัม",
    "3000 g|3 kg|3 kg.|3 kilogram|3 kilograms|3 กิโลกรัม|3 กก.|3 กก",
    "4 g|4000 mg|4000 milligram|4000 milligrams|4000 มิลลิกรัม|4000 มก.",
    "5000 kg|5 tonne|5 tonnes|5 ตัน",
    "2 min|120 s|120 sec|120 second|120 seconds|120 วินาที",
    "3 hours|180 min|180 min.|180 minute|180 minutes|180 นาที",
    "2 days|48 h|48 hr|48 hrs|48 hour|48 hours|48 ชั่วโมง|48 ชม.|48 ชม",
    "2 weeks|14 day|14 days|14 วัน",
    "21 days|3 week|3 weeks|3 สัปดาห์|3 อาทิตย์",
    "2 years|24 month|24 months|24 เดือน",
    "36 months|3 year|3 years|3 ปี",
    "4200 satang|42 บาท|42 บาทถ้วน|42 บ.|42 ฿|฿42|42 baht|42 thb|THB 42|42.-|42 -",
    "42 baht|4200 สตางค์|4200 satang",
    "4200 cents|42 $|$42|42 usd|USD 42|42 dollar|42 dollars|42 us dollars|42 ดอลลาร์|42 ดอลลาร์สหรัฐ|42 เหรียญสหรัฐ",
    "42 dollars|4200 cent|4200 cents|4200 ¢|4200 เซนต์",
    "0.5|50%|50 percent|50 per cent|50 เปอร์เซ็นต์|50 เปอร์เซนต์",
    *("2000|2 พัน|20 ร้อย|20 hundred|2 thousand", "2000000|2 ล้าน|20 แสน|200 หมื่น|2 million|2000 พัน"),
    *("20000000|2 สิบล้าน|20 million", "200000000|2 ร้อยล้าน", "2000000000|2 พันล้าน|2 billion"),
    "2000000000000|2 ล้านล้าน|2 trillion",
]


@pytest.mark.parametrize("line", SAME_QUANTITIES)
def test_every_unit_has_its_size(line):
    first, *others = line.split("|")
    for other in others:
        assert same_answer(first, other), other
        assert same_answer(other, first), other
        assert not same_answer(f"{first} หรือ {other}", first)
        assert not same_answer(re.sub(r"\d+", lambda match: str(int(match[0]) + 1), other, count=1), first), other


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("-42", -42), ("+42", 42), ("-$5", -5), ("$-5", -5), ("-$-5", None), ("- -5", None)),
        *(("2×10^3", 2000), ("2*10^{-1}", Fraction(1, 5)), ("2e+3", 2000), ("1/0", None), ("1e301", None)),
        *(("-1 1/2", Fraction(-3, 2)), (r"-2\frac12", Fraction(-5, 2)), ("3 Million", 3_000_000)),
    ],
)
def test_the_number_of_a_quantity(text, number):
    found = read_quantity(text)
    assert (found and found.number) == number


@pytest.mark.parametrize(("unit", "kind"), [("ตร.ม", "area"), ("กม", "length"), ("บ", "baht"), ("min", "time")])
def test_the_full_stop_of_an_abbreviation_may_be_missing(unit, kind):
    assert read_quantity(f"42 {unit}").kind == read_quantity(f"42 {unit}.").kind == kind
    assert not same_answer("42 ตร.ซม", "42 ตร.ม.")


def test_a_unit_after_a_scale_counts():
    assert read_quantity("2 million dollars").kind == "dollars"
    assert not same_answer("2 million dollars", "2 million baht")


def test_units_of_one_size_are_units_of_what_they_measure():
    kinds = [
        "42 m|42 เมตร",
        "42 m^2",
        "42 l",
        "42 g",
        "42 s",
        "42 months",
        "42 baht",
        "42 dollars",
        "42 €|€42|42 eur|42 euro|42 euros|42 ยูโร",
        "42 £|£42|42 gbp|42 ปอนด์สเตอร์ลิง",
        "42 ¥|¥42|42 jpy|42 yen|42 เยน",
        "42 °|42 degree|42 degrees|42 deg|42 องศา",
        "42 °c|42 องศาเซลเซียส|42 degrees Celsius",
        "42 °F|42 องศาฟาเรนไฮต์|42 degrees Fahrenheit",
        "42 %",
    ]
    for number, line in enumerate(kinds):
        for one in line.split("|"):
            others = [other for place, names in enumerate(kinds) for other in names.split("|") if place != number]
            assert not [other for other in others if same_answer(one, other)]
            assert all(same_answer(one, other) for other in line.split("|"))
            assert same_answer(one, "42")


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        *((f"{sign}42", "-42") for sign in "−‒–—﹣－"),
        ("＋42", "+42"),
        *((f"42{sign}", "42%") for sign in ("％", r"\%")),
        *((f"1{sign}2", "1/2") for sign in "／⁄∕"),
        ("x＝1", "x=1"),
        ("1，234．5", "1,234.5"),
        ("1：2", "1:2"),
        *((f"1{space}2", "1 2") for space in "\u00a0\u2003\u202f\u205f\u3000"),
        (r"\$5", " USD 5"),
        *((rf"\{name}(1", "(1") for name in ("left", "right", "displaystyle", "boldsymbol")),
        (r"\leftarrow", r"\leftarrow"),
        *((rf"\{letter}frac12", r"\frac12") for letter in "dtc"),
        *((f"1{comma}234", "1234") for comma in ("{,}", r"\,", r"\;", r"\:", r"\!", r"\ ", "~")),
        (r"1\,23", "1 23"),  # no thousands
        (r"12\,3456", "12 3456"),
        *((f"90{sign}", "90°") for sign in (r"^\circ", r"^{\circ}", r"^{ \circ }", r"\degree")),
        *((f"2{sign}3", "2×3") for sign in (r"\times", r"\cdot")),
        *((f"2 {sign} 10^3", "2× 10^3") for sign in "xX"),
        ("2x", "2x"),
        *((f"1, {dots}", "1, ...") for dots in (r"\dots", r"\ldots")),
        ("x²³", "x^23"),
        ("1½", "1 1/2"),
        *zip("⅓⅔¼¾⅕⅛", (" 1/3", " 2/3", " 1/4", " 3/4", " 1/5", " 1/8")),
    ],
)
def test_one_notation(written, plain):
    assert with_one_notation(written) == plain


@pytest.mark.timeout(30)  # math-verify gives up on each after 5 seconds, and in a thread never
def test_an_answer_that_would_take_for_ever_to_compute_is_wrong_at_once():
    towers = ["9^{9^{9^9}}", "10^{99999999}", "9^99999", "2^{2^{30}}", "(x+1)^{5000}", r"\binom{10^9}{10^8}", "9**9**9"]
    for tower in (*towers, "1000000!", "1e999999999", "9" * 100_000):
        assert not same_answer(tower, "1")
        assert not is_right_answer(rf"\boxed{{{tower}}}", r"\sqrt{2}")
    assert same_answer(r"\binom{4}{2}", "6")
    assert same_answer("2^{10}", "1024")


@pytest.mark.timeout(60)
def test_a_degenerate_reply_takes_no_time():
    pieces = (
        "คำตอบคือ",
        "ตอบ 4",
        "answer is \\(",
        "\\boxed{",
        "{",
        "$",
        "\\(",
        "1",
        "1,",
        ".",
        "1/",
        "#### 4\n",
        "^ ",
        " ",
        "ฯ",
    )
    for piece in (*pieces, "<think>", "</think>", "=", "-", "1 ", "**", "\\text{"):
        assert not is_right_answer(piece * 20_000, "42")
        assert not is_right_answer(f"\\boxed{{{piece * 20_000}}}", "42")
        assert not is_right_answer(f"คำตอบคือ {piece * 200}", "42")


def test_formulae_are_compared_in_threads_too():
    results = []
    thread = threading.Thread(target=lambda: results.append(same_answer("(x+1)^2", "x^2+2x+1")))
    thread.start()
    thread.join()
    assert results == [True]


def test_without_math_verify_formulae_are_compared_as_text_and_that_is_said():
    script = """
import sys
sys.modules["math_verify"] = None
from jai.evaluation.answers import same_answer
print(same_answer("42 บาท", "๔๒"), same_answer("x + 1", "x+1"), same_answer("1+x", "x+1"), same_answer("y+1", "x+1"))
print("torch" in sys.modules, "lm_eval" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False", "False", "False", "False"]
    assert done.stderr.count("pip install 'jai-llm[eval]'") == 1


# --- Any text ---

PIECES = st.sampled_from(
    [
        *(
            "\\boxed{",
            "{",
            "}",
            "\\",
            "$",
            "\\(",
            "\\)",
            "####",
            "\n",
            " ",
            "=",
            "^",
            "_",
            "/",
            ",",
            ".",
            "-",
            "%",
            "**",
        ),
        *("คำตอบคือ", "ตอบ", "The answer is", "42", "๔๒", "1e9", "½", "บาท", "km", "ล้าน", "\\frac", "\\text{", "\u200b"),
        *("<think>", "</think>", "\u0e4d\u0e32", "ๆ", "汉", "x", "\\sqrt", "!", "(", ")", "[", "\ud800", "\x00"),
    ]
)
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map("".join))


@settings(max_examples=60, deadline=None)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_no_text_is_too_odd(text, gold, question):
    found = final_answer(text, question=question)
    assert isinstance(is_right_answer(text, gold, question=question), bool)
    assert found is None or isinstance(found.text, str)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-(10**7), 10**7),
    st.integers(-(10**7), 10**7),
    st.sampled_from(["{}", "{} บาท", "คำตอบคือ {}", r"\boxed{{{}}}", "#### {}", "ตอบ {} km", "The answer is {}."]),
    st.booleans(),
    st.booleans(),
)
def test_a_number_is_right_for_itself_alone(number, other, form, in_thai, grouped):
    written = f"{number:,}" if grouped else str(number)
    if in_thai:
        written = written.translate({ord("0") + value: 0x0E50 + value for value in range(10)})
    assert is_right_answer(form.format(written), str(other)) == (number == other)
    assert is_right_answer(form.format(written), str(number))


@given(ANY_TEXT)
def test_one_notation_is_the_notation_of_itself(text):
    once = with_one_notation(text)
    assert with_one_notation(with_one_notation(once)) == with_one_notation(once)
    read_quantity(once)
