# SPDX-License-Identifier: Apache-2.0
"""Files for the chain of post-training, from the shared data: text, chats by category, pairs, prompts, held-out rows.

The categories are those of the JAI-1 report's Table 9, as far as the data has them: it has no chats for safety. Chats
for instruction following are made from others, by a program that also checks that the answer follows.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arithmetic_chats import draw_problems

from jai.evaluation.instructions.scoring import instruction_row, judge_instructions

LONGEST_CHAT = 420  # characters of question and answer
LONGEST_DOCUMENT = 600
TASKS = {  # of the shared data, by Table 9's categories
    "sentiment": "task",
    "translate_th_en": "task",
    "translate_en_th": "task",
    "reading_comprehension": "culture",  # of Thai Wikipedia
    "law_recall": "culture",
    "headline": "culture",
    "open": "chat",
    "math": "task",
}
CLOSINGS = {
    "th": ("ขอบคุณ", "สวัสดี", "จบข่าว", "หวังว่าจะเป็นประโยชน์"),
    "en": ("Thank you.", "The end.", "Good luck.", "I hope this helps."),
}
ASKED = {
    "th": {
        "end": "จบคำตอบด้วยคำว่า {}",
        "quote": "ใส่คำตอบทั้งหมดในเครื่องหมายอัญประกาศ",
        "title": "ตั้งชื่อเรื่องใน << และ >>",
    },
    "en": {
        "end": "End your answer with: {}",
        "quote": "Put your whole answer in double quotes.",
        "title": "Give a title between << and >>.",
    },
}
TITLES = {"th": "คำตอบ", "en": "Answer"}


@dataclass(frozen=True)
class Sizes:
    """How many rows of each kind."""

    documents: int = 6000
    instructions: int = 1200
    problems: int = 600
    held_out: int = 100


def write_data(shared: Path, out: Path, sizes: Sizes, seed: int) -> dict[str, int]:
    """Write all files into `out`; gives how many rows each has."""
    rng = random.Random(seed)
    out.mkdir(parents=True)
    files: dict[str, list[dict[str, Any]]] = {}
    documents = [
        {"text": row["text"]}
        for language in ("th", "en")
        for row in _drawn(
            _read(shared / f"train_{language}.jsonl.gz"),
            lambda row: len(row["text"]) <= LONGEST_DOCUMENT,
            sizes.documents // 2,
            rng,
        )
    ]
    files["pretrain"] = documents
    held_out: list[dict[str, Any]] = []
    instructions: list[dict[str, Any]] = []
    for language in ("th", "en"):
        chats = _drawn(
            _read(shared / f"instruct_{language}.jsonl.gz"),
            lambda row: sum(len(turn["content"]) for turn in row["messages"]) <= LONGEST_CHAT,
            None,
            rng,
        )
        held_out += [_chat(row, language) for row in chats[: sizes.held_out]]
        chats = chats[sizes.held_out :]
        changed = [row for row in chats if TASKS[row["task"]] == "task"][: sizes.instructions]
        taken = {id(row) for row in changed}
        for row in chats:
            if id(row) not in taken:
                files.setdefault(f"{TASKS[row['task']]}_{language}", []).append(_chat(row, language))
        made = [instruction_chat(row, language, rng) for row in changed]
        cut = min(sizes.held_out, len(made) // 4)
        files[f"if_{language}"] = made[cut:]
        if language == "th":
            instructions += made[:cut]
        train, test = draw_problems(language, train=2 * sizes.problems, held_out=sizes.held_out, seed=seed)
        files[f"arithmetic_{language}"] = [each.chat(thinks=True) for each in train[: sizes.problems]]
        files.setdefault("problems", []).extend(
            {"prompt": each.prompt, "solution": str(each.result), "language": language}
            for each in train[sizes.problems :]
        )
        files.setdefault("heldout_problems", []).extend(
            {"prompt": each.prompt, "solution": str(each.result), "language": language} for each in test
        )
    files["heldout_chats"] = held_out
    files["prompts_if"] = [
        {"id": f"if-{number}", "prompt": row["messages"][:-1], "category": "if", **_columns(row)}
        for number, row in enumerate(instructions)
    ]
    files["answers_if"] = [
        {"id": f"if-{number}", "answers": [row["messages"][-1]["content"]]} for number, row in enumerate(instructions)
    ]
    pairs = _drawn(
        _read(shared / "preference_th.jsonl.gz"),
        lambda row: all(len(row[side][0]["content"]) <= LONGEST_CHAT for side in ("prompt", "chosen", "rejected")),
        None,
        rng,
    )
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in pairs]
    asked = sorted({json.dumps(row["prompt"]) for row in pairs})
    rng.shuffle(asked)
    unseen = set(asked[: len(asked) // 4])  # a prompt has several pairs
    files["heldout_pairs"] = [row for row in pairs if json.dumps(row["prompt"]) in unseen][: sizes.held_out]
    files["pairs"] = [row for row in pairs if json.dumps(row["prompt"]) not in unseen]
    prompts = {json.dumps(row["prompt"]): row["prompt"] for row in files["pairs"]}
    files["prompts_chat"] = [
        {"id": f"chat-{number}", "prompt": prompt, "category": "chat"} for number, prompt in enumerate(prompts.values())
    ]
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    text = "\n".join(row["text"] for row in documents)
    (out / "text.txt").write_text(text + "\n", encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _drawn(
    rows: Iterable[dict[str, Any]], fits: Callable[[dict[str, Any]], bool], count: int | None, rng: random.Random
) -> list[dict[str, Any]]:
    kept = [row for row in rows if fits(row)]
    rng.shuffle(kept)
    return kept[:count]


def _chat(row: dict[str, Any], language: str) -> dict[str, Any]:
    return {"messages": row["messages"], "language": language}


def instruction_chat(row: dict[str, Any], language: str, rng: random.Random) -> dict[str, Any]:
    """A chat whose question asks for a form that a program checks, and whose answer has it, after any thought."""
    asked, answer = row["messages"][-2]["content"], row["messages"][-1]["content"]
    before, closing_tag, answer = answer.rpartition("</think>\n\n")
    thought = before + closing_tag
    kind = rng.choice(("end", "quote", "title"))
    closing = rng.choice(CLOSINGS[language])
    type_, arguments, formed = {
        "end": ("startend:end_checker", {"end_phrase": closing}, f"{answer} {closing}"),
        "quote": ("startend:quotation", {}, '"{}"'.format(answer.replace('"', "'"))),
        "title": ("detectable_format:title", {}, f"<<{TITLES[language]}>>\n{answer}"),
    }[kind]
    told = ASKED[language][kind].format(closing)
    made = {
        "messages": [
            {"role": "user", "content": f"{asked}\n{told}"},
            {"role": "assistant", "content": thought + formed},
        ],
        "language": language,
        "instruction_id_list": [type_],
        "kwargs": [arguments],
    }
    checked = instruction_row({"key": "made", "prompt": "", **_columns(made)}, language)
    if not all(judge_instructions(checked, thought + formed).strict):
        raise ValueError(f"{formed!r} does not follow {type_}")
    return made


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("instruction_id_list", "kwargs")}
