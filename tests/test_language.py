# SPDX-License-Identifier: Apache-2.0
"""Language accuracy and think accuracy."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jai
from jai import cli
from jai.errors import UserError
from jai.evaluation.comparison import compare_runs
from jai.evaluation.generations import FileReply, read_replies
from jai.evaluation.language import LanguageFault, ThinkFault, form_counts, language_fault, think_fault
from jai.evaluation.results import read_run
from jai.evaluation.text import plain_text, split_thought
from jai.files import sha256

THAI = "คำตอบคือสี่สิบสอง"
OTHER, MORE, NONE = LanguageFault.OTHER_SCRIPT, LanguageFault.MORE_LATIN, LanguageFault.NONE_OF_ITS_OWN

CASES = [  # text, what is wrong with it in Thai, and in English
    (THAI, None, OTHER),
    ("The answer is forty-two.", NONE, None),
    ("42", None, None),
    (r"\boxed{42}", None, None),
    ("", LanguageFault.BLANK, LanguageFault.BLANK),
    (" \u200b\n", LanguageFault.BLANK, LanguageFault.BLANK),
    # other scripts
    (f"{THAI} 四十二", OTHER, OTHER),
    (f"{THAI} сорок", OTHER, OTHER),
    (f"{THAI} 四", OTHER, OTHER),
    ("The answer is 四十二", OTHER, OTHER),
    (f"{THAI} かな", OTHER, OTHER),
    (f"{THAI} 한국", OTHER, OTHER),
    (f"{THAI} ລາວ", OTHER, OTHER),
    ("ν\u03afκη " + THAI, OTHER, OTHER),  # a word in Greek
    (f"มุม θ กับ α-linolenic {THAI}", None, OTHER),  # symbols
    (f"10 µm {THAI}", None, OTHER),
    # Latin in Thai
    (f"{THAI} ใช้ PyTorch กับ NumPy", None, OTHER),
    ("ใช้ PyTorch กับ NumPy and Transformers", MORE, OTHER),
    ("ไทย abc", None, OTHER),  # as many as Thai ones
    ("ไทย abcd", MORE, OTHER),
    # code, formulae, addresses
    (f"{THAI}\n```python\nprint('hello world, this is a long program')\n```", None, OTHER),
    (f"{THAI}\n```python\nprint('cut off, and 四十二 in a comment", None, OTHER),
    (f"{THAI} `torch.nn.functional.scaled_dot_product_attention()`", None, OTHER),
    (f"{THAI} import numpy as np and then call numpy", MORE, OTHER),
    (rf"{THAI} $\alpha + \beta = abcdefghijklmnopqrstuvwxyz$", None, OTHER),
    (rf"{THAI} \[\frac{{abcdefghijklm}}{{nopqrstuvwxyz}}\]", None, OTHER),
    (rf"{THAI} $x = 四$", OTHER, OTHER),
    (f"{THAI} ราคา $5 กับ 四十二 $6", OTHER, OTHER),
    (f"{THAI} https://huggingface.co/docs/transformers/main/en/index", None, OTHER),
    ("ดู www.example.com/四 สวัสดี", OTHER, OTHER),  # the address ends where ASCII does
    (f"{THAI} someone.with.a.long.name@example.co.th", None, OTHER),
    (f"{THAI} <a class=something-that-is-long>", None, OTHER),
    (f"{THAI}\n~~~\nprint('hello world, this is a long program')\n~~~", None, OTHER),
    (f"{THAI} ``a long piece of code with a ` in the middle of it``", None, OTHER),
    (f"{THAI} $αβγ = 1$", None, OTHER),
    (f"{THAI} $$\nabcdefghijklmnopqrstuvwxyz\n$$", None, OTHER),
    (rf"{THAI} \(abcdefghijklmnopqrstuvwxyz\)", None, OTHER),
    (rf"{THAI} \begin{{align}}abcdefghijklmnopqrstuvwxyz\end{{align}}", None, OTHER),
    (rf"{THAI} \operatorname{{abcdefghijklmnopqrstuvwxyz}}", None, OTHER),
    *(
        (f"{THAI} a-very-long-name.{end}/docs", None, OTHER)
        for end in ["com", "org", "net", "edu", "gov", "io", "ai", "dev", "app", "th", "jp", "uk"]
    ),
    # quoted names
    *((f"{THAI} {quoted}", None, OTHER) for quoted in ("«四十二»", "「四十二」", "『四十二』", "‘四十二’")),
    (f'{THAI} "The Lord of the Rings: The Return of the King"', None, OTHER),
    (f"{THAI} “四十二”", None, OTHER),
    (f"{THAI} 《四十二》", None, OTHER),
    (f"{THAI} 'The Lord of the Rings: The Two Towers'", None, OTHER),
    (f"{THAI} “{'四' * 100}”", OTHER, OTHER),  # longer than a name
    ('"The Lord of the Rings"', NONE, None),  # nothing but the quote
    ("“四十二”", OTHER, OTHER),
    ("It's what the user's asked for", NONE, None),
    (f"It is called “{THAI}” there.", MORE, None),
    # thoughts
    (f"<think>想一想, let me think about it for long</think>{THAI}", None, OTHER),
    (f"let me think</think>{THAI}", None, OTHER),
    (f"<think>{THAI}</think>The answer is 42.", NONE, None),
    (f"<think>{THAI}", LanguageFault.BLANK, LanguageFault.BLANK),
    (f"<think>{THAI}</think>", LanguageFault.BLANK, LanguageFault.BLANK),
    # look-alikes
    ("น\u0e49\u0e33", None, OTHER),
    ("น\u0e4d\u0e49\u0e32", None, OTHER),
    ("ๆ", None, OTHER),
    ("๔๒", None, None),
    ("\u200bไทย\u200b", None, OTHER),
    ("ไทa", None, OTHER),
    ("ไทяย", OTHER, OTHER),  # a Cyrillic letter in the middle
]


@pytest.mark.parametrize(("text", "in_thai", "in_english"), CASES)
def test_language(text, in_thai, in_english):
    assert language_fault(text, "th") == in_thai
    assert language_fault(text, "en") == in_english


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<think>ก</think>ข", None),
        ("<think>\nก\n</think>\n\nข", None),
        ("ก</think>ข", None),
        ("<think>四</think>ข", None),
        ("ข", ThinkFault.NO_THOUGHT),
        ("", ThinkFault.NO_THOUGHT),
        ("<think>ก", ThinkFault.NOT_CLOSED),
        ("<think>", ThinkFault.NOT_CLOSED),
        ("<think></think>ข", ThinkFault.BLANK_THOUGHT),
        ("<think> \u200b\n</think>ข", ThinkFault.BLANK_THOUGHT),
        ("</think>ข", ThinkFault.BLANK_THOUGHT),
        ("<think>ก</think>", ThinkFault.NO_ANSWER),
        ("<think>ก</think>\n\u200b", ThinkFault.NO_ANSWER),
        ("ข<think>ก</think>ค", ThinkFault.SEVERAL),
        ("<think>ก</think>ข<think>ค</think>ง", ThinkFault.SEVERAL),
        ("<think>ก</think>ข<think>ค", ThinkFault.SEVERAL),
        ("<think>ก</think>ข</think>ค", ThinkFault.SEVERAL),
        ("<think><think>ก</think>ข", ThinkFault.SEVERAL),
        ("< think>ก</ think>ข", ThinkFault.NO_THOUGHT),
    ],
)
def test_thinking(text, fault):
    assert think_fault(text) == fault


def test_another_language_is_refused():
    with pytest.raises(UserError, match="'de'; expected one of th, en"):
        language_fault("Hallo", "de")


def test_accuracies_are_shares_of_the_replies():
    replies = [f"<think>a</think>{THAI}", THAI, "四", ""]
    counts = form_counts([(language_fault(text, "th"), think_fault(text)) for text in replies])
    assert counts.replies == 4
    assert counts.language == {OTHER: 1, LanguageFault.BLANK: 1}
    assert counts.think == {ThinkFault.NO_THOUGHT: 3}
    assert (counts.language_accuracy, counts.think_accuracy) == (0.5, 0.25)


def test_the_table_of_cases_in_the_documentation():
    page = (Path(jai.__file__).parent / "docs/evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `` (.+?) `` \| (yes|no) \| (yes|no) \| (yes|no) \|", page, re.MULTILINE)
    assert len(rows) >= 12
    for reply, thai, english, think in rows:
        text = reply.replace("⏎", "\n")
        verdicts = (language_fault(text, "th"), language_fault(text, "en"), think_fault(text))
        assert tuple("no" if fault else "yes" for fault in verdicts) == (thai, english, think), reply


PIECES = st.sampled_from(
    ["<think>", "</think>", "```", "`", "$", "\\(", "\\)", '"', "“", "”", "\n", " ", "ไทย", "abc", "四", "θ", "http://"]
)
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map("".join))


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_no_text_is_too_odd(text):
    for language in ("th", "en"):
        assert isinstance(language_fault(text, language), LanguageFault | None)
    if think_fault(text) is None:
        assert split_thought(text).answer.strip()
        assert language_fault(text, "th") is not LanguageFault.BLANK
    if language_fault(text, "th") is None:
        assert language_fault(f"{text} 四 и", "th") is not None or "`" in text  # an open quote of code takes it in


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_plain_text_is_plain(text):
    assert plain_text(plain_text(plain_text(text))) == plain_text(plain_text(text))


@pytest.mark.timeout(20)
def test_a_degenerate_reply_takes_no_time():
    for piece in ("`", "$", "$ ", "\\(", '"', "“a", "<a ", "a.", "<think>", "www.", "\\begin{a}", "a@b", "'"):
        language_fault(piece * 30_000, "th")
        think_fault(piece * 30_000)


# --- Files of replies ---


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def jai_eval_language(monkeypatch, capsys):
    """Run `jai eval language …` in this process: (exit code, standard output, standard error)."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jai", "eval", "language", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


