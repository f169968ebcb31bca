# SPDX-License-Identifier: Apache-2.0
"""Messages of every form that data comes in (TRL's, OpenAI's, ShareGPT's), read into the one that TRL trains on.

A message becomes `{"role", "content"}`, and where it has them: `tool_calls` with their arguments as mappings,
`reasoning_content`, `name`, `tool_call_id`, and `weight: 0` on an answer that is not to be trained.
"""

import json
import re
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]

A_MESSAGE = '{"role": "user", "content": "…"}'

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CALLING_ROLE = "function_call"  # ShareGPT's: the assistant, whose value is the call
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Sky-T1's, Bespoke-Stratos's and OpenThoughts's. <think> stays where it is: chat templates know it.
_TAGGED_THOUGHT = re.compile(
    r"<\|begin_of_thought\|>(?P<thought>.*)<\|end_of_thought\|>\s*(?:<\|begin_of_solution\|>)?(?P<answer>.*?)"
    r"(?:<\|end_of_solution\|>)?",
    re.DOTALL,
)
_TEXT_PARTS = ("text", "input_text", "output_text")
_MAY_FOLLOW: dict[str | None, tuple[str, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool", "user"),
    "tool": ("tool", "assistant"),
}


class RowFault(Exception):
    """Why a row cannot be trained on.

    Attributes:
        kind: by which faults are counted.
        text: the fault itself, which reads after the name of the row.
    """

    def __init__(self, kind: str, text: str):
        super().__init__(kind, text)
        self.kind = kind
        self.text = text


def shortened(value: Any) -> str:
    """A value as a message of one line shows it."""
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def read_messages(value: Any) -> list[Message]:
    """A conversation in TRL's form; it may be JSON in a string, as a cell of a CSV file is.

    Raises:
        RowFault: with a text that reads after the name of the column.
    """
    value = parsed_messages(value)
    if value is None:
        raise RowFault("null", "is null")
    if not isinstance(value, list):
        raise RowFault("not messages", f"is {shortened(value)}; expected a list of messages such as {A_MESSAGE}")
    if not value:
        raise RowFault("no messages", "has no messages")
    messages = []
    for turn, message in enumerate(value, 1):
        if isinstance(message, dict) and {"input", "output"} <= message.keys() and "role" not in message:
            # Capybara's: a question and its answer together.
            messages += [_read_message({"role": role, "content": message[key]}, turn) for role, key in _INPUT_OUTPUT]
        else:
            messages.append(_read_message(message, turn))
    return messages


_INPUT_OUTPUT = (("user", "input"), ("assistant", "output"))


def parsed_messages(value: Any) -> Any:
    """The list of messages in a string of JSON; every other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _read_message(message: Any, turn: int) -> Message:
    if not isinstance(message, dict) or not ({"role"} <= message.keys() or {"from", "value"} <= message.keys()):
        raise RowFault(
            "not messages", f"has {shortened(message)} as message {turn}; expected a message such as {A_MESSAGE}"
        )
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise RowFault("no role", f"has no role in message {turn}")
    content = message.get("content", message.get("value"))
    if role == _CALLING_ROLE:
        message, content = {**message, "tool_calls": content}, None
    role = {**_ROLES, _CALLING_ROLE: "assistant"}.get(role, role)
    calls = _read_calls(message, turn) if role == "assistant" else []
    read: Message = {"role": role, "content": _read_content(content, bool(calls), turn)}
    if calls:
        read["tool_calls"] = calls
    if role == "assistant":
        thought = next((message[key] for key in _THOUGHTS if isinstance(message.get(key), str) and message[key]), None)
        if (tagged := _TAGGED_THOUGHT.fullmatch(read["content"].strip())) is not None:
            thought, read["content"] = tagged["thought"].strip(), tagged["answer"].strip()
        if thought is not None:
            read["reasoning_content"] = thought
        if _is_left_out(message, turn):
            read["weight"] = 0
    read |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    return read


def _read_content(content: Any, has_calls: bool, turn: int) -> str:
    if isinstance(content, list):
        return "".join(_read_part(part, turn) for part in content)
    if content is None:
        if has_calls:
            return ""
        raise RowFault("no content", f"has no content in message {turn}")
    if not isinstance(content, str):
        raise RowFault("not text", f"has {shortened(content)} as content of message {turn}; expected a string")
    return content


def _read_part(part: Any, turn: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") in _TEXT_PARTS:
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else part
    raise RowFault("not text", f"has a part of content that is not text in message {turn} ({shortened(kind)})")


def _read_calls(message: Message, turn: int) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or message.get("function_call")
    if isinstance(calls, str):
        calls = _parsed(calls, f"has a call that is not valid JSON in message {turn}")
    calls = [calls] if isinstance(calls, dict) else calls
    if not calls:
        return []
    if not isinstance(calls, list):
        raise RowFault("tool calls", f"has {shortened(calls)} as tool calls of message {turn}; expected a list")
    return [_read_call(call, turn) for call in calls]


def _read_call(call: Any, turn: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFault(
            "tool calls",
            f"has {shortened(call)} as a tool call of message {turn}; expected "
            '{"type": "function", "function": {"name": "…", "arguments": {…}}}',
        )
    arguments = function.get("arguments", function.get("parameters")) or {}
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"has arguments of a call that are not valid JSON in message {turn}")
    if not isinstance(arguments, dict):
        raise RowFault("tool calls", f"has {shortened(arguments)} as arguments of a call in message {turn}")
    read = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **read} if isinstance(call.get("id"), str) else read


def _parsed(text: str, fault: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowFault("tool calls", f"{fault} ({error})") from error


def _is_left_out(message: Message, turn: int) -> bool:
    """Whether an answer is not to be trained: `weight: 0` is OpenAI's way to say so, `train: false` another."""
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1):
        raise RowFault("weight", f"has the weight {shortened(weight)} in message {turn}; expected 0 or 1")
    if train not in (None, False, True):
        raise RowFault("weight", f"has `train: {shortened(train)}` in message {turn}; expected true or false")
    return weight == 0 or train is False


def check_turns(messages: list[Message]) -> None:
    """See that turns follow each other as they can, and that every answer says something.

    System turns may stand anywhere. Roles that are not known are left to the chat template.

    Raises:
        RowFault: with a text that reads after the name of the column.
    """
    before: str | None = None
    for turn, message in enumerate(messages, 1):
        role = message["role"]
        if role == "system":
            continue
        if before in _MAY_FOLLOW and role in _MAY_FOLLOW and role not in _MAY_FOLLOW[before]:
            earlier = {None: "at the beginning", "call": "after a call"}.get(before, f"after one of the {before}")
            raise RowFault("turns out of order", f"has a turn of the {role} {earlier} (message {turn})")
        says_nothing = not message["content"].strip() and "tool_calls" not in message
        if role == "assistant" and says_nothing and message.get("weight") != 0:
            raise RowFault("empty answer", f"has an empty answer in message {turn}")
        before = "call" if "tool_calls" in message else role
