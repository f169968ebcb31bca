# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods with what sequences have in common encoded once: the context of a question's choices, the passage of
several questions, the examples that all questions of a task begin with.

Sequences that begin alike are packed into one row as a tree: each token's position is its depth, and it attends to its
ancestors alone. What comes out is what each sequence by itself gives, but for the last bits of the arithmetic.

lm-eval's loop encodes every sequence by itself (those that differ in the last token alone count as one), and takes the
logits of every token, of which all but the continuation's are thrown away: with 64,000 entries in the vocabulary and
1,000 tokens, 256 MB for each sequence.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from jai.errors import UserError

_LONGEST_ROW = 4096  # tokens of a tree; attention takes their square
_LEAST_SHARED = 0.25  # of a sequence, for it to join a row
_MASKABLE = ("eager", "sdpa")  # attention implementations that take any mask

TokenRequest: TypeAlias = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context, continuation


@dataclass
class PrefixTree:
    """Sequences that begin alike, as one row. N is the number of its tokens.

    Attributes:
        tokens: N ids.
        depths: position of each in its sequences.
        branches: of the tokens that were added together: the first, the one after the last, and the one before the
            first in their sequence, which is None for the tree's root.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    branches: list[tuple[int, int, int | None]] = field(default_factory=list)

    def add(self, sequence: Sequence[int], shared: Sequence[int]) -> list[int]:
        """Add a sequence.

        Args:
            sequence: its ids.
            shared: indices in the row of the tokens that it has in common with another.

        Returns:
            Indices in the row of all its tokens.
        """
        begin = len(self.tokens)
        new = sequence[len(shared) :]
        if new:
            self.branches.append((begin, begin + len(new), shared[-1] if shared else None))
        self.tokens += new
        self.depths += range(len(shared), len(sequence))
        return [*shared, *range(begin, begin + len(new))]

    def mask(self) -> Tensor:
        """Which tokens each attends to, (N, N): itself and its ancestors."""
        allowed = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for begin, end, parent in self.branches:
            if parent is not None:
                allowed[begin:end] = allowed[parent]
            allowed[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        return allowed


@dataclass
class _Row:
    """A tree, and the requests whose sequences it holds with the indices of their tokens."""

    tree: PrefixTree = field(default_factory=PrefixTree)
    paths: list[tuple[int, list[int]]] = field(default_factory=list)


class PrefixSharingLM(HFLM):
    """lm-eval's `HFLM` with shared prefixes, and with a word on choices that cannot be scored."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        try:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        except ValueError as error:  # of transformers, for a setting that it does not know
            reason = str(error).partition("(note:")[0].strip()
            raise UserError(f"{requests[0].task_name} cannot be asked: {reason} Fix its generation_kwargs.") from error

    def _loglikelihood_tokens(
        self,
        requests: list[TokenRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        for texts, _, continuation in requests:
            self._refuse_what_cannot_be_scored(texts, continuation)
        if not _can_share(self.model):
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        inputs = [(context + continuation)[-(self.max_length + 1) :][:-1] for _, context, continuation in requests]
        longest = max(map(len, inputs), default=0)
        tokens_at_a_time = longest * (override_bs or int(self.batch_size))
        answers: dict[int, tuple[float, bool]] = {}
        rows = list(_rows(inputs, min(max(longest, _LONGEST_ROW), tokens_at_a_time)))
        for batch in _batches(rows, tokens_at_a_time):
            answers.update(self._score(batch, [continuation for _, _, continuation in requests]))
        ordered = [answers[index] for index in range(len(requests))]
        for (texts, _, _), answer in zip(requests, ordered):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return ordered

    def _refuse_what_cannot_be_scored(self, texts: tuple[str, str] | None, continuation: Sequence[int]) -> None:
        """lm-eval's loop asserts it, and names no question."""
        if 0 < len(continuation) <= self.max_length:
            return
        context, choice = texts or ("", "")
        what = f"has {len(continuation)} tokens, and the model takes {self.max_length}" if continuation else "is empty"
        raise UserError(
            f"A choice {what}, so it has no likelihood: {choice[:80]!r} after {context[-80:]!r}. Fix the data, or "
            "leave the question out."
        )

    def _score(
        self, rows: Sequence[_Row], continuations: Sequence[list[int]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Log-likelihood of the continuation of each request in the rows, and whether it is the most likely one."""
        width = max(len(row.tree.tokens) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        positions = torch.zeros_like(ids)
        allowed = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # no row of a softmax may be empty
        for number, row in enumerate(rows):
            # Padded on the left: where there is one sequence a row, the continuations then end together.
            begin = width - len(row.tree.tokens)
            ids[number, begin:] = torch.tensor(row.tree.tokens)
            positions[number, begin:] = torch.tensor(row.tree.depths)
            allowed[number, begin:, begin:] = row.tree.mask()
        wanted = [
            (number, index, [width - len(row.tree.tokens) + place for place in path[-len(continuations[index]) :]])
            for number, row in enumerate(rows)
            for index, path in row.paths
        ]
        kept = sorted({place for _, _, places in wanted for place in places})
        logits = self._logits(ids, positions, allowed, kept)  # (rows, kept, vocabulary)
        place_of = {place: number for number, place in enumerate(kept)}
        for number, index, places in wanted:
            target = torch.tensor(continuations[index], device=logits.device)
            of_tokens = logits[number, [place_of[place] for place in places]]
            scores = torch.log_softmax(of_tokens, dim=-1, dtype=self.softmax_dtype)
            value = scores.gather(1, target[:, None]).sum()
            yield index, (float(value), bool((of_tokens.argmax(-1) == target).all()))

    def _logits(self, ids: Tensor, positions: Tensor, allowed: Tensor, kept: list[int]) -> Tensor:
        dtype = self.mixed_precision_dtype or self.model.dtype
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype, enabled=self.mixed_precision_dtype is not None),
        ):
            return self.model(
                input_ids=ids.to(self.device),
                position_ids=positions.to(self.device),
                attention_mask=mask[:, None].to(self.device),
                logits_to_keep=torch.tensor(kept, device=self.device),
                use_cache=False,
            ).logits


def _can_share(model: Any) -> bool:
    """Whether a model takes any mask and any positions; else lm-eval's loop is used."""
    config = model.config.get_text_config()
    takes = inspect.signature(model.forward).parameters
    return (
        {"position_ids", "logits_to_keep"} <= takes.keys()
        and getattr(config, "_attn_implementation", None) in _MASKABLE
        and not getattr(config, "sliding_window", None)
        and not getattr(config, "attention_chunk_size", None)
    )


def _rows(sequences: Sequence[list[int]], longest_row: int) -> Iterator[_Row]:
    """Pack sequences into rows: neighbours in the order of their tokens, which have most in common."""
    row = _Row()
    before: list[int] = []
    path: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: sequences[index]):
        sequence = sequences[index]
        shared = _common(before, sequence) if row.paths else 0
        is_full = len(row.tree.tokens) + len(sequence) - shared > longest_row
        if row.paths and (is_full or shared < _LEAST_SHARED * len(sequence)):
            yield row
            row, shared = _Row(), 0
        path = row.tree.add(sequence, path[:shared])
        row.paths.append((index, path))
        before = sequence
    if row.paths:
        yield row


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((place for place, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def _batches(rows: Sequence[_Row], tokens_at_a_time: int) -> Iterator[list[_Row]]:
    """Rows of a like length, as many as make up so many tokens with their padding."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tree.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].tree.tokens) > tokens_at_a_time:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