CHAT = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "%s"}]}'


@pytest.mark.parametrize(
    ("rows", "field"),
    [
        (['{"response": "ไทย"}', '{"response": "<think>a</think>四"}'], "response"),
        (
            [
                CHAT % "ไทย",
                "",
                CHAT % "<think>a</think>四",
            ],
            "messages",
        ),
        (['{"doc_id": 0, "resps": [["ไทย", "<think>a</think>四"]]}'], "resps"),
        (
            ['{"completion": [{"role": "assistant", "content": "ไทย"}]}', '{"completion": "<think>a</think>四"}'],
            "completion",
        ),
    ],
)
def test_files_of_replies(tmp_path, jai_eval_language, rows, field):
    path = write_lines(tmp_path / "replies.jsonl", *rows)
    code, out, err = jai_eval_language(path)
    assert code == 0, err
    assert f"2 replies ({field})" in out
    interval = "0.5000–0.5000" if field == "resps" else "0.0000–1.0000"  # replies to one question are drawn together
    assert f"language accuracy 0.5000 ({interval})  letters of another script: 1\n" in out
    assert re.search(r"think accuracy 0.5000 .*no thought: 1\n", out)


def test_the_field_and_the_language_are_options(tmp_path, jai_eval_language):
    path = write_lines(tmp_path / "replies.jsonl", '{"response": "四", "mine": "Hello"}')
    assert "language accuracy 1.0000" in jai_eval_language(path, "--field", "mine", "--language", "en")[1]
    assert "language accuracy 0.0000" in jai_eval_language(path, "--language", "en")[1]
    assert "language accuracy 0.0000" in jai_eval_language(path, "--field", "mine")[1]


