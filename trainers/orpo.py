# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning and preference optimisation in one: TRL's ORPOTrainer on a JAI.

jai orpo --config recipes/orpo.yaml
accelerate launch -m jai.trainers.orpo --config recipes/orpo.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jai.trainers.reference_free import ORPOConfig, ORPOTrainer, ReferenceFreeMixin, check_reference_free_options
from jai.trainers.router_losses import RouterLossOptions
from jai.trainers.rows import DatasetType
from jai.trainers.stage import Stage, run_as_script, run_command


@dataclass
class JaiORPOConfig(RouterLossOptions, ORPOConfig):
    """TRL's ORPOConfig with the weight of the router's auxiliary loss."""


class JaiORPOTrainer(ReferenceFreeMixin, ORPOTrainer):
    """TRL's ORPOTrainer with the router's auxiliary loss, and with the tokens of all stages."""

    def odds_ratio_loss(
        self, policy_chosen_logps: torch.FloatTensor, policy_rejected_logps: torch.FloatTensor
    ) -> tuple[torch.FloatTensor, torch.FloatTensor, torch.FloatTensor, torch.FloatTensor, torch.FloatTensor]:
        """TRL's losses and rewards, each of shape (pairs,), and two means; the rewards are kept for the figures."""
        found = super().odds_ratio_loss(policy_chosen_logps, policy_rejected_logps)
        self._rewards = found[1], found[2]
        return found


ORPO = Stage(
    verb="orpo",
    title="Odds-ratio preference optimisation",
    trainer_class=JaiORPOTrainer,
    config_class=JaiORPOConfig,
    check_options=check_reference_free_options,
    dataset_types=(DatasetType.PREFERENCE,),
)


def main(argv: Sequence[str]) -> Path:
    """`jai orpo`; returns and raises what `run_command` does."""
    return run_command(ORPO, argv)


if __name__ == "__main__":
    run_as_script(main)
