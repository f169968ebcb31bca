# SPDX-License-Identifier: Apache-2.0
"""Alignment with single answers that are good or bad: TRL's KTOTrainer on a JAI.

jai kto --dataset_name answers.jsonl …
accelerate launch -m jai.trainers.kto --config kto.yaml
"""

from collections.abc import Sequence
from pathlib import Path

from trl import KTOConfig, KTOTrainer

from jai.trainers.mixin import JaiTrainerMixin
from jai.trainers.rows import DatasetType
from jai.trainers.stage import Stage, run_as_script, run_command


class JaiKTOTrainer(JaiTrainerMixin, KTOTrainer):
    """TRL's KTOTrainer with skip alphas left out of weight decay, and router statistics in its logs."""


KTO = Stage(
    verb="kto",
    title="Kahneman-Tversky optimisation",
    trainer_class=JaiKTOTrainer,
    config_class=KTOConfig,
    dataset_types=(DatasetType.UNPAIRED_PREFERENCE,),
)


def main(argv: Sequence[str]) -> Path:
    """`jai kto`; returns and raises what `run_command` does."""
    return run_command(KTO, argv)


if __name__ == "__main__":
    run_as_script(main)
