# SPDX-License-Identifier: Apache-2.0
"""Verifiable instructions: followed or not, in English as lm-eval's implementation has it, and in Thai."""

import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jai.errors import UserError
from jai.evaluation.instructions.checks import ENGLISH, THAI
from jai.evaluation.instructions.counting import (
    ABBREVIATIONS,
    detect_language,
    english_sentences,
    split_thai_words,
    thai_occurrences,
    thai_sentences,
)
from jai.evaluation.instructions.scoring import (
    InstructionVerdict,
    instruction_figures,
    instruction_row,
    judge_instructions,
)

SHARED_ROWS = Path(__file__).parents[2] / "shared/data/eval/ifeval_th.jsonl.gz"
ENGLISH_PROSE = "The quick brown fox jumps over the lazy dog, and then it goes home to sleep for a very long time."
THAI_PROSE = "ประเทศไทยเป็นประเทศที่ตั้งอยู่ในเอเชียตะวันออกเฉียงใต้"
LETTER = {"letter": "q", "let_frequency": 2, "let_relation": "at least"}
CAPITALS = {"capital_frequency": 2, "capital_relation": "less than"}
NTH = {"num_paragraphs": 2, "nth_paragraph": 2}

# Type, arguments, texts that follow, texts that do not.
CASES_IN_BOTH = [
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a *** b", "a\n***\nb\n***"],
        ["a", "a***b***c", "a *** *** b"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[ชื่อ] [ที่อยู่]", "[a][b][c]"],
        ["[a]", "(a) (b)", "[a\n] [b\n]"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["ok\nP.S. bye", "ok p. s. bye"],
        ["ok", "PS bye", "ok p.s"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["ok\nP.P.S bye", "p.p. s."], ["ok P.S. bye"]),
    (
        "detectable_content:postscript",
        {"postscript_marker": "ป.ล."},
        ["จบ\nป.ล. รักนะ", "จบ ป. ล. รักนะ"],
        ["จบ", "จบ ปล รักนะ", "จบ ป.ล รักนะ"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "ป.ป.ล."}, ["จบ ป.ป.ล. อีก"], ["จบ ป.ล. อีก"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "x\n- ก\n  - ข"],
        ["* a", "* a\n* b\n- c", "• a\n• b", "** a\n** b"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**ก** *ข*", "*a*b*c*"],
        ["*a*", "* * **", "_a_ _b_"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "ส่วน", "num_sections": 2},
        ["ส่วน 1\nก\nส่วน 2\nข", "ส่วน ๑ ส่วน ๒"],
        ["ส่วน 1", "ส่วน ก ส่วน ข"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"ก": [1]}\n```', "```\n[]\n```", "42"],
        ["{a: 1}", 'ok {"a": 1}', "", "[" * 100_000],
    ),
    ("detectable_format:title", {}, ["<<หัวข้อ>> เนื้อหา", "x <<a b>>"], ["<< >>", "<หัวข้อ>", "<<a\nb>>"]),
    (
        "combination:two_responses",
        {},
        ["ก ****** ข", "******\na\n******\nb"],
        ["ก", "ก ****** ก", "a ****** b ****** c", "a ****** ****** b", "a *** b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "บอกฉัน ที่ 1"},
        ["บอกฉัน ที่ 1 ได้เลย", " บอกฉัน ที่ 1"],
        ["ได้เลย บอกฉัน ที่ 1", "บอกฉันที่ 1"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Tell me"}, ["tell me\nok"], ["ok, tell me"]),
    ("startend:end_checker", {"end_phrase": "จบแล้ว"}, ["เรื่องนี้จบแล้ว", 'ว่า "จบแล้ว" '], ["จบแล้วจ้า", "จบแล้ว."]),
    ("startend:end_checker", {"end_phrase": "The end."}, ["It is THE END."], ["The end. Bye"]),
    ("startend:quotation", {}, ['"ก ข"', ' "a" '], ['"a', 'a"', '"', "'a'"]),
    ("punctuation:no_comma", {}, ["ก ข", "1.5"], ["ก, ข", "1,000"]),
    ("keywords:letter_frequency", LETTER, ["qQ", "quick q"], ["q", "ก"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "at least"}, ["a!"], ["a"]),
]
ENGLISH_CASES = [
    *CASES_IN_BOTH,
    ("keywords:existence", {"keywords": ["cat", "C++"]}, ["A Cat likes c++"], ["cat", "C++", "ct c++"]),
    (
        "keywords:frequency",
        {"keyword": "cat", "frequency": 2, "relation": "at least"},
        ["cat, concat"],
        ["cat", "act act"],
    ),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, ["cat", "dog"], ["cat Cat"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "dog"]}, ["concat dogma"], ["a Cat", "dog."]),
    ("language:response_language", {"language": "en"}, [ENGLISH_PROSE, "123"], [THAI_PROSE]),
    ("language:response_language", {"language": "th"}, [THAI_PROSE], [ENGLISH_PROSE]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["It is Mr. Fox. He ran 3.5 km.", "Oh! No?"],
        ["It is Mr. Fox.", "e.g. this"],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["One time"], ["One. Two."]),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        ["one two three", "one-two three"],
        ["one two", "... one"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    (
        "length_constraints:nth_paragraph_first_word",
        NTH | {"first_word": "weekend"},
        ["a\n\nWeekend! b", 'a\n\n"weekend" b'],
        ["Weekend\n\na", "a\n\nb\n\nweekend", "a\n\n weekends"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "So: My answer is no. Ok"],
        ["yes", "My answer is yes", "คำตอบของฉันคือใช่"],
    ),
    ("change_case:capital_word_frequency", CAPITALS, ["one NASA", "Nasa"], ["ONE TWO", "U.S.A. and NASA."]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 1, "capital_relation": "at least"},
        ["A-B"],
        ["Ab", "123"],
    ),
    ("change_case:english_capital", {}, [ENGLISH_PROSE.upper()], [ENGLISH_PROSE, THAI_PROSE]),
    ("change_case:english_lowercase", {}, [ENGLISH_PROSE.lower()], [ENGLISH_PROSE, ENGLISH_PROSE.upper()]),
]
KEYWORD = {"keyword": "น้ำ", "frequency": 2}
NUMBER = {"number": "3", "frequency": 2, "relation": "exactly"}
THAI_CASES = [
    *CASES_IN_BOTH,
    (
        "keywords:existence",
        {"keywords": ["น้ำ", "ทักษิณ"]},
        ["ทักษิณดื่มน้ำ", "ทักษิณ น\u0e49\u0e4d\u0e32", "ทัก\u200bษิณ น\u0e4d\u0e49\u0e32"],
        ["ทักษิณ", "น้า ทักษิณ"],
    ),
    ("keywords:existence", {"keywords": ["มา"]}, ["เขามาแล้ว", "ไปมาหาสู่"], ["มากมาย", "มากๆ", "โรม่า"]),
    ("keywords:frequency", KEYWORD | {"relation": "at least"}, ["น้ำแม่น้ำ", "น้ำๆ น\u0e4d\u0e49\u0e32"], ["น้ำ", "น้ำๆ"]),
    ("keywords:frequency", KEYWORD | {"relation": "exactly"}, ["น้ำ น้ำ"], ["น้ำ", "น้ำ น้ำ น้ำ"]),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["โลก", "มา"]},
        ["โลกาภิวัตน์ มากมาย"],
        ["โลกนี้", "มนุษย์โลก", "เขามา"],
    ),
    (
        "keywords:number_frequency",
        NUMBER,
        ["3 3", "๓ และ 3.", "3) 3,000 3"],
        ["3", "33", "3 3 3", "3.5 3", "5.3 3", "13 3"],
    ),
    ("language:response_language", {"language": "my"}, ["မြန်မာဘာသာစကား"], [THAI_PROSE, "123", ENGLISH_PROSE]),
    ("language:response_language", {"language": "th"}, [THAI_PROSE], [ENGLISH_PROSE, "123"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["สวัสดีครับ ผมเป็นครู", "อากาศดี\nฝนตก", "ไปไหน? ไปตลาด"],
        ["สวัสดีครับ", "ปี พ.ศ. 2567"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than", "divider": "***"},
        ["ก ข\nค", "ก ***"],
        ["ก *** ข"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        ["เด็กๆ ชอบเล่น", "ฉันรักเมืองไทย", "เด็ก ๆ ชอบเล่น!"],
        ["เด็กชอบเล่น", "ก . . . ."],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "less than"},
        ["เด็กชอบเล่น"],
        ["iPhone 15 Pro สวย"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        NTH | {"first_word": "มา"},
        ["ก\n\nมาแล้ว", "ก\n\n“มา”"],
        ["ก\n\nมาก", "มา\n\nก", "ก\n\nข\n\nมา"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["คำตอบของฉันคือใช่", "ค\u0e4d\u0e32ตอบของฉันคือไม่ครับ", "ว่า คำตอบของฉันคืออาจจะ."],
        ["ใช่", "คำตอบของฉันคือไม่ใช่", "คำตอบของฉันคือไม่แน่ใจ", "My answer is yes."],
    ),
    ("startend:first_word", {"first_word": "มัน"}, ["มันดี", " “มัน” ดี", "มันๆ"], ["มันส์มาก", "ดีมัน", "มั่น"]),
    ("startend:first_word", {"first_word": "จิ๊บ"}, ["จิ๊บจิ๊บ นก", "จิ๊บๆ"], ["นกจิ๊บ"]),
    ("startend:quotation", {}, ["“ก ข”"], ["‘ก’"]),
]
ALL_CASES = [(ENGLISH, *case) for case in ENGLISH_CASES] + [(THAI, *case) for case in THAI_CASES]


def row_of(language: str, *instructions: tuple[str, dict]):
    names, arguments = zip(*instructions)
    row = {"key": 1, "prompt": "p", "instruction_id_list": list(names), "kwargs": list(arguments)}
    return instruction_row(row, language)


@pytest.mark.parametrize(("instruction_set", "type_", "arguments", "following", "failing"), ALL_CASES)
def test_followed_or_not(instruction_set, type_, arguments, following, failing):
    row = row_of(instruction_set.language, (type_, arguments))
    assert [text for text in following if judge_instructions(row, text).strict != (True,)] == []
    assert [text for text in failing if judge_instructions(row, text).strict != (False,)] == []


@pytest.mark.parametrize(("instruction_set", "cases"), [(ENGLISH, ENGLISH_CASES), (THAI, THAI_CASES)])
def test_every_type_has_cases(instruction_set, cases):
    assert {type_ for type_, *_ in cases} == instruction_set.checks.keys()


def test_the_types_are_those_of_the_data():
    assert len(ENGLISH.checks) == 25
    own = {"keywords:number_frequency", "startend:first_word"}
    assert THAI.checks.keys() - own == {name for name in ENGLISH.checks if not name.startswith("change_case:")}


@pytest.mark.parametrize(("instruction_set", "type_", "arguments", "following", "failing"), ALL_CASES)
def test_a_thought_follows_nothing(instruction_set, type_, arguments, following, failing):
    row = row_of(instruction_set.language, (type_, arguments))
    for text in following:
        assert judge_instructions(row, f"<think>{text}</think>") == InstructionVerdict((False,), (False,))
        assert judge_instructions(row, f"<think>{text}") == InstructionVerdict((False,), (False,))
        assert judge_instructions(row, f"<think>x</think>{text}").strict == (True,)


@pytest.mark.parametrize("nth", [0, 3])
@pytest.mark.parametrize("language", ["en", "th"])
def test_a_paragraph_that_is_not_asked_for_is_never_right(language, nth):
    """lm-eval draws another number at random."""
    arguments = {"num_paragraphs": 2, "nth_paragraph": nth, "first_word": "b"}
    row = row_of(language, ("length_constraints:nth_paragraph_first_word", arguments))
    assert judge_instructions(row, "b\n\nb") == InstructionVerdict((False,), (False,))


def test_loose_forgives_a_first_line_a_last_line_and_asterisks():
    row = row_of("en", ("startend:quotation", {}), ("punctuation:no_comma", {}))
    for text in ('Sure:\n"a"', '"a"\nHope it helps', 'Sure:\n"a"\nBye', '**"a"**', 'Sure:\n**"a"**\nBye'):
        assert judge_instructions(row, text) == InstructionVerdict((False, True), (True, True))
    assert judge_instructions(row, 'a\nb\n"a, b"\nc').loose == (False, False)
    assert judge_instructions(row, 'a\nb\n"a, b"').loose == (False, True)  # its first two lines alone have no comma


def test_the_four_figures():
    verdicts = [
        InstructionVerdict((True, True), (True, True)),
        InstructionVerdict((True, False), (True, True)),
        InstructionVerdict((False,), (False,)),
    ]
    figures = instruction_figures(verdicts)
    assert figures.prompt_strict == pytest.approx(1 / 3)
    assert figures.instruction_strict == pytest.approx(3 / 5)
    assert figures.prompt_loose == pytest.approx(2 / 3)
    assert figures.instruction_loose == pytest.approx(4 / 5)
    assert figures.strict_mean == pytest.approx((1 / 3 + 3 / 5) / 2)


# --- Rows ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction_id_list": ["keywords:existance"]}, "there is no instruction 'keywords:existance'"),
        ({"instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]}, "Thai has no letter case"),
        ({"kwargs": [{}]}, "needs 'keywords'"),
        ({"kwargs": [{"keywords": None}]}, "needs 'keywords'"),
        ({"kwargs": [{"keywords": "น้ำ"}]}, "expected a list of words"),
        ({"kwargs": [{"keywords": []}]}, "expected a list of words"),
        ({"kwargs": [{"keywords": ["a"], "relation": "at least"}]}, "takes no 'relation'"),
        ({"kwargs": []}, "1 instructions and 0 kwargs"),
        ({"kwargs": None}, "not a row of IFEval"),
        ({"instruction_id_list": [], "kwargs": []}, "no instruction"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}, "not a row of IFEval"),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": -1, "relation": "at least"}],
            },
            "num_words of length_constraints:number_words is -1; expected a whole number from 0",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 5, "relation": "at most"}],
            },
            "expected one of less than, at least, exactly",
        ),
        (
            {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "xx"}]},
            "language 'xx' cannot be detected",
        ),
        (
            {"instruction_id_list": ["keywords:letter_frequency"], "kwargs": [LETTER | {"letter": "qu"}]},
            "expected one character",
        ),
    ],
)
def test_a_malformed_row_is_named(changes, message):
    row = {"key": 7, "prompt": "p", "instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["น้ำ"]}]}
    instruction_row(row, "th")
    with pytest.raises(UserError, match=message) as error:
        instruction_row(row | changes, "th")
    assert "7" in str(error.value)
    for name in row.keys() - {"key", "kwargs"} if not changes.keys() - {"kwargs"} else ():
        with pytest.raises(UserError):
            instruction_row({key: value for key, value in row.items() if key != name}, "th")


def test_a_language_without_types_is_refused():
    with pytest.raises(UserError, match="expected one of en, th"):
        instruction_row({}, "de")


def test_nulls_and_whole_floats_of_tables_are_taken():
    arguments = {"num_words": 2.0, "relation": "at least", "keywords": None, "letter": None}
    row = row_of("en", ("length_constraints:number_words", arguments))
    assert judge_instructions(row, "one two").strict == (True,)
    with pytest.raises(UserError, match="a whole number"):
        row_of("en", ("length_constraints:number_words", arguments | {"num_words": 2.5}))


# --- Counting ---


def test_thai_is_counted_as_it_is_read():
    assert split_thai_words("มากๆ") == split_thai_words("มาก ๆ") == ["มาก", "ๆ"]
    assert len(split_thai_words("ราคา 2,500.50 บาท (ลด 10%)")) == 5
    assert thai_sentences("") == thai_sentences(" \n ...") == []
    assert len(thai_sentences("ร้านเปิดแล้ว. คนเยอะมาก. กทม. ร้อน")) == 3
    assert thai_occurrences("ไทย", "คนไทย ไทยแลนด์ ไท") == 2
    assert thai_occurrences("cat", "Cat concat แมวcatแมว") == 2
    assert thai_occurrences("ต่าง", "ต่างๆ") == 1  # one word of the dictionary, and ๆ by itself is none there
    # A name that is in no dictionary may be cut, but not inside of a syllable: after เ, or before a vowel sign.
    assert [thai_occurrences(part, "คุณเวาซ์") for part in ("คุณ", "วา", "เว")] == [1, 0, 0]


def test_english_sentences_do_not_end_in_an_abbreviation():
    assert english_sentences("Dr. A. Smith of the U.S. came at 5 p.m. today. He left.")[1:] == ["He left."]


def test_the_language_is_told_the_same_way_every_time():
    for undecided in ("sol a menu", "radio taxi hotel", "el o a in de"):  # of which langdetect says now this, now that
        assert len({detect_language(undecided) for _ in range(30)}) == 1
    state = random.getstate()
    detect_language(ENGLISH_PROSE)
    assert random.getstate() == state


# --- Against lm-eval's implementation ---


@pytest.fixture(scope="module")
def lm_eval_ifeval(tmp_path_factory):
    """lm-eval's IFEval, with our parameters of Punkt in the place of those that it would download."""
    folder = tmp_path_factory.mktemp("nltk") / "tokenizers/punkt_tab/english"
    folder.mkdir(parents=True)
    (folder / "abbrev_types.txt").write_text("\n".join(sorted(ABBREVIATIONS)))
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).touch()
    import nltk

    nltk.data.path.insert(0, str(folder.parents[2]))
    try:
        import langdetect
        from lm_eval.tasks.ifeval import instructions_registry, instructions_util, utils

        langdetect.DetectorFactory.seed = 0  # without it, lm-eval's verdicts change from run to run
        assert instructions_registry.INSTRUCTION_DICT.keys() == ENGLISH.checks.keys()
        instructions_util.count_sentences("This loads the parameters. Now.")
        yield utils
        langdetect.DetectorFactory.seed = None
    finally:
        nltk.data.path.pop(0)


# In which lm-eval takes what the row says: no sign that a regular expression reads, no character that is no letter, and
# the two markers of a postscript that its data has.
AGREEING_CASES = [
    (type_, arguments)
    for type_, arguments, *_ in ENGLISH_CASES
    if "C++" not in arguments.get("keywords", ())
    and arguments.get("letter") != "!"
    and arguments.get("postscript_marker") not in ("ป.ล.", "ป.ป.ล.")
]
SLOW = ("change_case:english", "language")  # langdetect takes 5 ms for a text, and a loose verdict has eight


def _lm_eval_verdict(utils, instructions, text) -> InstructionVerdict:
    names, arguments = zip(*instructions)
    doc = {"key": 1, "prompt": "p", "instruction_id_list": list(names), "kwargs": list(arguments)}
    scores = utils.process_results(doc, [text])
    assert scores["prompt_level_strict_acc"] == all(scores["inst_level_strict_acc"])
    return InstructionVerdict(tuple(scores["inst_level_strict_acc"]), tuple(scores["inst_level_loose_acc"]))


def test_our_cases_agree_with_lm_eval(lm_eval_ifeval):
    texts = sorted({text for _, _, *lists in ENGLISH_CASES for texts in lists for text in texts if len(text) < 1000})
    differing = []
    for type_, arguments in AGREEING_CASES:
        row = row_of("en", (type_, arguments))
        for text in texts[:: 16 if type_.startswith(SLOW) else 2]:
            if judge_instructions(row, text) != _lm_eval_verdict(lm_eval_ifeval, [(type_, arguments)], text):
                differing.append((type_, arguments, text))
    assert differing == []


PIECES = [
    *(
        "The cat sat. ",
        "A dog! ",
        "Mr. Fox, e.g. one. ",
        "U.S.A. ",
        "NASA ",
        "HELLO ",
        "q",
        "Q ",
        "weekend",
        "My answer is yes.",
    ),
    *(
        "\n",
        "\n\n",
        "* a\n",
        "- b\n",
        "*x*",
        "**y**",
        "***",
        "******",
        "[a]",
        "[b]",
        "<<t>>",
        "<<",
        ">>",
        "<<  >>>",
        "Section 1\n",
        "SECTION 2 ",
    ),
    *(
        '"',
        "'",
        "P.S. ",
        "p. s. ",
        "P.P.S ",
        "```json\n",
        "```",
        "{}",
        '{"a": 1}',
        ", ",
        "...",
        " ",
        "Tell me ",
        "The end.",
    ),
    *("ไทย ", "é", "İ", "ß", "_", "1", "3.5 ", "2) "),
]


def test_generated_texts_agree_with_lm_eval(lm_eval_ifeval):
    rng = random.Random(0)
    arguments_of = {
        "num_words": lambda: rng.randint(1, 12),
        "relation": lambda: rng.choice(["less than", "at least"]),
        "num_sentences": lambda: rng.randint(1, 5),
        "num_paragraphs": lambda: rng.randint(1, 3),
        "nth_paragraph": lambda: 1,
        "first_word": lambda: rng.choice(["the", "weekend", "A"]),
        "num_placeholders": lambda: rng.randint(1, 3),
        "num_bullets": lambda: rng.randint(1, 3),
        "num_highlights": lambda: rng.randint(1, 4),
        "num_sections": lambda: rng.randint(1, 2),
        "section_spliter": lambda: rng.choice(["Section", "SECTION"]),
        "postscript_marker": lambda: rng.choice(["P.S.", "P.P.S"]),
        "keywords": lambda: rng.sample(["cat", "dog", "fox"], 2),
        "keyword": lambda: rng.choice(["cat", "hello"]),
        "forbidden_words": lambda: rng.sample(["cat", "dog", "q", "nasa"], 2),
        "frequency": lambda: rng.randint(1, 3),
        "letter": lambda: rng.choice("qaE"),
        "let_frequency": lambda: rng.randint(1, 4),
        "let_relation": lambda: rng.choice(["less than", "at least"]),
        "capital_frequency": lambda: rng.randint(1, 3),
        "capital_relation": lambda: rng.choice(["less than", "at least"]),
        "prompt_to_repeat": lambda: "Tell me the cat",
        "end_phrase": lambda: rng.choice(["The end.", "yes."]),
        "language": lambda: "en",
    }
    types = {}  # argument names by type
    for type_, arguments, *_ in ENGLISH_CASES:
        types[type_] = arguments.keys()
    slow = {name for name in types if name.startswith(SLOW)}
    counts = dict.fromkeys(types, 0)
    for number in range(2000):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 10)))
        text = rng.choice([text, text, text, f'"{text}"', f"Tell me the cat {text}"])
        drawn = rng.sample(sorted(types.keys() - slow if number % 40 else types), 3)
        instructions = [(name, {each: arguments_of[each]() for each in types[name]}) for name in drawn]
        mine = judge_instructions(row_of("en", *instructions), text)
        assert mine == _lm_eval_verdict(lm_eval_ifeval, instructions, text), (instructions, text)
        for name, followed in zip(drawn, mine.loose):
            counts[name] += followed
    assert {name for name, count in counts.items() if not count} <= slow, counts


