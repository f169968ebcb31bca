# SPDX-License-Identifier: Apache-2.0
"""Pre-training on text that `jai pack` wrote: transformers' Trainer, on any number of processes, exactly resumable.

jai pretrain --config recipes/tiny/phase-1.yaml
accelerate launch -m jai.trainers.pretrain --config recipes/jai-1/phase-1.yaml
"""

import faulthandler
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import get_peft_model
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, set_seed
from trl import ModelConfig, ScriptArguments

from jai.errors import UserError
from jai.pretraining.config import read_corpus_config
from jai.pretraining.plan import AnnealedPlan, AnyPlan, SequencePlan, Strategy, check_same_plan
from jai.pretraining.shards import PackedCorpus
from jai.pretraining.shares import Shares
from jai.trainers.announce import context_text, device_rows, model_rows, print_rows
from jai.trainers.arguments import JaiTrainingArguments, StageArguments, parse_arguments
from jai.trainers.base_model import BaseModel, open_base_model
from jai.trainers.checks import check_options, check_options_with_model, check_partial_training
from jai.trainers.chosen_parts import choose_parts
from jai.trainers.context import with_context
from jai.trainers.engine import accelerates_sizes, batches_at_once, sharded_at_load, uses_deepspeed, uses_fsdp
from jai.trainers.lora import lora_config
from jai.trainers.mixin import prepare_liger
from jai.trainers.parameters import count_trained_parameters, empty_model
from jai.trainers.predicted_memory import memory_rows
from jai.trainers.pretrain_announce import listed_tokens, router_rows, step_rows, text_rows
from jai.trainers.pretrain_config import PretrainConfig
from jai.trainers.pretrain_trainer import TOKENS_SEEN, JaiPretrainTrainer
from jai.trainers.record import write_record
from jai.trainers.run_identity import (
    check_same_files,
    check_same_options,
    deciding_files,
    deciding_options,
    saved_identity,
)
from jai.trainers.schedules import annealing_begins
from jai.trainers.second_token import drop_second_token_layer
from jai.trainers.snapshots import SnapshotCallback
from jai.trainers.stage import (
    end_training,
    loading_arguments,
    push_result,
    run_as_script,
    save_result,
    say_what_is_next,
)
from jai.trainers.steps import StepLayout
from jai.trainers.whole_checkpoints import last_whole_checkpoint, remove_unfinished, resume_checkpoint

OPTIONS = (PretrainConfig, ModelConfig, JaiTrainingArguments)


