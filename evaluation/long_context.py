# SPDX-License-Identifier: Apache-2.0
"""Long contexts in Thai and English, after RULER (Hsieh et al., 2024): needles in a haystack, chains of variables,
common words. The questions are made anew for each length, to fill it by the tokens of the model that answers.

The haystack is a text of the user's, `haystack_th.txt` or `haystack_en.txt`; where it is shorter than the context, it
begins again. lm-eval's own `ruler` has thirteen tasks, in English alone, of texts that it downloads.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jai.errors import UserError
from jai.evaluation.text import plain_text, with_ascii_digits

if TYPE_CHECKING:
    from datasets import Dataset

LENGTHS = (4096, 8192, 16384, 32768)
SAMPLES = 100  # questions for each task and length
_ANSWER_TOKENS = 128
_NEEDLES = 4
_CHAIN = 5
_COMMON = 10  # words; each comes 30 times and any other 3 times, in short lists less often, as RULER's
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class _Wording:
    """What a language says.

    Attributes:
        needle: of {key} and {value}.
        find: of {context} and {keys}.
        conjunction: between the last two keys.
        chain: of {context} and {value}.
        common: of {context} and {count}.
        answer: what the answer begins with.
    """

    needle: str
    find: str
    conjunction: str
    chain: str
    common: str
    answer: str


_WORDINGS = {
    "en": _Wording(
        needle="One of the special numbers for {key} is: {value}.",
        find="Some special numbers are hidden in the following text. Remember them; you will be asked for them.\n"
        "{context}\nWhat are all the special numbers for {keys} in the text above?",
        conjunction=" and ",
        chain="Remember the assignments of variables that are hidden in the following text.\n{context}\n"
        "Which variables have the value {value}, directly or through others? Name them all.",
        common="Some of the words in the following numbered list come more often than others. Remember these.\n"
        "{context}\nWhat are the {count} most frequent words in the list?",
        answer="Answer:",
    ),
    "th": _Wording(
        needle="หมายเลขพิเศษหมายเลขหนึ่งของ{key}คือ {value}",
        find="มีหมายเลขพิเศษซ่อนอยู่ในข้อความต่อไปนี้ จงจำไว้ แล้วจะมีคำถามเกี่ยวกับหมายเลขเหล่านี้\n{context}\n"
        "หมายเลขพิเศษทั้งหมดของ{keys}ในข้อความข้างต้นคืออะไร",
        conjunction="และ",
        chain="จงจำการกำหนดค่าตัวแปรที่ซ่อนอยู่ในข้อความต่อไปนี้\n{context}\n"
        "ตัวแปรใดบ้างที่มีค่า {value} ไม่ว่าโดยตรงหรือผ่านตัวแปรอื่น จงบอกให้ครบ",
        common="คำบางคำในรายการต่อไปนี้ปรากฏบ่อยกว่าคำอื่น จงจำคำเหล่านั้นไว้\n{context}\n"
        "คำที่ปรากฏบ่อยที่สุด {count} คำในรายการคือคำใดบ้าง",
        answer="คำตอบ:",
    ),
}
_KEYS = {
    "en": [
        "apple",
        "river",
        "mountain",
        "window",
        "garden",
        "bottle",
        "engine",
        "market",
        "island",
        "candle",
        "bridge",
    ],
    "th": ["แอปเปิล", "แม่น้ำ", "ภูเขา", "หน้าต่าง", "สวน", "ขวด", "เครื่องยนต์", "ตลาด", "เกาะ", "สะพาน"],
}


@dataclass(frozen=True)
class _Question:
    """A question before its context is cut to a length.

    Attributes:
        text: it, with {context} to be filled in.
        outputs: what an answer must hold.
        hidden: sentences that are hidden in the haystack.
        words: the list that is the context in place of a haystack, given how many entries it may have.
    """

    text: str
    outputs: list[str]
    hidden: Sequence[str] = ()
    words: Callable[[int], Sequence[str]] | None = None


def long_context_docs(
    *,
    kind: str,
    language: str,
    haystack_folder: str | None = None,
    max_seq_lengths: Sequence[int] = LENGTHS,
    samples: int = SAMPLES,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **other_settings: Any,
) -> "dict[str, Dataset]":
    """The questions of a task, for lm-eval's `custom_dataset`.

    Args:
        kind: "single", "multikey", "multivalue", "multiquery", "chain" or "common".
        language: "th" or "en".
        haystack_folder: where `haystack_th.txt` and `haystack_en.txt` lie.
        max_seq_lengths: tokens of question and answer together.
        samples: questions for each length.
        tokenizer, pretrained: what counts tokens, the first that is given.

    Raises:
        UserError: if there is no haystack or no tokenizer, or a length is too short for the task.
    """
    from datasets import Dataset

    text = _haystack(haystack_folder, language)
    count = _token_counter(tokenizer or pretrained)
    docs = []
    for length in map(int, max_seq_lengths):
        rng = random.Random(f"{kind} {language} {length}")
        pieces: int | None = None
        for _ in range(samples):
            question = _question(kind, language, text, rng)
            prompt, pieces = _fill(question, text, count, length - _ANSWER_TOKENS, pieces)
            docs.append(
                {
                    "input": prompt,
                    "outputs": question.outputs,
                    "max_length": length,
                    "gen_prefix": _WORDINGS[language].answer,
                }
            )
    return {"test": Dataset.from_list(docs)}


def long_context_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Share of what was asked for that the answer holds, under the name of the length, for lm-eval's
    `process_results`. Thai digits are digits, and look-alikes and invisible characters make no difference."""
    answer = _comparable(results[0])
    found = sum(_comparable(output) in answer for output in doc["outputs"])
    return {str(doc["max_length"]): found / len(doc["outputs"])}


