# SPDX-License-Identifier: Apache-2.0
"""A JAI checkpoint as an input: its configuration and the headers of its weights, checked against each other."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jai.configuration_jai import JaiConfig
from jai.conversion import names
from jai.conversion.inputs.checkpoint import Checkpoint
from jai.conversion.inputs.config import make_config
from jai.conversion.inputs.first_look import SNAPSHOT_TYPE, read_jai_config, read_jai_or_snapshot_config
from jai.conversion.inputs.hub import resolve_checkpoint
from jai.conversion.inputs.reader import UNTIED_NOTE, CheckpointReader
from jai.conversion.inputs.values import common_dtype
from jai.conversion.inputs.weight_files import has_all_weights, has_weights, refuse_adapter
from jai.conversion.inputs.weight_sources import PlannedFiles
from jai.errors import UserError
from jai.files import read_json

_TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class JaiCheckpoint(Checkpoint):
    """A JAI checkpoint, or a snapshot that has only its FFN weights, as `jai snapshot` writes it.

    Attributes:
        config: its configuration; of a snapshot, that of the model it was taken from.
        is_snapshot: whether it has only the FFN weights.
        notes: what is unusual about its weights, for people.
        global_step: the training step that it was saved at, None where it does not say.
    """

    config: JaiConfig
    is_snapshot: bool
    notes: list[str]
    global_step: int | None

    @property
    def title(self) -> str:
        """For people: the last part of its name, and its step."""
        step = "" if self.global_step is None else f" (step {self.global_step:,})"
        return f"{self.folder.name if Path(self.name).exists() else self.name}{step}"

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds all of its values: a checkpoint has one, but for what others wrote."""
        return common_dtype(self.reader.dtypes.values())


def open_jai(name: str, *, planned_only: bool = False) -> JaiCheckpoint:
    """Open a folder or a Hub id.

    Args:
        name: folder or Hub id of a whole checkpoint or of a snapshot.
        planned_only: for a dry run: weights that are not here are not fetched, but taken to be as the configuration
            says.

    Raises:
        UserError: if it holds no JAI, or weights that are damaged or not those of its configuration.
    """
    folder = resolve_checkpoint(name, weights=not planned_only)
    refuse_adapter(name, folder)
    content = read_jai_or_snapshot_config(folder)
    is_snapshot = content.get("model_type") == SNAPSHOT_TYPE
    if is_snapshot:
        step = content.pop("global_step", None)
        if step is not None and type(step) is not int:
            raise UserError(f"{folder} is not a snapshot: its global_step is {step!r}, not a number. Save it again.")
        config = make_config(JaiConfig, content | {"model_type": JaiConfig.model_type}, folder)
    else:
        config, step = load_jai_config(folder), _trainer_step(folder)
    is_here = has_weights(folder) if Path(name).is_dir() else has_all_weights(folder)
    if planned_only and not is_here:
        config.num_mtp_layers = None  # left out, as `open_jai_weights` does it
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
        reader = CheckpointReader(PlannedFiles(_shapes(config, is_snapshot=is_snapshot), dtype))
        return JaiCheckpoint(name, folder, reader, config, is_snapshot, [], step)
    reader, notes = open_jai_weights(name, folder, config, is_snapshot=is_snapshot)
    return JaiCheckpoint(name, folder, reader, config, is_snapshot, notes, step)


def open_whole_jai(name: str, *, planned_only: bool = False) -> JaiCheckpoint:
    """`open_jai` for what takes no snapshot.

    Raises:
        UserError: as `open_jai`, and for a snapshot.
    """
    source = open_jai(name, planned_only=planned_only)
    if source.is_snapshot:
        raise UserError(f"{source.name} has only FFN weights. Give the whole checkpoint.")
    return source


def open_jai_weights(
    name: str, folder: Path, config: JaiConfig, *, is_snapshot: bool = False
) -> tuple[CheckpointReader, list[str]]:
    """The weights of a JAI, and what is unusual about them, for people.

    Args:
        name: of the checkpoint, for the notes.
        folder: where its files lie.
        config: its configuration. Where it ties the head to the embeddings, and the weights have a head of its own,
            it is changed to say so. Of layers for multi-token prediction, which are left out, it loses the count.
        is_snapshot: whether it has only FFN weights.

    Raises:
        UserError: for weights that are damaged, or not those of the configuration.
    """
    reader = CheckpointReader(folder)
    notes = [*reader.leave_out_leftovers(), *reader.leave_out_mtp()]
    config.num_mtp_layers = None
    if config.tie_word_embeddings:
        notes += reader.take_head_for_embeddings()
    if config.tie_word_embeddings and reader.has_untied_head:
        config.tie_word_embeddings = False
        notes.append(UNTIED_NOTE)
    # Tied models are saved without the head, or with a copy of the embeddings.
    reader.check(_shapes(config, is_snapshot=is_snapshot), spare=frozenset({names.LM_HEAD}))
    return reader, [f"{name}: {note}" for note in notes]


def _shapes(config: JaiConfig, *, is_snapshot: bool) -> dict[str, tuple[int, ...]]:
    return feed_forward_shapes(config) if is_snapshot else jai_shapes(config)


def load_jai_config(folder: Path) -> JaiConfig:
    """Read the configuration of a JAI checkpoint.

    Raises:
        UserError: if the folder holds no JAI.
    """
    return make_config(JaiConfig, read_jai_config(folder), folder)


def jai_shapes(config: JaiConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a JAI, in the order in which checkpoints are written."""
    embeddings, *rest = ((name, rows.shape) for name, rows in names.outer_sources(config, config.vocab_size).items())
    return dict([embeddings, *_layer_shapes(config), *rest])


def feed_forward_shapes(config: JaiConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the FFN weights of a dense JAI."""
    return {name: shape for name, shape in _layer_shapes(config) if ".mlp." in name}


def _layer_shapes(config: JaiConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    experts = config.num_local_experts
    for planned in config.running_plan:
        for name, rows in names.layer_sources(config, planned.layer, planned.layer).items():
            yield name, (experts, *rows.shape) if names.is_expert_stack(name) else rows.shape
        if experts > 1:
            yield names.router_name(planned.layer), (experts, config.hidden_size)
        if planned.adds_anchor:
            yield names.skip_alpha_name(planned.layer), (1,)


def slice_names(stack: str) -> tuple[str, ...]:
    """The FFN weights of a dense JAI whose rows, one after the other, are a slice of an expert stack.

    >>> slice_names("model.layers.0.mlp.experts.gate_up_proj")
    ('model.layers.0.mlp.gate_proj.weight', 'model.layers.0.mlp.up_proj.weight')
    """
    layer, matrix = stack.split("experts.")
    kinds = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else (matrix,)
    return tuple(f"{layer}{kind}.weight" for kind in kinds)


def snapshot_config(config: JaiConfig, global_step: int | None) -> dict[str, Any]:
    """What is in the config.json of a snapshot."""
    values = config.to_dict() | {"model_type": SNAPSHOT_TYPE, "global_step": global_step}
    del values["auto_map"], values["architectures"]
    return values


def _trainer_step(folder: Path) -> int | None:
    path = folder / _TRAINER_STATE
    if not os.path.lexists(path):
        return None
    remedy = "Fetch the checkpoint again, or remove this file."
    step = read_json(path, remedy).get("global_step")
    if type(step) is not int:
        raise UserError(f"{path} is not a state of a Trainer. {remedy}")
    return step
