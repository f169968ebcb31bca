# SPDX-License-Identifier: Apache-2.0
"""How many tokens the rows of a stage have, and how many of them are cut off, counted before training."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from jai.errors import UserError
from jai.trainers.arguments import TrlConfig
from jai.trainers.data import AnyDataset, DatasetType, TrainingData

_COUNTED_ROWS = 20_000  # all rows up to here: a few seconds; of more, so many spread over them
_COUNTED_OF_A_STREAM = 100


@dataclass(frozen=True)
class TokenCount:
    """Tokens of some rows as the trainer makes them. A preference pair has two sequences, each with the prompt.

    Attributes:
        rows: rows that were counted.
        is_sample: whether there are more.
        tokens: in all their sequences.
        cut: how many of them training does not see, because they lie beyond `max_length`.
    """

    rows: int
    is_sample: bool
    tokens: int
    cut: int


def count_tokens(
    data: TrainingData, tokenizer: PreTrainedTokenizerBase, training: TrlConfig
) -> tuple[TokenCount, TokenCount | None]:
    """Count the tokens of the rows to train on and, where there are any, of those to evaluate on.

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
    rows: AnyDataset, packing: bool, data: TrainingData, tokenizer: PreTrainedTokenizerBase, training: TrlConfig
) -> TokenCount:
    numbered: Iterable[tuple[int, dict[str, Any]]]
    if isinstance(rows, Dataset):
        step = -(-len(rows) // _COUNTED_ROWS)
        numbers = range(0, len(rows), step)
        numbered, counted, is_sample = zip(numbers, rows.select(numbers)), len(numbers), step > 1
    else:
        sample = list(rows.take(_COUNTED_OF_A_STREAM))
        numbered, counted, is_sample = enumerate(sample), len(sample), True
    splits = packing and getattr(training, "packing_strategy", None) in ("bfd_split", "wrapped")
    limit = None if splits else training.max_length
    tokens = cut = 0
    for length in _lengths(_sequences(numbered, data, tokenizer, training), data, tokenizer):
        tokens += length
        cut += max(length - limit, 0) if limit else 0
    return TokenCount(counted, is_sample, tokens, cut)


def _lengths(sequences: Iterator[str], data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    while texts := list(islice(sequences, 1000)):
        # The chat template has written its special tokens itself.
        for ids in tokenizer(texts, add_special_tokens=not data.conversational)["input_ids"]:
            yield len(ids)


def _sequences(
    numbered: Iterable[tuple[int, dict[str, Any]]],
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
    training: TrlConfig,
) -> Iterator[str]:
    """The texts that the rows become, as TRL tokenises them."""
    eos = getattr(training, "eos_token", None) or str(tokenizer.eos_token)
    for index, row in numbered:
        for value in _values(row, data):
            if data.conversational:
                yield _render(value, row, index, data, tokenizer)
            else:
                yield value if value.endswith(eos) else value + eos


def _values(row: dict[str, Any], data: TrainingData) -> list[Any]:
    """The sequences that a row becomes, each a string or a list of messages."""
    if data.type is DatasetType.PROMPT_COMPLETION:
        return [row["prompt"] + row["completion"]]
    if data.type is DatasetType.PREFERENCE:
        prompt = row.get("prompt", [] if data.conversational else "")
        return [prompt + row["chosen"], prompt + row["rejected"]]
    return [row[data.columns[0]]]


def _render(
    messages: list[dict[str, Any]],
    row: dict[str, Any],
    index: int,
    data: TrainingData,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    kwargs = row.get("chat_template_kwargs") or {}
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs))
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"Row {index + 1:,} of {data.name} does not fit the chat template: {error} Mend the row, or give the "
            "tokenizer a template that takes it (`chat_template_path`)."
        ) from error
