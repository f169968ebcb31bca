# SPDX-License-Identifier: Apache-2.0
"""A row of any source, read into a row that TRL trains on.

Forms that are read: TRL's (messages, prompt and completion, text, pairs, single answers with a label), OpenAI's
(content in parts, tools and calls), ShareGPT's (`conversations` of from and value), Capybara's, Alpaca's (instruction,
input, output), and UltraFeedback's (the prompt a string and the answers conversations; or `completions` with scores).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from jai.errors import UserError
from jai.trainers.messages import Message, RowFault, check_turns, parsed_messages, read_messages, shortened

Row: TypeAlias = dict[str, Any]

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
CHAT_EXTRAS = ("tools", "chat_template_kwargs")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_PROMPT_COLUMNS = ("prompt", "question", "problem")  # GSM8K's and MATH's
_SOLUTION_COLUMNS = ("solution", "answer")
REWARD_COLUMNS = ("solution", "instruction_id_list", "kwargs")  # what rewards read of a row
_SCORES = ("fine-grained_score", "overall_score", "score", "rating")  # UltraFeedback's overall scores have known faults
_YES, _NO = ("true", "1", "yes", "good"), ("false", "0", "no", "bad")


class DatasetType(Enum):
    """What a row of training data is, in TRL's words."""

    LANGUAGE_MODELING = "language modeling"
    PROMPT_COMPLETION = "prompt-completion"
    PREFERENCE = "preference"
    UNPAIRED_PREFERENCE = "unpaired preference"
    PROMPT = "prompt only"


class Layout(Enum):
    """Which columns a row's content stands in."""

    MESSAGES = "messages"
    TEXT = "text"
    ALPACA = "instruction, input, output"
    PROMPT_COMPLETION = "prompt, completion"
    PAIR = "chosen, rejected"
    SCORED = "completions with scores"
    LABELLED = "prompt, completion, label"
    PROMPT = "prompt"


# Beside the column of the conversation, the text or the prompt.
_CONTENT_COLUMNS = {
    Layout.ALPACA: ("instruction", "input", "output", "history"),
    Layout.PROMPT_COMPLETION: ("prompt", "completion"),
    Layout.PAIR: ("chosen", "rejected"),
    Layout.SCORED: ("completions",),
    Layout.LABELLED: ("prompt", "completion", "label"),
    Layout.PROMPT: (*_SOLUTION_COLUMNS, *REWARD_COLUMNS),
}


@dataclass(frozen=True)
class RowForm:
    """The form of a source's rows.

    Attributes:
        layout: where the content stands.
        type: what the row is trained as.
        conversational: whether it becomes messages (with roles) rather than strings.
        column: of the conversation or the text, where one column holds it.
    """

    layout: Layout
    type: DatasetType
    conversational: bool
    column: str = ""

    @property
    def has_prompt(self) -> bool:
        """Whether a pair comes out with its prompt beside it; pairs of strings without one keep it inside."""
        return self.conversational or bool(self.column)

    @property
    def read_columns(self) -> tuple[str, ...]:
        """The columns of a source that are read; categories, languages and scores have others."""
        of_messages = (*_SYSTEM_COLUMNS, *CHAT_EXTRAS) if self.conversational else ()
        return (*_CONTENT_COLUMNS.get(self.layout, ()), *filter(None, [self.column]), *of_messages)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the rows that come out, in TRL's names."""
        if self.type is DatasetType.PREFERENCE:
            return ("prompt", "chosen", "rejected") if self.has_prompt else ("chosen", "rejected")
        if self.type is DatasetType.UNPAIRED_PREFERENCE:
            return ("prompt", "completion", "label")
        if self.type is DatasetType.PROMPT_COMPLETION:
            return ("prompt", "completion")
        if self.type is DatasetType.PROMPT:
            return ("prompt", *REWARD_COLUMNS)
        return ("messages",) if self.conversational else (self.column,)


