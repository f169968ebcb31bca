# SPDX-License-Identifier: Apache-2.0
"""What `jai quantize` can be asked for."""

from dataclasses import dataclass

from jai.conversion.output.options import Dtype, WriteOptions
from jai.options import argument, check_values, option


@dataclass(kw_only=True)
class QuantizeOptions(WriteOptions):
    """What `jai quantize` does."""

    model: str = argument("CKPT", help="Folder or Hub id of a JAI.")
    dtype: Dtype | None = option(None, help="Of what is not quantised.", shown_default="as CKPT")
    double_quant: bool = option(False, help="Quantise the scales too: 0.52 bytes a weight for 0.56.")

    def __post_init__(self) -> None:
        check_values(self)
