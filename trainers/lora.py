# SPDX-License-Identifier: Apache-2.0
"""LoRA on a JAI: which weights are adapted, and how an adapter is merged into its model.

The experts of a layer are two 3-D parameters and no linear layers, so PEFT reaches them through `target_parameters`;
its `all-linear` adapts attention alone, without a word.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedConfig
from trl import ModelConfig, get_peft_config

from jai.errors import UserError
from jai.trainers.arguments import JaiTrainingArguments

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE_MLP = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTER = "mlp.gate"


def lora_config(model_args: ModelConfig, jai_args: JaiTrainingArguments, config: PreTrainedConfig) -> LoraConfig | None:
    """The adapter that the options ask for, or None without `use_peft`.

    Raises:
        UserError: for options that do not fit each other or the model.
    """
    if not model_args.use_peft:
        if jai_args.merge_adapter or jai_args.lora_router:
            option = "merge_adapter" if jai_args.merge_adapter else "lora_router"
            raise UserError(
                f"`{option}` is on, but there is no adapter: set `use_peft: true` as well, or leave it out."
            )
        return None
    experts = getattr(config, "num_local_experts", 1)
    given = model_args.lora_target_modules is not None or model_args.lora_target_parameters is not None
    if not given:
        modules = [*ATTENTION, *(DENSE_MLP if experts == 1 else ())] if jai_args.lora_targets != "experts" else []
        parameters = list(EXPERTS) if jai_args.lora_targets != "attention" else None
        # A list and not None even if it is empty: without one PEFT takes its default for the model type.
        model_args = replace(model_args, lora_target_modules=modules, lora_target_parameters=parameters)
    if experts == 1 and (jai_args.lora_router or (not given and jai_args.lora_targets != "attention")):
        raise UserError(
            "The model is dense: it has no experts and no router for LoRA. Set `lora_targets: attention` (which takes "
            "in the MLP of a dense model) and `lora_router: false`."
        )
    if model_args.lora_target_parameters is not None:
        for option, value, fitting in (
            ("lora_dropout", model_args.lora_dropout, 0.0),
            ("use_dora", model_args.use_dora, False),
        ):
            if value != fitting:
                raise UserError(
                    f"`{option}` is {value}, which PEFT cannot do on experts (3-D parameters). Set it to "
                    f"{str(fitting).lower()}, or choose `lora_targets: attention`."
                )
    if jai_args.lora_router:
        model_args = replace(model_args, lora_modules_to_save=[*(model_args.lora_modules_to_save or []), ROUTER])
    return cast(LoraConfig, get_peft_config(model_args))


def merge_adapter(adapter: Path, out: Path, base: str, **loading: Any) -> None:
    """Add the adapter in a folder to its base model and save the whole model in `out`, which may exist.

    It starts from the base's files and not from the model in training, so it works alike after FSDP, ZeRO and
    quantised training. The merge runs on the CPU and needs memory for the whole model.

    Args:
        adapter: folder of the saved adapter.
        out: folder for the merged checkpoint.
        base: folder or Hub id of the model that the adapter was trained on.
        loading: arguments of `from_pretrained`: dtype, revision, trust_remote_code.
    """
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, device_map=None, use_safetensors=True, **loading)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(out)
