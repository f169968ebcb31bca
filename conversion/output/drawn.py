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
# Values that noise is added to at a time. torch draws by 16, so that pieces of one stream are what it draws at once, if
# each but the last is a multiple of that, and the last no less.
_PIECE = 1 << 18
_DRAWN_TOGETHER = 16


def normal(name: str, count: int, seed: int) -> torch.Tensor:
    """`count` values of the standard normal distribution in fp32, the same for the same name and seed."""
    return torch.randn(count, generator=_generator(name, seed))


def normal_pieces(name: str, count: int, seed: int, piece: int = _PIECE) -> Iterator[torch.Tensor]:
    """The values of `normal` one after the other, at most `piece` + 15 at a time."""
    generator = _generator(name, seed)
    while count:
        size = count if count < piece + _DRAWN_TOGETHER else piece
        yield torch.randn(size, generator=generator)
        count -= size


def _generator(name: str, seed: int) -> torch.Generator:
    # Hashed together: torch's CPU generator reads only the low 32 bits of its seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))


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
    count, row = math.prod(reader.shapes[source]), math.prod(reader.shapes[source][1:])

    def make() -> Iterator[torch.Tensor]:
        total = squares = 0.0
        for first, end in reader.chunk_rows(source):
            for at in range(first * row, end * row, _PIECE):
                values = reader.values(source, at, min(_PIECE, end * row - at)).double()
                total += values.sum().item()
                squares += values.square_().sum().item()
        std = relative_std * math.sqrt(max(squares - total * total / count, 0.0) / max(count - 1, 1))
        for number, (first, end) in enumerate(reader.chunk_rows(source)):
            at = first * row
            for noise in normal_pieces(f"{name}[{number}]", (end - first) * row, seed):
                yield noise.mul_(std).add_(reader.values(source, at, len(noise)))
                at += len(noise)

    formula = f"{source} + noise({name}, relative std {relative_std:g}, seed {seed})"
    return Computed(count * dtype.itemsize, formula, make, (reader.file_of(source),))
