# SPDX-License-Identifier: Apache-2.0
"""Training data: found, loaded, and checked for its form before anything long begins."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments

from jai.errors import UserError

AnyDataset: TypeAlias = Dataset | IterableDataset

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_READABLE = ".jsonl, .jsonl.gz, .json, .json.gz or .parquet"
_CHAT_EXTRAS = ("tools", "chat_template_kwargs")


class Form(Enum):
    """What a row of training data holds. The value says what the loss is taken on by default."""

    CHAT = "every token of the conversation"
    PROMPT_COMPLETION = "the completion"
    TEXT = "every token"
    PREFERENCE = "the chosen answer against the rejected one"


@dataclass(frozen=True)
class TrainingData:
    """The rows of a stage.

    Attributes:
        name: file, folder or Hub id, as given.
        form: what a row holds.
        columns: the columns that hold it.
        conversational: whether they hold messages (with roles) rather than strings.
        train: the rows to train on, with the columns that training reads.
        evaluation: the rows to evaluate on, or None.
    """

    name: str
    form: Form
    columns: tuple[str, ...]
    conversational: bool
    train: AnyDataset
    evaluation: AnyDataset | None

    @property
    def rows(self) -> int | None:
        """Number of training rows; None where they are streamed."""
        return len(self.train) if isinstance(self.train, Dataset) else None


def load_training_data(
    script_args: ScriptArguments, *, evaluate: bool, preference: bool, text_column: str = "text"
) -> TrainingData:
    """Load a stage's data and check its form.

    Args:
        script_args: names the data: a Hub id, a .jsonl(.gz), .json(.gz) or .parquet file, or a folder of such files.
        evaluate: whether the evaluation split is needed.
        preference: expect prompt, chosen and rejected (DPO); else messages, prompt and completion, or text.
        text_column: the column of plain text.

    Raises:
        UserError: if the data cannot be found or read, lacks a split, has no rows, or has other columns.
    """
    name = script_args.dataset_name
    if not name:
        raise UserError(
            f"No training data is given. Set `dataset_name` to a Hub id, a folder, or a file that ends in {_READABLE}."
        )
    try:
        splits = _load(name, script_args)
        train = _split(splits, script_args.dataset_train_split, name, "dataset_train_split")
        first: dict[str, Any] = next(iter(train))
    except StopIteration:  # `load_dataset` raises it too, for an empty file
        raise UserError(f"The data {name} has no rows. Give a dataset with at least one example.") from None
    evaluation = _split(splits, script_args.dataset_test_split, name, "dataset_test_split") if evaluate else None
    form, columns = (_preference_form if preference else _sft_form)(first, name, text_column)
    # The others go: a stray `prompt` beside `messages` would make TRL take the rows for something else.
    kept = [*columns, *(column for column in _CHAT_EXTRAS if column in first)]
    return TrainingData(
        name=name,
        form=form,
        columns=columns,
        conversational=not isinstance(first[columns[0]], str),
        train=train.select_columns(kept),
        evaluation=None if evaluation is None else evaluation.select_columns(kept),
    )


def _load(name: str, script_args: ScriptArguments) -> Any:
    """The splits of a file, a folder or a Hub dataset, by name."""
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if path.is_file() and suffix not in _BUILDERS:
        raise UserError(f"{name} is no data file that can be read. Give one that ends in {_READABLE}.")
    looks_local = suffix in _BUILDERS or path.is_absolute() or name.startswith(".") or name.count("/") > 1
    if looks_local and not path.exists():
        raise UserError(f"The data {name} does not exist. Give an existing file or folder, or a Hub id.")
    if (path / "dataset_dict.json").exists():  # what `save_to_disk` writes
        return load_from_disk(name)
    if (path / "state.json").exists():
        return {"train": load_from_disk(name)}
    try:
        if path.is_file():
            return load_dataset(_BUILDERS[suffix], data_files=name, streaming=script_args.dataset_streaming)
        return load_dataset(name, script_args.dataset_config, streaming=script_args.dataset_streaming)
    except DatasetGenerationError as error:
        raise UserError(
            f"The data {name} cannot be read: {error.__cause__ or error}. Every line must be one JSON object, and a "
            "column must have the same type in all of them."
        ) from error
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"The data {name} was not found: {error} Give an existing file or folder, or a Hub id."
        ) from error
    except (ConnectionError, ValueError) as error:
        raise UserError(f"The data {name} cannot be loaded: {error}") from error


def _split(splits: Any, split: str, name: str, option: str) -> AnyDataset:
    if split not in splits:
        raise UserError(
            f"The data {name} has no split {split!r}; it has {', '.join(map(repr, splits))}. Set `{option}`"
            + (", or `eval_strategy: no` to train without evaluation." if option == "dataset_test_split" else ".")
        )
    return splits[split]


def _sft_form(row: dict[str, Any], name: str, text_column: str) -> tuple[Form, tuple[str, ...]]:
    for column in ("messages", "conversations"):
        if column in row:
            _check_messages(row[column], column, name)
            return Form.CHAT, (column,)
    if "prompt" in row and "completion" in row:
        if type(row["prompt"]) is not type(row["completion"]):
            raise UserError(
                f"The data {name} has a {type(row['prompt']).__name__} as `prompt` and a "
                f"{type(row['completion']).__name__} as `completion`; both must be strings, or both lists of messages."
            )
        if not isinstance(row["prompt"], str):
            _check_messages(row["prompt"], "prompt", name)
            _check_messages(row["completion"], "completion", name)
        return Form.PROMPT_COMPLETION, ("prompt", "completion")
    if isinstance(row.get(text_column), str):
        return Form.TEXT, (text_column,)
    raise UserError(
        f"The data {name} has the columns {', '.join(row)}; expected `messages` (chat), `prompt` and `completion`, or "
        f"`{text_column}` (plain text, continued pre-training). Rename its columns"
        + ("; for preference pairs run `jai dpo`." if "chosen" in row else ", or set `dataset_text_field`.")
    )


def _preference_form(row: dict[str, Any], name: str, text_column: str) -> tuple[Form, tuple[str, ...]]:
    if "chosen" not in row or "rejected" not in row:
        raise UserError(
            f"The data {name} has the columns {', '.join(row)}; expected `prompt`, `chosen` and `rejected` (or "
            "`chosen` and `rejected` as whole conversations). Rename its columns; for other data run `jai sft`."
        )
    columns = tuple(column for column in ("chosen", "rejected", "prompt") if column in row)
    if len({isinstance(row[column], str) for column in columns}) > 1:
        raise UserError(
            f"The data {name} mixes strings and lists of messages in {', '.join(columns)}; use one form for all."
        )
    if not isinstance(row["chosen"], str):
        for column in columns:
            _check_messages(row[column], column, name)
    return Form.PREFERENCE, columns


def _check_messages(value: Any, column: str, name: str) -> None:
    fits = isinstance(value, list) and all(
        isinstance(message, dict) and ({"role", "content"} <= message.keys() or {"from", "value"} <= message.keys())
        for message in value
    )
    if not fits or not value:
        raise UserError(
            f"`{column}` in the data {name} holds {str(value)[:80]}; expected a list of messages such as "
            '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}].'
        )


def drop_unanswered(data: AnyDataset) -> tuple[AnyDataset, int]:
    """Leave out the conversations without an assistant's turn, which `assistant_only_loss` cannot train on.

    Returns the rest and how many were dropped (0 for streams, which are filtered as they come).
    """

    def is_answered(row: dict[str, Any]) -> bool:
        turns = row.get("completion") or row.get("messages") or row.get("conversations") or []
        return any((turn.get("role") or turn.get("from")) in ("assistant", "gpt") for turn in turns)

    with PartialState().local_main_process_first():
        kept = data.filter(is_answered)
    return kept, len(data) - len(kept) if isinstance(data, Dataset) else 0


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


def estimate_tokens(
    data: TrainingData, tokenizer: PreTrainedTokenizerBase, max_length: int | None, sample: int = 100
) -> float:
    """Mean tokens of a row, after truncation, from up to `sample` rows spread over the data.

    A preference pair counts both of its answers, each with the prompt.
    """
    if isinstance(data.train, Dataset):
        rows: Iterable[dict[str, Any]] = data.train.select(range(0, len(data.train), -(-len(data.train) // sample)))
    else:
        rows = data.train.take(sample)
    lengths = [
        sum(min(_length(text, tokenizer), max_length or sys.maxsize) for text in _texts(row, data)) for row in rows
    ]
    return sum(lengths) / len(lengths)


def _texts(row: dict[str, Any], data: TrainingData) -> list[Any]:
    """The sequences that a row becomes, each a string or a list of messages."""
    if data.form is Form.PROMPT_COMPLETION:
        return [row["prompt"] + row["completion"]]
    if data.form is Form.PREFERENCE:
        prompt = row.get("prompt", [] if data.conversational else "")
        return [prompt + row["chosen"], prompt + row["rejected"]]
    return [row[data.columns[0]]]


def _length(text: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(text, str):
        text = "".join(str(message.get("content") or message.get("value")) for message in text)
    return len(tokenizer(text)["input_ids"])
