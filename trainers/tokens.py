# SPDX-License-Identifier: Apache-2.0
"""Rows as tokens with their labels, as TRL makes them; and how many there are, and are cut off.

SFT's rows are given to TRL in its tokenised form, `input_ids` and `labels`: what is counted, previewed and chosen by
tokens is what is trained on, and is made once.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length, extract_prompt

from jai.errors import UserError
from jai.trainers.arguments import StageConfig, max_length_of
from jai.trainers.data import FAULT, FAULT_KIND, ROW, TrainingData, faults_in, without_faults
from jai.trainers.data_files import AnyDataset
from jai.trainers.faults import FaultyRow, refuse_faults
from jai.trainers.messages import Message, RowFault
from jai.trainers.rows import DatasetType, Row

IGNORED = -100
_ASKING_ROLES = ("system", "user", "tool")  # a chat of these alone teaches nothing; a template may have more of others
_COUNTED_ROWS = 20_000  # pairs: all rows up to here take a few seconds; of more, so many spread over them
_COUNTED_OF_A_STREAM = 100
_TOKENIZED = (DatasetType.LANGUAGE_MODELING, DatasetType.PROMPT_COMPLETION)  # SFT's; TRL makes the tokens of the others


@dataclass(frozen=True)
class RowTokenizer:
    """Makes tokens and labels of rows, exactly as TRL's trainers do.

    Attributes:
        tokenizer: with its chat template.
        conversational: whether rows hold messages.
        text_column: of plain text.
        assistant_only_loss, completion_only_loss: TRL's options.
        chat_template: in place of the tokenizer's own; TRL marks the templates that it knows.
    """

    tokenizer: PreTrainedTokenizerBase
    conversational: bool
    text_column: str
    assistant_only_loss: bool
    completion_only_loss: bool
    chat_template: str | None

    @classmethod
    def of(cls, data: TrainingData, tokenizer: PreTrainedTokenizerBase, training: StageConfig) -> "RowTokenizer":
        """The one for a stage's data and options."""
        assistant_only = getattr(training, "assistant_only_loss", False)
        is_marked = not assistant_only or has_generation_markers(str(tokenizer.chat_template))
        return cls(
            tokenizer,
            data.conversational,
            getattr(training, "dataset_text_field", "text"),
            assistant_only,
            getattr(training, "completion_only_loss", None) is not False,
            None if is_marked else get_training_chat_template(tokenizer),
        )

    def encode(self, row: Row) -> tuple[list[int], list[int]]:
        """A row's tokens, and their labels: the tokens themselves, or -100 where no loss is taken.

        Raises:
            RowFault: if its conversation does not fit the chat template.
        """
        if self.conversational:
            messages = row["messages"] if "messages" in row else [*row["prompt"], *row.get("completion", ())]
            trained = messages if "messages" in row or not self.completion_only_loss else row.get("completion", ())
            if any(message.get("weight") == 0 for message in trained) and not self.assistant_only_loss:
                raise RowFault(
                    "weight",
                    "it has a turn that is not to be trained (`weight: 0`), which needs `assistant_only_loss: true`",
                )
            self._refuse_what_the_template_ignores(messages, row)
        if "prompt" in row and "completion" in row:
            return self._encode_completion(row["prompt"], row["completion"], row)
        if "prompt" in row:  # an answer is to be generated
            ids, _ = self._encode_messages(row["prompt"], row, add_generation_prompt=True)
            return ids, [IGNORED] * len(ids)
        if self.conversational:
            ids, labels = self._encode_messages(row["messages"], row, add_generation_prompt=False)
            is_answered = any(message["role"] not in _ASKING_ROLES for message in row["messages"])
            return ids, labels if is_answered else [IGNORED] * len(ids)
        ids = self._encode_text(self._ended(row[self.text_column]))
        return ids, ids

    def encode_all(self, row: Row) -> dict[str, tuple[list[int], list[int]]]:
        """Every sequence of a row by its column: two of a preference pair, one without a name of any other row.

        Raises:
            RowFault: if its conversation does not fit the chat template.
        """
        return self.encode_pair(row) if "rejected" in row else {"": self.encode(row)}

    def encode_pair(self, row: Row) -> dict[str, tuple[list[int], list[int]]]:
        """The two sequences of a preference pair, each with the prompt, and labels on the answers.

        Raises:
            RowFault: if its conversation does not fit the chat template.
        """
        if "prompt" not in row:
            row = extract_prompt(dict(row))
        if self.conversational:
            self._refuse_what_the_template_ignores([*row["prompt"], *row["chosen"], *row["rejected"]], row)
        encoded = {name: self._encode_completion(row["prompt"], row[name], row) for name in ("chosen", "rejected")}
        # TRL gives both the same prompt: the shorter one, where tokens merge across its end in one of the two.
        start = min(sum(label == IGNORED for label in labels) for _, labels in encoded.values())
        return {name: (ids, [IGNORED] * start + ids[start:]) for name, (ids, _) in encoded.items()}

    def _refuse_what_the_template_ignores(self, messages: list[Message], row: Row) -> None:
        """A template that does not know a thing leaves it out without a word."""
        used = {
            "tools": bool(row.get("tools")),
            "tool_calls": any("tool_calls" in message for message in messages),
            "reasoning_content": any("reasoning_content" in message for message in messages),
            "weight": self.assistant_only_loss and any(message.get("weight") == 0 for message in messages),
        }
        template = str(self.chat_template or self.tokenizer.chat_template)
        if ignored := [name for name, is_used in used.items() if is_used and name not in template]:
            raise RowFault(
                "chat template",
                f"it has `{ignored[0]}`, which the chat template does not know. Set `chat_template_path` to one that "
                "does (JAI's is tokenization/chat_template.jinja)",
            )

    def _encode_completion(self, prompt: Any, completion: Any, row: Row) -> tuple[list[int], list[int]]:
        if self.conversational:
            begin, _ = self._encode_messages(prompt, row, add_generation_prompt=True)
            ids, labels = self._encode_messages([*prompt, *completion], row, add_generation_prompt=False)
        else:
            begin = self._encode_text(prompt)
            ids = labels = self._encode_text(prompt + self._ended(completion))
        # The completion begins where the two part, which need not be the end of the prompt: tokens merge across it.
        start = common_prefix_length(begin, ids) if self.completion_only_loss else 0
        return ids, [IGNORED] * start + labels[start:]

    def _encode_messages(self, messages: Any, row: Row, *, add_generation_prompt: bool) -> tuple[list[int], list[int]]:
        masks = self.assistant_only_loss and not add_generation_prompt
        kwargs = {"chat_template": self.chat_template, "tools": _tools(row), **(row.get("chat_template_kwargs") or {})}
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=masks,
                **kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RowFault(
                "chat template",
                f"it does not fit the chat template: {str(error).strip()} Fix the row, or give the tokenizer a "
                "template that takes it (`chat_template_path`)",
            ) from error
        ids = list(encoded["input_ids"])
        if not masks:
            return ids, ids
        return ids, [token if marked else IGNORED for token, marked in zip(ids, encoded["assistant_masks"])]

    def _encode_text(self, text: str) -> list[int]:
        return list(self.tokenizer(text=text)["input_ids"])

    def _ended(self, text: str) -> str:
        end = str(self.tokenizer.eos_token)
        return text if text.endswith(end) else text + end


