# SPDX-License-Identifier: Apache-2.0
"""Tokenizers by name, and checkpoints that bring theirs, for every verb that takes one.

Nothing heavy is imported before a tokenizer is there to load.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jai.errors import UserError
from jai.files import check_is_file, read_json
from jai.hub import METADATA_PATTERNS, WEIGHTS_PATTERN, local_folder, no_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TOKENIZER_JSON, SENTENCEPIECE_MODEL = "tokenizer.json", "tokenizer.model"
RECORD_FILE = "tokenizer_training.json"  # what `jai tokenizer train` made of what
# One of these holds the vocabulary (GPT-2's is in vocab.json, BERT's in vocab.txt); all else beside it are settings.
_VOCABULARY_FILES = (TOKENIZER_JSON, SENTENCEPIECE_MODEL, "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_JSON_FILES = (TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_LONGEST_REASON = 300
_ADVICE = "Give a folder that `save_pretrained` wrote, or a Hub id (owner/name)."


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file that a tokenizer's vocabulary can be read from."""
    return any((folder / name).exists() for name in _VOCABULARY_FILES)


def load_tokenizer(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    config: PreTrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, as transformers' `AutoTokenizer` loads it.

    Args:
        name: folder or Hub id.
        revision: commit, branch or tag on the Hub; None is the default branch.
        trust_remote_code: run the tokenizer's code, if it brings some.
        config: the model's configuration, where it is read already; else transformers reads it from the folder.

    Raises:
        UserError: if there is no tokenizer, it is damaged or needs its own code, or the Hub does not give it.
    """
    folder = tokenizer_folder(name, revision)
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, config=config)
    except Exception as error:  # of many kinds: JSON's, KeyError, RecursionError, a bare Exception
        raise _refusal(name, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"{name} loads as a {type(tokenizer).__name__}, which is not a tokenizer. {_ADVICE}")
    _check_encodes(name, tokenizer)
    return tokenizer


def load_backend_tokenizer(name: str | Path, *, revision: str | None = None) -> Tokenizer:
    """The `backend_tokenizer` of a folder's or Hub id's tokenizer: vocabulary, merges and added tokens.

    For those who look up tokens and do not encode text: the class that the folder names, which may put spaces
    otherwise, is not asked. To find that class, `AutoTokenizer` imports PyTorch and 190 MB; this takes 20 MB for phi-3.

    Raises:
        UserError: as `load_tokenizer`, and if the tokenizer is not one of the tokenizers library.
    """
    folder = tokenizer_folder(name, revision)
    from transformers import PreTrainedTokenizerFast

    if not (folder / TOKENIZER_JSON).exists():
        return backend_of(name, load_tokenizer(folder))
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # as above
        raise _refusal(name, error) from error
    _check_encodes(name, tokenizer)
    _check_class(folder)
    return tokenizer.backend_tokenizer


def backend_of(name: str | Path, tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizers library's part of a tokenizer.

    Raises:
        UserError: if it has none; `name` says which it is.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{name} loads as {type(tokenizer).__name__}, which has no fast implementation. Give a tokenizer with a "
            f"{TOKENIZER_JSON}."
        )
    return tokenizer.backend_tokenizer


def tokenizer_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a tokenizer's files: a folder as it is, a Hub id after download (or from the cache, offline).

    Raises:
        UserError: if it is neither, holds no tokenizer, or the Hub does not give it (without a network at once).
    """
    folder = local_folder(name, revision=revision)
    if not has_tokenizer(folder):
        raise UserError(
            f"{name} has no tokenizer that can be loaded: there is none of {', '.join(_VOCABULARY_FILES)}. Put the "
            f"tokenizer's files beside the model's, or name another tokenizer. {_ADVICE}"
        )
    for path in folder.iterdir():
        if path.name in _JSON_FILES:
            read_json(path)  # libraries take seconds to be imported, and say less of what is wrong
        elif path.suffix in (".json", ".model", ".txt", ".jinja"):
            check_is_file(path)
    return folder


def whole_checkpoint(model: str, *, weights: bool = True) -> Path:
    """Folder of a checkpoint with all that a model and a tokenizer are loaded from; imports neither.

    Args:
        model: folder or Hub id.
        weights: whether to download a Hub id's weights too, and look for them.

    Raises:
        UserError: if it is neither, or lacks its configuration, tokenizer or weights.
    """
    folder = local_folder(model, [*METADATA_PATTERNS, *([WEIGHTS_PATTERN] if weights else [])])
    configs = [folder / name for name in ("config.json", "adapter_config.json") if (folder / name).exists()]
    if not configs:
        raise no_config(model if Path(model).is_dir() else folder, "Give a folder or Hub id that holds a model.")
    for path in configs:
        read_json(path)
    _check_generation_config(folder / "generation_config.json")
    tokenizer_folder(folder)
    files = [*folder.glob(WEIGHTS_PATTERN)]
    if (weights or Path(model).is_dir()) and not files:
        raise UserError(f"{model} has no weights in safetensors files. Give a whole checkpoint.")
    for path in files:
        if not os.access(path, os.R_OK):  # safetensors says that there is no such file
            raise UserError(f"{path} cannot be read. Fetch it again, or ask whoever owns it.")
    return folder


def _check_generation_config(path: Path) -> None:
    """Refuse a damaged one, which transformers ignores, and ids that are none, over which only `generate` stumbles."""
    content = read_json(path) if path.exists() else {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given: Any = content.get(name)
        if not all(each is None or type(each) is int for each in (given if isinstance(given, list) else [given])):
            raise UserError(f"{path} is damaged: {name} is {given!r}. Give the id of a token.")


def _check_class(folder: Path) -> None:
    """Refuse a class that is no name, over which only `AutoTokenizer` stumbles."""
    for name in ("tokenizer_config.json", "config.json"):
        named = read_json(folder / name).get("tokenizer_class") if (folder / name).exists() else None
        if not isinstance(named, str | None):
            raise UserError(
                f"tokenizer_class in {folder / name} is {named!r}; expected a name. Fetch or save it again."
            )


def _check_encodes(name: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse settings that only encoding stumbles over, such as a `model_max_length` that is a word."""
    try:
        tokenizer("A")
    except Exception as error:  # as above
        raise _refusal(name, error) from error


def _refusal(name: str | Path, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
    return UserError(f"{name} has no tokenizer that can be loaded ({reason}). Fetch or save it again.")
