# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning, and continued pre-training on plain text: TRL's SFTTrainer on a JAI.

jai sft --config recipes/sft.yaml
accelerate launch -m jai.trainers.sft --config recipes/sft.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trl import SFTConfig, SFTTrainer

from jai.trainers.mixin import JaiTrainerMixin
from jai.trainers.rows import DatasetType
from jai.trainers.stage import Stage, run_as_script, run_command


class JaiSFTTrainer(JaiTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with skip alphas left out of weight decay, and router statistics in its logs."""

    weighs_tokens_alike = True


@dataclass
class JaiSFTConfig(SFTConfig):
    """TRL's SFTConfig, in which the data decides how it is packed where `packing_strategy` is not given."""

    packing_strategy: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "How `packing` fills sequences: `bfd` keeps rows whole, and cuts off what is longer than a "
            "sequence; `bfd_split` goes on in another sequence; `wrapped` joins all rows and splits them anywhere, so "
            "that they see the end of the one before them. Default: bfd_split for plain text, else bfd.",
            "choices": ["bfd", "bfd_split", "wrapped"],
        },
    )


SFT = Stage(
    verb="sft",
    title="Supervised fine-tuning",
    trainer_class=JaiSFTTrainer,
    config_class=JaiSFTConfig,
    dataset_types=(DatasetType.LANGUAGE_MODELING, DatasetType.PROMPT_COMPLETION),
)


def main(argv: Sequence[str]) -> Path:
    """`jai sft`; returns and raises what `run_command` does."""
    return run_command(SFT, argv)


if __name__ == "__main__":
    run_as_script(main)