def find_form(examples: Sequence[Row], types: Sequence[DatasetType], name: str, text_column: str) -> RowForm:
    """The form of a source, from its first rows.

    Args:
        examples: the first rows; a column that none of them has is not there.
        types: what the stage can train on.
        name: of the source, for the error.
        text_column: of plain text.

    Raises:
        UserError: for columns that are of no form, or of one that another verb trains on.
    """
    columns = list(dict.fromkeys(column for row in examples for column in row))

    def has(*names: str) -> bool:
        return set(names) <= set(columns)

    def holds_messages(*names: str) -> bool:
        return any(isinstance(parsed_messages(row.get(column)), list) for row in examples for column in names)

    if DatasetType.UNPAIRED_PREFERENCE in types and has("prompt", "completion", "label"):
        return RowForm(Layout.LABELLED, DatasetType.UNPAIRED_PREFERENCE, holds_messages("prompt", "completion"))
    if DatasetType.PREFERENCE in types and has("chosen", "rejected"):
        prompt = next(filter(has, _PROMPT_COLUMNS), "")
        is_chat = holds_messages(*filter(None, [prompt]), "chosen", "rejected")
        return RowForm(Layout.PAIR, DatasetType.PREFERENCE, is_chat, prompt)
    if DatasetType.PREFERENCE in types and has("completions") and (has("instruction") or has("prompt")):
        column = "instruction" if has("instruction") else "prompt"
        return RowForm(Layout.SCORED, DatasetType.PREFERENCE, True, column)
    if DatasetType.PROMPT in types:
        for column in (*_PROMPT_COLUMNS, *CONVERSATION_COLUMNS):
            if has(column):
                return RowForm(Layout.PROMPT, DatasetType.PROMPT, True, column)
    if DatasetType.LANGUAGE_MODELING in types:
        for column in CONVERSATION_COLUMNS:
            if has(column):
                return RowForm(Layout.MESSAGES, DatasetType.LANGUAGE_MODELING, True, column)
        if has("prompt", "completion"):
            is_chat = holds_messages("prompt", "completion")
            return RowForm(Layout.PROMPT_COMPLETION, DatasetType.PROMPT_COMPLETION, is_chat)
        if has(text_column):
            return RowForm(Layout.TEXT, DatasetType.LANGUAGE_MODELING, False, text_column)
        if has("instruction", "output"):
            return RowForm(Layout.ALPACA, DatasetType.LANGUAGE_MODELING, True)
    raise UserError(f"The data {name} has the columns {', '.join(columns)}; {_advice(columns, types, text_column)}")


def _advice(columns: Sequence[str], types: Sequence[DatasetType], text_column: str) -> str:
    if DatasetType.LANGUAGE_MODELING in types:
        advice = "Rename its columns, or set `dataset_text_field`."
        if "chosen" in columns:
            advice = "Rename its columns; for preference pairs run `jai dpo`."
        return (
            "expected `messages` or `conversations` (chat), `prompt` and `completion`, `instruction` and `output` "
            f"(Alpaca), or `{text_column}` (plain text, continued pre-training). {advice}"
        )
    if DatasetType.PROMPT in types:
        return "expected a prompt in `prompt`, `question` or `problem`, or `messages`. Rename its columns."
    if DatasetType.UNPAIRED_PREFERENCE in types:
        return "expected `prompt`, `completion` and `label`. Rename its columns."
    return (
        "expected `prompt`, `chosen` and `rejected` (or `chosen` and `rejected` as whole conversations), or "
        "`instruction` and `completions` with scores. Rename its columns; for other data run `jai sft`."
    )


def read_row(row: Any, form: RowForm) -> Row:
    """A row with the columns of `form.columns`, and with `tools` and `chat_template_kwargs` where it has them.

    Raises:
        RowFault: if it cannot be trained on.
    """
    if not isinstance(row, Mapping):
        raise RowFault("no row", f"it is {shortened(row)}; expected columns and their values")
    read = _READERS[form.layout](row, form)
    return read | _extras(row) if form.conversational else read


def _read_conversation(row: Mapping[str, Any], form: RowForm) -> Row:
    with _Column("messages"):
        messages = _with_system(row, read_messages(row.get(form.column)))
        check_turns(messages)
    return {"messages": messages}


def _read_text(row: Mapping[str, Any], form: RowForm) -> Row:
    return {form.column: _text(row, form.column)}


