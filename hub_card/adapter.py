# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters on the Hub: what a whole one is, and the base that it names."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jai.errors import UserError
from jai.files import read_json
from jai.hub import is_hub_id
from jai.hub_card.contents import ADAPTER_CONFIG, Contents

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What adapter_config.json says.

    Attributes:
        config: all of it.
        kind: "LORA" or another of PEFT's types.
        base: the base model: what the configuration names, after `on_hub` a Hub id.
        revision: of the base, where it is recorded.
        parameters: of the adapter alone.
        base_folder: the folder that the adapter was trained on, where it is on this machine.
    """

    config: dict[str, Any]
    kind: str
    base: str
    revision: str | None
    parameters: int
    base_folder: Path | None

    def config_text(self) -> str:
        """adapter_config.json with this base at this commit."""
        pinned = {"base_model_name_or_path": self.base, "revision": self.revision}
        return json.dumps({**self.config, **pinned}, indent=2) + "\n"


def read_adapter(contents: Contents) -> Adapter:
    """Check the files of an adapter's folder.

    Raises:
        UserError: if it is not whole, or only loads on the machine where it was made.
    """
    folder = contents.folder
    config = read_json(folder / ADAPTER_CONFIG, "Save the adapter again with save_pretrained.")
    if not (_is_text(config.get("peft_type")) and _is_text(config.get("base_model_name_or_path"))):
        raise UserError(
            f"{folder / ADAPTER_CONFIG} names no peft_type or no base_model_name_or_path, so it is not an adapter of "
            "PEFT. Save it again with save_pretrained."
        )
    if not isinstance(config.get("revision"), str | None):
        raise UserError(
            f"{folder / ADAPTER_CONFIG} has revision {config['revision']!r}; expected the name of a commit, or null."
        )
    if ADAPTER_WEIGHTS not in contents.kept:
        raise UserError(
            f"{folder} has no {ADAPTER_WEIGHTS}. Pickled weights (adapter_model.bin) are not published: load the "
            "adapter with PEFT and save it again, which writes safetensors."
        )
    if not config.get("task_type"):  # PEFT then records the class by its module, which lies in this machine's cache
        raise UserError(
            f"{folder / ADAPTER_CONFIG} has no task_type, so others could not load the adapter. Train it with "
            'task_type="CAUSAL_LM", or write that into the file.'
        )
    from jai.conversion.inputs.header import read_header

    tensors = read_header(folder / ADAPTER_WEIGHTS).tensors
    parameters = sum(math.prod(entry["shape"]) for entry in tensors.values())
    base = config["base_model_name_or_path"]
    base_folder = Path(base) if Path(base).is_dir() else None
    return Adapter(config, config["peft_type"], base, config.get("revision"), parameters, base_folder)


def on_hub(adapter: Adapter, base: str | None) -> Adapter:
    """The adapter with its base on the Hub: the one given, or else the recorded one.

    Raises:
        UserError: if the recorded one is a folder, which nobody else has.
    """
    name = base or adapter.base
    is_folder = base is None and adapter.base_folder is not None
    if is_folder or "/" not in name or not is_hub_id(name):
        raise UserError(
            f"The adapter's base model is {name!r}, which is not a model on the Hub. Publish the base first, then give "
            "its name: --base owner/name."
        )
    return replace(adapter, base=name, revision=adapter.revision if base is None else None)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
