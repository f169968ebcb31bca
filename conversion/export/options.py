# SPDX-License-Identifier: Apache-2.0
"""What `jai export` can be asked for."""

from dataclasses import dataclass
from typing import Literal

from jai.conversion.output.options import WriteOptions
from jai.options import argument, check_values, option

Architecture = Literal["mixtral", "phi3"]


@dataclass(kw_only=True)
class ExportOptions(WriteOptions):
    """What `jai export` does."""

    model: str = argument("CKPT", help="Folder or Hub id of a JAI whose skip alphas are all 0.")
    to: Architecture = option("mixtral", help="mixtral for a JAI with experts, phi3 for a dense one.")

    def __post_init__(self) -> None:
        check_values(self)
