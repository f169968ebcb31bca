# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share that compare arms of one experiment: its text, its folder, and its figures."""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jai.errors import UserError


def first_characters(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """The first pieces, until they have so many characters; the last is whole."""
    for piece in pieces:
        yield piece
        characters -= len(piece)
        if characters <= 0:
            return


def check_setup(setup: dict[str, Any], out: Path) -> None:
    """Refuse to go on from runs in `out` that could not be compared with those of `setup`, which is kept there.

    Raises:
        UserError: naming what differs.
    """
    setup = json.loads(json.dumps(setup))
    file = out / "setup.json"
    if not file.exists():
        file.write_text(json.dumps(setup, indent=1), encoding="utf-8")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    different = [name for name in setup if setup[name] != before.get(name)]
    if different:
        raise UserError(
            f"{out} holds runs with other {', '.join(different)}. Give another folder, or the options and the texts "
            "that it was made with."
        )


def mean_and_spread(values: Sequence[float], form: str, spread_form: str = ".3f") -> str:
    """The mean in a format, and the standard deviation where there is one."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):{spread_form}}" if len(values) > 1 else mean
