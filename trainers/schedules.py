# SPDX-License-Identifier: Apache-2.0
"""What changes from step to step in pre-training: learning rate and weight decay (Trillion-7B, section 3.2)."""

from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def annealing_begins(steps: int, share: float) -> int:
    """The step, from 0, with which the annealing begins; `steps` if there is none."""
    return steps - round(steps * share)


def warmup_stable_decay(step: int, *, warmup: int, decay: int, steps: int, final: float) -> float:
    """The learning rate of a step, as a share of its peak.

    It rises to the peak, stays there, and decays as 1 / (1 + (1/final − 1)·s), s being the share of the decay that is
    done: lr = lr_max / (1 + 9·s) for a tenth. Trillion-7B's report says "inverse proportional decay function to 10 %";
    this formula is our reading of it.

    Args:
        step: from 0.
        warmup: steps of the rise.
        decay: the step with which the decay begins.
        steps: of the run.
        final: share of the peak at the end.
    """
    if step < warmup:
        return step / warmup
    if step <= decay:
        return 1.0
    return 1 / (1 + (1 / final - 1) * min(1.0, (step - decay) / (steps - decay)))


def inverse_decay_schedule(optimizer: Optimizer, *, warmup: int, decay: int, steps: int, final: float) -> LambdaLR:
    """A scheduler of `warmup_stable_decay`."""
    return LambdaLR(optimizer, partial(warmup_stable_decay, warmup=warmup, decay=decay, steps=steps, final=final))


class AnnealedWeightDecay(TrainerCallback):
    """Sets the weight decay of the annealing, in the parameter groups that have one.

    Before every step, and not once: so it is the same in a run that is resumed.
    """

    def __init__(self, begins: int, weight_decay: float):
        self.begins, self.weight_decay = begins, weight_decay

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ) -> None:
        if state.global_step >= self.begins:
            for group in optimizer.param_groups:
                if group["weight_decay"]:
                    group["weight_decay"] = self.weight_decay
