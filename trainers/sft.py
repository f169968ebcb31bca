# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning, and continued pre-training on plain text: TRL's SFTTrainer on a JAI.

jai sft --config recipes/sft.yaml
accelerate launch -m jai.trainers.sft --config recipes/sft.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

from jai.trainers.arguments import JaiTrainingArguments, StageArguments
from jai.trainers.data_arguments import DataArguments
from jai.trainers.mixin import JaiTrainerMixin
from jai.trainers.rows import DatasetType
from jai.trainers.stage import Stage, run_as_script, run_command, run_stage


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


def run_sft(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    jai_args: JaiTrainingArguments,
    data_args: DataArguments | None = None,
    *,
    console: Console | None = None,
) -> Path:
    """Fine-tune a model on conversations, on prompts with completions, or on plain text.

    Args:
        script_args: TRL's: which data.
        training_args: TRL's: how to train.
        model_args: TRL's: which model, its dtype, LoRA.
        jai_args: ours.
        data_args: ours, on the data.
        console: where the plan and the result are printed; None is standard output, on the main process.

    Returns:
        The output folder: a whole checkpoint with `provenance.json`, or an adapter.

    Raises:
        UserError: for a model, data or options that cannot be trained with; the message says what to change.
    """
    return run_stage(
        SFT, StageArguments(script_args, training_args, model_args, jai_args, data_args or DataArguments()), console
    )


def main(argv: Sequence[str]) -> Path:
    """`jai sft`: parse the options and run.

    Raises:
        UserError: as `run_sft`, and for options that cannot be parsed.
    """
    return run_command(SFT, argv)


if __name__ == "__main__":
    run_as_script(main)
