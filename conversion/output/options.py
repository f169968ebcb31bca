# SPDX-License-Identifier: Apache-2.0
"""What every verb that writes a checkpoint can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jai.options import Size, argument, option

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class WriteOptions:
    """Where the checkpoint goes, and how it is written."""

    out: Path = argument("OUT", help="Folder to write; it must not exist.")
    max_shard_size: Size = option(
        Size(5_000_000_000), help="Size limit of one weight file.", metavar="SIZE", shown_default="5GB"
    )
    workers: int = option(1, help="Weight files to write in parallel.", at_least=1)
    dry_run: bool = option(False, help="Check the inputs and print the plan without writing anything.")
    verify: bool = option(False, help="After writing, read every byte again and compare it with its source.")
