# SPDX-License-Identifier: Apache-2.0
"""Which rows make a mixture: shares of categories, of examples or of tokens, spread evenly over each source.

Nothing here knows of datasets: rows are positions in arrays.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jai.errors import UserError

_GOLDEN = (math.sqrt(5) - 1) / 2


def even_order(rows: int, seed: int) -> np.ndarray:
    """The positions 0 … rows - 1 in an order whose every beginning is spread evenly over them. Shape (rows,).

    Position i stands at the fractional part of i times the golden ratio, plus a start that the seed decides. No stretch
    of rows, and no pattern such as every second one, is taken more often than the others (three-distance theorem), and
    a smaller choice is part of every larger one.
    """
    start = np.random.default_rng(seed).random()
    return np.argsort((np.arange(rows) * _GOLDEN + start) % 1.0, kind="stable")


@dataclass(frozen=True)
class Share:
    """What one group of rows gives to a mixture.

    Attributes:
        name: category, or source.
        wanted: its share, from 0 to 1.
        rows, tokens: that were taken; tokens are None where they were not counted.
        of_rows: how many it has.
    """

    name: str
    wanted: float
    rows: int
    tokens: int | None
    of_rows: int


@dataclass(frozen=True)
class RowMixture:
    """Rows that were chosen.

    Attributes:
        positions: of the rows, in the order of training; a repeated row stands several times.
        shares: what each group gave.
        printed_sum: of the shares as they were given.
        of: "examples" or "tokens".
    """

    positions: np.ndarray
    shares: tuple[Share, ...]
    printed_sum: float
    of: str


def mix_rows(
    groups: list[str | None],
    shares: Mapping[str, float],
    *,
    tokens: np.ndarray | None,
    of: str = "examples",
    size: int | None = None,
    repeat: bool = False,
    seed: int = 0,
) -> RowMixture:
    """Choose rows so that each group has its share of them, or of their tokens.

    Args:
        groups: each row's category (or source).
        shares: each group's share; they are divided by their sum.
        tokens: of each row; needed for shares of tokens. Shape (rows,).
        of: "examples" or "tokens".
        size: of the mixture, in examples or in tokens; None is the largest that repeats no row.
        repeat: whether rows may be repeated to reach that size.
        seed: of the rows that are taken, and of their order.

    Raises:
        UserError: for a group without a share, a share without rows, or a size that would repeat rows.
    """
    names, group_of = np.unique([name or "" for name in groups], return_inverse=True)
    rows_of = {str(name): np.flatnonzero(group_of == number) for number, name in enumerate(names)}
    _check_names(set(rows_of), shares)
    printed_sum = float(sum(shares.values()))
    wanted = {name: share / printed_sum for name, share in shares.items()}
    weights = np.ones(len(groups), dtype=np.int64) if of == "examples" else tokens
    assert weights is not None
    available = {name: int(weights[rows_of[name]].sum()) for name in wanted if name in rows_of}
    shortest = min((name for name in wanted if wanted[name] > 0), key=lambda name: available[name] / wanted[name])
    largest = available[shortest] / wanted[shortest]
    if size is not None and size > largest and not repeat:
        raise UserError(
            f"`mixture_size` is {size:,} {of}, and without repeating a row there are {math.floor(largest):,}: "
            f"{shortest} has {available[shortest]:,} for its share of {wanted[shortest]:.2%}. Give a smaller size "
            "(or none, for the largest), more rows, or `repeat_rows: true`."
        )
    total = largest if size is None else size
    chosen = {name: _take(rows_of[name], weights, wanted[name] * total, seed) for name in wanted if wanted[name] > 0}
    reports = tuple(
        Share(
            name,
            wanted[name],
            len(chosen.get(name, ())),
            None if tokens is None else int(tokens[chosen[name]].sum()) if name in chosen else 0,
            len(rows_of.get(name, ())),
        )
        for name in wanted
    )
    positions = np.concatenate(list(chosen.values()))
    if not len(positions):
        raise UserError(f"The mixture of {total:,.0f} {of} has no rows. Give a larger `mixture_size`.")
    return RowMixture(np.random.default_rng(seed).permutation(positions), reports, printed_sum, of)


def _check_names(present: set[str], shares: Mapping[str, float]) -> None:
    if "" in present:
        raise UserError("Some rows have no category, and `shares` are of categories. Give each source a `category`.")
    if without := sorted(present - shares.keys()):
        raise UserError(f"`shares` has none for {', '.join(without)}. Give each category its share; 0 leaves it out.")
    if missing := sorted(name for name, share in shares.items() if share > 0 and name not in present):
        raise UserError(
            f"`shares` has {', '.join(missing)}, and no rows are of it; there are {', '.join(sorted(present))}."
        )


def _take(rows: np.ndarray, weights: np.ndarray, budget: float, seed: int) -> np.ndarray:
    """Rows whose weights come nearest to a budget, each as often as every other one, or once more."""
    ordered = rows[even_order(len(rows), seed)]
    sums = np.cumsum(weights[ordered])
    rounds, rest = divmod(budget + 1e-6, int(sums[-1]))
    count = int(np.searchsorted(sums, rest, side="right"))
    if count < len(sums):
        before = int(sums[count - 1]) if count else 0
        count += rest - before > int(sums[count]) - rest
    return np.concatenate([np.tile(ordered, int(rounds)), ordered[:count]])


def cut_validation(questions: np.ndarray, size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rows to train on, and of those to validate on. Shapes (train,), (validation,).

    Rows with the same question stay together, so that no answer that is validated on was trained on. Which ones are
    held out follows from the questions themselves: rows that come later change nothing for those that are there,
    as far as the share allows.

    Args:
        questions: a hash of each row's prompt. Shape (rows,).
        size: how many rows to hold out; below 1, which share.
        seed: of the choice.

    Raises:
        UserError: if nothing would be left on one of the sides.
    """
    wanted = round(size * len(questions)) if size < 1 else round(size)
    unique, group_of, counts = np.unique(questions, return_inverse=True, return_counts=True)
    # Multiplied by an odd number and read from the top bits, the hashes have another order for each seed.
    odd = np.uint64(int(np.random.default_rng(seed).integers(0, 2**63)) * 2 + 1)
    order = np.argsort(unique.astype(np.uint64) * odd, kind="stable")
    # All that fit: a question with many answers may be too much where the next one is not.
    held_out, rows = np.zeros(len(unique), dtype=bool), 0
    for group in order:
        if rows + counts[group] <= wanted:
            held_out[group] = True
            rows += int(counts[group])
        if rows == wanted:
            break
    is_held_out = held_out[group_of]
    if not is_held_out.any() or is_held_out.all():
        raise UserError(
            f"`test_split_size` is {size:g}, and {len(questions):,} rows with {len(unique):,} prompts give no "
            "validation split of that size that leaves rows to train on. Give another size."
        )
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
