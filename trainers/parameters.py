# SPDX-License-Identifier: Apache-2.0
"""What a stage does to the model's parameters, found out on the meta device before a weight is read."""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import set_zero3_state
from trl import ModelConfig, get_quantization_config

from jai.errors import UserError
from jai.modeling_jai import JaiExperts
from jai.trainers.base_model import BaseModel
from jai.trainers.parts import EMBEDDINGS, NEW_ROWS, TrainableParts, count_entries, kind_of, part_kinds, without_layer
from jai.trainers.trainable import train_parts


@dataclass(frozen=True)
class KindCount:
    """Numbers of parameters of one kind: "attention", "experts", "router", "alphas", "new_rows", or a kind of no part.

    Attributes:
        kind: its name.
        total: of the model.
        trained: how many learn; through LoRA, those of the adapter.
        by_lora: whether they are LoRA's.
        is_partial: whether they lie in parameters of which other entries are frozen, as some experts in a layer's.
    """

    kind: str
    total: int
    trained: int
    by_lora: bool
    is_partial: bool


@dataclass(frozen=True)
class TrainedParameters:
    """Numbers of parameters.

    Attributes:
        total: all, adapters included.
        trained: those that training changes.
        quantized: those that are stored in fewer bits; 0 in a model in full.
        quantization: how, as in "4 bits (nf4)".
        kinds: the same by kind.
    """

    total: int
    trained: int
    quantized: int
    quantization: str
    kinds: tuple[KindCount, ...]


def empty_model(base: BaseModel, auto_class: type = AutoModelForCausalLM) -> PreTrainedModel:
    """The model that a stage starts from, on the meta device: its weights are not read.

    Args:
        base: the checkpoint.
        auto_class: transformers' class that makes it, such as AutoModelForSequenceClassification for a reward model.
    """
    # ZeRO-3 would cut weights up as they are made; told that somebody does that already, transformers leaves it be.
    with set_zero3_state(), torch.device("meta"):
        return cast(Any, auto_class).from_config(base.config, trust_remote_code=base.loading["trust_remote_code"])


def count_trained_parameters(
    model: PreTrainedModel, base: BaseModel, parts: TrainableParts, lora: LoraConfig | None, model_args: ModelConfig
) -> TrainedParameters:
    """Count a model's parameters without reading its weights.

    Args:
        model: of `empty_model`; it is changed.
        base: where it comes from.
        parts: what learns.
        lora: the adapter for them, if there is one.
        model_args: TRL's.

    Raises:
        UserError: if LoRA names targets that the model does not have, or quantisation would leave out its experts.
    """
    totals = _count_kinds(model, parts)
    quantized = _count_quantized(model, base, model_args)
    prepared: nn.Module = model
    if lora is not None:
        _require_targets(lora, model, base)
        with torch.device("meta"):
            prepared = get_peft_model(model, copy.deepcopy(lora))
    partial = {id(each.parameter): each.trained for each in train_parts(prepared, parts).partial}
    trained: Counter[str] = Counter()
    by_lora, are_partial = set(), set()
    for name, parameter in prepared.named_parameters():
        if parameter.requires_grad:
            kind = kind_of(name, model)
            whole_rows = kind == EMBEDDINGS and id(parameter) not in partial and "token_adapter" not in name
            if kind == EMBEDDINGS and not whole_rows:
                kind = NEW_ROWS
            trained[kind] += partial.get(id(parameter), parameter.numel())
            if id(parameter) in partial:
                are_partial.add(kind)
            if ".lora_" in name:
                by_lora.add(kind)
            elif whole_rows:  # the new among them learn, too
                new = count_entries(parts.new_rows or ()) * parameter.shape[1]
                trained[EMBEDDINGS] -= new
                trained[NEW_ROWS] += new
    kinds = tuple(
        KindCount(kind, total, trained[kind], kind in by_lora, kind in are_partial) for kind, total in totals.items()
    )
    total = sum(parameter.numel() for parameter in prepared.parameters())
    how = quantization_of(base.config, model_args)
    return TrainedParameters(total, trained.total(), quantized, "" if how is None else _described(how), kinds)


def _count_kinds(model: PreTrainedModel, parts: TrainableParts) -> dict[str, int]:
    totals: dict[str, int] = {}
    for name, kind in part_kinds(model).items():
        parameter = model.get_parameter(name)
        if kind == EMBEDDINGS and parts.new_rows:
            new = count_entries(parts.new_rows) * parameter.shape[1]
            totals[NEW_ROWS] = totals.get(NEW_ROWS, 0) + new
            totals[kind] = totals.get(kind, 0) - new
        totals[kind] = totals.get(kind, 0) + parameter.numel()
    return totals


def quantization_of(config: PreTrainedConfig, model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """How the model is quantised: as its checkpoint is, or as the options ask; None where it is not, by bitsandbytes.

    Args:
        config: the checkpoint's.
        model_args: TRL's.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return get_quantization_config(model_args)
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    return BitsAndBytesConfig.from_dict(stored) if stored.get("quant_method") == "bitsandbytes" else None


def _described(how: BitsAndBytesConfig) -> str:
    if not how.load_in_4bit:
        return "8 bits"
    double = ", scales in 8 bits" if how.bnb_4bit_use_double_quant else ""
    return f"4 bits ({how.bnb_4bit_quant_type}{double})"


def _count_quantized(model: PreTrainedModel, base: BaseModel, model_args: ModelConfig) -> int:
    """Parameters that are quantised: the weights of linear layers but the head's, and a JAI's experts in four bits."""
    how = quantization_of(base.config, model_args)
    if how is None:
        return 0
    option = "load_in_4bit" if how.load_in_4bit else "load_in_8bit"
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    quantized = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    )
    experts = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 3)
    if experts and how.load_in_4bit and base.is_jai:
        with torch.device("meta"):
            for module in model.modules():
                if isinstance(module, JaiExperts):
                    try:
                        module.in_four_bits(how)
                    except ValueError as error:
                        raise UserError(str(error)) from None
        return quantized + experts
    if experts and getattr(base.config, "quantization_config", None) is None:
        advice = "load in bfloat16 (`dtype: bfloat16`)"
        if base.is_jai:
            advice = f"set `load_in_4bit: true`, which takes the experts along, or {advice}"
        raise UserError(
            f"`{option}` is on, but it would leave {1 - quantized / total:.0%} of {base.name} as it is: bitsandbytes "
            f"quantises linear layers, and the experts ({experts / total:.0%} of the parameters) are 3-D parameters. "
            f"Leave `{option}` out and {advice}."
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
            known = sorted({without_layer(name) for name in names} - {""})
            raise UserError(
                f"`{option}` names {', '.join(missing)}, which {base.name} does not have. It has: {', '.join(known)}."
            )


def _matches(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)
