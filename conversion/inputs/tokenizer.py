# SPDX-License-Identifier: Apache-2.0
"""The tokenizer beside a checkpoint's weights.

Nothing here imports PyTorch, and the verbs read tokenizers before they do: reading phi-3's takes 70 MB for a moment,
which PyTorch's import then uses again. Read afterwards, the 70 MB would come on top of PyTorch's 260.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jai.errors import UserError
from jai.files import check_is_file, read_json
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
_KEPT = 32  # of what was read, a few hundred bytes each; a merge has some inputs, any other verb one

FilesState = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class TokenizerContent:
    """What tells the content of one `tokenizer.json` from another, by hashes.

    Attributes:
        parts: of its parts, but for truncation and padding, which are settings of a run.
        vocabulary: of the model's vocabulary.
        entries: how many that has.
    """

    parts: dict[str, str]
    vocabulary: str
    entries: int


def tokenizer_files(folder: Path) -> Iterator[str]:
    """The files of a folder's tokenizer, as paths within it."""
    yield from (name for name in _TOKENIZER_FILES if os.path.lexists(folder / name))
    yield from sorted(f"{_CHAT_TEMPLATES}/{path.name}" for path in (folder / _CHAT_TEMPLATES).glob("*.jinja"))


def check_tokenizer_files(folder: Path, rows: int | None = None) -> None:
    """Refuse a damaged tokenizer before anything is written. What was found is kept for as long as no file changes.

    Args:
        folder: with its files.
        rows: of the embeddings that it is for, None where that is not known.

    Raises:
        UserError: if one of its files is no file, or is JSON that cannot be read; if the tokenizers library does not
            load it; or if a token has no row.
    """
    last = _read_last_token(folder, _files_state(folder))
    if last is not None and rows is not None and last[1] >= rows:
        token, id_ = last
        raise UserError(
            f"The tokenizer in {folder} has ids up to {id_} ({token!r}), but the embeddings have {rows:,} rows, "
            "so the model would fail there. Put the tokenizer into the folder that the model was trained with, or give "
            "the model a row for each token first (resize_token_embeddings in transformers)."
        )


def check_tokenizer_json(folder: Path) -> None:
    """Refuse files of a tokenizer that are no files, and JSON that cannot be read: all that needs no library.

    Raises:
        UserError: naming the file.
    """
    for name in tokenizer_files(folder):
        if name.endswith(".json"):
            read_json(folder / name)
        else:
            check_is_file(folder / name)


def read_tokenizer_content(folder: Path) -> TokenizerContent | None:
    """What the folder's `tokenizer.json` holds, None where there is none. It is kept for as long as no file changes.

    Raises:
        UserError: if it is damaged.
    """
    return _read_content(folder, _files_state(folder)) if os.path.lexists(folder / TOKENIZER_JSON) else None


def first_with_tokenizer(folders: Sequence[Path]) -> Path:
    """The first folder that has a `tokenizer.json`; the first of all if none has."""
    return next((folder for folder in folders if os.path.lexists(folder / TOKENIZER_JSON)), folders[0])


def _files_state(folder: Path) -> FilesState:
    states = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.exists())
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


@lru_cache(_KEPT)
def _read_last_token(folder: Path, state: FilesState) -> tuple[str, int] | None:
    """The token with the largest id, None where no `tokenizer.json` names any."""
    check_tokenizer_json(folder)
    if not (folder / TOKENIZER_JSON).exists():
        return None
    return max(load_backend_tokenizer(folder).get_vocab().items(), key=lambda entry: entry[1], default=None)


@lru_cache(_KEPT)
def _read_content(folder: Path, state: FilesState) -> TokenizerContent:
    content = read_json(folder / TOKENIZER_JSON)
    model = content.get("model")
    vocabulary = model.get("vocab", {}) if isinstance(model, dict) else {}
    return TokenizerContent(
        parts={
            name: _hash(part)
            for name, part in content.items()
            if part is not None and name not in ("truncation", "padding")
        },
        vocabulary=_hash(vocabulary),
        entries=len(vocabulary) if isinstance(vocabulary, dict | list) else 0,
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
