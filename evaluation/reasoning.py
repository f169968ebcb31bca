# SPDX-License-Identifier: Apache-2.0
"""Problems with final answers, Thai and English, as lm-eval's tasks take them (`evaluation/tasks/reasoning`)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jai.evaluation.answers import STATED_FORMS, is_right_answer
from jai.evaluation.language import language_fault, think_fault

if TYPE_CHECKING:
    from datasets import Dataset

# By what data sets call them: MATH and AIME, AIME 2024, MGSM.
_PROBLEM_COLUMNS = ("problem", "Problem", "question")
_ANSWER_COLUMNS = ("answer_number", "answer", "Answer")


def problem_docs(dataset: "Dataset") -> "Dataset":
    """Rows with `problem` and `gold`, whatever their columns are called.

    Raises:
        KeyError: if a row has no problem, or no answer.
    """
    return dataset.map(_problem_doc, remove_columns=dataset.column_names)


def _problem_doc(row: Mapping[str, Any]) -> dict[str, str]:
    return {"problem": _first(row, _PROBLEM_COLUMNS).strip(), "gold": _first(row, _ANSWER_COLUMNS).strip()}


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if row.get(name) is not None:
            return str(row[name])
    raise KeyError(f"none of {', '.join(names)}")


def thai_reply_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Scores of a reply that should be in Thai."""
    return _reply_scores(doc, results[0], "th")


def english_reply_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Scores of a reply that should be in English."""
    return _reply_scores(doc, results[0], "en")


def _reply_scores(doc: Mapping[str, Any], reply: str, language: str) -> dict[str, float]:
    """Whether the final answer is right: as `exact_match` in any form, as `stated_match` where it is stated as one."""
    asked = {"gold": doc["gold"], "question": doc["problem"]}
    return {
        "exact_match": float(is_right_answer(reply, **asked)),
        "stated_match": float(is_right_answer(reply, forms=STATED_FORMS, **asked)),
        "language_acc": float(language_fault(reply, language) is None),
        "think_acc": float(think_fault(reply) is None),
    }
