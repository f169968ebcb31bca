# SPDX-License-Identifier: Apache-2.0
"""A phi-3 checkpoint's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jai.conversion.inputs.config import make_config, read_config
from jai.errors import UserError

if TYPE_CHECKING:
    from transformers import Phi3Config


def read_phi3_config(folder: Path) -> dict[str, Any]:
    """The content of a phi-3 checkpoint's config.json. Imports no PyTorch.

    Raises:
        UserError: if the folder holds no phi-3 language model.
    """
    content = read_config(folder, "Give a Phi3ForCausalLM checkpoint.")
    architectures = content.get("architectures") or []
    if content.get("model_type") != "phi3" or architectures not in ([], ["Phi3ForCausalLM"]):
        listed = ", ".join(map(str, architectures)) if isinstance(architectures, list) else repr(architectures)
        raise UserError(
            f"{folder} is {listed or 'a model'} of type {content.get('model_type')!r}. `jai convert` takes a "
            "Phi3ForCausalLM (model_type 'phi3'): phi-3-mini, phi-3-medium, phi-3.5-mini, phi-4."
        )
    if content.get("quantization_config"):
        raise UserError(f"{folder} is quantised. Convert the unquantised checkpoint, and quantise the result.")
    return content


def load_phi3_config(folder: Path) -> Phi3Config:
    """Read and check the configuration of a phi-3 checkpoint.

    Raises:
        UserError: if the folder holds no phi-3 language model, or the configuration is not valid.
    """
    content = read_phi3_config(folder)
    from transformers import Phi3Config  # and PyTorch, which not everything that reads a configuration needs

    return make_config(Phi3Config, content | _renamed_rope(content), folder)


def _renamed_rope(content: dict[str, Any]) -> dict[str, Any]:
    """LongRoPE under its present name: phi-3's first checkpoints call it `su`."""
    renamed = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = content.get(key)
        if isinstance(rope, dict) and "su" in (rope.get("type"), rope.get("rope_type")):
            renamed[key] = {name: value for name, value in rope.items() if name != "type"} | {"rope_type": "longrope"}
    return renamed
