# SPDX-License-Identifier: Apache-2.0
"""Safetensors checkpoints, read and written one tensor at a time.

A converted checkpoint can be larger than memory, and the shapes of its tensors are known before the first byte: each
output shard begins with its finished header, and tensors follow as they are made. Peak memory is about one tensor.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from jai.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def resolve_checkpoint(name: str) -> Path:
    """Folder of a checkpoint: a local folder as it is, a Hub id after download.

    Raises:
        UserError: if it is neither, or the Hub refuses.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except HFValidationError:
        raise UserError(f"{name} is neither a folder nor a Hub id. Give a folder that exists, or owner/name.") from None
    except Exception as error:  # of many kinds: the client is httpx or httpx2, depending on huggingface_hub's version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name} is no local folder, and the Hub did not give it: {reason}. Check the name, the network, and "
            "`hf auth login` if the repository is private."
        ) from None


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """Header of a safetensors file, checked against the file's size.

    Returns:
        name -> {dtype, shape, data_offsets}, and where the data begins, from which the offsets count.

    Raises:
        UserError: if the file is not safetensors, or shorter or longer than its header says.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else None
    except (struct.error, ValueError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} is no whole safetensors file: its header cannot be read. Fetch or save it again.")
    header.pop("__metadata__", None)
    data_start = 8 + length
    expected = data_start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise UserError(
            f"{path} has {size:,} bytes, but its header describes {expected:,}: the file is truncated or damaged. "
            "Fetch or save it again."
        )
    return header, data_start


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index where it has one.

    Raises:
        UserError: if there are none, or the index names one that is missing.
    """
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).exists():  # transformers prefers it too
        names = [WEIGHTS_FILE]
    elif index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} is no index of weights. Fetch or save it again.") from None
    else:
        raise UserError(
            f"{folder} has no safetensors weights ({WEIGHTS_FILE} or {INDEX_FILE}). Pickled .bin files are not read: "
            "load them with transformers and save them again, which writes safetensors."
        )
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which its index names. Fetch the missing files.")
    return [folder / name for name in names]


class CheckpointReader:
    """The tensors of a checkpoint folder by name, over all its shards, read when asked for.

    Raises:
        UserError: for weights that are missing, truncated, or of a dtype that is not a plain float.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = weight_files(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in self.files:
            header, data_start = read_header(path)
            for name, entry in header.items():
                if entry["dtype"] not in DTYPES:
                    raise UserError(
                        f"{name} in {path} is {entry['dtype']}; expected one of {', '.join(DTYPES)}. Quantised weights "
                        "cannot be converted: start from the unquantised checkpoint."
                    )
                self.shapes[name] = tuple(entry["shape"])
                self.dtypes[name] = DTYPES[entry["dtype"]]
                self._places[name] = (path, data_start + entry["data_offsets"][0])

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start:stop` of a tensor, read from the file: they are one run of bytes."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        stop = shape[0] if stop is None else stop
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        data = bytearray((stop - start) * row_bytes)
        path, offset = self._places[name]
        with path.open("rb") as file:
            file.seek(offset + start * row_bytes)
            file.readinto(data)
        return torch.frombuffer(data, dtype=dtype).view(stop - start, *shape[1:])


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output: its form is known now, its values are made when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Iterable[torch.Tensor]]
    """Yields the tensor in parts along its first dimension (or whole), in `dtype`."""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def write_checkpoint(folder: Path, tensors: list[PlannedTensor], max_shard_bytes: int) -> Iterator[PlannedTensor]:
    """Write `tensors` as safetensors shards with an index, in the form that transformers writes.

    Yields each tensor once it is written, so that the caller can show progress.
    """
    shards: list[list[PlannedTensor]] = []
    room = 0
    for tensor in tensors:
        if tensor.bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.bytes
    names = (
        [WEIGHTS_FILE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards):
        yield from _write_shard(folder / name, shard)
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(tensor.numel for tensor in tensors),
                "total_size": sum(tensor.bytes for tensor in tensors),
            },
            "weight_map": {tensor.name: name for name, shard in zip(names, shards) for tensor in shard},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(path: Path, tensors: list[PlannedTensor]) -> Iterator[PlannedTensor]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for tensor in tensors:
            written = 0
            for part in tensor.make():
                written += file.write(part.contiguous().view(torch.uint8).numpy().data)
            if written != tensor.bytes:
                raise AssertionError(f"{tensor.name}: planned {tensor.bytes} bytes, made {written}")
            yield tensor
