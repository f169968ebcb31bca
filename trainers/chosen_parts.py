# SPDX-License-Identifier: Apache-2.0
"""Which parts of the model a stage trains: those that the options name, or its defaults."""

from transformers import PreTrainedModel
from trl import ModelConfig

from jai.errors import UserError
from jai.provenance import Step, chain
from jai.trainers.arguments import JaiTrainingArguments
from jai.trainers.base_model import BaseModel
from jai.trainers.parameters import KindCount
from jai.trainers.parts import (
    ADAPTER_PARTS,
    ALL,
    NEW_PARTS,
    Entries,
    TrainableParts,
    read_entries,
    select_parts,
)

TRAINED_PARTS = "trained_parts"  # in the record of a stage: the kinds of parameters that learnt
NEW_ROW_IDS = "new_row_ids"  # in the record of a conversion


def choose_parts(
    jai: JaiTrainingArguments, model_args: ModelConfig, base: BaseModel, model: PreTrainedModel
) -> TrainableParts:
    """The parts that learn.

    Raises:
        UserError: for a part that the model does not have, and for `new_row_ids` without the part.
    """
    if jai.new_row_ids is None:
        new_rows = recorded_new_rows(base.made_by)
    else:
        new_rows = read_entries(jai.new_row_ids, "new_row_ids")
    if jai.trainable is not None:
        parts = select_parts(jai.trainable, model, new_rows)
    elif not model_args.use_peft:
        parts = select_parts((ALL,), model, new_rows)
    elif model_args.lora_target_modules is None and model_args.lora_target_parameters is None:
        parts = select_parts(ADAPTER_PARTS, model, new_rows, required=False)
    else:  # who names targets for LoRA gets those
        parts = select_parts((), model, new_rows)
    if jai.new_row_ids is not None and not {"new_rows", ALL} & set(parts.names):
        raise UserError(
            "`new_row_ids` is given, but new_rows does not learn. Name it in `trainable`, or leave `new_row_ids` out."
        )
    return parts


def recorded_new_rows(made_by: Step | None) -> Entries | None:
    """The rows that the conversion of a checkpoint made, None where no record says so."""
    for step in reversed(chain(made_by)):
        text = step.get("result", {}).get(NEW_ROW_IDS) if step["step"] == "convert" else None
        if isinstance(text, str):
            return read_entries(text, NEW_ROW_IDS) if text else ()
    return None


def untaught(kinds: tuple[KindCount, ...], made_by: Step | None) -> list[str]:
    """What conversion made to be taught, and neither this stage nor one before it teaches."""
    taught: set[str] = set()
    for step in chain(made_by):
        recorded = step.get("result", {}).get(TRAINED_PARTS)
        taught.update(map(str, recorded if isinstance(recorded, list) else ()))
    return [
        each.kind
        for each in kinds
        if each.kind in NEW_PARTS and each.total and not each.trained and each.kind not in taught
    ]
