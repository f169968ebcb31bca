# SPDX-License-Identifier: Apache-2.0
"""Direct preference optimisation: TRL's DPOTrainer on a JAI.

jai dpo --config recipes/dpo.yaml
accelerate launch -m jai.trainers.dpo --config recipes/dpo.yaml
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from datasets import Dataset
from rich.console import Console
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, get_quantization_config

from jai.trainers.arguments import JaiTrainingArguments, parse_arguments, resume_point
from jai.trainers.data import load_training_data
from jai.trainers.lora import lora_config
from jai.trainers.mixin import JaiTrainerMixin, prepare_liger
from jai.trainers.plan import print_plan
from jai.trainers.source import open_source, prepare_chat
from jai.trainers.stage import (
    building_trainer,
    hush_known_warnings,
    loading_arguments,
    main_console,
    report_dropped,
    run_as_script,
    train_and_save,
)


class JaiDPOTrainer(JaiTrainerMixin, DPOTrainer):
    """TRL's DPOTrainer with skip alphas left out of weight decay, and router statistics in its logs."""


def run_dpo(
    script_args: ScriptArguments,
    training_args: DPOConfig,
    model_args: ModelConfig,
    jai_args: JaiTrainingArguments,
    *,
    console: Console | None = None,
) -> Path:
    """Align a model with preferences: the reference is the model itself as it was before (paper, section 7).

    Args:
        script_args: TRL's: which data.
        training_args: TRL's: how to train.
        model_args: TRL's: which model, its dtype, LoRA.
        jai_args: ours.
        console: where the plan and the result are printed; None is standard output, on the main process.

    Returns:
        The output folder: a whole checkpoint with `provenance.json`, or an adapter.

    Raises:
        UserError: for a model, data or options that cannot be trained with; the message says what to change.
    """
    console = console or main_console()
    if training_args.use_liger_kernel:
        prepare_liger()
    resume = resume_point(training_args)
    source = open_source(model_args, training_args)
    data = load_training_data(script_args, evaluate=training_args.eval_strategy != "no", preference=True)
    prepare_chat(source, data)
    lora = lora_config(model_args, jai_args, source.config)
    print_plan(
        console,
        "Direct preference optimisation",
        source,
        data,
        training_args,
        model_args,
        lora,
        loss_on=data.form.value,
        merge=jai_args.merge_adapter,
    )

    training_args.model_init_kwargs = loading_arguments(model_args, training_args, jai_args)
    with building_trainer(data):
        trainer = JaiDPOTrainer(
            model=source.name,
            args=training_args,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=source.tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=lora,
            router_statistics=jai_args.router_statistics,
            linear_cross_entropy=jai_args.linear_cross_entropy,
        )
    if isinstance(data.train, Dataset):
        left = len(cast(Dataset, trainer.train_dataset))
        why = f"their prompts alone have {training_args.max_length} tokens or more (raise `max_length`)"
        report_dropped(console, data, len(data.train) - left, left, why)
    return train_and_save(trainer, "dpo", source, data, model_args, jai_args, resume, console)


def main(argv: Sequence[str]) -> Path:
    """`jai dpo`: parse the options and run.

    Raises:
        UserError: as `run_dpo`, and for options that cannot be parsed.
    """
    hush_known_warnings()
    options = (ScriptArguments, DPOConfig, ModelConfig, JaiTrainingArguments)
    return run_dpo(*parse_arguments(options, argv, prog="jai dpo"))


if __name__ == "__main__":
    run_as_script(main)
