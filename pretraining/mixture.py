# SPDX-License-Identifier: Apache-2.0
"""How many tokens of each source come in each block of sequences, so that shares hold exactly and nothing is counted.

Where a source stands at a block is a formula of the block's number, not the end of a count from the start: of the first
T tokens, a source with the share p has had ⌊T·p⌋, and the one with the largest share has had the rest. So the sum is T
for every T, no source is off by more than a token (the largest by one for each other), and any block is found at once.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from jai.pretraining.config import WhenDry

_ONE = 2**40  # shares are whole numbers of 2^-40, so that no machine rounds them otherwise


def language_shares(sizes: Mapping[str, int], alpha: float, beta: Mapping[str, float]) -> dict[str, float]:
    """Equation 2 of Trillion-7B: P(l) = α·|D_l| / Σ|D| + (1 − α)·β_l.

    A linear blend of the sizes' shares and given ones, though the report calls α a temperature. It prints neither α nor
    β.

    Args:
        sizes: tokens of each language's corpus, |D_l|.
        alpha: from 0 (shares are β) to 1 (shares are as the sizes are).
        beta: shares by language; they sum to 1.
    """
    total = sum(sizes.values())
    return {language: alpha * size / total + (1 - alpha) * beta[language] for language, size in sizes.items()}


@dataclass(frozen=True)
class BlockTokens:
    """What a block holds.

    Attributes:
        sequences: how many it has.
        ranges: start and stop of each source's tokens in its stream.
    """

    sequences: int
    ranges: list[tuple[int, int]]


@dataclass(frozen=True)
class DrySource:
    """A source that is used up: which, and the sequence up to which it lasts."""

    source: int
    sequence: int


@dataclass(frozen=True)
class _Stretch:
    """Blocks that follow each other with the same shares, or one block with amounts of its own.

    Attributes:
        first_block: number of the first one.
        blocks: how many.
        sequences: of each block.
        tokens: of each block; fewer than the sequences hold where the last one is not full.
        starts: where each source's stream is when they begin.
        shares: of each source, in units of 2^-40; None where there are amounts.
        amounts: tokens of each source in the one block.
    """

    first_block: int
    blocks: int
    sequences: int
    tokens: int
    starts: list[int]
    shares: list[int] | None
    amounts: list[int] | None = None

    def after(self, blocks: int) -> list[int]:
        """Where each source's stream is after so many of the blocks."""
        if self.shares is None:
            used = [amount * blocks for amount in self.amounts or []]
        else:
            used = _split(blocks * self.tokens, self.shares)
        return [start + more for start, more in zip(self.starts, used)]


