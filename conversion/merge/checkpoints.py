# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a merge: opened, and refused where they are not states of one model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from jai.conversion.inputs.checkpoint import Checkpoint
from jai.conversion.inputs.config import make_config
from jai.conversion.inputs.first_look import read_any_config
from jai.conversion.inputs.hub import HubFiles, resolve_checkpoint
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.inputs.tokenizer import TokenizerContent, read_tokenizer_content
from jai.conversion.inputs.weight_files import has_all_weights, refuse_adapter
from jai.errors import UserError

# What two states of one model may have of their own: where they lie, how they are stored, how they were trained, how
# they generate. None of it decides what a weight means.
_HARMLESS = {
    "_name_or_path",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "initializer_range",
    "output_router_logits",
    "pad_token_id",
    "resid_pdrop",
    "router_aux_loss_coef",
    "skip_alpha",
    "skip_alpha_trainable",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_LISTED_DIFFERENCES = 3


@dataclass(frozen=True)
class MergeInput(Checkpoint):
    """A checkpoint that is merged.

    Attributes:
        config: its configuration as transformers reads it, defaults filled in.
        tokenizer: what its `tokenizer.json` holds, None where it has none.
        notes: what is unusual about its weights, for people.
    """

    config: dict[str, Any]
    tokenizer: TokenizerContent | None
    notes: list[str]

    @property
    def model_type(self) -> str:
        return self.config["model_type"]


def open_input(name: str, downloads: Path, *, planned_only: bool) -> MergeInput:
    """Open a checkpoint.

    Args:
        name: folder or Hub id.
        downloads: folder that is only named, for a dry run of a Hub id.
        planned_only: for a dry run: of weights on the Hub only the headers are read.

    Raises:
        UserError: if it is no checkpoint that can be merged.
    """
    folder = resolve_checkpoint(name, weights=not planned_only)
    refuse_adapter(name, folder)
    config = _load_config(folder)
    if planned_only and not Path(name).is_dir() and not has_all_weights(folder):
        reader = CheckpointReader(HubFiles(name, folder, downloads))
    else:
        reader = CheckpointReader(folder)
    # No model that transformers knows has such names; one that it does not know may.
    notes = reader.leave_out_leftovers() if config["model_type"] in CONFIG_MAPPING else []
    tokenizer = read_tokenizer_content(folder)
    return MergeInput(name, folder, reader, config, tokenizer, [f"{name}: {note}" for note in notes])


def check_alike(first: MergeInput, other: MergeInput) -> None:
    """Refuse two checkpoints that are not states of one model.

    Raises:
        UserError: naming what differs: configuration, tensors or tokenizer.
    """
    differing = [
        f"{key} is {first.config.get(key, 'not there')!r} and {other.config.get(key, 'not there')!r}"
        for key in sorted((first.config.keys() | other.config.keys()) - _HARMLESS)
        if first.config.get(key) != other.config.get(key)
    ]
    if first.model_type != other.model_type:
        differing = [f"model_type is {first.model_type!r} and {other.model_type!r}"]
    _refuse(first, other, "configuration", differing)
    _refuse(first, other, "weights", _tensor_differences(first.reader, other.reader))
    if first.tokenizer and other.tokenizer:
        _refuse(first, other, "tokenizer", _tokenizer_differences(first.tokenizer, other.tokenizer))


def _refuse(first: MergeInput, other: MergeInput, what: str, differing: list[str]) -> None:
    if differing:
        listed = "; ".join(differing[:_LISTED_DIFFERENCES])
        more = f"; and {len(differing) - _LISTED_DIFFERENCES} more" if len(differing) > _LISTED_DIFFERENCES else ""
        raise UserError(
            f"{first.name} and {other.name} differ in their {what}: {listed}{more}. Only models of one architecture, "
            "plan and tokenizer can be merged, such as two trained from the same checkpoint."
        )


def _tensor_differences(first: CheckpointReader, other: CheckpointReader) -> list[str]:
    missing = [
        *(f"{name} is only in the first" for name in sorted(first.shapes.keys() - other.shapes.keys())),
        *(f"{name} is only in the second" for name in sorted(other.shapes.keys() - first.shapes.keys())),
    ]
    shared = sorted(first.shapes.keys() & other.shapes.keys())
    return missing + [
        f"{name} is {first.shapes[name]} and {other.shapes[name]}"
        for name in shared
        if first.shapes[name] != other.shapes[name]
    ]


def _tokenizer_differences(first: TokenizerContent, other: TokenizerContent) -> list[str]:
    return [
        _model_difference(first, other) if part == "model" else f"its part {part!r}"
        for part in sorted(first.parts.keys() | other.parts.keys())
        if first.parts.get(part) != other.parts.get(part)
    ]


def _model_difference(first: TokenizerContent, other: TokenizerContent) -> str:
    if first.entries != other.entries:
        return f"vocabularies of {first.entries:,} and {other.entries:,} entries"
    same = first.vocabulary == other.vocabulary
    return "other merges" if same else "vocabularies of one size with other entries"


def _load_config(folder: Path) -> dict[str, Any]:
    content = read_any_config(folder)
    model_type = content["model_type"]
    if model_type not in CONFIG_MAPPING:
        return content
    # Files of several years leave out what was a default then: transformers fills it in, where it knows the type.
    return make_config(CONFIG_MAPPING[model_type], content, folder).to_dict()
