# SPDX-License-Identifier: Apache-2.0
"""What weights are read from: the files of a folder, or a plan that has only their form."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from jai.conversion.inputs.header import Header, read_header
from jai.conversion.inputs.values import DTYPE_NAMES, sha256_of_finite
from jai.conversion.inputs.weight_files import WEIGHTS_FILE, weight_files
from jai.errors import UnfinishableError


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
            UnfinishableError: if a file that was fetched has a weight that is NaN or infinite.
        """

    def release(self, name: str) -> None:
        """Say that a file is not needed any more."""

    def identity(self) -> dict[str, list]:
        """What tells each file from another version of it, without reading it."""

    def sha256(self, name: str) -> str:
        """Hash of a file. Where that takes reading it, its values are looked at too; else `path` does that.

        Raises:
            UnfinishableError: if a weight is NaN or infinite.
        """

    def check_unchanged(self, name: str) -> None:
        """Raise `UnfinishableError` if a file is not what it was when this object was made."""


class LocalFiles:
    """The weight files of a local folder: a checkpoint's, or those that are named."""

    def __init__(self, folder: Path, names: Sequence[str] = ()):
        self.folder = folder
        self.place = str(folder)
        self.names = [*names] or [path.name for path in weight_files(folder)]
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
            raise UnfinishableError(
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
