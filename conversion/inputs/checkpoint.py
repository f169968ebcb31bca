# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that a verb reads: where it lies, its weights, and what lies beside them."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jai.conversion.inputs.config import CONFIG_FILE
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.inputs.tokenizer import tokenizer_files
from jai.files import check_is_file, hash_each, sha256
from jai.provenance import Input, input_of, read_step


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that a verb reads.

    Attributes:
        name: folder or Hub id, as given.
        folder: where its files lie; its weights may be elsewhere.
        reader: its weights.
    """

    name: str
    folder: Path
    reader: CheckpointReader

    def identity(self) -> dict[str, Any]:
        """What tells it from other checkpoints, and from another state of itself, by file."""
        return hashes_beside(self.folder) | self.reader.identity()

    def as_input(self, role: str) -> Input:
        """What provenance records of it. Hashing its weights reads them all, once."""
        return input_of(role, self.name, files=self._hashes, made_by=read_step(self.folder))

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return hashes_beside(self.folder) | self.reader.hashes()


def hashes_beside(folder: Path) -> dict[str, str]:
    """SHA-256 of a folder's configuration and tokenizer files, by path within it.

    Raises:
        UserError: if one of them is no file.
    """
    names = [*([CONFIG_FILE] if os.path.lexists(folder / CONFIG_FILE) else []), *tokenizer_files(folder)]
    for name in names:
        check_is_file(folder / name)
    return hash_each(names, lambda name: sha256(folder / name))
