# SPDX-License-Identifier: Apache-2.0
"""What decides a run, written into its checkpoints: a run goes on from one with the same data and options alone.

transformers goes on with whatever it is given, and what comes out is neither run's.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from jai.errors import UserError
from jai.provenance import checkpoint_revision
from jai.trainers.arguments import StageArguments, StageConfig
from jai.trainers.base_model import BaseModel
from jai.trainers.data import TrainingData
from jai.trainers.engine import batches_at_once
from jai.trainers.whole_checkpoints import KeptWithCheckpoints, kept_with, read_state

# Options of training that may change while a run rests. All others decide it, those too that a later TRL adds.
_PLACES = {
    "output_dir", "run_name", "project", "resume_from_checkpoint", "restore_callback_states_from_checkpoint",
    "ignore_data_skip", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo",
    "hub_always_push", "hub_revision", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "trust_remote_code",
}  # fmt: skip
_SAID_AND_SAVED = {
    "report_to", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_strategy",
    "logging_first_step", "logging_steps", "logging_nan_inf_filter", "include_for_metrics",
    "include_num_input_tokens_seen", "log_completions", "log_completions_hub_repo", "log_multimodal",
    "log_unique_prompts", "num_completions_to_print", "debug", "skip_memory_metrics", "save_strategy", "save_steps",
    "save_total_limit", "save_on_each_node", "save_only_model", "enable_jit_checkpoint", "keep_mtp",
}  # fmt: skip
_EVALUATION = {
    "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "eval_packing",
    "per_device_eval_batch_size", "batch_eval_metrics", "prediction_loss_only", "bf16_full_eval", "fp16_full_eval",
    "num_generations_eval", "generate_during_eval", "label_names", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better",
}  # fmt: skip
_ROUNDED_OTHERWISE = {
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "activation_offloading", "use_liger_kernel", "liger_kernel_config", "use_cpu",
    "tf32", "full_determinism", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "auto_find_batch_size", "accelerator_config", "parallelism_config", "deepspeed", "fsdp",
    "fsdp_config", "local_rank", "ddp_backend", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_timeout", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order",
    "dataloader_multiprocessing_context", "dataset_num_proc", "length_column_name", "remove_unused_columns",
    "use_cache", "padding_free", "pad_to_multiple_of", "precompute_ref_log_probs", "precompute_ref_batch_size",
    "cache_implementation", "ds3_gather_for_generation", "use_transformers_paged",
    "use_transformers_continuous_batching", "transformers_continuous_batching_config", "vllm_mode", "vllm_model_impl",
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
    "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_enable_sleep_mode",
}  # fmt: skip
# What the rest of the identity knows: the batch of a step, the text of pre-training, the files of the reference.
_KNOWN_OTHERWISE = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "first_accumulation_steps",
    "batch_ramp", "packed", "verify_packed", "mixture", "annealing_mixture", "ref_model_name_or_path",
}  # fmt: skip
NOT_DECIDING = _PLACES | _SAID_AND_SAVED | _EVALUATION | _ROUNDED_OTHERWISE | _KNOWN_OTHERWISE

_LENGTH = ("max_steps", "num_train_epochs")
# Of these, a step's learning rate does not depend on how many steps there are: such a run may go on for longer.
_ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")

_DECIDING_JAI = ("new_row_ids", "max_position_embeddings", "rope_theta")
_DECIDING_MODEL = ("dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "use_peft")
_DECIDING_LORA = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)


class RunIdentity(KeptWithCheckpoints):
    """Keeps what decides a run in its checkpoints: stage, data, layout of the steps, options."""

    def __init__(self, identity: dict[str, Any] | None = None):
        self.identity = identity or {}

    def state(self) -> dict[str, Any]:
        """What transformers saves of it."""
        return {"args": {}, "attributes": {"identity": self.identity}}


def stage_identity(
    verb: str, arguments: StageArguments, base: BaseModel, data: TrainingData, parts: Sequence[str]
) -> dict[str, Any]:
    """What decides a run of TRL's trainers, for `RunIdentity`.

    Args:
        verb: of the stage.
        arguments: the run's.
        base: the model that it begins with.
        data: the rows that are trained on.
        parts: of the model, those that learn.
    """
    training = arguments.training
    batch = training.per_device_train_batch_size * batches_at_once(training) * training.gradient_accumulation_steps
    return {
        "stage": verb,
        "data": {"rows": data.rows, "content": data.content},
        "files": deciding_files(arguments, base),
        "layout": {"completions_a_step" if isinstance(training, GRPOConfig) else "examples_a_step": batch},
        "options": deciding_options(arguments, parts),
    }


def deciding_files(arguments: StageArguments, base: BaseModel) -> dict[str, str | None]:
    """What tells the checkpoints that a run begins with from others, by role."""
    reference = getattr(arguments.training, "ref_model_name_or_path", None)
    return {
        "model": checkpoint_revision(base.name, arguments.model.model_revision, reads_weights=False),
        "reference": None if reference is None else checkpoint_revision(reference, reads_weights=False),
    }


def deciding_options(arguments: StageArguments, parts: Sequence[str]) -> dict[str, Any]:
    """The options that decide what a step does, as JSON gives them back.

    Args:
        arguments: the run's.
        parts: of the model, those that learn: by default, they depend on the model.
    """
    training = arguments.training
    names = {each.name for each in fields(training)} - NOT_DECIDING
    if _schedule_is_endless(arguments):
        names -= set(_LENGTH)
    of_model = (*_DECIDING_MODEL, *(_DECIDING_LORA if arguments.model.use_peft else ()))
    groups = ((training, sorted(names)), (arguments.jai, _DECIDING_JAI), (arguments.model, of_model))
    values = {name: getattr(options, name) for options, names in groups for name in names}
    plain = {name: getattr(value, "value", value) for name, value in values.items()} | {"trainable": list(parts)}
    return json.loads(json.dumps(plain, default=str))


def _schedule_is_endless(arguments: StageArguments) -> bool:
    training = arguments.training
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    warmup_is_share = 0 < (training.warmup_steps or 0) < 1
    return name in _ENDLESS_SCHEDULES and not warmup_is_share


def saved_identity(checkpoint: Path, verb: str) -> dict[str, Any] | None:
    """What decided the run that wrote a checkpoint; None where it does not say, as TRL's own.

    Raises:
        UserError: if it is of a run of another verb.
    """
    saved = kept_with(read_state(checkpoint) or {}, RunIdentity).get("identity")
    if not isinstance(saved, dict):
        return None
    stage = saved.get("stage", "pretrain")  # which was the first to write what decides a run, without its name
    if stage != verb:
        raise UserError(
            f"{checkpoint} was written by `jai {stage}`, and not by `jai {verb}`. Give a checkpoint of such a run."
        )
    return saved


def check_same_stage(
    checkpoint: Path, saved: dict[str, Any], identity: dict[str, Any], data_name: str, training: StageConfig
) -> None:
    """Refuse to go on from a checkpoint with other rows, another model's files, other batches or other options.

    Args:
        checkpoint: of the run.
        saved: what decided that run.
        identity: of the run as it would go on, as `stage_identity` has it.
        data_name: of the data that it would go on with.
        training: its options of training.

    Raises:
        UserError: naming what has changed.
    """
    before, now = saved["data"], identity["data"]
    if before != now:
        rows = [f"{of['rows']:,}" if of["rows"] is not None else "streamed" for of in (before, now)]
        what = (
            f"{rows[0]} rows, and are {rows[1]}" if rows[0] != rows[1] else "other rows, or the same in another order"
        )
        raise UserError(
            f"The run in {checkpoint} was begun with other data than {data_name} gives now: they were {what}. Its "
            "steps would see other rows. Give the same data, mixture and `seed`, or begin a new run."
        )
    check_same_files(checkpoint, saved["files"], identity["files"])
    check_same_options(checkpoint, saved, identity, training)


def check_same_files(checkpoint: Path, saved: dict[str, Any], now: dict[str, str | None]) -> None:
    """Refuse to go on from a checkpoint with another model or reference than the run began with.

    Args:
        checkpoint: of the run.
        saved: the `deciding_files` of that run.
        now: those of the run as it would go on.

    Raises:
        UserError: naming which is another.
    """
    for role, revision in now.items():
        if revision != saved.get(role):
            option = "model_name_or_path" if role == "model" else "ref_model_name_or_path"
            raise UserError(
                f"The run in {checkpoint} was begun with another {role}: the files of `{option}` are others. Give the "
                f"{role} that it began with, or begin a new run."
            )


def check_same_options(
    checkpoint: Path, saved: dict[str, Any], identity: dict[str, Any], training: StageConfig
) -> None:
    """Refuse to go on from a checkpoint with other batches or other options.

    Options that only one of two versions of TRL or transformers has are none that have changed, unless they are given.

    Args:
        checkpoint: of the run.
        saved: what decided that run.
        identity: of the run as it would go on.
        training: its options of training.

    Raises:
        UserError: naming what has changed.
    """
    defaults = {each.name: each.default for each in fields(training)}
    for part in ("layout", "options"):
        old, new = saved[part], json.loads(json.dumps(identity[part]))
        changed = [
            f"{name} was {old.get(name)} and is {new.get(name)}"
            for name in new
            if (old[name] != new[name] if name in old else new[name] not in (None, defaults.get(name)))
        ]
        if changed:
            raise UserError(
                f"The run in {checkpoint} was begun with other options: {'; '.join(changed)}. It can be resumed "
                "only with the same ones. Give them as they were, or begin a new run."
            )
