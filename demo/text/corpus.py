# SPDX-License-Identifier: Apache-2.0
"""The demo's text, Thai and English: plain text, chats and preferences, made from templates by a seed."""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jai.demo.text.chats import SYSTEM, Exchange, Message, all_exchanges, rejected_answer
from jai.demo.text.documents import draw_document

PRETRAIN_BYTES = 300_000
HELD_OUT_DOCUMENTS = 60
CHATS = 1500
PREFERENCES = 300
QUESTIONS = 100


@dataclass(frozen=True)
class DemoText:
    """Text of one seed. No document, and no question, is in two of the parts.

    Attributes:
        pretrain_en, pretrain_th: documents for pre-training, about 300 KB of each language.
        heldout_en, heldout_th: documents of the same kinds that are not among them.
        sft: chats, `{"messages": [...], "language": "th" | "en"}`.
        preferences: `{"prompt": [...], "chosen": [...], "rejected": [...]}`; what is chosen is right, polite and in the
            language of the question.
        eval_chats: chats of one question and its only right answer, in the form of `sft`.
    """

    pretrain_en: list[str]
    pretrain_th: list[str]
    heldout_en: list[str]
    heldout_th: list[str]
    sft: list[dict[str, Any]]
    preferences: list[dict[str, list[Message]]]
    eval_chats: list[dict[str, Any]]


def build_text(seed: int) -> DemoText:
    """Make the demo's text; the same seed gives the same text."""
    rng = random.Random(seed)
    exchanges = all_exchanges(rng)
    rng.shuffle(exchanges)
    by_language = {language: [e for e in exchanges if e.language == language] for language in ("th", "en")}
    questions = [by_language[language].pop() for _ in range(QUESTIONS // 2) for language in ("th", "en")]
    compared = [by_language[language].pop() for _ in range(PREFERENCES // 2) for language in ("th", "en")]
    documents = _documents(rng)
    return DemoText(
        pretrain_th=documents["th"][HELD_OUT_DOCUMENTS:],
        pretrain_en=documents["en"][HELD_OUT_DOCUMENTS:],
        heldout_th=documents["th"][:HELD_OUT_DOCUMENTS],
        heldout_en=documents["en"][:HELD_OUT_DOCUMENTS],
        sft=_chats(by_language, rng),
        preferences=[
            {
                "prompt": exchange.messages[:1],
                "chosen": exchange.messages[1:],
                "rejected": [{"role": "assistant", "content": rejected_answer(exchange, rng)}],
            }
            for exchange in compared
        ],
        eval_chats=[{"messages": exchange.messages, "language": exchange.language} for exchange in questions],
    )


def write_text_files(corpus: DemoText, folder: Path) -> None:
    """Write a corpus as files that the verbs read.

    `pretrain_LANGUAGE.txt` and `heldout_LANGUAGE.txt` have an empty line between documents; `pretrain.jsonl` has the
    Thai documents and as much English, shuffled (`text`); the chats are in `sft.jsonl`, `preferences.jsonl` and
    `eval_chats.jsonl`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("pretrain_en", "pretrain_th", "heldout_en", "heldout_th"):
        (folder / f"{name}.txt").write_text("\n\n".join(getattr(corpus, name)) + "\n", encoding="utf-8")
    # As much English as Thai, in characters: enough that the English is not forgotten.
    english = corpus.pretrain_en[: _count_up_to(corpus.pretrain_en, sum(map(len, corpus.pretrain_th)))]
    both = [*english, *corpus.pretrain_th]
    random.Random(0).shuffle(both)
    rows = {
        "pretrain": [{"text": text} for text in both],
        "sft": corpus.sft,
        "preferences": corpus.preferences,
        "eval_chats": corpus.eval_chats,
    }
    for name, items in rows.items():
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _count_up_to(texts: list[str], characters: int) -> int:
    """How many of `texts`, from the first on, have `characters` characters together at most."""
    return sum(length <= characters for length in itertools.accumulate(map(len, texts)))


def _documents(rng: random.Random) -> dict[str, list[str]]:
    """Documents of each language, without repeats, until there are enough; the held-out ones come first."""
    documents: dict[str, list[str]] = {"th": [], "en": []}
    seen: set[str] = set()
    left = dict.fromkeys(documents, PRETRAIN_BYTES)
    while any(size > 0 for size in left.values()):
        for language, text in zip(("th", "en"), draw_document(rng)):
            if left[language] <= 0 or text in seen:
                continue
            seen.add(text)
            documents[language].append(text)
            if len(documents[language]) > HELD_OUT_DOCUMENTS:
                left[language] -= len(text.encode())
    return documents


def _chats(by_language: dict[str, list[Exchange]], rng: random.Random) -> list[dict[str, Any]]:
    """One question a chat, two in some, and a system message before some."""
    chats: list[dict[str, Any]] = []
    remaining = {language: list(exchanges) for language, exchanges in by_language.items()}
    while len(chats) < CHATS:
        language = ("th", "en")[len(chats) % 2]
        if not remaining[language]:
            break
        messages = remaining[language].pop().messages
        if rng.random() < 0.15:
            messages = messages + rng.choice(by_language[language]).messages
        if rng.random() < 0.1:
            messages = [{"role": "system", "content": SYSTEM[language]}, *messages]
        chats.append({"messages": messages, "language": language})
    return chats
