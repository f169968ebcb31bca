# SPDX-License-Identifier: Apache-2.0
"""Questions of Thai examinations in one form, from the forms in which they are published: a question, its choices, and
the number of the right one, from 0. The task files in `evaluation/tasks` name these functions."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

LETTERS = "ABCDE"
_ANSWER = re.compile(r"\(([1-5])\)")


def letters(doc: Mapping[str, Any]) -> list[str]:
    """What the model chooses from."""
    return list(LETTERS[: len(doc["choices"])])


def thai_exam_docs(dataset: "Dataset") -> "Dataset":
    """Rows of scb10x/thai_exam: the Hub's, with a column a letter, or SEA-HELM's, with `choices` by letter."""
    return dataset.map(_thai_exam_doc, remove_columns=dataset.column_names)


def _thai_exam_doc(row: Mapping[str, Any]) -> dict[str, Any]:
    by_letter = row["choices"] if "choices" in row else {letter: row.get(letter) for letter in "abcde"}
    # Questions with fewer choices have empty ones, or none, at the end or between.
    texts = {letter: (by_letter.get(letter) or "").strip() for letter in "abcde"}
    given = [letter for letter, text in texts.items() if text]
    return {
        "question": row["question"].strip(),
        "choices": [texts[letter] for letter in given],
        "answer": given.index(row["answer"].strip().lower()),
        "subject": row.get("subject") or "",
    }


def onet_docs(dataset: "Dataset") -> "Dataset":
    """Rows of OpenThaiGPT's O-NET files that are multiple choice, can be answered from their text, and have one answer.

    Of the 397 questions of the ten files, 334 are. Choices stand in one text, numbered "(1) … (2) …".
    """
    return dataset.filter(_is_answerable).map(_onet_doc, remove_columns=dataset.column_names)


def _is_answerable(row: Mapping[str, Any]) -> bool:
    return all(
        str(row[name]).upper() == "TRUE" for name in ("isAnswerable", "isMultipleChoice", "isSingleChoiceSolution")
    )


def _onet_doc(row: Mapping[str, Any]) -> dict[str, Any]:
    choices = numbered_choices(row["input"])
    answer = _ANSWER.match(row["result"].strip())
    if answer is None or int(answer[1]) > len(choices):
        raise ValueError(f"the answer {row['result']!r} is none of {row['input']!r}")
    return {
        "question": row["instruction"].replace("\\n", "\n").strip(),
        "choices": choices,
        "answer": int(answer[1]) - 1,
        "year": str(row["year"]),
    }


def numbered_choices(text: str) -> list[str]:
    """The choices that stand in one text. A few numbers have lost their brackets, and begin a line.

    >>> numbered_choices("(1) ก (2) ข")
    ['ก', 'ข']
    >>> numbered_choices("(1) ก \\n2.ข")
    ['ก', 'ข']
    """
    text = text.replace("\\n", "\n")
    marks: list[re.Match[str]] = []
    for number in range(1, len(LETTERS) + 1):
        rest = re.compile(rf"\({number}\)"), re.compile(rf"^[\s\\]*{number}\s*[.)]?\s*", re.MULTILINE)
        start = marks[-1].end() if marks else 0
        mark = next(filter(None, (pattern.search(text, start) for pattern in rest)), None)
        if mark is None:
            break
        marks.append(mark)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [text[mark.end() : end].strip() for mark, end in zip(marks, ends)]


def truthful_results(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Share of the probability of all answers that the true ones have: TruthfulQA's MC2, as lm-eval has it."""
    values = [value for value, _ in results]
    shares = [math.exp(value - max(values)) for value in values]
    true = sum(share for share, label in zip(shares, doc["mc2_targets"]["labels"]) if label == 1)
    return {"acc": true / sum(shares)}
