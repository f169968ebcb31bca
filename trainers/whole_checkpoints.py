# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run that can be killed at any time: which are whole, and which one a run goes on from."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from jai.errors import UserError
from jai.trainers.first_look import refuse_used_output

_STATE = "trainer_state.json"


class KeptWithCheckpoints(TrainerCallback, ExportableState):
    """What a run keeps in its checkpoints' trainer_state.json, which the Trainer writes last of all.

    So where it is whole, the checkpoint is, too. `state` gives it, and `kept_with` reads it.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """After a checkpoint that has it not, such as one of TRL's, transformers could save no next one (KeyError)."""
        cast(dict[str, Any], state.stateful_callbacks).setdefault(type(self).__name__, self.state())


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
            f"`resume_from_checkpoint` names {wanted}, which is not a complete checkpoint: it has no readable "
            f"{_STATE}. Give a checkpoint-N folder of an earlier run, or `true` for the last one in `output_dir`."
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


def kept_with(state: dict[str, Any], kind: type[KeptWithCheckpoints]) -> dict[str, Any]:
    """What a run kept in a checkpoint's trainer_state.json, given as `read_state` has it; {} where it kept nothing."""
    kept = state.get("stateful_callbacks", {}).get(kind.__name__, {})
    return kept.get("attributes", {}) if isinstance(kept, dict) else {}


def _checkpoints(out: Path) -> list[Path]:
    if not out.is_dir():
        return []
    return [path for path in out.iterdir() if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
