# SPDX-License-Identifier: Apache-2.0
"""Answers that are judged: of a model, turn by turn, or from a file."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jai.evaluation.endpoint import FailedRequest
from jai.evaluation.judged.questions import ChatQuestion
from jai.evaluation.reply_cache import ChatReply, ChatRequest
from jai.evaluation.text import split_thought

# Asks a model; gives a reply or a failure to each request, in order. The second argument names the work for people.
Asker = Callable[[Sequence[ChatRequest], str], Sequence[ChatReply | FailedRequest]]

# MT-Bench's temperatures by category (FastChat's `temperature_config`); others are answered with 0.7 there.
_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class ChatAnswers:
    """A model's answers to the turns of a question.

    Attributes:
        id: of the question.
        answers: as many as could be had: a turn after one that failed is not asked.
    """

    id: str
    answers: tuple[str, ...]


def answer_chats(
    questions: Sequence[ChatQuestion],
    ask: Asker,
    *,
    max_tokens: int,
    temperature: float | None = None,
    seed: int | None = None,
) -> list[ChatAnswers]:
    """Have a model answer questions, all of them one turn after the other.

    Args:
        questions: what is asked.
        ask: asks the model.
        max_tokens: of each answer.
        temperature: of all answers; None is MT-Bench's, by category.
        seed: that is sent along; None sends none.

    Returns:
        The answers to each question, without thoughts: these are neither judged nor part of the conversation.
    """
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [
            number
            for number, question in enumerate(questions)
            if turn < len(question.turns) and len(answers[number]) == turn
        ]
        requests = []
        for number in asked:
            question = questions[number]
            messages = [{"role": "user", "content": question.turns[0]}]
            for answer, next_turn in zip(answers[number], question.turns[1:]):
                messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": next_turn}]
            chosen = _temperature(question) if temperature is None else temperature
            parameters = {"temperature": chosen, "max_tokens": max_tokens, **({} if seed is None else {"seed": seed})}
            requests.append(ChatRequest(messages, parameters))
        for number, reply in zip(asked, ask(requests, f"Answering, turn {turn + 1}")):
            if isinstance(reply, ChatReply):
                answers[number].append(split_thought(reply.text).answer.strip())
    return [ChatAnswers(question.id, tuple(given)) for question, given in zip(questions, answers)]


def _temperature(question: ChatQuestion) -> float:
    return _TEMPERATURES.get((question.category or "").lower(), _OTHER_TEMPERATURE)


def write_answers(path: Path, questions: Iterable[ChatQuestion], answers: Iterable[ChatAnswers]) -> None:
    """Write answers as JSON Lines: `id`, `category`, `turns`, `answers`."""
    rows = [
        {"id": question.id, "category": question.category, "turns": question.turns, "answers": given.answers}
        for question, given in zip(questions, answers)
    ]
    partial = path.with_name(f"{path.name}.new")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def chat_answers(row: Mapping[str, Any]) -> ChatAnswers:
    """Answers as `write_answers` writes them, or in FastChat's form (`question_id`, `choices[0].turns`).

    Raises:
        ValueError: if the row is something else.
    """
    id_ = row.get("id", row.get("question_id"))
    choices, given = row.get("choices"), row.get("answers")
    if given is None and isinstance(choices, list) and choices and isinstance(choices[0], dict):
        given = choices[0].get("turns")
    if (
        not isinstance(id_, str | int)
        or not isinstance(given, list)
        or not all(isinstance(each, str) for each in given)
    ):
        raise ValueError("no `id` and list of texts `answers`, nor FastChat's `question_id` and `choices`")
    return ChatAnswers(str(id_), tuple(given))
