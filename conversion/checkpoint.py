# SPDX-License-Identifier: Apache-2.0
"""Safetensors checkpoints, read by tensor and by byte range.

A tensor lies in its file as one run of bytes, and so do any rows of it. What conversion does to phi-3 is nearly all of
that kind, so it plans in byte ranges and reads values only where it computes. Nothing is mapped into memory: a file
that another process cuts short would kill the reader, where a read that comes up short can say so.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from jai.conversion.tensors import DTYPE_NAMES, DTYPES, Computed, Copied, Part, Shards
from jai.errors import UserError
from jai.files import sha256

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
METADATA_PATTERNS = ("*.json", "*.jinja", "*.py", "tokenizer.model")

_LONGEST_HEADER = 100_000_000  # as in safetensors
_CHUNK_BYTES = 8_000_000
_NAMED = 3


def resolve_checkpoint(name: str, *, weights: bool = True) -> Path:
    """Folder of a checkpoint: a local folder as it is, a Hub id after download.

    Args:
        name: folder or Hub id.
        weights: whether to download the weights too.

    Raises:
        UserError: if it is neither, or the Hub refuses.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    patterns = [*METADATA_PATTERNS, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise UserError(f"{name} is neither a folder nor a Hub id. Give a folder that exists, or owner/name.") from None
    except Exception as error:  # of many kinds: the client is httpx or httpx2, depending on huggingface_hub's version
        raise hub_refusal(name, error) from None


def hub_refusal(name: str, error: Exception) -> UserError:
    """What to tell the user when the Hub does not give a repository."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"{name} is no local folder, and the Hub did not give it: {reason}. Check the name, the network, and "
        "`hf auth login` if the repository is private."
    )


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


def has_weights(folder: Path) -> bool:
    """Whether a folder has the weights of a checkpoint, or an index of them."""
    return (folder / WEIGHTS_FILE).exists() or (folder / INDEX_FILE).exists()


def refuse_adapter(name: str, folder: Path) -> None:
    """Raise `UserError` for a LoRA adapter without its model."""
    if (folder / "adapter_config.json").exists() and not has_weights(folder):
        raise UserError(
            f"{name} is a LoRA adapter without its model. Train with `merge_adapter: true`, or train all weights, and "
            "give the result here."
        )


def weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file, as a folder's index says; None where one file holds all weights.

    Raises:
        UserError: if there are no weights, or the index is damaged or names a file outside of the folder.
    """
    if (folder / WEIGHTS_FILE).exists():  # transformers prefers it too
        return None
    index = folder / INDEX_FILE
    if not index.exists():
        raise UserError(
            f"{folder} has no safetensors weights ({WEIGHTS_FILE} or {INDEX_FILE}). Pickled .bin files are not read: "
            "load them with transformers and save them again, which writes safetensors."
        )
    try:
        file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = [name for name in file_of.values() if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of weights. Fetch or save it again.") from None
    if outside:
        raise UserError(
            f"{index} names {outside[0]}, which is not a file beside it. Do not use this checkpoint: an index has only "
            "plain file names."
        )
    return file_of


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index where it has one.

    Raises:
        UserError: as `weight_map`, and if a file is missing.
    """
    file_of = weight_map(folder)
    names = [WEIGHTS_FILE] if file_of is None else sorted(set(file_of.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which its index names. Fetch the missing files.")
    return [folder / name for name in names]


class LocalShards:
    """The weight files of a local folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.place = str(folder)
        self.names = [path.name for path in weight_files(folder)]
        self._identities = {name: self._identity(name) for name in self.names}

    def header(self, name: str) -> Header:
        return read_header(self.folder / name)

    def path(self, name: str) -> Path:
        return self.folder / name

    def release(self, name: str) -> None:
        """Nothing: the files are the user's."""

    def identity(self) -> dict[str, list]:
        return dict(self._identities)

    def sha256(self, name: str) -> str:
        return sha256(self.folder / name)

    def check_unchanged(self, name: str) -> None:
        if not self.path(name).exists() or self._identity(name) != self._identities[name]:
            raise UserError(
                f"{self.path(name)} changed while it was read. Let nothing write to the inputs, and start again."
            )

    def _identity(self, name: str) -> list:
        status = (self.folder / name).stat()
        return [status.st_size, status.st_mtime_ns]


class CheckpointReader:
    """The tensors of a checkpoint by name, over all its shards.

    Args:
        shards: a local folder, or where else the weight files come from.

    Attributes:
        shards: the weight files.
        shapes: shape of each tensor.
        dtypes: dtype of each tensor.
        size: bytes of all files.
        headers: hash of each file's header.

    Raises:
        UserError: for weights that are missing, truncated, twice there, or of a dtype that is not a plain float, and
            for an index that names tensors which its files lack.
    """

    def __init__(self, shards: Path | Shards, indexed: dict[str, str] | None = None):
        if isinstance(shards, Path):
            indexed = weight_map(shards)
            shards = LocalShards(shards)
        self.shards: Shards = shards
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.size = 0
        self.headers: dict[str, str] = {}
        self._places: dict[str, tuple[str, int]] = {}
        for shard in self.shards.names:
            header = self.shards.header(shard)
            self.headers[shard] = header.sha256
            self.size += header.size
            for name, entry in header.tensors.items():
                self._add(shard, name, entry, header.data_start)
        lost = sorted(name for name, shard in (indexed or {}).items() if self._places.get(name, ("",))[0] != shard)
        if lost:
            raise UserError(
                f"The index of {self.name} names {lost[0]} in {(indexed or {})[lost[0]]}, which does not hold it "
                f"({len(lost)} such tensors). Fetch or save the checkpoint again."
            )

    @property
    def name(self) -> str:
        """For messages."""
        return self.shards.place

    def identity(self) -> dict[str, list]:
        """What tells these files from others: for each its size, its time of change and the hash of its header."""
        return {shard: [*rest, self.headers[shard]] for shard, rest in self.shards.identity().items()}

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files by name, several at a time: hashing takes longer than reading."""
        with ThreadPoolExecutor() as pool:
            return dict(zip(self.shards.names, pool.map(self.shards.sha256, self.shards.names)))

    def check(self, expected: dict[str, tuple[int, ...]], *, spare: frozenset[str]) -> None:
        """Refuse weights that are not exactly the expected ones.

        Args:
            expected: shape of each tensor that must be there.
            spare: names that may be there too.

        Raises:
            UserError: naming what is missing, unknown or of another shape.
        """
        missing = sorted(expected.keys() - self.shapes.keys())
        unknown = sorted(self.shapes.keys() - expected.keys() - spare)
        wrong = sorted(name for name in expected.keys() & self.shapes.keys() if expected[name] != self.shapes[name])
        if missing or unknown or wrong:
            problems = [
                *(f"{name} is missing" for name in missing[:_NAMED]),
                *(f"{name} is unknown" for name in unknown[:_NAMED]),
                *(f"{name} is {self.shapes[name]}, not {expected[name]}" for name in wrong[:_NAMED]),
            ]
            raise UserError(
                f"The weights in {self.name} do not match its config.json: {'; '.join(problems)} ({len(missing)} "
                f"missing, {len(unknown)} unknown, {len(wrong)} of another shape). Save it again with transformers."
            )

    def copied(self, name: str, start: int = 0, stop: int | None = None) -> Copied:
        """Rows `start:stop` of a tensor as a range of bytes."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        stop = shape[0] if stop is None else stop
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        shard, offset = self._places[name]
        return Copied(self.shards, shard, offset + start * row_bytes, (stop - start) * row_bytes)

    def cast(self, name: str, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Part:
        """Rows `start:stop` of a tensor in `dtype`: copied where that is its own."""
        copied = self.copied(name, start, stop)
        if dtype == self.dtypes[name]:
            return copied
        size = copied.length // self.dtypes[name].itemsize * dtype.itemsize
        return Computed(
            size,
            f"{name}[{start}:{'' if stop is None else stop}] as {dtype}".replace("torch.", ""),
            lambda: (chunk.to(dtype) for chunk in self.chunks(name, start, stop)),
            ((self.shards, copied.shard),),
        )

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start:stop` of a tensor, read from the file."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        copied = self.copied(name, start, stop)
        data = bytearray(copied.length)
        with self.shards.path(copied.shard).open("rb") as file:
            file.seek(copied.start)
            if file.readinto(data) != copied.length:
                raise UserError(f"{self.shards.path(copied.shard)} is shorter than it was. Fetch it and start again.")
        if not data:
            return torch.empty(0, *shape[1:], dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(-1, *shape[1:])

    def chunks(
        self, name: str, start: int = 0, stop: int | None = None, chunk_bytes: int = _CHUNK_BYTES
    ) -> Iterator[torch.Tensor]:
        """Rows `start:stop` of a tensor, some rows at a time, so that memory stays bounded.

        A single row is never cut, so a chunk may be larger than `chunk_bytes` where rows are. The cuts depend on the
        tensor alone, never on where a run was resumed.
        """
        shape = self.shapes[name]
        stop = shape[0] if stop is None else stop
        step = max(1, chunk_bytes // max(1, math.prod(shape[1:]) * self.dtypes[name].itemsize))
        for at in range(start, stop, step):
            yield self.rows(name, at, min(at + step, stop))

    def read_shard(self, name: str) -> tuple[Shards, str]:
        """The shard that a computation on this tensor reads."""
        return self.shards, self._places[name][0]

    def _add(self, shard: str, name: str, entry: dict, data_start: int) -> None:
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{name} in {shard} is {entry['dtype']}; expected one of {', '.join(DTYPES)}. Quantised weights "
                "cannot be converted: start from the unquantised checkpoint."
            )
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        start, stop = entry["data_offsets"]
        if stop - start != math.prod(shape) * dtype.itemsize or name in self._places:
            problem = (
                "is in two shards" if name in self._places else f"has {stop - start} bytes, not those of its shape"
            )
            raise UserError(f"{name} in {shard} {problem}. Fetch or save the checkpoint again.")
        self.shapes[name], self.dtypes[name] = shape, dtype
        self._places[name] = (shard, data_start + start)


class PlannedShards:
    """Weights of which only the form is known, for planning; reading them is an error of the program."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.names = [WEIGHTS_FILE]
        self.place = "the plan"
        self._tensors: dict[str, dict] = {}
        end = 0
        for name, shape in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            entry = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._tensors[name], end = entry, end + size
        self._size = end

    def header(self, name: str) -> Header:
        return Header(self._tensors, 0, self._size, "")

    def path(self, name: str) -> Path:
        raise AssertionError(f"{name} is planned only")

    def release(self, name: str) -> None:
        """Nothing is held."""

    def identity(self) -> dict[str, list]:
        return {name: [self._size] for name in self.names}

    def sha256(self, name: str) -> str:
        raise AssertionError(f"{name} is planned only")

    def check_unchanged(self, name: str) -> None:
        """Nothing can change."""