# --- The shared Thai set ---


def oracle(type_: str, arguments: dict) -> tuple[str, str]:
    """A text that follows an instruction, and one that does not."""
    name = type_.split(":")[1]
    count = next((value for key, value in arguments.items() if key.startswith("num_")), 0)
    repeated = lambda part, times: "".join(part.format(number) for number in range(1, times + 1))  # noqa: E731
    if name in ("frequency", "number_frequency"):
        word, times = arguments.get("keyword", arguments.get("number")), arguments["frequency"]
        at_least, less = f"{word} " * times, f"ก {word} " * (times - 1) + "จบ"
        return (less, at_least) if arguments["relation"] == "less than" else (at_least, less)
    if name in ("number_words", "number_sentences"):
        part = {"number_words": "บ้าน ", "number_sentences": "ฉันไป***"}[name]
        at_least, less = repeated(part, count), repeated(part, count - 1) or "!"
        return (less, at_least) if arguments["relation"] == "less than" else (at_least, less)
    if name == "response_language":
        texts = {
            "tl": "Magandang umaga po sa inyong lahat at maraming salamat sa pagdating ninyo dito",
            "ta": "தமிழ் மொழி மிகவும் பழமையான மொழி",
            "my": "မြန်မာဘာသာစကားသည် လှပသည်",
            "id": "Selamat pagi, saya ingin memberikan saran tentang buku sejarah yang bagus untuk dibaca",
            "vi": "Tiếng Việt là ngôn ngữ của người Việt Nam và rất đẹp",
        }
        return texts[arguments["language"]], THAI_PROSE
    return {
        "existence": (" ".join(arguments.get("keywords", ())), "ไม่มี"),
        "forbidden_words": ("ไม่มี", " ".join(arguments.get("forbidden_words", ()))),
        "number_paragraphs": ("***".join("ก" * count), "***".join("ก" * (count + 1))),
        "number_placeholders": (repeated("[{}]", count), repeated("[{}]", count - 1) + "()"),
        "postscript": (f"จบ\n{arguments.get('postscript_marker')} รัก", "จบ"),
        "number_bullet_lists": (repeated("* {}\n", count), repeated("* {}\n", count + 1)),
        "number_highlighted_sections": (repeated("*{}* ", count), "ไม่มี"),
        "multiple_sections": (repeated("ส่วน {}\nก\n", count), repeated("ส่วน {}\nก\n", count - 1)),
        "json_format": ('{"ก": 1}', "ก: 1"),
        "title": ("<<หัวข้อ>>", "หัวข้อ"),
        "two_responses": ("ก\n******\nข", "ก\n***\nข"),
        "repeat_prompt": (f"{arguments.get('prompt_to_repeat')}\nได้", f"ได้ {arguments.get('prompt_to_repeat')}"),
        "constrained_response": ("คำตอบของฉันคือไม่", "คำตอบของฉันคือไม่ทราบ"),
        "first_word": (f"{arguments.get('first_word')} และ", f"และ {arguments.get('first_word')}"),
        "end_checker": (f"จบ {arguments.get('end_phrase')}", f"{arguments.get('end_phrase')} จบ"),
        "quotation": ('"ก"', "ก"),
    }[name]


