# SPDX-License-Identifier: Apache-2.0
"""Training data: found, loaded, and every row checked, before anything long begins."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pyarrow.lib import ArrowException
from trl import ScriptArguments

from jai.errors import UserError
from jai.trainers.arguments import StageArguments
from jai.trainers.first_look import DATA_BUILDERS, check_data_name, data_suffix

AnyDataset: TypeAlias = Dataset | IterableDataset

_CONVERSATION_COLUMNS = ("messages", "conversations")
_CHAT_EXTRAS = ("tools", "chat_template_kwargs")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_A_MESSAGE = '{"role": "user", "content": "…"}'


class DatasetType(Enum):
    """What a row of training data is, in TRL's words."""

    LANGUAGE_MODELING = "language modeling"
    PROMPT_COMPLETION = "prompt-completion"
    PREFERENCE = "preference"


@dataclass(frozen=True)
class TrainingData:
    """The rows of a stage.

    Attributes:
        name: file, folder or Hub id, as given.
        type: what a row is.
        columns: the columns that hold it.
        conversational: whether they hold messages (with roles) rather than strings.
        train: the rows to train on, with the columns that training reads.
        evaluation: the rows to evaluate on, or None.
    """

    name: str
    type: DatasetType
    columns: tuple[str, ...]
    conversational: bool
    train: AnyDataset
    evaluation: AnyDataset | None

    @property
    def rows(self) -> int | None:
        """Number of training rows; None where they are streamed."""
        return len(self.train) if isinstance(self.train, Dataset) else None

    @property
    def is_plain_text(self) -> bool:
        """Whether it is text to continue, as in pre-training."""
        return self.type is DatasetType.LANGUAGE_MODELING and not self.conversational


def load_training_data(arguments: StageArguments, dataset_types: Sequence[DatasetType]) -> TrainingData:
    """Load a stage's data: a Hub id, a .jsonl(.gz), .json(.gz), .parquet or .csv file, or a folder of such files.

    Conversations come out as messages with role and content, whichever of the two common forms they had.

    Args:
        arguments: the run's; they name the data, its splits and its column of plain text.
        dataset_types: what the stage can train on.

    Raises:
        UserError: if the data cannot be found or read, lacks a split, has no rows, has other columns, or has a row
            that cannot be trained on.
    """
    script = arguments.script
    path = check_data_name(script.dataset_name)
    name = str(script.dataset_name)
    try:
        splits = _load(name, path, script)
        train = _split(splits, script.dataset_train_split, name, "dataset_train_split")
        first: dict[str, Any] = next(iter(train))
    except StopIteration:  # `load_dataset` raises it too, for an empty file
        raise UserError(f"The data {name} has no rows. Give a dataset with at least one example.") from None
    except ArrowException as error:  # of a stream, which is read here first
        raise _unreadable(name, error) from error
    evaluation = None
    if arguments.training.eval_strategy != "no":
        evaluation = _split(splits, script.dataset_test_split, name, "dataset_test_split")
    text_column = getattr(arguments.training, "dataset_text_field", "text")
    if DatasetType.PREFERENCE in dataset_types:
        type_, columns = _preference_columns(train, list(first), name)
    else:
        type_, columns = _sft_columns(list(first), name, text_column)
    conversational = columns[0] in _CONVERSATION_COLUMNS or isinstance(_example(train, columns[0]), list)
    data = TrainingData(name, type_, columns, conversational, train, evaluation)
    train, columns = _tidy(train, data, script.dataset_train_split)
    if evaluation is not None:
        evaluation, _ = _tidy(evaluation, data, script.dataset_test_split)
    return replace(data, columns=columns, train=train, evaluation=evaluation)


def _load(name: str, path: Path, script: ScriptArguments) -> Any:
    """The splits of a file, a folder or a Hub dataset, by name."""
    if (path / "dataset_dict.json").exists():  # what `save_to_disk` writes
        return load_from_disk(name)
    if (path / "state.json").exists():
        return {"train": load_from_disk(name)}
    for file in [path] if path.is_file() else path.rglob("*.json*"):
        _refuse_null_first(file)
    try:
        if path.is_file():
            return load_dataset(DATA_BUILDERS[data_suffix(path)], data_files=name, streaming=script.dataset_streaming)
        return load_dataset(name, script.dataset_config, streaming=script.dataset_streaming)
    except DatasetGenerationError as error:
        raise _unreadable(name, error.__cause__ or error) from error
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"The data {name} was not found: {error} Give an existing file or folder, or a Hub id."
        ) from error
    except (ConnectionError, ValueError) as error:
        raise UserError(f"The data {name} cannot be loaded: {error}") from error


