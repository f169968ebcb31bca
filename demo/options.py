# SPDX-License-Identifier: Apache-2.0
"""What `jai demo` can be asked for."""

from dataclasses import dataclass
from pathlib import Path

from jai.errors import UserError
from jai.options import argument, check_values, option


@dataclass(kw_only=True)
class DemoOptions:
    """How the demo is run."""

    out: Path = argument("OUT", Path("runs/demo"), help="Folder to write; it must not exist.")
    seed: int = option(0, help="Random seed for the text, the base and the training.", at_least=0, at_most=2**32 - 1)
    quick: bool = option(False, help="Train for a few steps only: every part runs, but nothing is learned.")

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UserError: naming the option, or if the folder exists.
        """
        check_values(self)
        if self.out.exists():
            raise UserError(f"{self.out} exists already. Give another folder (jai demo OUT), or remove this one first.")
