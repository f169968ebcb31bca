# SPDX-License-Identifier: Apache-2.0
"""Questions of judged suites."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jai.errors import UserError

# MT-Bench shows its judge no reference answer to these, whose questions have many good answers (Zheng et al., 2023,
# section 3.4); it does to coding, math and reasoning, and of a ninth category nothing is published.
_MANY_GOOD_ANSWERS = ("writing", "roleplay", "extraction", "stem", "humanities")
_ID_NAMES = ("question_id", "prompt_id", "id")


@dataclass(frozen=True)
class ChatQuestion:
    """Turns of a user, each asked after the model has answered the one before.

    Attributes:
        id: unique in its file.
        category: such as "math"; None where the file has none.
        turns: what the user says.
        references: right answers to the turns, empty where there is none; turns at the end may lack them.
    """

    id: str
    category: str | None
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()

    @property
    def wants_reference(self) -> bool:
        """Whether the judge compares with a reference answer."""
        return self.category is not None and self.category.lower() not in _MANY_GOOD_ANSWERS

    @property
    def lacks_reference(self) -> bool:
        """Whether the judge has to know a right answer by itself."""
        return self.wants_reference and not (len(self.references) == len(self.turns) and all(self.references))


@dataclass(frozen=True)
class FactQuestion:
    """A question with the facts that its answer is checked against.

    Attributes:
        id: unique in its file.
        category: such as the part of the benchmark; None where the file has none.
        question: what the user says.
        facts: of a reliable source.
        answer: a right answer, None where the file has none.
    """

    id: str
    category: str | None
    question: str
    facts: str
    answer: str | None = None


def chat_question(row: Mapping[str, Any]) -> ChatQuestion:
    """A question of MT-Bench.

    Args:
        row: with `turns` (or `prompt`, a list too), an id (`question_id`, `prompt_id` or `id`) and perhaps `category`
            and `reference`, a right answer to each turn.

    Raises:
        ValueError: if it is something else.
    """
    turns = row.get("turns", row.get("prompt"))
    if not _is_texts(turns) or not turns:
        raise ValueError("`turns` is not a list of texts, what the user says turn by turn")
    references = row.get("reference") or ()
    is_list = isinstance(references, list | tuple) and len(references) <= len(turns)
    if not is_list or not all(each == "" or _is_text(each) for each in references):
        raise ValueError(f"`reference` is not a list of {len(turns)} texts, one a turn")
    return ChatQuestion(_id(row), _category(row), tuple(turns), tuple(references))


def fact_question(row: Mapping[str, Any]) -> FactQuestion:
    """A question of JAI-Hall-Bench.

    Args:
        row: with `question`, an id, `facts` (or `context`) or `answer` or both, and perhaps `category`.

    Raises:
        ValueError: if it is something else.
    """
    question, answer = row.get("question"), row.get("answer")
    facts = row.get("facts", row.get("context")) or ""
    if not _is_text(question):
        raise ValueError("`question` is not text")
    if not isinstance(facts, str) or not (answer is None or _is_text(answer)) or not (facts.strip() or answer):
        raise ValueError("no text `facts` (or `context`) and no text `answer`, so no answer can be checked")
    return FactQuestion(_id(row), _category(row), str(question), facts, answer)


def check_questions(questions: Sequence[ChatQuestion | FactQuestion], place: str) -> None:
    """Refuse data without a question, or with an id that stands there twice.

    Raises:
        UserError: naming the place.
    """
    if not questions:
        raise UserError(f"{place} has no questions. Give a file with at least one.")
    counts = Counter(question.id for question in questions)
    id_, count = counts.most_common(1)[0]
    if count > 1:
        raise UserError(f"{place} has the id {id_} {count} times. Give each question its own.")


def questions_hash(questions: Sequence[ChatQuestion | FactQuestion]) -> str:
    """SHA-256 of all that is asked, in its order."""
    asked = [each.turns if isinstance(each, ChatQuestion) else each.question for each in questions]
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()


def _id(row: Mapping[str, Any]) -> str:
    value = next((row[name] for name in _ID_NAMES if row.get(name) is not None), None)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"no id (one of {', '.join(_ID_NAMES)}), which is a number or a text")
    return str(value)


def _category(row: Mapping[str, Any]) -> str | None:
    value = row.get("category")
    if value is not None and not _is_text(value):
        raise ValueError("`category` is not text")
    return value


def _is_text(value: Any) -> bool:
    """Whether it is a text that is not blank and can be sent: half of a surrogate pair cannot."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= each <= "\udfff" for each in value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_text(each) for each in value)
