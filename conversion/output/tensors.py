# SPDX-License-Identifier: Apache-2.0
"""The tensors of an output checkpoint, planned: where each byte of them comes from, before any is written."""

import math
from dataclasses import dataclass

import torch

from jai.conversion.inputs.parts import Part


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output: its form, and the parts that its bytes are made of, in order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        made = sum(part.length for part in self.parts)
        if made != self.bytes:
            raise AssertionError(f"{self.name} has {self.bytes} bytes, but its parts have {made}")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize
