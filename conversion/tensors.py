# SPDX-License-Identifier: Apache-2.0
"""The tensors of an output checkpoint, planned: where each byte of them comes from, before any is written."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from jai.conversion.checkpoint import Header

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Shards(Protocol):
    """The weight files that tensors are read from: a local folder's, or a Hub repository's.

    Attributes:
        names: of the files.
        place: folder or Hub id, for messages.
    """

    names: list[str]
    place: str

    def header(self, name: str) -> "Header":
        """Header of a file, which need not be here for that."""

    def path(self, name: str) -> Path:
        """Where a file lies; it is fetched first if it must be."""

    def release(self, name: str) -> None:
        """Say that a file is not needed any more."""

    def identity(self) -> dict[str, list]:
        """What tells each file from another version of it, without reading it."""

    def sha256(self, name: str) -> str:
        """Hash of a file."""

    def check_unchanged(self, name: str) -> None:
        """Raise `UserError` if a file is not what it was when this object was made."""


@dataclass(frozen=True)
class Copied:
    """Bytes `start` to `start + length` of a source file, as they are."""

    shards: Shards
    shard: str
    start: int
    length: int

    @property
    def reads(self) -> tuple[tuple[Shards, str], ...]:
        return ((self.shards, self.shard),)


@dataclass(frozen=True)
class Computed:
    """Bytes that are made when they are written.

    Attributes:
        length: how many.
        formula: what is computed, for people and for tests that account for every byte.
        make: yields the values in order, in the dtype of the output, in chunks of bounded size. Called twice it gives
            the same bytes.
        reads: the source files that it reads.
    """

    length: int
    formula: str
    make: Callable[[], Iterable[torch.Tensor]]
    reads: tuple[tuple[Shards, str], ...] = ()


Part = Copied | Computed


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
