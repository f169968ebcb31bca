# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file: which tensors it holds, of which form, and where their bytes lie. No PyTorch."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jai.errors import UserError
from jai.files import check_is_file

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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint as a header says: its shape, its dtype in safetensors' spelling ("BF16"), and its bytes.

    Attributes:
        file: name of the weight file.
        start: the place in the file at which its bytes begin.
        length: how many they are.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str
    start: int
    length: int


def read_header(path: Path) -> Header:
    """Header of a safetensors file, checked against the file's size.

    Raises:
        UserError: if it is no file, not safetensors, or shorter or longer than its header says.
    """
    check_is_file(path)
    with path.open("rb") as file:
        return parse_header(file, path.stat().st_size, str(path))


def parse_header(file: BinaryIO, size: int, name: str) -> Header:
    """As `read_header`, from the beginning of any file of `size` bytes; `name` is for messages.

    Raises:
        UserError: as `read_header`.
    """
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"its length is {length:,}")
        raw = file.read(length)
        tensors = json.loads(raw, object_pairs_hook=_without_duplicates)
        if not isinstance(tensors, dict):
            raise ValueError("it is not a JSON object")
        tensors.pop("__metadata__", None)
        for tensor, entry in tensors.items():
            _check_entry(tensor, entry)
        end = _check_ranges(tensors)
    except (struct.error, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{name} is not a complete safetensors file: its header cannot be read ({reason}). Fetch or save it again."
        ) from None
    if size != 8 + length + end:
        raise UserError(
            f"{name} has {size:,} bytes, but its header describes {8 + length + end:,}: the file is truncated or "
            "damaged. Fetch or save it again."
        )
    return Header(tensors, 8 + length, size, hashlib.sha256(raw).hexdigest())


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; readers differ in which of two values they take for one name."""
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in content if names.count(name) > 1)!r} twice")
    return content


def _check_entry(tensor: str, entry: Any) -> None:
    is_whole = (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and _are_sizes(entry.get("shape"))
        and _are_sizes(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    )
    if not is_whole:
        raise ValueError(f"the entry of {tensor} has no dtype, shape and data_offsets as whole numbers from 0")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_ranges(tensors: dict[str, dict]) -> int:
    """Where the tensors' bytes end, if they lie one behind the other, as the format demands.

    Two tensors that share bytes are trained and merged as if they were apart; what lies in a hole, nobody sees.
    """
    end = 0
    for tensor, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != end or stop < start:
            raise ValueError(f"the bytes of {tensor} are {start:,} to {stop:,}, where {end:,} was expected")
        end = stop
    return end


def stored_tensors(
    headers: Mapping[str, Header], place: str, indexed: Mapping[str, str] | None
) -> dict[str, StoredTensor]:
    """The tensors of all weight files by name, of any dtype.

    Args:
        headers: of each file.
        place: folder or Hub id, for messages.
        indexed: the file of each tensor as the index says (`weight_map`).

    Raises:
        UserError: if a tensor is in two files, or not in that which the index names.
    """
    stored: dict[str, StoredTensor] = {}
    for file, header in headers.items():
        for name, entry in header.tensors.items():
            if name in stored:
                raise UserError(f"{name} in {file} is in two files. Fetch or save the checkpoint again.")
            start, stop = entry["data_offsets"]
            begin = header.data_start + start
            stored[name] = StoredTensor(tuple(entry["shape"]), entry["dtype"], file, begin, stop - start)
    lost = sorted(name for name, file in (indexed or {}).items() if name not in stored or stored[name].file != file)
    if lost:
        raise UserError(
            f"The index of {place} names {lost[0]} in {(indexed or {})[lost[0]]}, which does not hold it "
            f"({len(lost)} such tensors). Fetch or save the checkpoint again."
        )
    return stored