@pytest.mark.parametrize(
    ("lines", "words", "message"),
    [
        (['{"response": "a"}', '{"response": 1}'], [], "line 2, .*response is 1; expected text"),
        (['{"response": "a"}', "{"], [], "line 2, "),
        (['{"x": "a"}'], [], "line 1, .*none of response, .*--field"),
        (['{"response": "a"}', '{"completion": "a"}'], [], "line 2, .*response is None"),
        (['{"messages": [{"role": "user", "content": "a"}]}'], [], "line 1, .*not a row.*assistant"),
        (['{"resps": []}'], [], "line 1, "),
        ([], [], "has no replies"),
        (['{"response": "a"}'], ["--language", "de"], "--language|language is 'de'"),
    ],
)
def test_a_malformed_row_of_replies_is_named(tmp_path, jai_eval_language, lines, words, message):
    code, _, err = jai_eval_language(write_lines(tmp_path / "replies.jsonl", *lines), *words)
    assert code != 0
    assert re.search(message, " ".join(err.split())), err
    assert "Traceback" not in err


def test_a_missing_file_of_replies_is_named(tmp_path, jai_eval_language):
    code, _, err = jai_eval_language(tmp_path / "missing.jsonl")
    assert (code, "missing.jsonl does not exist" in err) == (1, True)