def _tools(row: Row) -> Any:
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


def tokenize_rows(
    data: TrainingData, tokenizer: PreTrainedTokenizerBase, training: StageConfig, limit: float = 0.0
) -> TrainingData:
    """The data with `input_ids` and `labels` beside what the rows had; preference pairs as they are.

    Args:
        data: the rows.
        tokenizer: of the model, with its chat template.
        training: TRL's options.
        limit: of faulty rows, those that were left out before among them.

    Raises:
        UserError: for more rows that do not fit the chat template than are allowed.
    """
    if data.type not in _TOKENIZED:
        return data
    encoder = RowTokenizer.of(data, tokenizer, training)
    faulty: list[FaultyRow] = []
    splits = []
    for split, rows in (("train", data.train), ("test", data.evaluation)):
        if isinstance(rows, Dataset):
            with PartialState().local_main_process_first():
                rows = rows.map(_add_tokens, fn_kwargs={"encoder": encoder}, **_map_options(training, "Tokenizing"))
            faulty += faults_in(rows, data, split)
            rows = without_faults(rows)
        elif rows is not None:
            rows = rows.map(_add_tokens_or_refuse, fn_kwargs={"encoder": encoder, "name": data.name})
        splits.append(rows)
    notes = refuse_faults(faulty, _size(data) + data.faulty, limit, before=data.faulty)
    return replace(
        data, train=splits[0], evaluation=splits[1], faulty=data.faulty + len(faulty), notes=[*data.notes, *notes]
    )


def _size(data: TrainingData) -> int:
    return sum(len(rows) for rows in (data.train, data.evaluation) if isinstance(rows, Dataset))


