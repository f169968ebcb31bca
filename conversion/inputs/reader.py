# SPDX-License-Identifier: Apache-2.0
"""Safetensors checkpoints, read by tensor and by byte range.

A tensor lies in its file as one run of bytes, and so do any rows of it. What conversion does to phi-3 is nearly all of
that kind, so it plans in byte ranges and reads values only where it computes. Nothing is mapped into memory: a file
that another process cuts short would kill the reader, where a read that comes up short can say so.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

from jai.conversion.inputs.header import StoredTensor, stored_tensors
from jai.conversion.inputs.parts import Computed, Copied, Part
from jai.conversion.inputs.values import DTYPES
from jai.conversion.inputs.weight_files import weight_map
from jai.conversion.inputs.weight_sources import LocalFiles, WeightFiles
from jai.conversion.names import EMBEDDINGS, LM_HEAD, MTP_PREFIX
from jai.errors import UnfinishableError, UserError
from jai.files import hash_each

UNTIED_NOTE = (
    "config.json ties the head to the embeddings, but the weights have a head of its own. The output keeps it, with "
    "tie_word_embeddings false."
)

_CHUNK_BYTES = 8_000_000
_CAST_BYTES = 1_000_000  # chunks of 8 MB and their copies in fp32 made the whole process 27 MB larger
_LISTED_PROBLEMS = 3

# What wraps a model puts its own name before those of the weights, and saving the wrapper saves it with them.
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DDP or FSDP", "base_model.model.": "PEFT"}
_ROPE_BUFFER = "rotary_emb.inv_freq"

Value = TypeVar("Value")


class CheckpointReader:
    """The tensors of a checkpoint by name, over all its files.

    Args:
        files: a local folder, or where else the weight files come from.
        indexed: the file of each tensor, as the index says; of a folder it is read.

    Attributes:
        files: the weight files.
        shapes: shape of each tensor.
        dtypes: dtype of each tensor.
        size: bytes of all files.
        headers: hash of each file's header.

    Raises:
        UserError: for weights that are missing, truncated, twice there, or of a dtype that is not a plain float, and
            for an index that names tensors which its files lack.
    """

    def __init__(self, files: Path | WeightFiles, indexed: dict[str, str] | None = None):
        if isinstance(files, Path):
            indexed = weight_map(files)
            files = LocalFiles(files)
        self.files: WeightFiles = files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        headers = {file: files.header(file) for file in files.names}
        self.size = sum(header.size for header in headers.values())
        self.headers = {file: header.sha256 for file, header in headers.items()}
        self._places: dict[str, tuple[str, int]] = {}
        for name, stored in stored_tensors(headers, self.name, indexed).items():
            self._add(name, stored)

    @property
    def name(self) -> str:
        """For messages."""
        return self.files.place

    def identity(self) -> dict[str, list]:
        """What tells these files from others: for each its size, its time of change and the hash of its header."""
        return {file: [*rest, self.headers[file]] for file, rest in self.files.identity().items()}

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the files by name.

        Raises:
            UserError: if a weight is NaN or infinite (`WeightFiles.sha256`).
        """
        return hash_each(self.files.names, self.files.sha256)

    def leave_out_leftovers(self) -> list[str]:
        """Leave out what is no part of a model: the prefix of a wrapper before all names, and RoPE's frequencies.

        torch.compile, DDP and PEFT put their prefix before every name; older versions of transformers saved the
        frequencies, which follow from the configuration.

        Returns:
            What was left out, for people.
        """
        notes = []
        if prefix := self.wrapper_prefix:
            self.shapes, self.dtypes, self._places = (
                _renamed(self.shapes, prefix),
                _renamed(self.dtypes, prefix),
                _renamed(self._places, prefix),
            )
            notes.append(
                f"all names of weights begin with {prefix!r}, left there by {_cause(prefix)}; it is taken off."
            )
        if buffers := [name for name in self.shapes if name.endswith(_ROPE_BUFFER)]:
            self._leave_out(buffers)
            notes.append(f"RoPE's buffers ({len(buffers)}: {buffers[0]}, …) are left out; the model makes its own.")
        return notes

    def leave_out_mtp(self) -> list[str]:
        """Leave out the layers of multi-token prediction, which are no part of the model that generates.

        Returns:
            What was left out, for people.
        """
        weights = [name for name in self.shapes if name.startswith(MTP_PREFIX)]
        self._leave_out(weights)
        return [f"its layer for multi-token prediction ({len(weights)} weights) is left out."] if weights else []

    def _leave_out(self, weights: list[str]) -> None:
        for name in weights:
            del self.shapes[name], self.dtypes[name], self._places[name]

    def take_head_for_embeddings(self) -> list[str]:
        """Of a tied model: where only the head is stored, it is the embeddings too, as transformers reads it.

        Returns:
            What was taken, for people.
        """
        if EMBEDDINGS in self.shapes or LM_HEAD not in self.shapes:
            return []
        self.shapes[EMBEDDINGS] = self.shapes.pop(LM_HEAD)
        self.dtypes[EMBEDDINGS] = self.dtypes.pop(LM_HEAD)
        self._places[EMBEDDINGS] = self._places.pop(LM_HEAD)
        return [f"config.json ties the head to the embeddings, and only {LM_HEAD} is stored; it is read as both."]

    @property
    def wrapper_prefix(self) -> str:
        """What wrappers put before the names of all tensors; empty where some have another prefix, or none."""
        prefixes = {_wrapper_prefix(name) for name in self.shapes}
        return prefixes.pop() if len(prefixes) == 1 else ""

    def check(self, expected: dict[str, tuple[int, ...]], *, spare: frozenset[str]) -> None:
        """Refuse weights that are not exactly the expected ones.

        Args:
            expected: shape of each tensor that must be there.
            spare: names that may be there too.

        Raises:
            UserError: naming what is missing, unknown or of another shape, and its cause where it is known.
        """
        missing = sorted(expected.keys() - self.shapes.keys())
        unknown = sorted(self.shapes.keys() - expected.keys() - spare)
        wrong = sorted(name for name in expected.keys() & self.shapes.keys() if expected[name] != self.shapes[name])
        if missing or unknown or wrong:
            problems = [
                *(f"{name} is missing" for name in missing[:_LISTED_PROBLEMS]),
                *(f"{name} is unknown" for name in unknown[:_LISTED_PROBLEMS]),
                *(f"{name} is {self.shapes[name]}, not {expected[name]}" for name in wrong[:_LISTED_PROBLEMS]),
            ]
            raise UserError(
                f"The weights in {self.name} do not match its config.json: {'; '.join(problems)} ({len(missing)} "
                f"missing, {len(unknown)} unknown, {len(wrong)} of another shape). {_remedy(unknown)}"
            )

    def copied(self, name: str, start: int = 0, stop: int | None = None) -> Copied:
        """Rows `start:stop` of a tensor as a range of bytes."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        stop = shape[0] if stop is None else stop
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        file, offset = self._places[name]
        return Copied(self.files, file, offset + start * row_bytes, (stop - start) * row_bytes)

    def cast(self, name: str, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Part:
        """Rows `start:stop` of a tensor in `dtype`: copied where that is its own."""
        copied = self.copied(name, start, stop)
        if dtype == self.dtypes[name]:
            return copied
        size = copied.length // self.dtypes[name].itemsize * dtype.itemsize
        return Computed(
            size,
            f"{name}[{start}:{'' if stop is None else stop}] as {dtype}".replace("torch.", ""),
            lambda: self.chunks(name, start, stop, _CAST_BYTES),
            ((self.files, copied.file),),
        )

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start:stop` of a tensor, read from the file."""
        row = self.shapes[name][1:]
        stop = self.shapes[name][0] if stop is None else stop
        if not math.prod(row):
            return torch.empty(stop - start, *row, dtype=self.dtypes[name])
        return self.values(name, start * math.prod(row), (stop - start) * math.prod(row)).view(-1, *row)

    def values(self, name: str, start: int, count: int) -> torch.Tensor:
        """`count` values of a tensor from the one numbered `start`, as the file has them one behind the other."""
        dtype = self.dtypes[name]
        file_name, offset = self._places[name]
        data = bytearray(count * dtype.itemsize)
        with self.files.path(file_name).open("rb") as file:
            file.seek(offset + start * dtype.itemsize)
            if file.readinto(data) != len(data):
                raise UnfinishableError(
                    f"{self.files.path(file_name)} is shorter than it was. Fetch it and start again."
                )
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    def chunks(
        self, name: str, start: int = 0, stop: int | None = None, chunk_bytes: int = _CHUNK_BYTES
    ) -> Iterator[torch.Tensor]:
        """Rows `start:stop` of a tensor, some rows at a time, so that memory stays bounded.

        A single row is never cut, so a chunk may be larger than `chunk_bytes` where rows are. The cuts depend on the
        tensor alone, never on where a run was resumed.
        """
        for first, end in self.chunk_rows(name, start, stop, chunk_bytes):
            yield self.rows(name, first, end)

    def chunk_rows(
        self, name: str, start: int = 0, stop: int | None = None, chunk_bytes: int = _CHUNK_BYTES
    ) -> Iterator[tuple[int, int]]:
        """For each of `chunks`, its first row and the row behind its last."""
        shape = self.shapes[name]
        stop = shape[0] if stop is None else stop
        step = max(1, chunk_bytes // max(1, math.prod(shape[1:]) * self.dtypes[name].itemsize))
        for at in range(start, stop, step):
            yield at, min(at + step, stop)

    def same_values(self, first: str, second: str) -> bool:
        """Whether two tensors have the same shape and values, whatever their dtypes."""
        if self.shapes[first] != self.shapes[second]:
            return False
        rows, *width = self.shapes[first] or (0,)
        step = max(1, _CHUNK_BYTES // (max(1, math.prod(width)) * torch.float32.itemsize))
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

    def file_of(self, name: str) -> tuple[WeightFiles, str]:
        """The file that a computation on this tensor reads."""
        return self.files, self._places[name][0]

    def _add(self, name: str, stored: StoredTensor) -> None:
        if stored.dtype not in DTYPES:
            raise UserError(
                f"{name} in {stored.file} is {stored.dtype}; expected one of {', '.join(DTYPES)}. Quantised weights "
                "cannot be converted: start from the unquantised checkpoint."
            )
        dtype = DTYPES[stored.dtype]
        if stored.length != math.prod(stored.shape) * dtype.itemsize:
            raise UserError(
                f"{name} in {stored.file} has {stored.length} bytes, not those of its shape. Fetch or save the "
                "checkpoint again."
            )
        self.shapes[name], self.dtypes[name] = stored.shape, dtype
        self._places[name] = (stored.file, stored.start)


def _renamed(by_name: dict[str, Value], prefix: str) -> dict[str, Value]:
    return {name.removeprefix(prefix): value for name, value in by_name.items()}


def _wrapper_prefix(name: str) -> str:
    for prefix in _WRAPPERS:
        if name.startswith(prefix):
            return prefix + _wrapper_prefix(name.removeprefix(prefix))
    return ""


def _cause(prefix: str) -> str:
    return " and ".join(wrapper for own, wrapper in _WRAPPERS.items() if own in prefix)


def _remedy(unknown: list[str]) -> str:
    """What to do about weights that no JAI and no phi-3 has."""
    if any(".lora_" in name or ".base_layer." in name for name in unknown):
        return (
            "They hold a LoRA adapter beside the weights that it changes: call `merge_and_unload()` on the PEFT model, "
            "and save the model that it returns."
        )
    if any(name.endswith(".bias") for name in unknown):
        return "This checkpoint has biases, and neither phi-3 nor JAI has any: it cannot be converted without loss."
    wrappers = {prefix: name for name in unknown for prefix in _WRAPPERS if prefix in name}
    if wrappers:
        prefix, name = next(iter(wrappers.items()))
        return (
            f"{_WRAPPERS[prefix]} left {prefix!r} in some names ({name}): save the model that it wraps, as "
            "`save_pretrained` of transformers does."
        )
    return "Save it again with transformers."
