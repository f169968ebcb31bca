# SPDX-License-Identifier: Apache-2.0
"""What the headers of a checkpoint's safetensors files say, without loading the weights."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from jai.conversion.inputs.header import read_header
from jai.conversion.inputs.weight_files import INDEX_FILE, WEIGHTS_FILE, weight_files
from jai.errors import UserError


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


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint folder, from all its weight files.

    Raises:
        UserError: if files are missing, cut off or damaged, or the index does not fit them.
    """
    indexed: Mapping[str, str] | None = None
    if (folder / INDEX_FILE).is_file():
        if (folder / WEIGHTS_FILE).is_file():
            raise UserError(
                f"{folder} has both {WEIGHTS_FILE} and {INDEX_FILE}, and transformers would load the former. Remove "
                "the one that is old."
            )
        index = read_json(folder / INDEX_FILE)
        indexed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(indexed, dict):
            raise UserError(f"{folder / INDEX_FILE} has no weight_map. Write the checkpoint again.")
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        header = read_header(path)
        tensors |= {name: TensorInfo(tuple(t["shape"]), t["dtype"], path) for name, t in header.tensors.items()}
    lost = [name for name in indexed or {} if name not in tensors]
    if lost:
        raise UserError(
            f"{INDEX_FILE} of {folder} names {len(lost)} tensors that its files do not hold ({', '.join(lost[:3])}). "
            "Write the checkpoint again."
        )
    return tensors


def read_number(tensor: TensorInfo, name: str) -> float:
    """The value of a tensor with one element."""
    with safe_open(tensor.file, framework="pt") as file:
        return float(file.get_tensor(name).item())
