# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that a verb reads: where it lies, its weights, and what lies beside them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jai.conversion.inputs.config import CONFIG_FILE
from jai.conversion.inputs.reader import CheckpointReader
from jai.errors import UserError
from jai.files import check_is_file, hash_each, read_json, sha256
from jai.provenance import Input, input_of, read_step
from jai.tokenization.loading import RECORD_FILE as TOKENIZER_RECORD_FILE
from jai.tokenization.loading import TOKENIZER_JSON, load_backend_tokenizer

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_TOKENIZER_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    TOKENIZER_RECORD_FILE,
)
_CHAT_TEMPLATES = "additional_chat_templates"  # named ones, which transformers keeps in a folder of this name


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


def tokenizer_files(folder: Path) -> Iterator[str]:
    """The files of a folder's tokenizer, as paths within it."""
    yield from (name for name in _TOKENIZER_FILES if os.path.lexists(folder / name))
    yield from sorted(f"{_CHAT_TEMPLATES}/{path.name}" for path in (folder / _CHAT_TEMPLATES).glob("*.jinja"))


def check_tokenizer_files(folder: Path, rows: int | None = None) -> None:
    """Refuse a damaged tokenizer before anything is written.

    Args:
        folder: with its files.
        rows: of the embeddings that it is for, None where that is not known.

    Raises:
        UserError: if one of its files is no file, or is JSON that cannot be read; if the tokenizers library does not
            load it; or if a token has no row.
    """
    for name in tokenizer_files(folder):
        if name.endswith(".json"):
            read_json(folder / name)
        else:
            check_is_file(folder / name)
    if not (folder / TOKENIZER_JSON).exists():
        return
    ids = load_backend_tokenizer(folder).get_vocab()
    token = max(ids, key=ids.__getitem__, default="")
    if rows is not None and ids.get(token, -1) >= rows:
        raise UserError(
            f"The tokenizer in {folder} has ids up to {ids[token]} ({token!r}), but the embeddings have {rows:,} rows, "
            "so the model would fail there. Put the tokenizer into the folder that the model was trained with, or give "
            "the model a row for each token first (resize_token_embeddings in transformers)."
        )
