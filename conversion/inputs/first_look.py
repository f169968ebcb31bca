# SPDX-License-Identifier: Apache-2.0
"""What the files of a checkpoint tell by themselves, before PyTorch is imported: that takes 3 s and 260 MB."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jai.conversion.inputs.config import read_config
from jai.conversion.inputs.header import read_header
from jai.conversion.inputs.tokenizer import check_tokenizer_json
from jai.conversion.inputs.weight_files import has_weights, refuse_adapter, weight_files
from jai.errors import UserError
from jai.hub import local_folder

JAI_TYPE = "jai"  # the `model_type` of a JAI, as its configuration class has it
SNAPSHOT_TYPE = "jai_ffn_snapshot"  # that of a snapshot: nothing loads one as a model


def look_at_checkpoint(name: str, read: Callable[[Path], Any], *, needs_weights: bool = True) -> Path:
    """Check the files of a checkpoint as far as that needs no PyTorch.

    Args:
        name: folder or Hub id; of the latter, the files beside the weights are fetched and looked at.
        read: what reads its configuration, such as `read_jai_config`.
        needs_weights: whether it is nothing without its weights.

    Returns:
        Its folder.

    Raises:
        UserError: if it is not there, an adapter, of another kind, or lacks its weights; for a configuration, an index,
            a header or a tokenizer that is damaged, and for weight files of another length than their headers say.
    """
    folder = local_folder(name)
    refuse_adapter(name, folder)
    read(folder)
    if Path(name).is_dir() and (needs_weights or has_weights(folder)):
        for path in weight_files(folder):
            read_header(path)
    check_tokenizer_json(folder)
    return folder


def read_jai_config(folder: Path) -> dict[str, Any]:
    """The content of a JAI's config.json.

    Raises:
        UserError: if the folder holds no JAI, or a snapshot.
    """
    content = read_jai_or_snapshot_config(folder)
    if content["model_type"] == SNAPSHOT_TYPE:
        raise UserError(f"{folder} is a snapshot, which has only FFN weights. Give it to jai upcycle.")
    return content


def read_whole_jai_config(folder: Path, remedy: str = "Give the checkpoint that it was made from.") -> dict[str, Any]:
    """The content of the config.json of a JAI that is not quantised; `remedy` says what to do with one that is.

    Raises:
        UserError: if the folder holds no JAI, a snapshot, or one that is quantised.
    """
    content = read_jai_config(folder)
    quantization = content.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(f"{folder} is quantised already ({method}). {remedy}")
    return content


def read_jai_or_snapshot_config(folder: Path) -> dict[str, Any]:
    """The content of the config.json of a JAI, or of a snapshot of its FFN weights.

    Raises:
        UserError: if the folder holds neither.
    """
    content = read_config(folder, "Give a JAI checkpoint.")
    if content.get("model_type") not in (JAI_TYPE, SNAPSHOT_TYPE):
        raise UserError(
            f"{folder} is a model of type {content.get('model_type')!r}, not 'jai'. Convert it first: jai convert."
        )
    return content


def read_any_config(folder: Path) -> dict[str, Any]:
    """The content of the config.json of any model that transformers saved.

    Raises:
        UserError: if there is none, or it names no model_type.
    """
    content = read_config(folder, "Give a folder that save_pretrained wrote.")
    if not isinstance(content.get("model_type"), str):
        raise UserError(f"{folder / 'config.json'} is not valid: it names no model_type. Fetch or save it again.")
    return content