def _refuse_null_first(path: Path) -> None:
    """Refuse a file of JSON lines that begins with `null`: pyarrow 26 dies of it, and the process too."""
    if path.suffix not in (".json", ".jsonl", ".gz"):
        return
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            beginning = file.read(1000).removeprefix(codecs.BOM_UTF8).lstrip()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(str(path), error) from error
    if beginning.startswith(b"null"):
        raise _unreadable(str(path), ValueError("row 1 is null"))


def _unreadable(name: str, error: BaseException) -> UserError:
    return UserError(
        f"The data {name} cannot be read: {error}. Every line must be one JSON object, and a column must have the same "
        "type in all of them."
    )


def _split(splits: Any, split: str, name: str, option: str) -> AnyDataset:
    if split not in splits:
        raise UserError(
            f"The data {name} has no split {split!r}; it has {', '.join(map(repr, splits))}. Set `{option}`"
            + (", or `eval_strategy: no` to train without evaluation." if option == "dataset_test_split" else ".")
        )
    return splits[split]


def _example(rows: AnyDataset, column: str, sample: int = 100) -> Any:
    """The first value in a column that is not null, among the first rows."""
    values = (row[column] for row in rows.take(sample))
    return next((value for value in values if value is not None), None)


def _sft_columns(columns: list[str], name: str, text_column: str) -> tuple[DatasetType, tuple[str, ...]]:
    for column in _CONVERSATION_COLUMNS:
        if column in columns:
            return DatasetType.LANGUAGE_MODELING, (column,)
    if "prompt" in columns and "completion" in columns:
        return DatasetType.PROMPT_COMPLETION, ("prompt", "completion")
    if text_column in columns:
        return DatasetType.LANGUAGE_MODELING, (text_column,)
    if "chosen" in columns:
        advice = "Rename its columns; for preference pairs run `jai dpo`."
    elif {"instruction", "output"} <= set(columns):
        advice = (
            "It looks like Alpaca's form: join `instruction` and `input` to `prompt`, and rename `output` to "
            "`completion`."
        )
    else:
        advice = "Rename its columns, or set `dataset_text_field`."
    raise UserError(
        f"The data {name} has the columns {', '.join(columns)}; expected `messages` (chat), `prompt` and `completion`, "
        f"or `{text_column}` (plain text, continued pre-training). {advice}"
    )


def _preference_columns(rows: AnyDataset, columns: list[str], name: str) -> tuple[DatasetType, tuple[str, ...]]:
    if "chosen" not in columns or "rejected" not in columns:
        raise UserError(
            f"The data {name} has the columns {', '.join(columns)}; expected `prompt`, `chosen` and `rejected` (or "
            "`chosen` and `rejected` as whole conversations). Rename its columns; for other data run `jai sft`."
        )
    pair = ("chosen", "rejected")
    if "prompt" not in columns:
        return DatasetType.PREFERENCE, pair
    # UltraFeedback's layout: the prompt as a string, and again as the first turn of both conversations.
    if isinstance(_example(rows, "prompt"), str) and isinstance(_example(rows, "chosen"), list):
        return DatasetType.PREFERENCE, pair
    return DatasetType.PREFERENCE, (*pair, "prompt")


def _tidy(rows: AnyDataset, data: TrainingData, split: str) -> tuple[AnyDataset, tuple[str, ...]]:
    """The rows with the columns that training reads alone, every row checked, conversations in `messages`.

    The other columns go: a stray `prompt` beside `messages` would make TRL take the rows for something else.
    """
    columns, present = data.columns, list(next(iter(rows)))
    if missing := [column for column in columns if column not in present]:
        raise UserError(
            f"The split {split} of {data.name} lacks {', '.join(missing)}; it has the columns {', '.join(present)}. "
            "All splits need the same columns."
        )
    rows = rows.select_columns([*columns, *(column for column in _CHAT_EXTRAS if column in present)])
    if data.conversational:
        example = _example(rows, columns[0])
        turn = example[0] if isinstance(example, list) and example else None
        if isinstance(turn, dict) and {"from", "value"} <= turn.keys():
            try:
                with PartialState().local_main_process_first():
                    rows = rows.map(_from_sharegpt, fn_kwargs={"columns": columns})
            except ArrowException as error:  # values of several types, which JSON may have and Arrow not
                raise _unreadable(data.name, error) from error
        if "conversations" in columns:
            rows, columns = rows.rename_column("conversations", "messages"), ("messages",)
    checked = replace(data, columns=columns)
    if isinstance(rows, Dataset):
        _refuse(list(_wrong_rows(rows, checked)), checked, split)
        return rows, columns

    def check(row: dict[str, Any], index: int) -> dict[str, Any]:
        if wrong := _wrong_row(row, checked):
            _refuse([(index + 1, wrong)], checked, split)
        return row

    return rows.map(check, with_indices=True), columns