@pytest.mark.skipif(not SHARED_ROWS.exists(), reason=f"{SHARED_ROWS} is not there: it is no part of the repository")
def test_oracle_texts_follow_every_row_of_the_shared_set_and_their_negations_none():
    with gzip.open(SHARED_ROWS, "rt", encoding="utf-8") as lines:
        rows = [instruction_row(json.loads(line), "th") for line in lines]
    assert len(rows) == 105
    assert len({row.instructions[0].type for row in rows}) == 21
    right, wrong = [], []
    for row in rows:
        (instruction,) = row.instructions
        follows, fails = oracle(instruction.type, dict(instruction.arguments))
        right.append(judge_instructions(row, follows))
        wrong.append(judge_instructions(row, fails))
    assert [row for row, verdict in zip(rows, right) if verdict.strict != (True,)] == []
    assert [row for row, verdict in zip(rows, wrong) if verdict.strict != (False,)] == []
    assert instruction_figures(right).strict_mean == 1
    assert instruction_figures(wrong).strict_mean == 0


# --- Any text ---


@pytest.mark.timeout(120)
def test_a_degenerate_reply_takes_little_time():
    for piece in ("[", "<<", "\n", "มา", " ", "A."):
        for row in ALL_ROWS:
            judge_instructions(row, piece * 3_000)