def run_pretrain(
    config: PretrainConfig,
    model_args: ModelConfig,
    jai_args: JaiTrainingArguments,
    *,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train a model on packed text and leave a whole checkpoint (or an adapter) with its record.

    Args:
        config: transformers' options and those of pre-training.
        model_args: TRL's: which model, its dtype, LoRA.
        jai_args: ours: what learns, and the context.
        console: where the plan and the result are printed; None is standard output, on the main process.
        callbacks: for the Trainer.

    Returns:
        The output folder.

    Raises:
        UserError: for a model, text or options that cannot be trained with, and a loss that is not finite; the message
            says what to change.
    """
    console = console or Console(quiet=not PartialState().is_main_process)
    arguments = StageArguments(ScriptArguments(dataset_name=config.packed), config, model_args, jai_args)
    check_options(arguments)
    _check(config, model_args, jai_args)
    if config.use_liger_kernel:
        prepare_liger()
    checkpoint, unfinished = resume_checkpoint(config)
    base = with_context(open_base_model(model_args, config), arguments)
    check_options_with_model(arguments, base.config)
    if config.keep_mtp and not base.is_jai:
        raise UserError(
            f"`keep_mtp` is on, and {base.name} is not a JAI: a model of another kind does not find the layer in its "
            "checkpoint. Leave it out, or convert the model first."
        )
    corpus = PackedCorpus.open(str(config.packed))
    corpus.check_tokenizer(base.name, base.tokenizer)
    if config.verify_packed:
        _verify(corpus, console)
    plan, layout = plan_run(config, corpus)
    config.max_steps = layout.steps
    model = empty_model(base)
    parts = choose_parts(jai_args, model_args, base, model)
    identity: dict[str, Any] = {
        "stage": "pretrain",
        "plan": plan.identity(),
        "files": deciding_files(arguments, base),
        "layout": layout.identity(),
        "options": deciding_options(arguments, parts.names),
    }
    if checkpoint is not None:
        if (saved := saved_identity(checkpoint, "pretrain")) is None:
            raise UserError(f"{checkpoint} was not written by `jai pretrain`. Give a checkpoint of such a run.")
        check_same_plan(saved["plan"], plan)
        if "files" in saved:
            check_same_files(checkpoint, saved["files"], identity["files"])
        else:
            note = f"{checkpoint} does not say which model its run began with: whether it is {base.name} is not known."
            console.print(f"[yellow]{escape(note)}[/]")
        check_same_options(checkpoint, saved, identity, config)
    remove_unfinished(unfinished, console)
    lora = lora_config(model_args, parts, model)
    check_partial_training(arguments, parts.masked(lora is not None), lora)
    parameters = count_trained_parameters(model, base, parts, lora, model_args)
    rows = [*model_rows(arguments, base, lora, parameters), *text_rows(config, plan, layout)]
    rows += [
        ("context", context_text(config, base)),
        *step_rows(config, base, layout),
        *router_rows(config, base, parameters),
        *memory_rows(arguments, base, lora, parameters),
        *device_rows(arguments, lora, parameters),
    ]
    print_rows(console, "Pre-training", rows)

    set_seed(config.seed)  # an adapter's weights are drawn before the Trainer does it
    loaded = _load(base, loading_arguments(arguments, base))
    trainer = JaiPretrainTrainer(
        cast(PreTrainedModel, get_peft_model(loaded, lora) if lora is not None else loaded),
        config,
        plan=plan,
        layout=layout,
        identity=identity,
        processing_class=base.tokenizer,
        router_statistics=jai_args.router_statistics,
        linear_cross_entropy=jai_args.linear_cross_entropy,
        parts=parts,
        callbacks=[*callbacks, *([SnapshotCallback(jai_args.snapshot_steps)] if jai_args.snapshot_steps else [])],
    )
    with _explaining_full_disks(config):
        metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
    if config.mtp_weight and not config.keep_mtp:
        drop_second_token_layer(trainer.accelerator.unwrap_model(trainer.model))
    out = save_result(trainer, arguments, base, console)
    seen = plan.tokens_seen(layout.first_sequence(layout.steps))
    if trainer.is_world_process_zero():
        dataset = {"name": corpus.folder.name, "content_sha256": corpus.content_sha256, TOKENS_SEEN: seen}
        logs, steps = trainer.state.log_history, trainer.state.global_step
        write_record(out, "pretrain", arguments, base, dataset, parameters, logs, steps, metrics)
        console.print(f"Seen: {listed_tokens(seen)}")
        say_what_is_next(out, "pretrain", arguments, base, console)
    if config.push_to_hub:
        push_result(trainer, out, str(corpus.folder))
    end_training(trainer)
    return out


def plan_run(config: PretrainConfig, corpus: PackedCorpus) -> tuple[AnyPlan, StepLayout]:
    """The sequences of a run, and which of them each step takes.

    Raises:
        UserError: for shares that do not fit the text, and a run that is longer than it.
    """
    how: dict[str, Any] = {
        "strategy": cast(Strategy, config.packing_strategy),
        "seed": config.seed if config.data_seed is None else config.data_seed,
        "rho": config.rho,
        "shares": _shares(config.mixture),
    }
    if config.max_steps > 0:
        layout = _layout(config, config.max_steps)
        if (annealing := _shares(config.annealing_mixture)) is not None:
            begins = layout.first_sequence(annealing_begins(layout.steps, config.annealing))
            if not begins:
                raise UserError(
                    f"`annealing` is {config.annealing:g}, all of the {layout.steps:,} steps, so that no text would be "
                    "taken by other shares than those of `annealing_mixture`. Give a smaller share, or the file as "
                    "`mixture`."
                )
            plan: AnyPlan = AnnealedPlan(corpus, config.max_length, annealing=annealing, begins=begins, **how)
        else:
            plan = SequencePlan(corpus, config.max_length, **how)
    else:  # as long as the text lasts
        if config.annealing_mixture is not None:
            raise UserError("`annealing_mixture` begins at a step, and `max_steps` is not given. Give a number.")
        plan = SequencePlan(corpus, config.max_length, **how)
        steps = plan.sequences // (_batch_sequences(config) * config.gradient_accumulation_steps)
        if steps < 1:
            raise UserError(
                f"The text in {corpus.folder} has {plan.sequences:,} sequences of {config.max_length:,} tokens, fewer "
                "than one step takes. Give more text, a smaller batch or a shorter `max_length`."
            )
        layout = _layout(config, steps)
    plan.check_lasts(layout.first_sequence(layout.steps))
    return plan, layout


def _shares(mixture: str | None) -> Shares | None:
    return None if mixture is None else Shares.configured(read_corpus_config(Path(mixture)))


def _batch_sequences(config: PretrainConfig) -> int:
    return config.per_device_train_batch_size * batches_at_once(config)


def _layout(config: PretrainConfig, steps: int) -> StepLayout:
    grown = config.gradient_accumulation_steps
    first = config.first_accumulation_steps or grown
    return StepLayout(steps, _batch_sequences(config), grown, first, round(steps * config.batch_ramp))


def _check(config: PretrainConfig, model_args: ModelConfig, jai_args: JaiTrainingArguments) -> None:
    if not config.packed:
        raise UserError("No text is given. Set `packed` to a folder that `jai pack` wrote.")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise UserError("Pre-training takes no quantised weights. Leave `load_in_4bit` and `load_in_8bit` out.")
    if config.mtp_weight:
        for option, is_on in (
            ("use_peft", model_args.use_peft),
            ("linear_cross_entropy", jai_args.linear_cross_entropy),
            ("deepspeed", uses_deepspeed(config)),
            ("fsdp", uses_fsdp(config)),
            ("distributed_config", sharded_at_load(config) is not None),
        ):
            if is_on:
                raise UserError(
                    f"`mtp_weight` is {config.mtp_weight:g}, and `{option}` is on, with which the layer for the second "
                    "next token does not work. Leave one of them out."
                )
    if getattr(config.accelerator_config, "split_batches", False):
        raise UserError(
            "`split_batches` is on in `accelerator_config`: processes would share a batch, and a step see less text "
            "than is planned and counted. Leave it out."
        )
    sizes = accelerates_sizes(config)
    if sizes is not None and max(sizes.tp_size, sizes.cp_size, sizes.sp_size) > 1:
        raise UserError(
            f"Accelerate's `parallelism_config` has tp_size {sizes.tp_size}, cp_size {sizes.cp_size} and sp_size "
            f"{sizes.sp_size}: processes would share a batch, and its tokens be counted in each. Set them to 1; for "
            "tensor parallelism give `distributed_config` in `model_init_kwargs`."
        )
    checkpointing = cast(dict[str, Any], config.gradient_checkpointing_kwargs or {})
    if config.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise UserError(
            "With reentrant checkpointing the routers' losses have no gradient. Leave `use_reentrant` out of "
            "`gradient_checkpointing_kwargs`."
        )


def _verify(corpus: PackedCorpus, console: Console) -> None:
    """The processes of each node share the files, so that none waits for the others longer than they would let it."""
    console.print(f"Comparing {escape(str(corpus.folder))} with its hashes …")
    fault = None
    try:
        # Without the launcher's word of how many there are, each reads all.
        corpus.verify(PartialState().local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    except UserError as error:
        fault = str(error)
    faults = [each for each in gather_object([fault]) if each is not None]
    if faults:
        raise UserError(faults[0])


@contextmanager
def _explaining_full_disks(config: PretrainConfig) -> Iterator[None]:
    """What PyTorch and safetensors raise when they cannot write a checkpoint, with what is left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        whole, unfinished = last_whole_checkpoint(Path(str(config.output_dir)))
        if not unfinished:
            raise
        reason = str(error).strip().partition("\n")[0]
        left = f"{whole} is whole" if whole else "There is none before it"
        raise UserError(
            f"{unfinished[0]} could not be written: {reason}. {left}. Make room on the disk, and go on with "
            "`--resume_from_checkpoint true`."
        ) from error


def _load(base: BaseModel, loading: dict[str, Any]) -> PreTrainedModel:
    dtype = loading.get("dtype")
    if isinstance(dtype, str) and dtype != "auto":
        loading = {**loading, "dtype": getattr(torch, dtype)}
    try:
        return AutoModelForCausalLM.from_pretrained(base.name, **loading)
    except (ValueError, ImportError) as error:
        raise UserError(f"The model {base.name} cannot be loaded with these options: {error}") from error
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise UserError(f"`model_init_kwargs` does not fit the model: {error}.") from error
        raise


def main(argv: Sequence[str]) -> Path:
    """`jai pretrain`: parse the options and run.

    Raises:
        UserError: as `run_pretrain`, and for options that cannot be parsed.
    """
    warnings.filterwarnings("ignore", message=".*activation_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found.*")
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # a shard that is cut off while it is mapped ends the process by SIGBUS
    return run_pretrain(*parse_arguments(OPTIONS, argv, prog="jai pretrain"))


if __name__ == "__main__":
    run_as_script(main)
