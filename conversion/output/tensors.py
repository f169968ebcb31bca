# SPDX-License-Identifier: Apache-2.0
"""The tensors of an output checkpoint, planned: where each byte of them comes from, before any is written."""

import math
from dataclasses import dataclass

import torch

from jai.conversion.inputs.parts import Computed, Part
from jai.conversion.inputs.values import bytes_of, is_finite
from jai.errors import UnfinishableError


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output: its form, and the parts that its bytes are made of, in order.

    Attributes:
        holds: parameters of the model that are in it, where these are not its numbers: two in a byte, none in scales.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    holds: int | None = None

    def __post_init__(self) -> None:
        made = sum(part.length for part in self.parts)
        if made != self.bytes:
            raise AssertionError(f"{self.name} has {self.bytes} bytes, but its parts have {made}")

    def rounded(self, part: Computed, values: torch.Tensor) -> torch.Tensor:
        """Computed values in the tensor's dtype.

        Raises:
            UnfinishableError: if one of them is NaN, infinite, or too large for the dtype.
        """
        result = values.to(self.dtype)
        if not is_finite(bytes_of(result), self.dtype):
            raise UnfinishableError(_not_finite(self, part, values[~result.isfinite()][0].item()))
        return result

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def parameters(self) -> int:
        return self.numel if self.holds is None else self.holds

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def _not_finite(tensor: PlannedTensor, part: Computed, value: float) -> str:
    if not math.isfinite(value):
        return (
            f"{tensor.name} comes out as {value}: {part.formula}. Its inputs have only finite values, but some are too "
            "large to compute with. Look at how they were trained, and take other checkpoints."
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    largest = torch.finfo(tensor.dtype).max
    wider = next((wider for wider in (torch.bfloat16, torch.float32) if abs(value) <= torch.finfo(wider).max), None)
    remedy = f"Give --dtype {str(wider).removeprefix('torch.')}." if wider else "No dtype of a checkpoint can hold it."
    return f"{tensor.name} has the value {value:.4g}, but the largest that {dtype} can hold is {largest:.4g}. {remedy}"
