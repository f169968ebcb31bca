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
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig

from jai.errors import UserError
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
        quantized: those that `load_in_4bit` or `load_in_8bit` stores in fewer bits; 0 without them.
        kinds: the same by kind.
    """

    total: int
    trained: int
    quantized: int
    kinds: tuple[KindCount, ...]


def empty_model(base: BaseModel, auto_class: type = AutoModelForCausalLM) -> PreTrainedModel:
    """The model that a stage starts from, on the meta device: its weights are not read.

    Args:
        base: the checkpoint.
        auto_class: transformers' class that makes it, such as AutoModelForSequenceClassification for a reward model.
    """
    with torch.device("meta"):
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
    return TrainedParameters(total, trained.total(), quantized, kinds)


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
            known = sorted({without_layer(name) for name in names} - {""})
            raise UserError(
                f"`{option}` names {', '.join(missing)}, which {base.name} does not have. It has: {', '.join(known)}."
            )


def _matches(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)
