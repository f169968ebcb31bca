# SPDX-License-Identifier: Apache-2.0
"""Parts of a model that learn through an adapter of PEFT: each in the form that PEFT has for it, and merging.

| part | form |
| --- | --- |
| projections, a dense model's MLP | LoRA (`target_modules`) |
| experts, which are 3-D parameters and no linear layers | LoRA (`target_parameters`); `all-linear` has no effect |
| rows of new tokens | the rows themselves (`trainable_token_indices`), of the embeddings and of an untied head |
| routers, norms | whole modules (`modules_to_save`) |
| skip alphas | as they are, beside the adapter in its file (`alphas_beside_adapter`) |
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_peft_config

from jai.errors import UserError
from jai.trainers.expert_lora import adapting_four_bits
from jai.trainers.parts import ALL, EMBEDDINGS, TASK_HEAD, TrainableParts, part_kinds, without_layer


@dataclass(frozen=True)
class _Targets:
    """Names for PEFT's configuration. Each names what ends with it."""

    modules: list[str]
    parameters: list[str]
    whole_modules: list[str]
    rows: dict[str, list[int]]


def lora_config(model_args: ModelConfig, parts: TrainableParts, model: PreTrainedModel) -> LoraConfig | None:
    """The adapter in which the parts learn, or None without `use_peft`.

    Args:
        model_args: TRL's; targets that it names are adapted beside the parts.
        parts: what is to learn.
        model: the model; weights are not read, so that it may be on the meta device.

    Raises:
        UserError: for options that do not fit each other or the model.
    """
    if not model_args.use_peft:
        return None
    if ALL in parts.names:
        raise UserError(
            "`trainable` is all and `use_peft` is on, but an adapter holds a part of the weights. Name parts "
            "(attention, experts, router, alphas, new_rows), or set `use_peft: false` to train every weight."
        )
    targets = _targets(parts, model)
    given = model_args.lora_target_modules is not None or model_args.lora_target_parameters is not None
    if given and (targets.modules or targets.parameters):
        raise UserError(
            f"`lora_target_modules` and `lora_target_parameters` say what LoRA adapts, and so does `trainable` "
            f"({', '.join(parts.names)}). Give one or the other; `trainable` may name router, alphas and new_rows "
            "beside them."
        )
    if not given:
        if not (targets.modules or targets.parameters):
            raise UserError(
                f"`trainable` names {', '.join(parts.names)}, which leaves nothing for LoRA to adapt. Name attention "
                "or experts as well, or set `use_peft: false`: these parts then learn in full, and all else is frozen."
            )
        # A list and not None even if it is empty: without one PEFT takes its default for the model type.
        model_args = replace(
            model_args, lora_target_modules=targets.modules, lora_target_parameters=targets.parameters or None
        )
    _check_experts(model_args)
    whole = [*(model_args.lora_modules_to_save or []), *targets.whole_modules]
    config = cast(LoraConfig, get_peft_config(replace(model_args, lora_modules_to_save=whole or None)))
    name = config.target_modules
    if (
        isinstance(name, str)
        and name != "all-linear"
        and not any(re.fullmatch(name, module) for module, _ in model.named_modules())
    ):
        config.target_modules = [name]  # TRL makes a string of a single name, which PEFT takes for a pattern
    adapting_four_bits(config)
    config.trainable_token_indices = targets.rows or None
    return config


def _check_experts(model_args: ModelConfig) -> None:
    if model_args.lora_target_parameters is None:
        return
    for option, value, fitting in (
        ("lora_dropout", model_args.lora_dropout, 0.0),
        ("use_dora", model_args.use_dora, False),
    ):
        if value != fitting:
            raise UserError(
                f"`{option}` is {value}, which PEFT cannot do on experts (3-D parameters). Set it to "
                f"{str(fitting).lower()}, or leave experts out of `trainable`."
            )


def _targets(parts: TrainableParts, model: PreTrainedModel) -> _Targets:
    kinds = part_kinds(model)
    linear, parameters, whole = [], [], []
    rows: dict[str, list[int]] = {}
    for name, entries in parts.entries.items():
        module_name = name.rpartition(".")[0]
        if kinds[name] == EMBEDDINGS:
            rows[module_name.rpartition(".")[2]] = [id_ for run in entries or () for id_ in run]
        elif model.get_parameter(name).ndim == 3:
            parameters.append(name)
        elif isinstance(model.get_submodule(module_name), nn.Linear) and kinds[name] != TASK_HEAD:
            linear.append(module_name)
        elif kinds[name] != "alphas":
            whole.append(module_name)
    modules = [name for name, _ in model.named_modules()]
    return _Targets(
        modules=[name.rpartition(".")[2] if "layers." not in name else name for name in _short(linear, modules)],
        parameters=_short(parameters, kinds),
        whole_modules=_short(whole, modules),
        rows=rows,
    )


def _short(chosen: Sequence[str], names: Iterable[str]) -> list[str]:
    """What ends the chosen names alone: `mlp.gate` if it is chosen in all layers, else `layers.3.mlp.gate`."""
    every: dict[str, set[str]] = {}
    for name in names:
        every.setdefault(without_layer(name), set()).add(name)
    of_inner: dict[str, list[str]] = {}
    for name in dict.fromkeys(chosen):
        of_inner.setdefault(without_layer(name), []).append(name)
    short: list[str] = []
    for inner, group in of_inner.items():
        short += [inner] if set(group) == every[inner] else [name[name.index("layers.") :] for name in group]
    return short


def merge_adapter(
    adapter: Path, out: Path, base: str, *, auto_class: type = AutoModelForCausalLM, **loading: Any
) -> None:
    """Add the adapter in a folder to its base model and save the whole model in `out`, which may exist.

    It starts from the base's files and not from the model in training, so it works alike after FSDP, ZeRO and
    quantised training. The merge runs on the CPU and needs memory for the whole model.

    Args:
        adapter: folder of the saved adapter.
        out: folder for the merged checkpoint.
        base: folder or Hub id of the model that the adapter was trained on.
        auto_class: transformers' class that makes the model.
        loading: arguments of `from_pretrained`: dtype, revision, trust_remote_code.
    """
    with torch.no_grad():
        model = cast(Any, auto_class).from_pretrained(base, device_map=None, use_safetensors=True, **loading)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(out)
