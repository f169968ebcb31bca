# SPDX-License-Identifier: Apache-2.0
"""The weight files of a checkpoint: which there are, by its index or alone, and what is asked of them."""

import math
import os
from pathlib import Path
from typing import Protocol

import torch

from jai.conversion.inputs.header import DTYPE_NAMES, Header, read_header
from jai.conversion.inputs.values import sha256_of_finite
from jai.errors import UserError
from jai.files import check_is_file, read_json

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"


class WeightFiles(Protocol):
    """The weight files that tensors are read from: a local folder's, or a Hub repository's.

    Attributes:
        names: of the files.
        place: folder or Hub id, for messages.
    """

    names: list[str]
    place: str

    def header(self, name: str) -> Header:
        """Header of a file, which need not be here for that."""

    def path(self, name: str) -> Path:
        """Where a file lies; it is fetched first if it must be.

        Raises:
            UserError: if a file that was fetched has a weight that is NaN or infinite.
        """

    def release(self, name: str) -> None:
        """Say that a file is not needed any more."""

    def identity(self) -> dict[str, list]:
        """What tells each file from another version of it, without reading it."""

    def sha256(self, name: str) -> str:
        """Hash of a file. Where that takes reading it, its values are looked at too; else `path` does that.

        Raises:
            UserError: if a weight is NaN or infinite.
        """

    def check_unchanged(self, name: str) -> None:
        """Raise `UserError` if a file is not what it was when this object was made."""


def has_weights(folder: Path) -> bool:
    """Whether a folder has the weights of a checkpoint, or an index of them."""
    return os.path.lexists(folder / WEIGHTS_FILE) or os.path.lexists(folder / INDEX_FILE)


def has_all_weights(folder: Path) -> bool:
    """Whether a folder has every weight file, and not only the index of them, as the Hub's cache may."""
    if not has_weights(folder):
        return False
    file_of = weight_map(folder)
    return file_of is None or all((folder / name).exists() for name in set(file_of.values()))


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
    if os.path.lexists(folder / WEIGHTS_FILE):  # transformers prefers it too
        return None
    index = folder / INDEX_FILE
    if not os.path.lexists(index):
        raise UserError(
            f"{folder} has no safetensors weights ({WEIGHTS_FILE} or {INDEX_FILE}). Pickled .bin files are not read: "
            "load them with transformers and save them again, which writes safetensors."
        )
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise UserError(f"{index} is no index of weights: it has no weight_map of names. Fetch or save it again.")
    outside = [name for name in file_of.values() if Path(name).name != name]
    if outside:
        raise UserError(
            f"{index} names {outside[0]}, which is not a file beside it. Do not use this checkpoint: an index has only "
            "plain file names."
        )
    return file_of


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by its index where it has one.

    Raises:
        UserError: as `weight_map`, and if a file is missing or no file.
    """
    file_of = weight_map(folder)
    names = [WEIGHTS_FILE] if file_of is None else sorted(set(file_of.values()))
    missing = [name for name in names if not os.path.lexists(folder / name)]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which its index names. Fetch the missing files.")
    for name in names:
        check_is_file(folder / name)
    return [folder / name for name in names]


class LocalFiles:
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
        return sha256_of_finite(self.folder / name, self.header(name))

    def check_unchanged(self, name: str) -> None:
        if not self.path(name).exists() or self._identity(name) != self._identities[name]:
            raise UserError(
                f"{self.path(name)} changed while it was read. Let nothing write to the inputs, and start again."
            )

    def _identity(self, name: str) -> list:
        status = (self.folder / name).stat()
        return [status.st_size, status.st_mtime_ns]


class PlannedFiles:
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
