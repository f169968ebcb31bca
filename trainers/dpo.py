# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation: TRL's DPOTrainer on a JAI.

jai dpo --config recipes/dpo.yaml
accelerate launch -m jai.trainers.dpo --config recipes/dpo.yaml
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments

from jai.trainers.arguments import JaiTrainingArguments, StageArguments
from jai.trainers.data_arguments import DataArguments
from jai.trainers.mixin import JaiTrainerMixin
from jai.trainers.rows import DatasetType
from jai.trainers.stage import Stage, run_as_script, run_command, run_stage


class JaiDPOTrainer(JaiTrainerMixin, DPOTrainer):
    """TRL's DPOTrainer with skip alphas left out of weight decay, and router statistics in its logs."""


DPO = Stage(
    verb="dpo",
    title="Direct preference optimisation",
    trainer_class=JaiDPOTrainer,
    config_class=DPOConfig,
    dataset_types=(DatasetType.PREFERENCE,),
)


def run_dpo(
    script_args: ScriptArguments,
    training_args: DPOConfig,
    model_args: ModelConfig,
    jai_args: JaiTrainingArguments,
    data_args: DataArguments | None = None,
    *,
    console: Console | None = None,
) -> Path:
    """Align a model with preferences: the reference is the model itself as it was before (paper, section 7).

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
        DPO, StageArguments(script_args, training_args, model_args, jai_args, data_args or DataArguments()), console
    )


def main(argv: Sequence[str]) -> Path:
    """`jai dpo`: parse the options and run.

    Raises:
        UserError: as `run_dpo`, and for options that cannot be parsed.
    """
    return run_command(DPO, argv)


if __name__ == "__main__":
    run_as_script(main)
