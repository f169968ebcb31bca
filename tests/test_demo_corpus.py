# SPDX-License-Identifier: Apache-2.0
"""The demo's text: determinism, parts that do not overlap, answers that are right."""

import json
import os
import random
import subprocess
import sys
import unicodedata

import pytest
import regex

from jai.demo.text import lexicon as lex
from jai.demo.text.chats import CURT, all_exchanges
from jai.demo.text.corpus import DemoText, build_text, write_text_files
from jai.demo.text.documents import TEMPLATES

THAI = regex.compile(r"\p{Script=Thai}")
PARTS = ("pretrain_en", "pretrain_th", "heldout_en", "heldout_th")
NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs): raise SystemExit("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from pathlib import Path
from jai.demo.text.corpus import build_text, write_text_files
write_text_files(build_text(0), Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def corpus() -> DemoText:
    return build_text(0)


@pytest.fixture(scope="module")
def exchanges():
    return all_exchanges(random.Random(0))


def all_texts(corpus: DemoText) -> list[str]:
    messages = [message for chat in (*corpus.sft, *corpus.eval_chats) for message in chat["messages"]]
    messages += [message for pair in corpus.preferences for part in pair.values() for message in part]
    return [text for part in PARTS for text in getattr(corpus, part)] + [message["content"] for message in messages]


def questions(chats: list[dict]) -> set[str]:
    return {message["content"] for chat in chats for message in chat["messages"] if message["role"] == "user"}


def test_the_same_seed_gives_the_same_text_in_another_process_without_network(corpus, tmp_path):
    write_text_files(corpus, tmp_path / "here")
    subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(tmp_path / "there")],
        check=True,
        # Another home: nothing may have to be downloaded first. Another hash seed: no set decides the order.
        env={**os.environ, "PYTHONHASHSEED": "7", "HOME": str(tmp_path), "PYTHAINLP_DATA": str(tmp_path / "data")},
    )
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "there").iterdir())
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    assert build_text(1) != corpus


def test_sizes(corpus):
    for part in ("pretrain_en", "pretrain_th"):
        assert 280_000 < sum(len(text.encode()) for text in getattr(corpus, part)) < 320_000
    assert len(corpus.heldout_en) == len(corpus.heldout_th) == 60
    assert len(corpus.sft) == 1500
    assert len(corpus.preferences) == 300
    for chats in (corpus.sft, corpus.eval_chats):
        assert sum(chat["language"] == "th" for chat in chats) == len(chats) / 2


def test_text_is_nfc_and_clean(corpus):
    for text in all_texts(corpus):
        assert unicodedata.is_normalized("NFC", text)
        assert text == text.strip()
        assert text
        assert not regex.search(r"  |[{}▁]|None|\p{Mn}{3}|^\p{Mn}", text), text


def test_languages(corpus):
    for part in PARTS:
        text = "".join(getattr(corpus, part))
        thai = len(regex.findall(r"\p{Script=Thai}", text)) / len(regex.findall(r"[\p{L}\p{M}]", text))
        assert thai > 0.85 if part.endswith("_th") else 0 < thai < 0.1


def test_parts_do_not_overlap(corpus):
    for language in ("en", "th"):
        trained, held_out = getattr(corpus, f"pretrain_{language}"), getattr(corpus, f"heldout_{language}")
        assert len(set(trained)) == len(trained)
        assert not set(trained) & set(held_out)
    compared = {pair["prompt"][0]["content"] for pair in corpus.preferences}
    assert len(compared) == len(corpus.preferences)
    assert not compared & questions(corpus.sft)
    assert not questions(corpus.eval_chats) & (questions(corpus.sft) | compared)


def test_documents_vary(corpus):
    for template in TEMPLATES:
        assert len({tuple(template(random.Random(seed))) for seed in range(40)}) > 20, template.__name__
    assert len({text[:20] for text in corpus.pretrain_th}) > len(corpus.pretrain_th) / 2


