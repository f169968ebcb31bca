# SPDX-License-Identifier: Apache-2.0
"""The files of a LoRA adapter of PEFT, and what of its configuration decides the merge. Imports no PyTorch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jai.errors import UserError
from jai.files import check_is_file, read_json
from jai.hub import local_folder
from jai.options import is_number

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CALIBRATION_FILE = "reward_calibration.json"  # beside a reward model's
_REMEDY = "Fetch or save the adapter again."
# What changes the sum W + scale * B @ A, or how much of it there is; with each the values that leave it as it is.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "bias": ("none", None),
    "layer_replication": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
}


@dataclass(frozen=True)
class AdapterConfig:
    """What decides a merge.

    Attributes:
        base: name of the model that it was trained on.
        revision: of that model on the Hub; None is the default branch.
        rank, scale: of every pair of factors.
        parameters: endings of the names of adapted 3-D parameters.
        rows: by the ending of an embedding module's name, which rows the adapter holds.
    """

    base: str
    revision: str | None
    rank: int
    scale: float
    parameters: tuple[str, ...]
    rows: dict[str, list[int]]


def adapter_folder(name: str) -> Path:
    """Folder of an adapter; one on the Hub is fetched.

    Raises:
        UserError: if there is none.
    """
    folder = local_folder(name, [CONFIG, WEIGHTS, CALIBRATION_FILE, "provenance.json"])
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).exists():
            raise UserError(f"{name} has no {file}, and is not a LoRA adapter of PEFT. Give the folder that has one.")
        check_is_file(folder / file)
    return folder


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read an adapter's configuration.

    Raises:
        UserError: if it is damaged, no LoRA, or a variant of it that is no sum of two factors' product.
    """
    path = folder / CONFIG
    content = read_json(path, _REMEDY)
    if content.get("peft_type") != "LORA":
        raise UserError(f"{path} is of the type {content.get('peft_type')!r}; only LORA can be merged here.")
    for option, plain in _PLAIN.items():
        if (value := content.get(option)) not in plain:
            raise UserError(
                f"{path} sets `{option}` to {value!r}, which is not merged here. Load it with PEFT on the model in "
                "memory, and call `merge_and_unload()`."
            )
    rank, alpha, base = content.get("r"), content.get("lora_alpha"), content.get("base_model_name_or_path")
    parameters, revision = content.get("target_parameters") or [], content.get("revision")
    rows = content.get("trainable_token_indices") or {}
    if isinstance(rows, list):
        rows = {"embed_tokens": rows}
    is_sound = (
        type(rank) is int
        and rank > 0
        and is_number(rank)
        and is_number(alpha)
        and isinstance(base, str | None)
        and isinstance(revision, str | None)
        and isinstance(parameters, list)
        and all(isinstance(name, str) for name in parameters)
        and isinstance(rows, dict)
        and all(isinstance(ids, list) and all(type(id_) is int and id_ >= 0 for id_ in ids) for ids in rows.values())
    )
    if not is_sound:
        raise UserError(f"{path} has no sound rank, alpha and targets. {_REMEDY}")
    rank, alpha = cast(int, rank), cast(float, alpha)
    scale = alpha / (math.sqrt(rank) if content.get("use_rslora") else rank)
    return AdapterConfig(base or "", revision, rank, scale, tuple(parameters), rows)


def base_of(name: str, config: AdapterConfig, given: str | None) -> str:
    """The model to merge into.

    Raises:
        UserError: if neither is named, or it is on the Hub and the adapter names a revision of it.
    """
    base = given or config.base
    if base and base == config.base and config.revision and not Path(base).is_dir():
        raise UserError(
            f"{name} was trained on {base} at the revision {config.revision}, and this reads the default branch. "
            f"Fetch that revision (hf download {base} --revision {config.revision} --local-dir FOLDER), and give it: "
            "--base FOLDER"
        )
    if base:
        return base
    raise UserError(f"{name} does not say which model it is for. Give it: --base CKPT")
