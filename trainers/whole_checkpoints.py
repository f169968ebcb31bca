# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run that can be killed at any time: which are whole, and whether a run may go on from one."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from jai.errors import UserError
from jai.pretraining.plan import AnyPlan, check_same_plan
from jai.trainers.arguments import StageArguments
from jai.trainers.first_look import refuse_used_output

_STATE = "trainer_state.json"

# What a resumed run must have the same: all that decides a step, but for the text, which the plan knows, and for what
# only rounds otherwise (kernels, attention, checkpointing).
_DECIDING_TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "annealing",
    "annealing_learning_rate",
    "annealing_weight_decay",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "neftune_noise_alpha",
    "average_tokens_across_devices",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "mtp_weight",
    "annealing_mtp_weight",
    "model_init_kwargs",
    "seed",
    "bf16",
    "fp16",
)
_DECIDING_JAI = ("new_row_ids", "max_position_embeddings", "rope_theta")
_DECIDING_MODEL = ("dtype", "use_peft")
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


class RunIdentity(TrainerCallback, ExportableState):
    """Writes what decides a run into its checkpoints: text, layout of the steps, options.

    It goes into trainer_state.json, which the Trainer writes last of all: where it is whole, so is the checkpoint.
    """

    def __init__(self, identity: dict[str, Any] | None = None):
        self.identity = identity or {}

    def state(self) -> dict[str, Any]:
        """What transformers saves of it."""
        return {"args": {}, "attributes": {"identity": self.identity}}


class LogWithCheckpoints(TrainerCallback):
    """Logs whenever a checkpoint is saved, so that means in the logs begin anew where a resumed run's do."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Of `save_strategy` steps."""
        if control.should_save:
            control.should_log = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Of `save_strategy` epoch."""
        self.on_step_end(args, state, control)


def last_whole_checkpoint(out: Path) -> tuple[Path | None, list[Path]]:
    """The last checkpoint in a folder that was written to its end, and the later ones that were not."""
    unfinished: list[Path] = []
    for checkpoint in sorted(_checkpoints(out), key=_step, reverse=True):
        if read_state(checkpoint) is not None:
            return checkpoint, unfinished
        unfinished.append(checkpoint)
    return None, unfinished


def resume_checkpoint(config: TrainingArguments) -> tuple[Path | None, list[Path]]:
    """The checkpoint to go on from, None for a fresh start; and those that are passed over.

    `resume_from_checkpoint` is a folder, or "true" for the last whole checkpoint in the output folder.

    Raises:
        UserError: if there is none, it is not whole, or a fresh start would write into a folder that is not empty.
    """
    out, wanted = Path(str(config.output_dir)), str(config.resume_from_checkpoint or "false")
    if wanted.lower() == "false":
        refuse_used_output(out)
        return None, []
    if wanted.lower() == "true":
        checkpoint, unfinished = last_whole_checkpoint(out)
        if checkpoint is None:
            raise UserError(
                f"`resume_from_checkpoint` is on, but {out} has no checkpoint that is whole. Remove the folder and "
                "start afresh; `save_steps` says how often checkpoints are written."
            )
        return checkpoint, unfinished
    if read_state(Path(wanted)) is None:
        raise UserError(
            f"`resume_from_checkpoint` names {wanted}, which is no whole checkpoint: it has no readable {_STATE}. Give "
            "a checkpoint-N folder of an earlier run, or `true` for the last one in `output_dir`."
        )
    return Path(wanted), []


def remove_unfinished(checkpoints: Sequence[Path], console: Console) -> None:
    """Or the Trainer, which counts folders to keep to `save_total_limit`, would remove whole ones for them."""
    for folder in checkpoints:
        console.print(f"[yellow]{escape(str(folder))} is removed:[/] it was not written to its end")
        if PartialState().is_main_process:
            shutil.rmtree(folder)


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """What the Trainer wrote of a checkpoint's run, the last of its files; None if it is not whole."""
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def deciding_options(arguments: StageArguments, parts: Sequence[str]) -> dict[str, Any]:
    """The options that decide what a step does, as JSON.

    Args:
        arguments: the run's.
        parts: of the model, those that learn: by default, they depend on the model.
    """
    of_model = (*_DECIDING_MODEL, *(_DECIDING_LORA if arguments.model.use_peft else ()))
    groups = (
        (arguments.training, _DECIDING_TRAINING),
        (arguments.jai, _DECIDING_JAI),
        (arguments.model, of_model),
    )
    values = {name: getattr(options, name) for options, names in groups for name in names}
    return {name: getattr(value, "value", value) for name, value in values.items()} | {"trainable": list(parts)}


def check_same_run(checkpoint: Path, plan: AnyPlan, identity: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint with other text, other batches or other options.

    Args:
        checkpoint: of the run.
        plan: what the run would go on with.
        identity: of the run as it would go on, as `RunIdentity` has it.

    Raises:
        UserError: naming what has changed.
    """
    state = read_state(checkpoint) or {}
    saved = state.get("stateful_callbacks", {}).get(RunIdentity.__name__, {}).get("attributes", {}).get("identity")
    if not isinstance(saved, dict):
        raise UserError(f"{checkpoint} was not written by `jai pretrain`. Give a checkpoint of such a run.")
    check_same_plan(saved["plan"], plan)
    for part in ("layout", "options"):
        old, new = saved[part], json.loads(json.dumps(identity[part]))
        changed = [
            f"{name} was {old.get(name)} and is {new.get(name)}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise UserError(
                f"The run in {checkpoint} was begun with other options: {'; '.join(changed)}. It goes on with the same "
                "ones only, or what comes out would be neither run's. Give them as they were, or begin a new run."
            )


def _checkpoints(out: Path) -> list[Path]:
    if not out.is_dir():
        return []
    return [path for path in out.iterdir() if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