def _from_sharegpt(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    def message(turn: Any) -> Any:
        if not isinstance(turn, dict) or "from" not in turn:
            return turn
        return {"role": _SHAREGPT_ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}

    return {
        column: [message(turn) for turn in row[column]] if isinstance(row[column], list) else row[column]
        for column in columns
    }


def _refuse(wrong_rows: list[tuple[int, str]], data: TrainingData, split: str) -> None:
    if not wrong_rows:
        return
    (row, wrong), *others = wrong_rows
    more = ""
    if others:
        numbers = ", ".join(f"{number:,}" for number, _ in others[:5])
        more = f" Rows like it: {numbers}{f' and {len(others) - 5:,} more' if len(others) > 5 else ''}."
    raise UserError(
        f"Row {row:,} of {data.name} (split {split}) cannot be trained on: {wrong}.{more} Mend these rows or leave "
        "them out."
    )


def _wrong_rows(rows: Dataset, data: TrainingData) -> Iterable[tuple[int, str]]:
    """Numbers of the rows that cannot be trained on, from 1, each with what is wrong."""
    for number, row in enumerate(rows, 1):
        if wrong := _wrong_row(row, data):
            yield number, wrong


def _wrong_row(row: dict[str, Any], data: TrainingData) -> str | None:
    for column in data.columns:
        wrong = (_wrong_conversation if data.conversational else _wrong_text)(row[column])
        if wrong:
            mixed = row[column] is not None and isinstance(row[column], list) != data.conversational
            return f"`{column}` {wrong}" + (
                f", like `{data.columns[0]}`" if mixed and column != data.columns[0] else ""
            )
    if wrong := _wrong_extras(row):
        return wrong
    if data.type is not DatasetType.PREFERENCE:
        return None
    if row["chosen"] == row["rejected"]:
        return "`chosen` and `rejected` are the same, so there is nothing to prefer"
    if "prompt" in data.columns:
        return None
    if row["chosen"][:1] != row["rejected"][:1]:
        return (
            "`chosen` and `rejected` begin differently. Without a column `prompt`, both must begin with the turns that "
            "they answer"
        )
    shorter, longer = sorted((row["chosen"], row["rejected"]), key=len)
    if longer[: len(shorter)] == shorter:
        return "one of `chosen` and `rejected` is the beginning of the other, so it has no answer of its own"
    return None


def _wrong_text(value: Any) -> str | None:
    if value is None:
        return "is null"
    return None if isinstance(value, str) else f"is {_shortened(value)}; expected a string"


def _wrong_conversation(value: Any) -> str | None:
    if value is None:
        return "is null"
    if not isinstance(value, list):
        return f"is {_shortened(value)}; expected a list of messages such as {_A_MESSAGE}"
    if not value:
        return "has no messages"
    for turn, message in enumerate(value, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return f"has {_shortened(message)} as message {turn}; expected a message such as {_A_MESSAGE}"
        content = message["content"]
        if not isinstance(message["role"], str):
            return f"has no role in message {turn}"
        if isinstance(content, list):
            return (
                f"has content in parts in message {turn} (OpenAI's form for images); expected a string: join the text "
                "of its parts"
            )
        if content is None and not message.get("tool_calls"):
            return f"has no content in message {turn}"
        if content is not None and not isinstance(content, str):
            return f"has {_shortened(content)} as content of message {turn}; expected a string"
    return None


def _wrong_extras(row: dict[str, Any]) -> str | None:
    if isinstance(row.get("tools"), str):
        try:
            json.loads(row["tools"])
        except ValueError as error:
            return f"`tools` is no valid JSON ({error})"
    kwargs = row.get("chat_template_kwargs", {})
    return None if isinstance(kwargs, dict) else f"`chat_template_kwargs` is {_shortened(kwargs)}; expected a mapping"


def _shortened(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def drop_unanswered(rows: AnyDataset) -> tuple[AnyDataset, int]:
    """Leave out the conversations without an assistant's turn, which `assistant_only_loss` cannot train on.

    Returns the rest and how many were dropped (0 for streams, which are filtered as they come).
    """

    def is_answered(row: dict[str, Any]) -> bool:
        return any(message["role"] == "assistant" for message in row.get("completion") or row["messages"])

    with PartialState().local_main_process_first():
        kept = rows.filter(is_answered)
    return kept, len(rows) - len(kept) if isinstance(rows, Dataset) else 0


def count_unsupervised(packed: Dataset) -> tuple[int, int]:
    """Documents in a packed dataset that carry no label at all, and documents in all."""
    empty = total = 0
    for row in packed.select_columns(["labels", "seq_lengths"]):
        start = 0
        for length in row["seq_lengths"]:
            total += 1
            empty += all(label == -100 for label in row["labels"][start : start + length])
            start += length
    return empty, total
