# SPDX-License-Identifier: Apache-2.0
"""The peak of a stage's memory, predicted before a weight is read (docs/planning.md)."""

from collections.abc import Iterator
from typing import Any, cast, get_args

import torch
from peft import LoraConfig
from transformers.training_args import OptimizerNames
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig

from jai.configuration_jai import JaiConfig
from jai.planning.advice import MARGIN
from jai.planning.memory import Experts, Setup, peak_memory
from jai.planning.report import memory_line
from jai.trainers.arguments import StageArguments, max_length_of
from jai.trainers.base_model import BaseModel
from jai.trainers.engine import accelerates_sizes, sharded_at_load, uses_deepspeed, uses_fsdp
from jai.trainers.parameters import TrainedParameters, quantization_of
from jai.trainers.parts import NEW_ROWS
from jai.trainers.pretrain_config import PretrainConfig


def memory_rows(
    arguments: StageArguments, base: BaseModel, lora: LoraConfig | None, parameters: TrainedParameters
) -> Iterator[tuple[str, str]]:
    """The row of a plan that says the predicted peak of a step on one device, and its parts; or why there is none."""
    if not base.is_jai:
        return
    setup = setup_of_stage(arguments, base, lora, parameters)
    if isinstance(setup, str):
        yield "memory", f"not predicted: {setup}"
        return
    memory = peak_memory(cast(JaiConfig, base.config), setup)
    yield "memory", f"a step's peak is predicted as {memory_line(memory)}"
    device = arguments.training.device
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
        if memory.total > MARGIN * size:
            yield (
                "",
                f"[bold yellow]the device has {size / 1e9:,.1f} GB, of which {MARGIN:.0%} can be filled[/]: `jai "
                "inspect CKPT --train …` says what would fit",
            )


def setup_of_stage(
    arguments: StageArguments, base: BaseModel, lora: LoraConfig | None, parameters: TrainedParameters
) -> Setup | str:
    """What the formulae need to know of a stage, or in words what of it they do not know."""
    training = arguments.training
    experts = _experts(arguments)
    length = max_length_of(arguments.training)
    optimizer = str(getattr(training.optim, "value", training.optim))
    if experts not in get_args(Experts):
        return f"the formulae do not know `experts_implementation` {experts}"
    if length is None:
        return "no `max_length` is set"
    if "adamw" not in optimizer or optimizer == OptimizerNames.ADAMW_ANYPRECISION.value:
        return f"the formulae know AdamW alone, and `optim` is {optimizer}"
    if uses_deepspeed(training):
        return "DeepSpeed's own file says what is cut"
    if sharded_at_load(training) is not None:
        return "the formulae do not know `distributed_config`"
    if getattr(training, "mtp_weight", 0):
        return "the formulae do not know multi-token prediction"
    how = quantization_of(base.config, arguments.model)
    if how is not None and (not how.load_in_4bit or lora is None):
        return "the formulae know four bits with LoRA alone"
    is_cut = uses_fsdp(training)
    half = training.bf16 or training.fp16
    dtype = arguments.model.dtype
    if dtype in ("auto", None):
        dtype = str(getattr(base.config, "dtype", None) or "float32").removeprefix("torch.")
    weights: Any = "float32" if dtype == "float32" else "bfloat16"  # or float16, which is as wide
    compute = 2 if weights == "bfloat16" or (half and is_cut) else 4
    if how is not None:
        weights = "nf4-double" if how.bnb_4bit_use_double_quant else "nf4"
        compute = 4 if how.bnb_4bit_compute_dtype == torch.float32 and not half else 2
    rows = sum(each.trained for each in parameters.kinds if each.kind == NEW_ROWS) if lora is not None else 0
    return Setup(
        learns="full" if lora is None else "lora",
        weights=weights,
        compute=compute,
        rank=0 if lora is None else lora.r,
        new_rows=rows // (2 * base.config.hidden_size),
        routers=any(each.trained for each in parameters.kinds if each.kind == "router"),
        state=2.0 if "8bit" in optimizer else 8.0,
        batch=training.per_device_train_batch_size * _sequences_of_row(arguments),
        length=length,
        accumulates=training.gradient_accumulation_steps > 1,
        checkpointing=bool(training.gradient_checkpointing),
        experts=cast(Any, experts),
        autocast=half,
        loss=_loss(arguments),
        trained=parameters.trained,
        reference=_has_reference(arguments, lora),
        on_cpu=training.device.type == "cpu",
        gpus=training.world_size,
        **_cut(arguments, is_cut),
    )


def _cut(arguments: StageArguments, is_cut: bool) -> dict[str, Any]:
    """Over what FSDP cuts weights, gradients and states."""
    sizes = accelerates_sizes(arguments.training)
    if not is_cut or arguments.training.world_size == 1:
        return {"sharding": "none"}
    if sizes is not None and sizes.dp_replicate_size > 1:
        return {"sharding": "hsdp", "group": sizes.dp_shard_size}
    return {"sharding": "fsdp"}


def _experts(arguments: StageArguments) -> str:
    kwargs = arguments.training.model_init_kwargs
    chosen = kwargs.get("experts_implementation") if isinstance(kwargs, dict) else None
    return str(chosen or arguments.jai.experts_implementation or "grouped_mm")


def _sequences_of_row(arguments: StageArguments) -> int:
    """A pair is two sequences, and they are computed together."""
    is_pair = not isinstance(arguments.training, SFTConfig | PretrainConfig | GRPOConfig | KTOConfig)
    return 2 if is_pair else 1


def _loss(arguments: StageArguments) -> Any:
    training = arguments.training
    if isinstance(training, RewardConfig):
        return "none"
    if isinstance(training, SFTConfig):
        return "logits" if training.loss_type == "dft" or training.label_smoothing_factor else "chunked"  # as TRL does
    return "chunked" if isinstance(training, PretrainConfig | DPOConfig | KTOConfig | GRPOConfig) else "logits"


def _has_reference(arguments: StageArguments, lora: LoraConfig | None) -> bool:
    training = arguments.training
    if not isinstance(training, DPOConfig | KTOConfig) or training.precompute_ref_log_probs:
        return False
    return lora is None or getattr(training, "ref_model_name_or_path", None) is not None
