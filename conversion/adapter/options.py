# SPDX-License-Identifier: Apache-2.0
"""What `jai merge-adapter` can be asked for."""

from dataclasses import dataclass

from jai.conversion.output.options import WriteOptions
from jai.options import argument, check_values, option


@dataclass(kw_only=True)
class MergeAdapterOptions(WriteOptions):
    """What `jai merge-adapter` does."""

    adapter: str = argument("ADAPTER", help="Folder or Hub id of a LoRA adapter, such as the output of `jai sft`.")
    base: str | None = option(
        None,
        help="Folder or Hub id of the JAI to merge into, in 16 or 32 bits. Needed if the adapter names none, or "
        "one in four bits.",
        metavar="CKPT",
    )

    def __post_init__(self) -> None:
        check_values(self)