ODD_PIECES = st.sampled_from(
    [
        *PIECES,
        *("น้ำ", "มา", "มาก", "ๆ", "\u0e4d\u0e32", "\u200b", "汉", "<think>", "</think>", "\ud800", "\x00", "พ.ศ.", "๓"),
    ]
)
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(ODD_PIECES, max_size=12).map("".join))
ALL_ROWS = [
    row_of(language, *((type_, arguments) for type_, arguments, *_ in cases))
    for language, cases in (("en", ENGLISH_CASES), ("th", THAI_CASES))
]


@settings(max_examples=20, deadline=None)
@given(ANY_TEXT)
def test_no_text_is_too_odd(text):
    for row in ALL_ROWS:
        verdict = judge_instructions(row, text)
        assert all(loose >= strict for strict, loose in zip(verdict.strict, verdict.loose, strict=True))
        assert {type(each) for each in (*verdict.strict, *verdict.loose)} == {bool}


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["keywords", "relation", "x"]), inner),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(ANY_VALUE, st.sampled_from(sorted(THAI.checks)))
def test_an_odd_argument_is_an_error_that_names_the_row(value, type_):
    row = {"key": "row 7", "prompt": "p", "instruction_id_list": [type_], "kwargs": [{}]}
    for changes in (
        {"kwargs": value},
        {"kwargs": [value]},
        {"instruction_id_list": value},
        {"instruction_id_list": [value]},
    ):
        try:
            instruction_row(row | changes, "th")
        except UserError as error:
            message = str(error)
        else:
            message = "row 7"  # it was taken
        assert "row 7" in message
