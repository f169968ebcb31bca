# SPDX-License-Identifier: Apache-2.0
"""Snapshots of the FFN weights during training, which become experts (paper, section 3.1.3)."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from accelerate.state import AcceleratorState
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from jai.conversion.upcycle.options import SnapshotOptions
from jai.conversion.upcycle.snapshot import snapshot
from jai.errors import UserError

SNAPSHOTS_FOLDER = "snapshots"


class SnapshotCallback(TrainerCallback):
    """For any of transformers' trainers on a dense JAI: at `steps`, save a checkpoint and keep its FFN weights.

    The Trainer itself saves the checkpoint, so this works wherever its checkpoints are whole. The snapshot is a copy in
    `snapshots/step-N` of the output folder, which `save_total_limit` does not remove.

    Raises:
        UserError: when training begins, if the model is no dense JAI or its checkpoints would be in pieces.
    """

    def __init__(self, steps: Sequence[int]):
        wrong = [step for step in steps if type(step) is not int or step < 1]
        if wrong:
            raise UserError(f"A snapshot is asked for at step {wrong[0]!r}. Give numbers of steps from 1.")
        self.steps = frozenset(steps)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        config = model.config
        if config.model_type != "jai" or config.num_local_experts > 1:
            raise UserError(
                "Snapshots are of a dense JAI's FFN, and this model is none. Convert with --experts 1, or leave "
                "`snapshot_steps` out."
            )
        if (last := max(self.steps)) > state.max_steps:
            raise UserError(
                f"A snapshot is asked for at step {last:,}, but training ends at step {state.max_steps:,}. Train "
                "longer, or give earlier steps."
            )
        if getattr(model, "peft_config", None):
            raise UserError("Snapshots are of trained FFN weights, and LoRA trains none. Set `use_peft: false`.")
        if not any(weight.requires_grad for name, weight in model.named_parameters() if ".mlp." in name):
            raise UserError(
                "Snapshots are of trained FFN weights, and `trainable` leaves them as they are. Name experts (the MLP "
                "of a dense model), or leave `snapshot_steps` out."
            )
        plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
        if plugin is not None and "FULL" not in str(plugin.state_dict_type):
            raise UserError(
                "Snapshots are taken from whole checkpoints, and FSDP saves them in pieces. Set "
                "`fsdp_state_dict_type: FULL_STATE_DICT` in accelerate's configuration."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step in self.steps:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step not in self.steps or not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not checkpoint.exists():
            raise UserError(
                f"{checkpoint} is gone: to keep to `save_total_limit`, the Trainer removed it for checkpoints of later "
                f"steps, which another run left in {folder}. Remove those, or leave `save_total_limit` out."
            )
        out = folder / SNAPSHOTS_FOLDER / f"step-{state.global_step}"
        if out.exists():  # of a run that was resumed from before it
            shutil.rmtree(out)
        snapshot(SnapshotOptions(checkpoint=str(checkpoint), out=out), console=Console(quiet=True))