def test_chats_alternate_and_end_with_the_assistant(corpus):
    kinds = set()
    for chat in corpus.sft:
        roles = [message["role"] for message in chat["messages"]]
        kinds.add(tuple(roles))
        without_system = roles[1:] if roles[0] == "system" else roles
        assert without_system == ["user", "assistant"] * (len(without_system) // 2)
        assert without_system
    assert len(kinds) == 4  # with and without a system message, one question and two
    for chat in corpus.eval_chats:
        assert [message["role"] for message in chat["messages"]] == ["user", "assistant"]


def test_one_question_has_one_answer(corpus):
    answers = {}
    for chat in (*corpus.sft, *corpus.eval_chats):
        for question, answer in zip(chat["messages"], chat["messages"][1:]):
            if question["role"] == "user":
                assert answers.setdefault(question["content"], answer["content"]) == answer["content"]


def test_answers_are_in_the_language_of_the_question_and_polite(exchanges):
    for exchange in exchanges:
        if exchange.language == "en":
            assert regex.search(r"[A-Za-z]", exchange.question)
            assert regex.search(r"[A-Za-z]", exchange.answer)
        else:
            assert THAI.search(exchange.question)
            repeated = exchange.question.removeprefix("พูดตามนะ: ")
            assert exchange.answer == repeated or "ค่ะ" in exchange.answer


def test_sums_are_right(exchanges, corpus):
    checked = 0
    for exchange in exchanges:
        if found := regex.search(r"(\d+) (บวก|ลบ|plus|minus) (\d+)", exchange.question):
            a, b = int(found[1]), int(found[3])
            result = a + b if found[2] in ("บวก", "plus") else a - b
            assert regex.search(r"\d+", exchange.answer)[0] == str(result)
            checked += 1
    assert checked > 200
    for text in (*corpus.pretrain_en, *corpus.pretrain_th):
        for a, sign, b, result in regex.findall(r"(\d+) ([+-]) (\d+) = (\d+)", text):
            assert int(a) + int(f"{sign}{b}") == int(result)


def test_facts_are_right(exchanges):
    answers = {exchange.question: exchange.answer for exchange in exchanges}
    assert answers["จังหวัดเชียงใหม่อยู่ในภาคใด"] == "อยู่ในภาคเหนือค่ะ"
    assert answers["Where in Thailand is Phuket?"] == "It is in southern Thailand."
    assert answers["กรุงเทพมหานครอยู่ในภาคใด"] == "อยู่ในภาคกลางค่ะ"
    assert answers["What is the capital of Japan?"] == "It is Tokyo."
    assert answers["แมวมีกี่ขา"] == "มี 4 ขาค่ะ"
    assert answers["How many legs does an ant have?"] == "It has 6 legs."
    assert answers["วันที่ถัดจากวันอาทิตย์คือวันอะไร"] == "วันจันทร์ค่ะ"
    assert answers["Which month comes after December?"] == "It is January."
    assert answers["Write 42 in words."] == "forty-two"
    assert answers["เลขไทย ๒๗ คือเลขอะไร"] == "เลข 27 ค่ะ"
    assert answers["What is the Thai word for cat?"] == "It is แมว."


def test_counted_words_are_counted_right(exchanges):
    checked = 0
    for exchange in exchanges:
        if exchange.question.startswith(("มีคำว่า", "How many times")):
            listed = exchange.question.split(": ")[1].split()
            assert len(set(listed)) == 1
            assert regex.search(r"\d+", exchange.answer)[0] == str(len(listed))
            checked += 1
    assert checked > 80


def test_preferences(corpus, exchanges):
    by_question = {exchange.question: exchange for exchange in exchanges}
    kinds = {"curt": 0, "wrong": 0, "other language": 0}
    for pair in corpus.preferences:
        (prompt,), (chosen,), (rejected,) = pair["prompt"], pair["chosen"], pair["rejected"]
        assert [message["role"] for message in (prompt, chosen, rejected)] == ["user", "assistant", "assistant"]
        exchange = by_question[prompt["content"]]
        assert chosen["content"] == exchange.answer
        assert rejected["content"] != exchange.answer
        if rejected["content"] in CURT[exchange.language]:
            kinds["curt"] += 1
        elif rejected["content"] == exchange.translated:
            kinds["other language"] += 1
        else:
            kinds["wrong"] += 1
    assert min(kinds.values()) > 40, kinds


def test_provinces():
    provinces = lex.load_provinces()
    assert len({province.th for province in provinces}) == 77
    assert sum(len(region.provinces.split()) for region in lex.REGIONS) == 77


def test_numbers_in_words():
    assert [lex.thai_words(n) for n in (0, 1, 10, 11, 20, 21, 35, 99)] == [
        *("ศูนย์", "หนึ่ง", "สิบ", "สิบเอ็ด"),
        *("ยี่สิบ", "ยี่สิบเอ็ด", "สามสิบห้า", "เก้าสิบเก้า"),
    ]
    assert [lex.english_words(n) for n in (0, 13, 20, 21, 99)] == [
        "zero",
        "thirteen",
        "twenty",
        "twenty-one",
        "ninety-nine",
    ]
    assert len({lex.thai_words(n) for n in range(100)}) == len({lex.english_words(n) for n in range(100)}) == 100


def test_written_files(corpus, tmp_path):
    write_text_files(corpus, tmp_path)
    assert (tmp_path / "heldout_th.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n") == corpus.heldout_th
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("pretrain", "sft", "preferences", "eval_chats")
    }
    texts = [row["text"] for row in rows["pretrain"]]
    english = [text for text in texts if text in set(corpus.pretrain_en)]
    assert sorted(texts) == sorted(english + corpus.pretrain_th)
    ratio = sum(map(len, english)) / sum(map(len, corpus.pretrain_th))
    assert 0.98 < ratio <= 1
    assert rows["sft"] == corpus.sft
    assert rows["preferences"] == corpus.preferences
    assert rows["eval_chats"] == corpus.eval_chats
