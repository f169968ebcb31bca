# SPDX-License-Identifier: Apache-2.0
"""Which sequences each step of pre-training takes, while the batch grows, on however many processes.

A Trainer accumulates the same number of batches in every step. So a step of a batch that is still growing has absent
batches, which are no sequences and cost nothing; they come first, because processes share their gradients after the
last. Then the loop, its resumption and its counting are transformers' own, and the order is a sequential sampler's.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from jai.pretraining.dataset import PackedSequences
from jai.pretraining.plan import AnyPlan

SEQUENCE = "sequence"  # number of each sequence of a batch, beside its tokens


@dataclass(frozen=True)
class StepLayout:
    """How many sequences each step takes.

    Attributes:
        steps: of the run.
        batch_sequences: of one batch on all processes together.
        accumulation: batches of a step, when the batch has grown.
        first_accumulation: batches of the first step.
        ramp_steps: steps after which the batch has grown.
    """

    steps: int
    batch_sequences: int
    accumulation: int
    first_accumulation: int
    ramp_steps: int

    def batches(self, step: int) -> int:
        """Batches that a step accumulates; steps count from 0."""
        if step >= self.ramp_steps:
            return self.accumulation
        # Every number of batches holds for as many steps, so that the mean is half-way between first and last.
        stages = self.accumulation - self.first_accumulation + 1
        return self.first_accumulation + stages * step // self.ramp_steps

    @cached_property
    def _begins(self) -> list[int]:
        grown = min(self.ramp_steps, self.steps)
        return list(itertools.accumulate((self.batches(step) for step in range(grown)), initial=0))

    def first_sequence(self, step: int) -> int:
        """The number of the sequence that a step begins with; also how many there are in the steps before it."""
        grown = len(self._begins) - 1
        batches = self._begins[step] if step <= grown else self._begins[grown] + (step - grown) * self.accumulation
        return batches * self.batch_sequences

    def sequence(self, slot: int) -> int | None:
        """The sequence in a slot of the sequential order, None in an absent batch.

        A step has a slot for each sequence of a batch that has grown.
        """
        step, place = divmod(slot, self.accumulation * self.batch_sequences)
        place -= (self.accumulation - self.batches(step)) * self.batch_sequences
        return None if place < 0 else self.first_sequence(step) + place

    @property
    def slots(self) -> int:
        """Of the whole run."""
        return self.steps * self.accumulation * self.batch_sequences

    def identity(self) -> dict[str, Any]:
        """What decides which sequences a step takes, as JSON.

        Processes and accumulation may change as long as the step stays the same; a batch that grows does so in units of
        what all processes take at once, which must stay the same too.
        """
        fixed = {"steps": self.steps, "sequences_a_step": self.accumulation * self.batch_sequences}
        if self.first_accumulation == self.accumulation:
            return fixed
        return {
            **fixed,
            "sequences_of_first_step": self.first_accumulation * self.batch_sequences,
            "ramp_steps": self.ramp_steps,
            "sequences_a_batch": self.batch_sequences,
        }


class StepSequences(Dataset):
    """The sequences of a plan in the slots of a layout: the `train_dataset` of a Trainer with a sequential sampler.

    An item is that of `PackedSequences` with its number as `sequence`, or None in an absent batch.
    """

    def __init__(self, plan: AnyPlan, layout: StepLayout):
        self.sequences, self.layout = PackedSequences(plan), layout

    def __len__(self) -> int:
        return self.layout.slots

    def __getitem__(self, slot: int) -> dict[str, torch.Tensor] | None:
        sequence = self.layout.sequence(slot)
        return None if sequence is None else {**self.sequences[sequence], SEQUENCE: torch.tensor(sequence)}


def collate_present(items: list[dict[str, torch.Tensor] | None]) -> dict[str, torch.Tensor]:
    """Stack the sequences of a batch `(batch, context)`; of an absent batch, tensors of shape `(0, 0)`."""
    present = [item for item in items if item is not None]
    if present:
        return default_collate(present)
    nothing = torch.zeros(0, 0, dtype=torch.int64)
    return dict.fromkeys(("input_ids", "position_ids", "labels", "language_ids", SEQUENCE), nothing)


def is_absent(batch: dict[str, Any]) -> bool:
    """Whether a batch holds no sequences."""
    return len(batch["input_ids"]) == 0
