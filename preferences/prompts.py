# SPDX-License-Identifier: Apache-2.0
"""Prompts that candidates answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jai.errors import UserError
from jai.evaluation.reply_cache import Message

_ROLES = ("system", "user", "assistant")
_PROMPTS = ("prompt", "messages", "question", "problem", "prompts")


@dataclass(frozen=True)
class PreferencePrompt:
    """A conversation that ends with a user's turn.

    Attributes:
        id: unique in its file; empty where the file has none.
        messages: the conversation.
        category: such as "chat"; None where the file has none.
        row: all that the file says, such as facts or instructions.
    """

    id: str
    messages: tuple[Message, ...]
    category: str | None
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What the user says last."""
        return self.messages[-1]["content"]


def preference_prompt(row: Mapping[str, Any]) -> PreferencePrompt:
    """A prompt from a row of a file.

    Args:
        row: with `prompt` (a text or messages), `messages` (a conversation, whose last answers are left out),
            `question`, `problem`, or SEA-IFEval's `prompts`; perhaps a system turn (`system` or `system_prompt`), an id
            (`id`, `key`, `prompt_id` or `question_id`) and a `category`.

    Raises:
        ValueError: if it is something else.
    """
    id_ = next((row[name] for name in ("id", "key", "prompt_id", "question_id") if row.get(name) is not None), "")
    category = row.get("category")
    return PreferencePrompt(str(id_), _messages(row), category if isinstance(category, str) else None, row)


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    given = next((row[name] for name in _PROMPTS if row.get(name)), None)
    if isinstance(given, list) and given and isinstance(given[0], dict) and "text" in given[0]:
        given = given[0]["text"]
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list | tuple) or not all(map(_is_message, given)):
        raise ValueError(
            "no `prompt`, `messages`, `question` or `problem`: a text, or messages with role and content, were expected"
        )
    last = max((number for number, message in enumerate(given) if message["role"] == "user"), default=None)
    if last is None:
        raise ValueError("no message of a user")
    messages = tuple({"role": message["role"], "content": message["content"]} for message in given[: last + 1])
    system = row.get("system", row.get("system_prompt"))
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": system}, *messages)


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        return False
    content = message.get("content")
    return (
        isinstance(content, str) and bool(content.strip()) and not any("\ud800" <= each <= "\udfff" for each in content)
    )


def number_prompts(prompts: Sequence[PreferencePrompt], place: str) -> list[PreferencePrompt]:
    """Prompts with an id each: their own, or their place in the file, from 1.

    Raises:
        UserError: if there is none, or two have one id.
    """
    if not prompts:
        raise UserError(f"{place} has no prompts. Give a file with at least one.")
    numbered = [
        PreferencePrompt(each.id or str(number), each.messages, each.category, each.row)
        for number, each in enumerate(prompts, 1)
    ]
    seen: set[str] = set()
    for each in numbered:
        if each.id in seen:
            raise UserError(f"{place} has the id {each.id} twice. Give each prompt its own.")
        seen.add(each.id)
    return numbered
