# SPDX-License-Identifier: Apache-2.0
"""Rows as the tokens that are trained on, with their labels, for a look before a run."""

from collections.abc import Iterator
from itertools import groupby, islice

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from jai.errors import UserError
from jai.trainers.arguments import StageConfig, max_length_of
from jai.trainers.data import TrainingData
from jai.trainers.messages import RowFault
from jai.trainers.tokens import IGNORED, RowTokenizer, splits_rows


def print_preview(
    console: Console, data: TrainingData, tokenizer: PreTrainedTokenizerBase, training: StageConfig, rows: int
) -> None:
    """Print the first rows, each as runs of tokens that the loss is taken on (`loss`) or not (`-`).

    Tokens stand with their ids. Of a pair both sequences are printed.
    """
    limit = None if getattr(training, "packing", False) and splits_rows(training) else max_length_of(training)
    encoder = RowTokenizer.of(data, tokenizer, training)
    for number, row in enumerate(islice(data.train, rows), 1):
        is_tokenized = "input_ids" in row
        try:
            sequences = {"": (row["input_ids"], row["labels"])} if is_tokenized else encoder.encode_all(row)
        except RowFault as fault:
            raise UserError(f"Row {number:,} of {data.name} cannot be trained on: {fault.text}.") from fault
        for name, (ids, labels) in sequences.items():
            taught = sum(label != IGNORED for label in labels[:limit])
            title = Text(f"Row {number}{f', {name}' if name else ''}", style="bold")
            title.append(f": {len(ids):,} tokens, {taught:,} with a label", style="not bold")
            if limit is not None and len(ids) > limit:
                title.append(f"; the last {len(ids) - limit:,} are cut off", style="yellow")
            console.print(title)
            for line in _runs(ids[:limit], labels[:limit], tokenizer):
                console.print(line, soft_wrap=True)


def _runs(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[Text]:
    tokens = tokenizer.convert_ids_to_tokens(ids)
    for has_label, run in groupby(zip(tokens, ids, labels), key=lambda each: each[2] != IGNORED):
        line = Text("  loss  " if has_label else "  -     ", style="green" if has_label else "dim")
        line.append(" ".join(f"{token}({id_})" for token, id_, _ in run))
        yield line
