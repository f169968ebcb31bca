# SPDX-License-Identifier: Apache-2.0
"""Preference optimisation without a reference: TRL's CPOTrainer on a JAI, with CPO, SimPO and AlphaPO by `loss_type`.

jai cpo --config recipes/simpo.yaml
accelerate launch -m jai.trainers.cpo --config recipes/simpo.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jai.trainers.reference_free import CPOConfig, CPOTrainer, ReferenceFreeMixin, check_reference_free_options
from jai.trainers.router_losses import RouterLossOptions
from jai.trainers.rows import DatasetType
from jai.trainers.stage import Stage, run_as_script, run_command


@dataclass
class JaiCPOConfig(RouterLossOptions, CPOConfig):
    """TRL's CPOConfig with the weight of the router's auxiliary loss."""


class JaiCPOTrainer(ReferenceFreeMixin, CPOTrainer):
    """TRL's CPOTrainer with the router's auxiliary loss, and with the tokens of all stages."""

    def cpo_loss(
        self, policy_chosen_logps: torch.FloatTensor, policy_rejected_logps: torch.FloatTensor
    ) -> tuple[torch.FloatTensor, torch.FloatTensor, torch.FloatTensor]:
        """TRL's losses and rewards, each of shape (pairs,); the rewards are kept for the figures of groups."""
        losses, chosen, rejected = super().cpo_loss(policy_chosen_logps, policy_rejected_logps)
        self._rewards = chosen, rejected
        return losses, chosen, rejected


CPO = Stage(
    verb="cpo",
    title="Contrastive preference optimisation",
    trainer_class=JaiCPOTrainer,
    config_class=JaiCPOConfig,
    check_options=check_reference_free_options,
    dataset_types=(DatasetType.PREFERENCE,),
)


def main(argv: Sequence[str]) -> Path:
    """`jai cpo`; returns and raises what `run_command` does."""
    return run_command(CPO, argv)


if __name__ == "__main__":
    run_as_script(main)