def _read_alpaca(row: Mapping[str, Any], form: RowForm) -> Row:
    instruction, given = _text(row, "instruction"), row.get("input")
    question = f"{instruction}\n\n{given}" if isinstance(given, str) and given.strip() else instruction
    messages: list[Message] = []
    for earlier in row.get("history") or []:
        if not isinstance(earlier, list) or len(earlier) != 2 or not all(isinstance(text, str) for text in earlier):
            raise RowFault("history", f"`history` has {shortened(earlier)}; expected pairs of a question and an answer")
        messages += [{"role": "user", "content": earlier[0]}, {"role": "assistant", "content": earlier[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output")}]
    return {"messages": _with_system(row, messages)}


def _read_prompt_completion(row: Mapping[str, Any], form: RowForm) -> Row:
    if not form.conversational:
        return {"prompt": _text(row, "prompt", may_be_empty=True), "completion": _text(row, "completion")}
    prompt, completion = _turns(row, "prompt", "user"), _turns(row, "completion", "assistant")
    with _Column("prompt` and `completion"):
        check_turns([*prompt, *completion])
    return {"prompt": prompt, "completion": completion}


def _read_prompt(row: Mapping[str, Any], form: RowForm) -> Row:
    """A prompt, which a string is the user's turn of, and what its answers are rewarded by."""
    prompt = _with_system(row, _turns(row, form.column, "user"))
    if form.column in CONVERSATION_COLUMNS:  # of a chat, what its last answers answer, as `jai difficulty` takes it
        while len(prompt) > 1 and prompt[-1]["role"] == "assistant":
            prompt.pop()
    if prompt[-1]["role"] == "assistant":
        raise RowFault("no question", f"`{form.column}` ends with an answer; expected a turn that is to be answered")
    with _Column(form.column):
        check_turns(prompt)
    solution = next((row[column] for column in _SOLUTION_COLUMNS if row.get(column) is not None), None)
    if isinstance(solution, list | dict):
        raise RowFault("solution", f"its solution is {shortened(solution)}; expected a text or a number")
    return {
        "prompt": prompt,
        "solution": None if solution is None or not str(solution).strip() else str(solution),
        "instruction_id_list": row.get("instruction_id_list"),
        "kwargs": row.get("kwargs"),
    }


def _read_labelled(row: Mapping[str, Any], form: RowForm) -> Row:
    label = row.get("label")
    label = {**dict.fromkeys(_YES, True), **dict.fromkeys(_NO, False)}.get(str(label).lower(), label)
    if not isinstance(label, bool):
        raise RowFault("label", f"`label` is {shortened(label)}; expected true (a good answer) or false")
    read = _read_prompt_completion(row, form)
    if form.conversational:
        _refuse_untrained(read["completion"], "all with a label are")
    return {**read, "label": label}


def _read_pair(row: Mapping[str, Any], form: RowForm) -> Row:
    if not form.conversational:
        return _read_pair_of_strings(row, form.column)
    prompt = _turns(row, form.column, "user") if form.column else []
    return _pair(prompt, _turns(row, "chosen", "assistant"), _turns(row, "rejected", "assistant"), row)


def _pair(prompt: list[Message], chosen: list[Message], rejected: list[Message], row: Mapping[str, Any]) -> Row:
    if _said(chosen) == _said(rejected):
        raise RowFault(*_SAME)
    if not prompt or chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":  # whole conversations
        same = sum(1 for _ in _common(chosen, rejected))
        if same == 0 or (prompt and _said(chosen[:same])[-len(prompt) :] != _said(prompt)):
            where = "from `prompt`" if prompt and same else "differently"
            raise RowFault("different questions", f"`chosen` and `rejected` begin {where}. {_BEGINNINGS}")
        if same == min(len(chosen), len(rejected)):
            raise RowFault(*_NO_ANSWER)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
            raise RowFault(
                "different questions", f"`chosen` and `rejected` differ in message {same + 1}, which is not an answer"
            )
    prompt = _with_system(row, prompt)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        with _Column(name):
            check_turns([*prompt, *answer])
    _refuse_untrained([*chosen, *rejected], "a pair trains both")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _refuse_untrained(answers: list[Message], why: str) -> None:
    if any(message.get("weight") == 0 for message in answers):
        raise RowFault("weight", f"an answer is not to be trained (`weight: 0`), and {why}")


_BEGINNINGS = "Without a column `prompt`, both must begin with the turns that they answer; with one, they must be those"
_SAME = ("same answers", "`chosen` and `rejected` are the same, so there is nothing to prefer")
_NO_ANSWER = (
    "no answer",
    "one of `chosen` and `rejected` is the beginning of the other, so it has no answer of its own",
)


def _common(one: Sequence[Any], other: Sequence[Any]) -> Any:
    for ours, theirs in zip(one, other):
        if ours != theirs:
            return
        yield ours


def _said(messages: list[Message]) -> list[tuple[Any, ...]]:
    """What is compared: two answers that differ by the space around them are the same."""
    return [
        (message["role"], message["content"].strip(), message.get("tool_calls"), message.get("reasoning_content"))
        for message in messages
    ]


def _read_pair_of_strings(row: Mapping[str, Any], prompt_column: str) -> Row:
    prompt = {"prompt": _text(row, prompt_column, may_be_empty=True)} if prompt_column else {}
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen.strip() == rejected.strip():
        raise RowFault(*_SAME)
    if not prompt_column:
        same = sum(1 for _ in _common(chosen, rejected))
        if same == 0:
            raise RowFault("different questions", f"`chosen` and `rejected` begin differently. {_BEGINNINGS}")
        if same == min(len(chosen), len(rejected)):
            raise RowFault(*_NO_ANSWER)
    return {**prompt, "chosen": chosen, "rejected": rejected}


def _read_scored(row: Mapping[str, Any], form: RowForm) -> Row:
    """UltraFeedback's: the answers with the best and the worst score."""
    answers = row.get("completions")
    if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(answer, dict) for answer in answers):
        raise RowFault("completions", f"`completions` is {shortened(answers)}; expected two answers or more")
    scored = []
    for number, answer in enumerate(answers, 1):
        score = next((value for name in _SCORES if (value := _number(answer.get(name))) is not None), None)
        text = answer.get("response", answer.get("content"))
        if score is None or not isinstance(text, str):
            raise RowFault(
                "completions", f"`completions` has no {'score' if score is None else 'response'} in answer {number}"
            )
        scored.append((score, text))
    best, worst = max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        raise RowFault("same scores", f"all `completions` have the score {best[0]:g}, so there is nothing to prefer")
    prompt, chosen, rejected = (
        [{"role": role, "content": text}]
        for role, text in (("user", _text(row, form.column)), ("assistant", best[1]), ("assistant", worst[1]))
    )
    return _pair(prompt, chosen, rejected, row)


_READERS = {
    Layout.MESSAGES: _read_conversation,
    Layout.TEXT: _read_text,
    Layout.ALPACA: _read_alpaca,
    Layout.PROMPT_COMPLETION: _read_prompt_completion,
    Layout.PAIR: _read_pair,
    Layout.SCORED: _read_scored,
    Layout.LABELLED: _read_labelled,
    Layout.PROMPT: _read_prompt,
}


class _Column:
    """Puts the name of a column before the text of a fault in it."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RowFault):
            raise RowFault(error.kind, f"`{self._name}` {error.text}") from None


def _text(row: Mapping[str, Any], column: str, *, may_be_empty: bool = False) -> str:
    value = row.get(column)
    if value is None:
        raise RowFault("null", f"`{column}` is null")
    if not isinstance(value, str):
        raise RowFault("not text", f"`{column}` is {shortened(value)}; expected a string")
    if not may_be_empty and not value.strip():
        kind = "empty answer" if column in ("completion", "output", "chosen", "rejected") else "empty"
        raise RowFault(kind, f"`{column}` is empty")
    return value


def _turns(row: Mapping[str, Any], column: str, role: str) -> list[Message]:
    """A column's messages; a string is one message."""
    value = parsed_messages(row.get(column))
    with _Column(column):
        return read_messages([{"role": role, "content": value}] if isinstance(value, str) else value)


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The conversation after the system turn that some forms keep in a column of its own."""
    system = row.get("system", row.get("system_prompt"))
    if not isinstance(system, str) or not system.strip() or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _extras(row: Mapping[str, Any]) -> Row:
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except (ValueError, RecursionError) as error:
            raise RowFault("tools", f"`tools` is not valid JSON ({error})") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowFault("tools", f"`tools` is {shortened(tools)}; expected a list of functions")
    if isinstance(kwargs, str):
        kwargs = _parsed_mapping(kwargs)
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RowFault("template", f"`chat_template_kwargs` is {shortened(kwargs)}; expected a mapping")
    return {"tools": tools or None, "chat_template_kwargs": kwargs or None}


def _parsed_mapping(text: str) -> Any:
    """The mapping in a string of JSON, or the string where there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):  # UltraFeedback has "N/A"
        return None


def question_of(row: Row, form: RowForm) -> Any:
    """What a row asks, by which rows that belong together are known: a prompt, or the turns before the first answer."""
    if form.type is DatasetType.LANGUAGE_MODELING:
        if not form.conversational:
            return row[form.column]
        messages = row["messages"]
        answer = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        return messages[:answer]
    return row["prompt"] if "prompt" in row else row["chosen"]


def answers_of(row: Row, columns: Sequence[str]) -> list[str]:
    """The texts that a row teaches: what the assistant says, completions, both answers of a pair, plain text."""
    texts = []
    for column in columns:
        if column in ("prompt", "label", *REWARD_COLUMNS):
            continue
        value = row[column]
        turns = value if isinstance(value, list) else [{"role": "assistant", "content": value}]
        texts += [turn["content"] for turn in turns if turn["role"] == "assistant" and turn["content"]]
    return texts