class Mixture:
    """Tokens of each source in each block, as far as the sources last.

    Args:
        limits: tokens that each source has, over all its epochs.
        weights: shares of tokens, against each other; None is as the limits are, so that all end together.
        context: tokens of a sequence.
        block_sequences: sequences of a block.
        when_dry: "error" ends where the first source is used up, with the last whole sequence; "renormalize" goes on
            with the others until nothing is left.
        fill_last: whether all sequences are full; else, where everything is used up, the last one holds the rest.
        at_most: sequences after which it ends, with a smaller block; None is as many as there are.

    Attributes:
        sequences: how many there are.
        blocks: how many there are.
        stretches: for each change of the shares, the first sequence and the number of the first block.
        dry: sources that are used up, in the order in which it happens.
        left: tokens of each source that are never used.
    """

    def __init__(
        self,
        limits: Sequence[int],
        weights: Sequence[float] | None,
        context: int,
        block_sequences: int,
        when_dry: WhenDry,
        fill_last: bool = False,
        at_most: int | None = None,
    ):
        self.fill_last = fill_last
        self.limits, self.context, self.block_sequences = list(limits), context, block_sequences
        self.dry: list[DrySource] = []
        self._stretches: list[_Stretch] = []
        if weights is None:
            self._plan_all(list(map(float, limits)))
        elif when_dry == "renormalize":
            self._plan_all(list(weights))
        else:
            self._plan_until_dry(list(weights))
        if at_most is not None:
            self._cut(at_most)
        self._first_sequences = [0, *accumulate(each.blocks * each.sequences for each in self._stretches)]
        self.sequences = self._first_sequences[-1]
        self.stretches = list(zip(self._first_sequences, (each.first_block for each in self._stretches)))
        self.blocks = sum(each.blocks for each in self._stretches)
        self.left = [limit - end for limit, end in zip(self.limits, self._end())]

    def block(self, number: int) -> BlockTokens:
        """The tokens of a block."""
        stretch = self._stretches[bisect.bisect_right(self._stretches, number, key=lambda each: each.first_block) - 1]
        before = stretch.after(number - stretch.first_block)
        return BlockTokens(stretch.sequences, list(zip(before, stretch.after(number - stretch.first_block + 1))))

    def place(self, sequence: int) -> tuple[int, int]:
        """The block that a sequence is in, and its number there."""
        index = bisect.bisect_right(self._first_sequences, sequence) - 1
        stretch = self._stretches[index]
        block, number = divmod(sequence - self._first_sequences[index], stretch.sequences)
        return stretch.first_block + block, number

    def _cut(self, sequences: int) -> None:
        """Leave so many sequences, if there are more."""
        kept, self._stretches = self._stretches, []
        for each in kept:
            blocks, rest = divmod(min(sequences, each.blocks * each.sequences), each.sequences)
            sequences -= blocks * each.sequences + rest
            if blocks:
                self._stretches.append(replace(each, blocks=blocks))
            if rest:
                block = [stop - start for start, stop in zip(each.after(blocks), each.after(blocks + 1))]
                self._add_amounts(_fill(block, list(map(float, block)), rest * self.context))

    def _end(self) -> list[int]:
        """Where the sources' streams are after all that is added."""
        last = self._stretches[-1] if self._stretches else None
        return last.after(last.blocks) if last else [0] * len(self.limits)

    def _add_blocks(self, blocks: int, shares: list[int]) -> None:
        if blocks:
            tokens = self.block_sequences * self.context
            self._add(blocks, self.block_sequences, tokens, shares, None)

    def _add_amounts(self, amounts: list[int]) -> None:
        if tokens := sum(amounts):
            self._add(1, -(-tokens // self.context), tokens, None, amounts)

    def _add(
        self, blocks: int, sequences: int, tokens: int, shares: list[int] | None, amounts: list[int] | None
    ) -> None:
        first = self._stretches[-1].first_block + self._stretches[-1].blocks if self._stretches else 0
        self._stretches.append(_Stretch(first, blocks, sequences, tokens, self._end(), shares, amounts))

    def _plan_until_dry(self, weights: list[float]) -> None:
        shares = _whole_shares(weights)
        sequences = _most(self.limits, shares, self.context)
        self._add_blocks(sequences // self.block_sequences, shares)
        self._add_amounts([a - b for a, b in zip(_split(sequences * self.context, shares), self._end())])
        more = _split((sequences + 1) * self.context, shares)
        self.dry = [DrySource(index, sequences) for index, limit in enumerate(self.limits) if more[index] > limit]

    def _plan_all(self, weights: list[float]) -> None:
        block_tokens, sequence = self.block_sequences * self.context, 0
        least = self.context if self.fill_last else 1
        while sum(left := [limit - end for limit, end in zip(self.limits, self._end())]) >= least:
            open_weights = [weight if rest else 0.0 for weight, rest in zip(weights, left)]
            shares = _whole_shares(open_weights)
            blocks = _most(left, shares, block_tokens)
            self._add_blocks(blocks, shares)
            left = [limit - end for limit, end in zip(self.limits, self._end())]
            tokens = min(block_tokens, sum(left) // least * least)
            amounts = _fill(left, open_weights, tokens)
            self._add_amounts(amounts)
            sequence += blocks * self.block_sequences + -(-sum(amounts) // self.context)
            used_up = [i for i, weight in enumerate(open_weights) if weight and left[i] == amounts[i]]
            self.dry += [DrySource(index, sequence) for index in used_up]


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """Shares in units of 2^-40, that of the largest left to `_split`."""
    total = sum(weights)
    return [int(_ONE * weight / total) for weight in weights]


def _split(tokens: int, shares: Sequence[int]) -> list[int]:
    """Each source's part of so many tokens; none becomes less when there are more."""
    parts = [tokens * share // _ONE for share in shares]
    largest = max(range(len(shares)), key=lambda index: shares[index])
    parts[largest] += tokens - sum(parts)
    return parts


def _most(limits: Sequence[int], shares: Sequence[int], unit: int) -> int:
    """How many units of tokens there are at most before a source has too few."""
    low, high = 0, sum(limits) // unit + 1
    while high - low > 1:
        middle = (low + high) // 2
        if all(used <= limit for used, limit in zip(_split(middle * unit, shares), limits)):
            low = middle
        else:
            high = middle
    return low


def _fill(left: Sequence[int], weights: Sequence[float], tokens: int) -> list[int]:
    """Tokens by shares, but no more than is left of a source: what one lacks, the others give by their shares."""
    amounts, weights = [0] * len(left), list(weights)
    while any(weights):
        quotas = _split(tokens - sum(amounts), _whole_shares(weights))
        short = [index for index, weight in enumerate(weights) if weight and quotas[index] >= left[index]]
        if not short:
            return [amount + quota for amount, quota in zip(amounts, quotas)]
        for index in short:
            amounts[index], weights[index] = left[index], 0.0
    return amounts
