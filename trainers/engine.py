# SPDX-License-Identifier: Apache-2.0
"""What spreads a run over processes: Accelerate's FSDP2, DeepSpeed, or transformers' own `DistributedConfig`.

Each is somebody else's; here is what of them would go wrong in silence, or only when hours are gone, refused before the
model is loaded.
"""

import os
from dataclasses import fields
from typing import Any, cast

from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from transformers import PreTrainedConfig, TrainingArguments
from transformers.distributed import DistributedConfig

from jai.errors import UserError


def uses_fsdp(training: TrainingArguments) -> bool:
    """Whether Accelerate shards the model, by `accelerate launch`'s configuration or by the option `fsdp`."""
    return _is_on("ACCELERATE_USE_FSDP") or bool(training.fsdp)


def uses_deepspeed(training: TrainingArguments) -> bool:
    """Whether DeepSpeed does, by `accelerate launch`'s configuration or by the option `deepspeed`."""
    return _is_on("ACCELERATE_USE_DEEPSPEED") or bool(training.deepspeed)


def accelerates_sizes(training: TrainingArguments) -> ParallelismConfig | None:
    """How Accelerate spreads the processes, by `accelerate launch`'s configuration or by `parallelism_config`."""
    if training.parallelism_config is not None:
        return training.parallelism_config
    return ParallelismConfig() if _is_on("ACCELERATE_USE_PARALLELISM_CONFIG") else None


def sharded_at_load(training: TrainingArguments) -> DistributedConfig | None:
    """transformers' `DistributedConfig` in `model_init_kwargs`, which shards a model while it is loaded.

    Raises:
        UserError: for a key that it does not have, and sizes that cannot be.
    """
    options = cast(dict[str, Any], getattr(training, "model_init_kwargs", None) or {})
    given = options.get("distributed_config")
    if given is None or isinstance(given, DistributedConfig):
        return given
    known = [each.name for each in fields(DistributedConfig)]
    if not isinstance(given, dict) or not given.keys() <= set(known):
        raise UserError(
            f"`distributed_config` in `model_init_kwargs` is {given!r}; expected a mapping of {', '.join(known)}."
        )
    try:
        return DistributedConfig(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"`distributed_config` in `model_init_kwargs` cannot be: {error}") from error


def batches_at_once(training: TrainingArguments) -> int:
    """How many batches all processes take together: those that hold parts of the same matrices share one."""
    config = sharded_at_load(training)
    return training.world_size // (1 if config is None else config.tp_size or 1)


def check_engine(training: TrainingArguments, *, use_peft: bool) -> None:
    """Refuse what the engines do not do, before anything is loaded.

    Args:
        training: the options of the run.
        use_peft: whether an adapter is trained.

    Raises:
        UserError: naming what to change.
    """
    if uses_fsdp(training):
        _check_fsdp(training)
    config = sharded_at_load(training)
    if config is not None:
        _check_sharded_at_load(training, config, use_peft)


def check_engine_with_model(training: TrainingArguments, config: PreTrainedConfig) -> None:
    """Refuse what the engines cannot do with this model.

    Raises:
        UserError: for frozen skip alphas, which are buffers, where Accelerate hands out parameters alone.
    """
    loads_once = _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING") or str(
        _fsdp_option(training, "cpu_ram_efficient_loading")
    ).lower() in ("true", "1")
    has_frozen_alphas = not getattr(config, "skip_alpha_trainable", True) and max(config.block_repeats) > 1
    if uses_fsdp(training) and loads_once and has_frozen_alphas:
        raise UserError(
            "The model's skip alphas are buffers (`skip_alpha_trainable` is false), and with "
            "`cpu_ram_efficient_loading` Accelerate hands parameters alone to the other processes. Set it to false, or "
            "`skip_alpha_trainable` to true in the model's config.json and leave `alphas` out of `trainable`."
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _fsdp_option(training: TrainingArguments, name: str) -> Any:
    options = training.fsdp_config if isinstance(training.fsdp_config, dict) else {}
    return options.get(name, options.get(f"fsdp_{name}"))


def _check_fsdp(training: TrainingArguments) -> None:
    by_launcher = os.environ.get("FSDP_VERSION", "1") if _is_on("ACCELERATE_USE_FSDP") else "2"
    version = str(_fsdp_option(training, "version") or by_launcher) if training.fsdp else by_launcher
    if version != "2":
        raise UserError(
            "FSDP is on in its first version, in whose flat tensors parts of a matrix cannot be told apart. Set "
            "`fsdp_version: 2` in Accelerate's configuration (recipes/accelerate/fsdp2.yaml)."
        )
    if PartialState().distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
        raise UserError(
            "FSDP is on, and Accelerate shards nothing here: on processors, and in one process, it trains whole copies "
            "of the model and says nothing of it. Leave FSDP out, or launch two processes or more on GPUs."
        )


def _check_sharded_at_load(training: TrainingArguments, config: DistributedConfig, use_peft: bool) -> None:
    what = "`distributed_config` in `model_init_kwargs` shards the model while it is loaded"
    for engine, is_on in (("FSDP", uses_fsdp(training)), ("DeepSpeed", uses_deepspeed(training))):
        if is_on:
            raise UserError(
                f"{what}, and Accelerate's {engine} is on, which would shard it again: experts that are spread over "
                "processes would be overwritten by those of the first one. Leave one of them out; `fsdp_size` in "
                "`distributed_config` goes together with `ep_size` and `tp_size`."
            )
    strategy = getattr(training.save_strategy, "value", training.save_strategy)
    if str(training.resume_from_checkpoint or "false").lower() != "false" or (
        strategy != "no" and not training.save_only_model
    ):
        raise UserError(
            f"{what}, and transformers cannot resume such a run: it does not save the optimiser's state. Set "
            "`save_strategy: no`, or `save_only_model: true` for weights alone; a run that must resume takes "
            "Accelerate's FSDP2 (recipes/accelerate)."
        )
    sizes = {name: getattr(config, name) or 1 for name in ("tp_size", "fsdp_size", "dp_replicate_size")}
    if (config.pp_size or 1) > 1:
        raise UserError("`pp_size` is for inference: transformers' Trainer runs no pipeline. Leave it out.")
    processes = 1
    for size in sizes.values():
        processes *= size
    if processes != training.world_size:
        shown = " x ".join(f"`{name}` {size}" for name, size in sizes.items())
        raise UserError(
            f"`distributed_config` spreads the model over {processes} processes ({shown}), and the run has "
            f"{training.world_size}. Launch as many as it says."
        )
    if use_peft:
        raise UserError(f"{what}, and `use_peft` is on, which does not go together. Leave one of them out.")
