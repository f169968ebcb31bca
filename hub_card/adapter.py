# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters on the Hub: what a whole one is, the base that it names, and its card."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from jai.conversion.inputs.header import read_header
from jai.errors import UserError
from jai.hub_card.card import mark_generated
from jai.hub_card.contents import ADAPTER_CONFIG, Contents
from jai.hub_card.weights import read_json
from jai.provenance import redact

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_CARD = """\
# {name}

A {kind} adapter for [{base}](https://huggingface.co/{base}). It holds {parameters:,} parameters; the model itself and \
its code come from there.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}", trust_remote_code=True)
```

`trust_remote_code=True` runs the model code of {base} on your machine. It is pinned: `adapter_config.json` names the \
commit `{revision}`, on which the adapter was checked.

| key | value |
| --- | --- |
{rows}
"""
_SHOWN = ("r", "lora_alpha", "target_modules", "target_parameters", "modules_to_save")


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
    config = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict) or not config.get("peft_type") or not config.get("base_model_name_or_path"):
        raise UserError(
            f"{folder / ADAPTER_CONFIG} names no peft_type or no base_model_name_or_path, so it is no adapter of PEFT. "
            "Save it again with save_pretrained."
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
    try:
        validate_repo_id(name)
        is_id = "/" in name and not (base is None and adapter.base_folder)
    except HFValidationError:
        is_id = False
    if not is_id:
        raise UserError(
            f"The adapter's base model is {name!r}, which is no model on the Hub. Publish the base first, then give "
            "its name: --base owner/name."
        )
    return replace(adapter, base=name, revision=adapter.revision if base is None else None)


def adapter_card(contents: Contents, adapter: Adapter, repo_id: str) -> str:
    """The README.md of an adapter's repository."""
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        language=["th", "en"],
        license="mit",
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=adapter.base,
        base_model_relation="adapter",
        tags=["jai", adapter.kind.lower(), "custom_code"],
    )
    rows = "\n".join(f"| {key} | {_cell(adapter.config[key])} |" for key in _SHOWN if adapter.config.get(key))
    text = _CARD.format(
        name=name,
        kind=adapter.kind,
        base=adapter.base,
        parameters=adapter.parameters,
        repo_id=repo_id,
        tokenizer=repo_id if "tokenizer_config.json" in contents.kept else adapter.base,
        revision=adapter.revision,
        rows=rows,
    )
    return mark_generated(redact(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))))


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
