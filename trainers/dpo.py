# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation: TRL's DPOTrainer on a JAI.

jai dpo --config recipes/dpo.yaml
accelerate launch -m jai.trainers.dpo --config recipes/dpo.yaml
"""

from collections.abc import Sequence
from pathlib import Path

from trl import DPOConfig, DPOTrainer

from jai.trainers.mixin import JaiTrainerMixin
from jai.trainers.rows import DatasetType
from jai.trainers.stage import Stage, run_as_script, run_command


class JaiDPOTrainer(JaiTrainerMixin, DPOTrainer):
    """TRL's DPOTrainer with skip alphas left out of weight decay, and router statistics in its logs."""


DPO = Stage(
    verb="dpo",
    title="Direct preference optimisation",
    trainer_class=JaiDPOTrainer,
    config_class=DPOConfig,
    dataset_types=(DatasetType.PREFERENCE,),
)


def main(argv: Sequence[str]) -> Path:
    """`jai dpo`; returns and raises what `run_command` does."""
    return run_command(DPO, argv)


if __name__ == "__main__":
    run_as_script(main)
