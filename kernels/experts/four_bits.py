# SPDX-License-Identifier: Apache-2.0
"""Matrices in four bits as the kernels read them: bitsandbytes' NF4 and FP4 (QLoRA, section 3), each expert by itself.

A byte holds two weights of a row, the first in its upper half. Every `SCALED` weights of a row share a scale; with
double quantisation the scales are codes of eight bits, every `NESTED` of an expert's share a scale, and an offset is
added.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

SCALED = 64
NESTED = 256


class FourBits(NamedTuple):
    """What two matrices need beside their packed bytes.

    Attributes:
        code: what the 16 codes mean, `(16,)` in fp32.
        gate_up_scales, down_scales: the scale of each block `(E, R * C / 64)` in fp32; or with double quantisation the
            codes `(E, R * C / 64)` in uint8, their scales `(E, R * C / 64 / 256)` rounded up, the experts' offsets
            `(E,)` and what the codes mean `(256,)`, all in fp32.
    """

    code: torch.Tensor
    gate_up_scales: Sequence[torch.Tensor]
    down_scales: Sequence[torch.Tensor]


class Packed(NamedTuple):
    """One matrix of every expert: its bytes `(E, R * C / 2)`, and what they need (`FourBits`)."""

    packed_EB: torch.Tensor
    scales: Sequence[torch.Tensor]
    code: torch.Tensor

    def other_side(self, side: int) -> int:
        """R where `side` is C, and C where it is R."""
        return self.packed_EB.shape[1] * 2 // side


def dequantize_reference(matrix: Packed, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights in plain operations, `(E, R, C)`."""
    packed_EB = matrix.packed_EB.long()
    weights = matrix.code[torch.stack((packed_EB >> 4, packed_EB & 15), dim=-1)].flatten(1)
    scales, *nested = matrix.scales
    if nested:
        absmax, offset_E, meaning = nested
        places = torch.arange(scales.shape[1], device=scales.device) // NESTED
        scales = meaning[scales.long()] * absmax[:, places] + offset_E[:, None]
    return (weights * scales.repeat_interleave(SCALED, dim=1)).to(dtype).view(weights.shape[0], -1, columns)
