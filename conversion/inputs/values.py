# SPDX-License-Identifier: Apache-2.0
"""What the values of weights are: NaN and infinity, found in their bytes, and the dtype that holds several.

Whoever trains or merges such a checkpoint gets only NaN, often hours later. Inputs are read once for their hashes
anyway, and looking at the values on the way takes 0.80 s of processor time a gigabyte in place of 0.72: the largest bit
pattern, read with and without a sign, is found at 26 GB/s on one core. `torch.isfinite` does 0.6 GB/s (bf16).
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path

import numpy as np
import torch

from jai.conversion.inputs.header import Header
from jai.errors import UnfinishableError

# As safetensors spells them.
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
STORED_NAMES = {**DTYPE_NAMES, torch.uint8: "U8"}  # bytes of quantised weights: written, and read by nothing here

# Bits of infinity. With the sign cleared, finite values have smaller ones, and NaN larger ones.
_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_BITS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}
_CHUNK_BYTES = 1 << 20  # a multiple of every dtype's size; it stays in the processor's cache


def is_finite(data: memoryview, dtype: torch.dtype) -> bool:
    """Whether bytes that are values of `dtype` hold neither NaN nor infinity."""
    if not data or not dtype.is_floating_point:
        return True
    signed, unsigned = _BITS[dtype.itemsize]
    infinity = _INFINITY[dtype]
    # Positive values order as their bits do; those with a sign are the largest where no sign is read.
    return bool(
        np.frombuffer(data, signed).max() < infinity
        and np.frombuffer(data, unsigned).max() < (infinity | 1 << 8 * dtype.itemsize - 1)
    )


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the values of all these exactly: of bfloat16 and float16 it is float32."""
    return reduce(torch.promote_types, dtypes)


def is_rounded(dtype: torch.dtype, to: torch.dtype) -> bool:
    """Whether `to` lacks some values of `dtype`."""
    return common_dtype((dtype, to)) != to


def dtype_names(dtypes: Iterable[torch.dtype]) -> list[str]:
    """For people and configurations, each once."""
    return sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})


def bytes_of(values: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    return values.contiguous().view(-1).view(torch.uint8).numpy().data


def refuse_not_finite(path: Path, header: Header) -> None:
    """Raise `UnfinishableError` if a weight in a safetensors file is NaN or infinite."""
    for _ in _checked_chunks(path, header):
        pass


def sha256_of_finite(path: Path, header: Header) -> str:
    """SHA-256 of a safetensors file, in hexadecimal, read in one pass with its values.

    Raises:
        UnfinishableError: if a weight is NaN or infinite.
    """
    digest = hashlib.sha256()
    for chunk in _checked_chunks(path, header):
        digest.update(chunk)
    return digest.hexdigest()


def _checked_chunks(path: Path, header: Header) -> Iterator[memoryview]:
    """All bytes of a file, in a buffer that is used again."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb") as file:
        for name, dtype, length in _ranges(header):
            for at in range(0, length, _CHUNK_BYTES):
                chunk = buffer[: min(_CHUNK_BYTES, length - at)]
                if file.readinto(chunk) != len(chunk):
                    raise UnfinishableError(f"{path} is shorter than it was. Fetch it and start again.")
                if dtype and not is_finite(chunk, dtype):
                    values = torch.frombuffer(chunk, dtype=dtype)
                    value = values[~values.isfinite()][0].item()
                    raise UnfinishableError(
                        f"{name} in {path} holds {value}, so nothing that is computed with it would be a number. Fetch "
                        "or save the checkpoint again; if its training went wrong, take a checkpoint from before."
                    )
                yield chunk


def _ranges(header: Header) -> Iterator[tuple[str, torch.dtype | None, int]]:
    """Name, dtype and length of all that a file holds, in order: the header, then tensors without a hole."""
    yield "", None, header.data_start
    for name, entry in sorted(header.tensors.items(), key=lambda tensor: tensor[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        yield name, DTYPES[entry["dtype"]], stop - start
