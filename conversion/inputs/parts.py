# SPDX-License-Identifier: Apache-2.0
"""What the bytes of an output are made of: ranges of input files, and values that are computed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from jai.conversion.inputs.weight_sources import WeightFiles


@dataclass(frozen=True)
class Copied:
    """Bytes `start` to `start + length` of a weight file, as they are.

    Attributes:
        files: the files of its checkpoint.
        file: its name among them.
        start: first byte in the file.
        length: how many bytes.
    """

    files: WeightFiles
    file: str
    start: int
    length: int

    @property
    def reads(self) -> tuple[tuple[WeightFiles, str], ...]:
        return ((self.files, self.file),)


@dataclass(frozen=True)
class Computed:
    """Bytes that are made when they are written.

    Attributes:
        length: how many, in the dtype of the output.
        formula: what is computed, for people and for tests that account for every byte.
        make: yields the values in order, in chunks of bounded size, each valid until the next is asked for. Whoever
            writes them rounds them to the dtype of the output. Called twice it gives the same values.
        reads: the weight files that it reads.
    """

    length: int
    formula: str
    make: Callable[[], Iterable[torch.Tensor]]
    reads: tuple[tuple[WeightFiles, str], ...] = ()


Part = Copied | Computed
