# SPDX-License-Identifier: Apache-2.0
"""Faulty rows: counted by kind, named by source and row, a few of each shown, and refused above a limit."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jai.errors import UserError

_SHOWN_ROWS = 5
_SHOWN_KINDS = 5


@dataclass(frozen=True)
class FaultyRow:
    """A row that cannot be trained on.

    Attributes:
        where: source and split.
        row: its number there, from 1.
        kind: by which faults are counted.
        text: the fault itself.
    """

    where: str
    row: int
    kind: str
    text: str


def refuse_faults(faulty: Sequence[FaultyRow], rows: int, limit: float, *, before: int = 0) -> list[str]:
    """Refuse more faults than are allowed, or say what is left out.

    Args:
        faulty: in their order.
        rows: of all sources together, the faulty ones too.
        limit: how many may be faulty; below 1, which share.
        before: how many others were left out already, which count against the limit.

    Returns:
        What to say of the rows that are left out: nothing where none is.

    Raises:
        UserError: naming the first row of each kind, and some like it.
    """
    if not faulty:
        return []
    kinds = [_texts(group) for group in _by_kind(faulty)]
    if before + len(faulty) > (limit * rows if limit < 1 else limit):
        first, *others = kinds[:_SHOWN_KINDS]
        also = "".join(f" Also {text[0].lower()}{text[1:]}" for text in others)
        more = f" And {len(kinds) - _SHOWN_KINDS} more kinds." if len(kinds) > _SHOWN_KINDS else ""
        raise UserError(
            f"{first}{also}{more} {before + len(faulty):,} of {rows:,} rows are faulty. Fix these rows or leave them "
            f"out, or raise `max_faulty_rows` ({limit:g}), which leaves out so many."
        )
    return [f"Left out {len(faulty):,} of {rows:,} rows, which are faulty. {' '.join(kinds)}"]


def _by_kind(faulty: Iterable[FaultyRow]) -> list[list[FaultyRow]]:
    kinds: dict[tuple[str, str], list[FaultyRow]] = {}
    for each in faulty:
        kinds.setdefault((each.where, each.kind), []).append(each)
    return list(kinds.values())


def _texts(group: list[FaultyRow]) -> str:
    first, *others = group
    more = ""
    if others:
        numbers = ", ".join(f"{each.row:,}" for each in others[:_SHOWN_ROWS])
        rest = f" and {len(others) - _SHOWN_ROWS:,} more" if len(others) > _SHOWN_ROWS else ""
        more = f" Rows like it: {numbers}{rest}."
    return f"Row {first.row:,} of {first.where} cannot be trained on: {first.text}.{more}"