def test_figures_of_a_file_are_a_run_that_can_be_compared(tmp_path, jai_eval_language, monkeypatch, capsys):
    asked = [json.dumps({"prompt": f"ข้อ {number}", "response": "四"}, ensure_ascii=False) for number in range(8)]
    before = write_lines(tmp_path / "before.jsonl", *asked)
    after = write_lines(tmp_path / "after.jsonl", *(line.replace("四", "<think>ก</think>สี่") for line in asked))
    for path in (before, after, after):  # again, it is written anew
        code, out, err = jai_eval_language(path, "--out", tmp_path / path.stem)
        assert code == 0, err
        assert f"Next: jai eval compare {tmp_path / path.stem}" in out
    results, _ = read_run(tmp_path / "after")
    assert (results.finished, results.model, results.revision) == (True, str(after), sha256(after))
    assert results.conditions == {"language": "th", "field": "response"}
    assert [(each.suite, each.name, each.metric, each.value) for each in results.figures] == [
        ("language-th", "replies", "language_acc", 1.0),
        ("language-th", "replies", "think_acc", 1.0),
    ]
    assert [item.texts for item in read_run(tmp_path / "before")[1] if item.id == "3"] == [
        {"question": "ข้อ 2", "answer": "四", "fault": "letters of another script"},
        {"question": "ข้อ 2", "answer": "四", "fault": "no thought"},
    ]
    row, _ = compare_runs([tmp_path / "before", tmp_path / "after"]).rows
    assert (row.metric, row.obstacles) == ("language_acc", ("", ""))
    assert (row.differences[1].value, row.differences[1].items) == (1.0, 8)
    assert row.differences[1].p_value < 0.05
    other = write_lines(tmp_path / "other.jsonl", *(line.replace("ข้อ", "คำถาม") for line in asked))
    jai_eval_language(other, "--out", tmp_path / "other")
    row, _ = compare_runs([tmp_path / "before", tmp_path / "other"]).rows
    assert row.obstacles == ("", "other questions")


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (CHAT % "ไทย", '[{"role": "user", "content": "x"}]'),
        ('{"doc_id": 0, "arguments": [["x", {}]], "resps": [["ไทย"]]}', '[["x", {}]]'),
        ('{"question": "x", "answer": "ไทย"}', "x"),
        ('{"answer": "ไทย"}', ""),
    ],
)
def test_what_was_asked_is_found_in_a_row(tmp_path, row, question):
    assert read_replies(write_lines(tmp_path / "replies.jsonl", row))[1] == [FileReply(1, "ไทย", question)]


def test_a_run_of_replies_is_of_one_file(tmp_path, jai_eval_language):
    path = write_lines(tmp_path / "replies.jsonl", '{"response": "ไทย"}')
    code, _, err = jai_eval_language(path, path, "--out", tmp_path / "run")
    assert (code, "takes the figures of one file, and 2 are given" in " ".join(err.split())) == (1, True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    code, _, err = jai_eval_language(path, "--out", tmp_path / "mine")
    assert (code, "is not an evaluation" in " ".join(err.split())) == (1, True)
    jai_eval_language(path, "--out", tmp_path / "run")
    code, _, err = jai_eval_language(path, "--out", tmp_path / "run", "--language", "en")
    assert (code, "holds another evaluation: language" in " ".join(err.split())) == (1, True)
