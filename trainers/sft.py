# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning, and continued pre-training on plain text: TRL's SFTTrainer on a JAI.

jai sft --config recipes/sft.yaml
accelerate launch -m jai.trainers.sft --config recipes/sft.yaml
"""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, get_quantization_config

from jai.errors import UserError
from jai.trainers.arguments import JaiTrainingArguments, parse_arguments, resume_point
from jai.trainers.data import Form, TrainingData, count_unsupervised, drop_unanswered, load_training_data
from jai.trainers.lora import lora_config
from jai.trainers.mixin import JaiTrainerMixin, prepare_liger
from jai.trainers.plan import print_plan
from jai.trainers.snapshots import SnapshotCallback
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


class JaiSFTTrainer(JaiTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with skip alphas left out of weight decay, and router statistics in its logs."""

    weighs_tokens_alike = True


def run_sft(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    jai_args: JaiTrainingArguments,
    *,
    console: Console | None = None,
) -> Path:
    """Fine-tune a model on conversations, on prompts with completions, or on plain text.

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
    data = load_training_data(
        script_args,
        evaluate=training_args.eval_strategy != "no",
        preference=False,
        text_column=training_args.dataset_text_field,
    )
    prepare_chat(
        source,
        data,
        assistant_only_loss=training_args.assistant_only_loss,
        chat_template_path=training_args.chat_template_path,
    )
    training_args.chat_template_path = None  # the tokenizer has it now
    lora = lora_config(model_args, jai_args, source.config)
    stage = "pretrain" if data.form is Form.TEXT else "sft"
    title = "Continued pre-training" if stage == "pretrain" else "Supervised fine-tuning"
    print_plan(
        console,
        title,
        source,
        data,
        training_args,
        model_args,
        lora,
        loss_on=_loss_on(data, training_args),
        merge=jai_args.merge_adapter,
    )

    train, evaluation = data.train, data.evaluation
    if training_args.assistant_only_loss:
        train, dropped = drop_unanswered(train)
        report_dropped(console, data, dropped, 1 if data.rows is None else len(train), "they have no assistant's turn")
        evaluation = None if evaluation is None else drop_unanswered(evaluation)[0]
    training_args.model_init_kwargs = loading_arguments(model_args, training_args, jai_args)
    with building_trainer(data):
        trainer = JaiSFTTrainer(
            model=source.name,
            args=training_args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=source.tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=lora,
            router_statistics=jai_args.router_statistics,
            linear_cross_entropy=jai_args.linear_cross_entropy,
            callbacks=[SnapshotCallback(jai_args.snapshot_steps)] if jai_args.snapshot_steps else None,
        )
    if isinstance(train, Dataset):
        _report_unsupervised(console, data, len(train), trainer.train_dataset, training_args)
    return train_and_save(trainer, stage, source, data, model_args, jai_args, resume, console)


def _loss_on(data: TrainingData, training_args: SFTConfig) -> str:
    if training_args.assistant_only_loss:
        return "the assistant's turns"
    if data.form is Form.PROMPT_COMPLETION and training_args.completion_only_loss is False:
        return "prompt and completion"
    return data.form.value


def _report_unsupervised(
    console: Console, data: TrainingData, rows: int, prepared: Dataset, training_args: SFTConfig
) -> None:
    """Count the examples that truncation left without a single label: TRL drops them, and packs them, in silence."""
    why = (
        f"nothing that the loss is taken on lies in their first {training_args.max_length} tokens (raise `max_length`)"
    )
    if not training_args.packing:
        report_dropped(console, data, rows - len(prepared), len(prepared), why)
    elif "seq_lengths" in prepared.column_names and (
        training_args.assistant_only_loss or (data.form is Form.PROMPT_COMPLETION)
    ):
        empty, total = count_unsupervised(prepared)
        if empty == total:
            raise UserError(f"None of the examples in {data.name} can be trained on: {why}.")
        if empty:
            console.print(f"[yellow]{empty:,} of {total:,} examples are packed but teach nothing:[/] {why}.")


def main(argv: Sequence[str]) -> Path:
    """`jai sft`: parse the options and run.

    Raises:
        UserError: as `run_sft`, and for options that cannot be parsed.
    """
    hush_known_warnings()
    options = (ScriptArguments, SFTConfig, ModelConfig, JaiTrainingArguments)
    return run_sft(*parse_arguments(options, argv, prog="jai sft"))


if __name__ == "__main__":
    run_as_script(main)
