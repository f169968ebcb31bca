# SPDX-License-Identifier: Apache-2.0
"""Text, chats and questions of `reasoning_merge.py`: the demo's text, and arithmetic that a program makes and checks.

Of the problems some ask for a form as well, such as a title or an ending, which a program checks too.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arithmetic_chats import Problem, draw_problems
from post_training_data import instruction_chat

from jai.demo.text.corpus import build_text
from jai.evaluation.language import language_fault

Chat = dict[str, Any]


@dataclass(frozen=True)
class DataSizes:
    """How many rows of each kind, a language.

    Attributes:
        base: problems that the base answers, without a thought and often wrongly: it learns the form alone.
        traces: problems with a thought, of the reasoner; in English.
        aligned: problems with a thought for the language model, in each of both languages, and as many Thai chats.
        forms: share of the problems that ask for a form.
        questions: held-out problems, and as many that ask for a form.
    """

    base: int = 300
    traces: int = 1000
    aligned: int = 100
    forms: float = 0.3
    questions: int = 60


def write_data(out: Path, sizes: DataSizes) -> None:
    """Write text, the chats of each model, and questions by kind into a folder; the same every time.

    No problem is in two of training and questions, not even in the other language.
    """
    rng = random.Random(0)
    corpus = build_text(0)
    train: dict[str, list[Problem]] = {}
    questions: dict[str, list[Chat]] = {}
    for language in ("th", "en"):
        # One seed: both languages hold out the same sums.
        train[language], held_out = draw_problems(language, train=2000, held_out=2 * sizes.questions, seed=0)
        plain, formed = held_out[: sizes.questions], held_out[sizes.questions :]
        questions[f"problems {language}"] = [each.chat(thinks=False, solution=str(each.result)) for each in plain]
        questions[f"forms {language}"] = [instruction_chat(each.chat(thinks=False), language, rng) for each in formed]
    questions["chats th"] = [chat for chat in corpus.eval_chats if _is_thai(chat)]

    def answered(language: str, first: int, count: int, *, thinks: bool) -> list[Chat]:
        problems = train[language][first : first + count]
        chats = [each.chat(thinks=thinks) for each in problems]
        return [instruction_chat(chat, language, rng) if rng.random() < sizes.forms else chat for chat in chats]

    chats = {language: [chat for chat in corpus.sft if chat["language"] == language] for language in ("th", "en")}
    thai = [chat for chat in chats["th"] if _is_thai(chat)]
    files = {
        "base": [
            *chats["th"],
            *chats["en"],
            *(chat for language in train for chat in answered(language, 0, sizes.base, thinks=False)),
        ],
        "language": [*thai, *answered("th", 0, sizes.base, thinks=False)],
        "reasoner": answered("en", 0, sizes.traces, thinks=True),
        "aligned": [
            *thai[: sizes.aligned],
            *(chat for language in train for chat in answered(language, 0, sizes.aligned, thinks=True)),
        ],
    }
    for name, rows in files.items():
        rng.shuffle(rows)
        lines = (json.dumps({"messages": row["messages"]}, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    documents = [*corpus.pretrain_th, *corpus.pretrain_en]
    (out / "documents.json").write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
    (out / "questions.json").write_text(json.dumps(questions, ensure_ascii=False), encoding="utf-8")


def _is_thai(chat: Chat) -> bool:
    """Whether every answer is in Thai; some of the demo's answers to Thai questions translate into English."""
    answers = [turn["content"] for turn in chat["messages"] if turn["role"] == "assistant"]
    return chat["language"] == "th" and all(language_fault(answer, "th") is None for answer in answers)
