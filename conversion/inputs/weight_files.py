# SPDX-License-Identifier: Apache-2.0
"""The weight files of a checkpoint folder: which there are, by its index or alone. Imports no PyTorch."""

import os
from pathlib import Path

from jai.errors import UserError
from jai.files import check_is_file, read_json

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"


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
            f"{name} is a LoRA adapter without its model. Merge it first, `jai merge-adapter {name} OUT`, and give OUT "
            "here."
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
        raise UserError(f"{index} is not an index of weights: it has no weight_map of names. Fetch or save it again.")
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
