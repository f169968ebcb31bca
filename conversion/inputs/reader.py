# SPDX-License-Identifier: Apache-2.0
"""Safetensors checkpoints, read by tensor and by byte range.

A tensor lies in its file as one run of bytes, and so do any rows of it. What conversion does to phi-3 is nearly all of
that kind, so it plans in byte ranges and reads values only where it computes. Nothing is mapped into memory: a file
that another process cuts short would kill the reader, where a read that comes up short can say so.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from jai.conversion.inputs.header import DTYPES
from jai.conversion.inputs.parts import Computed, Copied, Part
from jai.conversion.inputs.weight_files import LocalFiles, WeightFiles, weight_map
from jai.conversion.names import EMBEDDINGS, LM_HEAD
from jai.errors import UserError
from jai.files import hash_each

UNTIED_NOTE = (
    "config.json ties the head to the embeddings, but the weights have a head of its own. The output keeps it, with "
    "tie_word_embeddings false."
)

_CHUNK_BYTES = 8_000_000
_NAMED = 3


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

    def __init__(self, shards: Path | WeightFiles, indexed: dict[str, str] | None = None):
        if isinstance(shards, Path):
            indexed = weight_map(shards)
            shards = LocalFiles(shards)
        self.shards: WeightFiles = shards
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
        """SHA-256 of the files by name.

        Raises:
            UserError: if a weight is NaN or infinite (`WeightFiles.sha256`).
        """
        return hash_each(self.shards.names, self.shards.sha256)

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
            lambda: self.chunks(name, start, stop),
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

    def same_values(self, first: str, second: str) -> bool:
        """Whether two matrices have the same shape and values, whatever their dtypes."""
        if self.shapes[first] != self.shapes[second]:
            return False
        rows, width = self.shapes[first]
        step = max(1, _CHUNK_BYTES // (width * torch.float32.itemsize))
        return all(
            torch.equal(*(self.rows(name, at, min(at + step, rows)).float() for name in (first, second)))
            for at in range(0, rows, step)
        )

    @property
    def has_untied_head(self) -> bool:
        """Whether there is an `lm_head` with other values than the embeddings.

        Where the configuration says that the two are one, transformers keeps both then, and so do we.
        """
        return {EMBEDDINGS, LM_HEAD} <= self.shapes.keys() and not self.same_values(EMBEDDINGS, LM_HEAD)

    def read_shard(self, name: str) -> tuple[WeightFiles, str]:
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
