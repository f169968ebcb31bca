# SPDX-License-Identifier: Apache-2.0
"""What `jai quantize` can be asked for."""

from dataclasses import dataclass

from jai.conversion.output.options import Dtype, WriteOptions
from jai.options import argument, check_values, option


@dataclass(kw_only=True)
class QuantizeOptions(WriteOptions):
    """What `jai quantize` does."""

    model: str = argument("CKPT", help="Folder or Hub id of a JAI.")
    dtype: Dtype | None = option(None, help="Data type of the weights that are not quantized.", shown_default="CKPT's")
    double_quant: bool = option(False, help="Also quantize the scales: 0.52 bytes per weight instead of 0.56.")

    def __post_init__(self) -> None:
        check_values(self)