def _map_options(training: StageConfig, description: str) -> dict[str, Any]:
    return {"num_proc": getattr(training, "dataset_num_proc", None), "desc": description}


def _add_tokens(row: Row, encoder: RowTokenizer) -> Row:
    try:
        ids, labels = encoder.encode(row)
    except RowFault as fault:
        return {"input_ids": [], "labels": [], FAULT_KIND: fault.kind, FAULT: fault.text}
    return {"input_ids": ids, "labels": labels}


def _add_tokens_or_refuse(row: Row, encoder: RowTokenizer, name: str) -> Row:
    try:
        ids, labels = encoder.encode(row)
    except RowFault as fault:
        raise UserError(f"Row {row[ROW]:,} of {name} cannot be trained on: {fault.text}.") from fault
    return {"input_ids": ids, "labels": labels}


def lengths_of(rows: Dataset) -> np.ndarray:
    """Tokens of each row. Shape (rows,)."""
    batches = rows.select_columns(["input_ids"]).with_format("arrow").iter(1000)
    lengths = [pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches]
    return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class TokenCount:
    """Tokens of some rows as the trainer makes them. A preference pair has two sequences, each with the prompt.

    Attributes:
        rows: rows that were counted.
        is_sample: whether there are more.
        tokens: in all their sequences.
        cut: how many of them training does not see, because they lie beyond `max_length`.
        longest: tokens of the longest sequence.
    """

    rows: int
    is_sample: bool
    tokens: int
    cut: int
    longest: int


def count_tokens(
    data: TrainingData, tokenizer: PreTrainedTokenizerBase, training: StageConfig
) -> tuple[TokenCount, TokenCount | None]:
    """Count the tokens of the rows to train on and, where there are any, of those to evaluate on.

    All tokens of SFT's rows, which `tokenize_rows` has made; of many pairs, and of a stream, those of a sample.

    Raises:
        UserError: for a row that does not fit the chat template.
    """
    packing = getattr(training, "packing", False)
    eval_packing = getattr(training, "eval_packing", None)
    train = _count(data.train, packing, data, tokenizer, training)
    if data.evaluation is None:
        return train, None
    return train, _count(data.evaluation, packing if eval_packing is None else eval_packing, data, tokenizer, training)


def _count(
    rows: AnyDataset, packing: bool, data: TrainingData, tokenizer: PreTrainedTokenizerBase, training: StageConfig
) -> TokenCount:
    is_tokenized = data.type in _TOKENIZED
    limit = None if packing and splits_rows(training) else max_length_of(training)
    if isinstance(rows, Dataset) and is_tokenized:
        lengths = lengths_of(rows)
        return TokenCount(len(rows), False, int(lengths.sum()), _cut(lengths, limit), int(lengths.max(initial=0)))
    numbered: Iterable[tuple[int, Row]]
    if isinstance(rows, Dataset):
        step = max(-(-len(rows) // _COUNTED_ROWS), 1)
        numbers = range(0, len(rows), step)
        numbered, counted, is_sample = zip(numbers, rows.select(numbers)), len(numbers), step > 1
    else:
        sample = list(islice(rows, _COUNTED_OF_A_STREAM))
        numbered, counted, is_sample = enumerate(sample), len(sample), True
    if is_tokenized:
        lengths = np.array([len(row["input_ids"]) for _, row in numbered])
    else:
        encoder = RowTokenizer.of(data, tokenizer, training)
        lengths = np.array(list(_lengths(numbered, encoder, data.name)))
    return TokenCount(counted, is_sample, int(lengths.sum()), _cut(lengths, limit), int(lengths.max(initial=0)))


def splits_rows(training: StageConfig) -> bool:
    """Whether packing continues a long row in another sequence, so that nothing of it is cut off."""
    return getattr(training, "packing_strategy", None) in ("bfd_split", "wrapped")


def _cut(lengths: np.ndarray, limit: int | None) -> int:
    return int(np.maximum(lengths - limit, 0).sum()) if limit else 0


def _lengths(numbered: Iterable[tuple[int, Row]], encoder: RowTokenizer, name: str) -> Iterator[int]:
    for index, row in numbered:
        try:
            sequences = encoder.encode_all(row)
        except RowFault as fault:
            number = row.get(ROW, index + 1)
            raise UserError(f"Row {number:,} of {name} cannot be trained on: {fault.text}.") from fault
        yield from (len(ids) for ids, _ in sequences.values())
