# SPDX-License-Identifier: Apache-2.0
"""What the headers of safetensors files say, without loading the weights."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from jai.errors import UserError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint: its shape, its dtype in safetensors' spelling ("BF16"), and the file it is in."""

    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


def read_json(path: Path) -> object:
    """A JSON file of a checkpoint.

    Raises:
        UserError: if it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}). Write the checkpoint again.") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model of a folder.

    Raises:
        UserError: if there are none, or the index names files that are missing.
    """
    if (folder / _SINGLE).is_file():  # transformers looks for it first, too
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{folder} has its weights only as pickles ({', '.join(pickles)}), which can run code when loaded. "
                "Load the model and save it again with save_pretrained: that writes safetensors."
            )
        raise UserError(f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}. Give the folder of a whole model.")
    index = read_json(folder / _INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{folder / _INDEX} has no weight_map. Write the checkpoint again.")
    files = sorted(set(names.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(files)} weight files that {_INDEX} names: {', '.join(missing)}. "
            "Copy them here, or write the checkpoint again."
        )
    return [folder / name for name in files]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Raises:
        UserError: if the file is cut off, too long, or no safetensors at all.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        text = file.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        infos = {name: TensorInfo(tuple(t["shape"]), t["dtype"], path) for name, t in tensors.items()}
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path} is no whole safetensors file: its {size:,} bytes do not begin with a complete header. Copy or write "
            "it again."
        ) from error
    if size != expected:
        fault = "cut off" if size < expected else "too long"
        raise UserError(
            f"{path} is {fault}: its header promises {expected:,} bytes and it has {size:,}. Copy or write it again."
        )
    return infos


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint folder, from all its files, with every check of `weight_files` and `read_header`."""
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        tensors |= read_header(path)
    if not tensors:
        raise UserError(f"The weight files of {folder} hold no tensors. Write the checkpoint again.")
    return tensors


def read_scalars(tensors: dict[str, TensorInfo], suffix: str) -> dict[str, float]:
    """The values of the one-element tensors whose name ends in `suffix`."""
    values = {}
    for name, info in tensors.items():
        if name.endswith(suffix) and info.parameters == 1:
            with safe_open(info.file, framework="pt") as file:
                values[name] = float(file.get_tensor(name).item())
    return values
