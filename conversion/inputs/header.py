# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file: which tensors it holds, of which form, and where their bytes lie."""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from jai.errors import UserError

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

_LONGEST_HEADER = 100_000_000  # as in safetensors


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        tensors: name -> {dtype, shape, data_offsets}.
        data_start: where the data begins, from which the offsets count.
        size: bytes of the whole file.
        sha256: of the header's bytes.
    """

    tensors: dict[str, dict]
    data_start: int
    size: int
    sha256: str


def read_header(path: Path) -> Header:
    """Header of a safetensors file, checked against the file's size.

    Raises:
        UserError: if the file is not safetensors, or shorter or longer than its header says.
    """
    with path.open("rb") as file:
        return parse_header(file, path.stat().st_size, str(path))


def parse_header(file: BinaryIO, size: int, name: str) -> Header:
    """As `read_header`, from the beginning of any file of `size` bytes; `name` is for messages.

    Raises:
        UserError: as `read_header`.
    """
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        raw = file.read(length) if length <= min(size - 8, _LONGEST_HEADER) else b""
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = 0
        for entry in header.values():
            start, stop = entry["data_offsets"]
            if not (0 <= start <= stop and all(type(n) is int and n >= 0 for n in entry["shape"])):
                raise ValueError
            end = max(end, stop)
    except (struct.error, ValueError, AttributeError, KeyError, TypeError):
        raise UserError(
            f"{name} is no whole safetensors file: its header cannot be read. Fetch or save it again."
        ) from None
    if size != 8 + length + end:
        raise UserError(
            f"{name} has {size:,} bytes, but its header describes {8 + length + end:,}: the file is truncated or "
            "damaged. Fetch or save it again."
        )
    return Header(header, 8 + length, size, hashlib.sha256(raw).hexdigest())
