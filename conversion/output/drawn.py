# SPDX-License-Identifier: Apache-2.0
"""Values that conversion makes itself: drawn with a seed, constant, or a matrix with noise added.

What is drawn depends on the tensor's name and the seed alone, not on the order of writing or the number of workers.
"""

import math
import zlib
from collections.abc import Iterator

import torch

from jai.conversion.inputs.parts import Computed
from jai.conversion.inputs.reader import CheckpointReader

_CHUNK = 1 << 20  # values drawn at a time: 4 MB in fp32


def normal(name: str, count: int, seed: int) -> torch.Tensor:
    """`count` values of the standard normal distribution in fp32, the same for the same name and seed."""
    # Hashed together: torch's CPU generator reads only the low 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.randn(count, generator=generator)


def drawn(name: str, shape: tuple[int, ...], std: float, seed: int, dtype: torch.dtype) -> Computed:
    """A tensor of normal values with mean 0 and standard deviation `std`."""
    count = math.prod(shape)

    def make() -> Iterator[torch.Tensor]:
        for at in range(0, count, _CHUNK):
            yield normal(f"{name}[{at}]", min(_CHUNK, count - at), seed) * std

    return Computed(count * dtype.itemsize, f"normal({name}, std {std:g}, seed {seed})", make)


def constant(value: float, shape: tuple[int, ...], dtype: torch.dtype) -> Computed:
    """A tensor of one value."""
    count = math.prod(shape)

    def make() -> Iterator[torch.Tensor]:
        for at in range(0, count, _CHUNK):
            yield torch.full((min(_CHUNK, count - at),), value, dtype=dtype)

    return Computed(count * dtype.itemsize, f"constant {value:g}", make)


def with_noise(
    reader: CheckpointReader, source: str, name: str, relative_std: float, seed: int, dtype: torch.dtype
) -> Computed:
    """A source tensor plus normal noise, whose standard deviation is `relative_std` times that of the tensor."""
    count = math.prod(reader.shapes[source])

    def make() -> Iterator[torch.Tensor]:
        total = squares = 0.0
        for chunk in reader.chunks(source):
            values = chunk.double()
            total += values.sum().item()
            squares += values.square_().sum().item()  # in place, as below: a chunk in fp64 is 32 MB
        std = relative_std * math.sqrt(max(squares - total * total / count, 0.0) / max(count - 1, 1))
        for number, chunk in enumerate(reader.chunks(source)):
            yield normal(f"{name}[{number}]", chunk.numel(), seed).view_as(chunk).mul_(std).add_(chunk)

    formula = f"{source} + noise({name}, relative std {relative_std:g}, seed {seed})"
    return Computed(count * dtype.itemsize, formula, make, (reader.file_of(source),))
