# SPDX-License-Identifier: Apache-2.0
"""Configurations of checkpoints: read in one way, and made into transformers' classes, which import PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jai.errors import UserError
from jai.files import read_json
from jai.hub import no_config

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

CONFIG_FILE, GENERATION_CONFIG_FILE = "config.json", "generation_config.json"
# Planning goes through layers and rows one by one, so a mistyped number would take all memory before anything fails.
# The deepest models have some hundred layers, and the largest vocabularies some hundred thousand rows.
_LARGEST = {"num_hidden_layers": 10_000, "vocab_size": 100_000_000}

Config = TypeVar("Config", bound="PreTrainedConfig")


def read_config(folder: Path, remedy: str) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Args:
        folder: the checkpoint.
        remedy: what to give instead of a folder that has none.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    path = folder / CONFIG_FILE
    if not os.path.lexists(path):
        raise no_config(folder, remedy)
    return read_json(path)


def make_config(config_class: type[Config], content: dict[str, Any], folder: Path) -> Config:
    """The configuration of a class of transformers that a config.json holds.

    Args:
        config_class: the class.
        content: what the config.json holds.
        folder: its folder, for messages.

    Raises:
        UserError: if the class does not take it, or a size is beyond that of any model.
    """
    path = folder / CONFIG_FILE
    for name, largest in _LARGEST.items():
        value = content.get(name)
        if isinstance(value, int | float) and value > largest:
            raise UserError(
                f"{path} is not valid: {name} is {value:g}, and at most {largest:,} is taken. Fetch or save it again."
            )
    try:
        return config_class.from_dict(content)
    except Exception as error:  # of every kind, for each of transformers' classes checks in its own way
        reason = f"{type(error).__name__}: {error.__cause__ or error}"
        raise UserError(f"{path} is not valid: {reason}. Fetch or save it again.") from None


def load_generation_config(folder: Path) -> GenerationConfig | None:
    """A checkpoint's settings of generation, None where it has none.

    Raises:
        UserError: if they are damaged.
    """
    path = folder / GENERATION_CONFIG_FILE
    if not os.path.lexists(path):
        return None
    read_json(path)  # transformers would wait for ever on a named pipe, and takes a list for settings
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of every kind, by what is wrong
        raise UserError(f"{path} is not valid: {error}. Fetch or save it again, or remove it.") from None
