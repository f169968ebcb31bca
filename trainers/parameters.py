# SPDX-License-Identifier: Apache-2.0
"""What a stage does to the model's parameters, found out on the meta device before a weight is read."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig

from jai.errors import UserError
from jai.trainers.base_model import BaseModel


@dataclass(frozen=True)
class TrainedParameters:
    """Numbers of parameters.

    Attributes:
        total: all, adapters included.
        trained: those that training changes.
        quantized: those that `load_in_4bit` or `load_in_8bit` stores in fewer bits; 0 without them.
    """

    total: int
    trained: int
    quantized: int


def count_trained_parameters(base: BaseModel, lora: LoraConfig | None, model_args: ModelConfig) -> TrainedParameters:
    """Count a model's parameters without reading its weights.

    Raises:
        UserError: if LoRA names targets that the model does not have, or quantisation would leave out its experts.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(base.config, trust_remote_code=base.loading["trust_remote_code"])
        quantized = _count_quantized(model, base, model_args)
        if lora is not None:
            _require_targets(lora, model, base)
            model = get_peft_model(model, copy.deepcopy(lora))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return TrainedParameters(sum(parameter.numel() for parameter in model.parameters()), trained, quantized)


def _count_quantized(model: PreTrainedModel, base: BaseModel, model_args: ModelConfig) -> int:
    """Parameters that bitsandbytes quantises: the weights of linear layers but the head's."""
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return 0
    option = "load_in_4bit" if model_args.load_in_4bit else "load_in_8bit"
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    quantized = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    )
    experts = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 3)
    if experts:
        raise UserError(
            f"`{option}` is on, but it would leave {1 - quantized / total:.0%} of {base.name} as it is: bitsandbytes "
            f"quantises linear layers, and the experts ({experts / total:.0%} of the parameters) are 3-D parameters. "
            f"Leave `{option}` out and load in bfloat16 (`dtype: bfloat16`); dense models can be quantised."
        )
    return quantized


def _require_targets(lora: LoraConfig, model: PreTrainedModel, base: BaseModel) -> None:
    """PEFT adapts what it finds, and is silent about targets that match nothing as long as one of them does."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for option, targets, names in (
        ("lora_target_modules", lora.target_modules, modules),
        ("lora_target_parameters", lora.target_parameters, parameters),
        ("lora_modules_to_save", lora.modules_to_save, modules),
    ):
        if targets is None or isinstance(targets, str):  # "all-linear", or a regular expression
            continue
        missing = sorted(target for target in targets if not _matches(target, names))
        if missing:
            known = sorted({_without_layer(name) for name in names} - {""})
            raise UserError(
                f"`{option}` names {', '.join(missing)}, which {base.name} does not have. It has: {', '.join(known)}."
            )


def _matches(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _without_layer(name: str) -> str:
    """The name inside of its layer: model.layers.3.self_attn.q_proj is self_attn.q_proj."""
    parts = name.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[layer + 1 :])