def _comparable(text: str) -> str:
    return with_ascii_digits(plain_text(text)).lower()


def _question(kind: str, language: str, text: str, rng: random.Random) -> _Question:
    wording = _WORDINGS[language]
    if kind == "chain":
        return _chain(wording, rng)
    if kind == "common":
        return _common_words(wording, language, text, rng)
    keys = rng.sample(_KEYS[language], _NEEDLES)
    values = [str(value) for value in rng.sample(range(1_000_000, 10_000_000), _NEEDLES)]
    if kind == "multivalue":
        keys = keys[:1] * _NEEDLES
    asked = {"single": 1, "multikey": 1, "multivalue": _NEEDLES, "multiquery": _NEEDLES}[kind]
    hidden = 1 if kind == "single" else _NEEDLES
    needles = [wording.needle.format(key=key, value=value) for key, value in zip(keys[:hidden], values)]
    rng.shuffle(needles)
    names = list(dict.fromkeys(keys[:asked]))
    listed = wording.conjunction.join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return _Question(wording.find.replace("{keys}", listed), values[:asked], needles)


def _chain(wording: _Wording, rng: random.Random) -> _Question:
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(_CHAIN)]
    value = str(rng.randrange(10_000, 100_000))
    hidden = [f"VAR {name} = {f'VAR {before}' if before else value}." for before, name in zip([None, *names], names)]
    return _Question(wording.chain.replace("{value}", value), names, hidden)


def _common_words(wording: _Wording, language: str, text: str, rng: random.Random) -> _Question:
    words = _words(text, language)
    if len(words) < 2 * _COMMON:
        raise UserError(f"The haystack has {len(words)} different words; the task of common words takes {2 * _COMMON}.")
    words = rng.sample(words, len(words))
    common, others = words[:_COMMON], words[_COMMON:]

    def entries(count: int) -> list[str]:
        often, seldom = (30, 3) if count >= 60 * _COMMON else (max(2, count // (2 * _COMMON)), 1)
        rest = max(0, count - often * _COMMON)
        listed = common * often + list(islice(cycle(others), -(-rest // seldom))) * seldom
        random.Random(count).shuffle(listed)
        return [f"{number}. {word}" for number, word in enumerate(listed, 1)]

    return _Question(wording.common.replace("{count}", str(_COMMON)), common, words=entries)


def _words(text: str, language: str) -> list[str]:
    """Different words of a text, in order."""
    if language == "th":
        from pythainlp.tokenize import word_tokenize

        found: Sequence[str] = word_tokenize(text[:200_000])
    else:
        found = text.lower().split()
    return sorted({word for word in found if _WORD.fullmatch(word)} | {word for word in found if _is_thai(word)})


def _is_thai(word: str) -> bool:
    return len(word) > 1 and all("\u0e01" <= letter <= "\u0e4e" for letter in word)


def _fill(
    question: _Question, text: str, count: Callable[[str], int], limit: int, pieces: int | None
) -> tuple[str, int]:
    """The question with as much context as fits, and the number of its pieces.

    Args:
        question, text, count: what is asked, the haystack, and what counts tokens.
        limit: in tokens.
        pieces: what fitted the question before; None for the first, for which the number is searched.
    """
    if pieces is None:
        low, high = 0, limit
        while low < high:  # the largest number that fits
            middle = (low + high + 1) // 2
            prompt = question.text.replace("{context}", _context(question, text, middle))
            low, high = (middle, high) if count(prompt) <= limit else (low, middle - 1)
        pieces = low
    while pieces > 0:
        prompt = question.text.replace("{context}", _context(question, text, pieces))
        if count(prompt) <= limit:
            return prompt, pieces
        pieces -= 1 + pieces // 50
    raise UserError(f"A context of {limit + _ANSWER_TOKENS} tokens is too short for the task. Give longer ones.")


def _context(question: _Question, text: str, pieces: int) -> str:
    """So many pieces, with what is hidden in its order and at places that follow from it."""
    if question.words is not None:
        return " ".join(question.words(pieces))
    sentences = list(islice(cycle(text.split("\n")), pieces))
    rng = random.Random(" ".join(question.hidden))
    places = sorted(rng.randrange(pieces + 1) for _ in question.hidden)
    for offset, (place, sentence) in enumerate(zip(places, question.hidden)):
        sentences.insert(place + offset, sentence)
    return "\n".join(sentences)


def _haystack(folder: str | None, language: str) -> str:
    """The text, a phrase a line."""
    path = Path(folder or ".") / f"haystack_{language}.txt"
    if folder is None or not path.is_file():
        raise UserError(
            f"Long contexts in {language} need a text as haystack_{language}.txt, in the folder that --data names."
        )
    lines = re.split(r"(?<=[.!?])\s+|\n+|(?<=[\u0e00-\u0e7f])\s+(?=[\u0e00-\u0e7f])", path.read_text(encoding="utf-8"))
    text = "\n".join(line.strip() for line in lines if line.strip())
    if not text:
        raise UserError(f"{path} is empty. Give a text.")
    return text


def _token_counter(name: str | None) -> Callable[[str], int]:
    if name is None:
        raise UserError("Long contexts are cut by tokens. Give the tokenizer that counts with --tokenizer.")
    from jai.tokenization.loading import load_tokenizer

    tokenizer = load_tokenizer(name)
    return lambda text: len(tokenizer(text, verbose=False)["input_ids"])  # it warns of texts that are too long
