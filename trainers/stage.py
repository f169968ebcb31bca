# SPDX-License-Identifier: Apache-2.0
"""The seven steps of every training stage: open, check, announce, build, train, record, and say what is next."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import upload_folder
from jinja2 import TemplateError
from peft import LoraConfig
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import ModelConfig, ScriptArguments, SFTConfig, get_quantization_config

from jai.errors import UserError
from jai.files import print_next, read_json
from jai.trainers.agreement import check_reference, check_resumption
from jai.trainers.announce import print_plan
from jai.trainers.arguments import (
    JaiTrainingArguments,
    StageArguments,
    StageConfig,
    max_length_of,
    parse_arguments,
)
from jai.trainers.base_model import BaseModel, open_base_model, prepare_chat
from jai.trainers.checks import check_options, check_options_with_model, check_partial_training
from jai.trainers.chosen_parts import choose_parts
from jai.trainers.context import with_context
from jai.trainers.data import TrainingData, load_training_data
from jai.trainers.data_arguments import DataArguments
from jai.trainers.group_losses import GroupLosses
from jai.trainers.lora import lora_config, merge_adapter
from jai.trainers.mixin import JaiTrainerMixin, prepare_liger
from jai.trainers.pair_figures import PairFigures
from jai.trainers.parameters import count_trained_parameters, empty_model
from jai.trainers.parts import TrainableParts
from jai.trainers.prepare import prepare_rows
from jai.trainers.preview import print_preview
from jai.trainers.record import recorded_data, write_record
from jai.trainers.rows import DatasetType
from jai.trainers.run_identity import RunIdentity, check_same_stage, saved_identity, stage_identity
from jai.trainers.snapshots import SnapshotCallback
from jai.trainers.tokens import count_tokens
from jai.trainers.whole_checkpoints import remove_unfinished, resume_checkpoint

_ADAPTER_FILES = "adapter_*"  # in an output folder


@dataclass(frozen=True)
class Stage:
    """What differs from one stage to another.

    Attributes:
        verb: of the command line: "sft" is `jai sft`.
        title: of the plan that is printed.
        trainer_class: one of TRL's trainers, with `JaiTrainerMixin` before it.
        config_class: the trainer's own arguments.
        dataset_types: what it can train on.
        auto_class: transformers' class that makes its model.
        check_options: refuses options of the stage's own that cannot be, before anything is read.
        prepare_data: changes and checks the rows that were chosen, for what the stage alone needs.
        finish: what follows when the model is saved, in all processes, given the trainer, the data and the folder.
    """

    verb: str
    title: str
    trainer_class: type[JaiTrainerMixin]
    config_class: type[StageConfig]
    dataset_types: tuple[DatasetType, ...]
    auto_class: type = AutoModelForCausalLM
    check_options: Callable[[StageArguments], None] | None = None
    prepare_data: Callable[[StageArguments, TrainingData], TrainingData] | None = None
    finish: Callable[[JaiTrainerMixin, TrainingData, Path, Console], None] | None = None

    @property
    def option_classes(self) -> tuple[type, ...]:
        """The dataclasses of its options, in the order of `StageArguments`."""
        return ScriptArguments, self.config_class, ModelConfig, JaiTrainingArguments, DataArguments


def run_command(stage: Stage, argv: Sequence[str]) -> Path:
    """Parse the arguments of `jai VERB` and run the stage.

    Raises:
        UserError: as `run_stage`, and for options that cannot be parsed.
    """
    # TRL still says gradient checkpointing, where transformers has begun to say activation checkpointing.
    warnings.filterwarnings("ignore", message=".*activation_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found.*")
    return run_stage(stage, StageArguments(*parse_arguments(stage.option_classes, argv, prog=f"jai {stage.verb}")))


def run_stage(stage: Stage, arguments: StageArguments, console: Console | None = None) -> Path:
    """Train a model and leave a whole checkpoint (or an adapter) with its record in the output folder.

    With `preview` it shows rows and ends, and there is no output folder.

    Raises:
        UserError: for a model, data or options that cannot be trained with; the message says what to change.
    """
    console = console or Console(quiet=not PartialState().is_main_process)
    check_options(arguments)
    if stage.check_options is not None:
        stage.check_options(arguments)
    if arguments.training.use_liger_kernel:
        prepare_liger()
    checkpoint, unfinished = (None, []) if arguments.data.preview else resume_checkpoint(arguments.training)
    base = with_context(open_base_model(arguments.model, arguments.training), arguments)
    check_options_with_model(arguments, base.config)
    data = load_training_data(arguments, stage.dataset_types)
    prepare_chat(base, data, arguments.training)
    if stage.auto_class is AutoModelForSequenceClassification:
        if arguments.jai.linear_cross_entropy:
            raise UserError(
                "`linear_cross_entropy` is about the head for words, which a reward model lacks. Leave it out."
            )
        base.config.num_labels = 1
        if arguments.model.use_peft:
            arguments.model.lora_task_type = "SEQ_CLS"
    if (reference := getattr(arguments.training, "ref_model_name_or_path", None)) is not None:
        check_reference(reference, base, conversational=data.conversational)
    model = empty_model(base, stage.auto_class)
    parts = choose_parts(arguments.jai, arguments.model, base, model)
    lora = lora_config(arguments.model, parts, model)
    check_partial_training(arguments, parts.masked(lora is not None), lora)
    if checkpoint is not None:
        check_resumption(checkpoint, base, lora)
    loading = loading_arguments(arguments, base)

    _choose_packing(arguments.training, data)
    data = prepare_rows(data, arguments, base.tokenizer)
    if stage.prepare_data is not None:
        data = stage.prepare_data(arguments, data)
    for note in data.notes:
        console.print(f"[yellow]{escape(note)}[/]")
    if arguments.data.preview:
        print_preview(console, data, base.tokenizer, arguments.training, arguments.data.preview)
        return Path(str(arguments.training.output_dir))
    identity = stage_identity(stage.verb, arguments, base, data, parts.names)
    if checkpoint is not None:
        if (saved := saved_identity(checkpoint, stage.verb)) is not None:
            check_same_stage(checkpoint, saved, identity, data.name, arguments.training)
        else:
            note = f"{checkpoint} does not say which data and options its run had: whether they are these is not known."
            console.print(f"[yellow]{escape(note)}[/]")
    parameters = count_trained_parameters(model, base, parts, lora, arguments.model)
    train_tokens, evaluation_tokens = count_tokens(data, base.tokenizer, arguments.training)

    step, title = ("pretrain", "Continued pre-training") if data.is_plain_text else (stage.verb, stage.title)
    remove_unfinished(unfinished, console)
    print_plan(console, title, arguments, base, data, lora, parameters, train_tokens, evaluation_tokens)
    trainer = _build(stage, arguments, base, data, parts, lora, loading, identity, console)
    with _explaining_resumption(checkpoint):
        metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
    out = save_result(trainer, arguments, base, console, auto_class=stage.auto_class)
    if stage.finish is not None:
        stage.finish(trainer, data, out, console)
    if trainer.is_world_process_zero():
        write_record(
            out,
            step,
            arguments,
            base,
            recorded_data(data),
            parameters,
            trainer.state.log_history,
            trainer.state.global_step,
            metrics,
        )
        say_what_is_next(out, step, arguments, base, console, auto_class=stage.auto_class)
    if arguments.training.push_to_hub:
        push_result(trainer, out, data.name)
    end_training(trainer)
    return out


def loading_arguments(arguments: StageArguments, base: BaseModel) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the trainer, in which `model_init_kwargs` has the last word."""
    loading = {
        **base.loading,
        "attn_implementation": arguments.model.attn_implementation,
        "dtype": arguments.model.dtype,
        "use_safetensors": True,  # nothing pickled
        "experts_implementation": arguments.jai.experts_implementation,
        **cast(dict[str, Any], arguments.training.model_init_kwargs or {}),
    }
    if loading["experts_implementation"] is None:
        del loading["experts_implementation"]
    return loading


def _build(
    stage: Stage,
    arguments: StageArguments,
    base: BaseModel,
    data: TrainingData,
    parts: TrainableParts,
    lora: LoraConfig | None,
    loading: dict[str, Any],
    identity: dict[str, Any],
    console: Console,
) -> JaiTrainerMixin:
    """The trainer, which has loaded the model and tokenised the data; what it left out of them is said."""
    training = arguments.training
    training.model_init_kwargs = loading
    snapshot_steps = arguments.jai.snapshot_steps
    with _explaining_errors(data):
        trainer = stage.trainer_class(
            model=base.name,
            args=training,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=base.tokenizer,
            quantization_config=get_quantization_config(arguments.model),
            peft_config=lora,
            router_statistics=arguments.jai.router_statistics,
            linear_cross_entropy=arguments.jai.linear_cross_entropy,
            parts=parts,
            group_figures=_group_figures(data, training),
            callbacks=[RunIdentity(identity), *([SnapshotCallback(snapshot_steps)] if snapshot_steps else [])],
        )
    if data.type in (DatasetType.PREFERENCE, DatasetType.UNPAIRED_PREFERENCE):
        kept_whole = stage.auto_class is AutoModelForSequenceClassification  # DPO's answers are cut, a reward's are not
        longest = max_length_of(training)
        why = f"their prompts alone have {longest} tokens or more (raise `max_length`)"
        if kept_whole:
            why = f"an answer with its prompt has more than {longest} tokens (raise `max_length`)"
        splits = (("trained", data.train, trainer.train_dataset), ("evaluated", data.evaluation, trainer.eval_dataset))
        for use, given, left in splits:
            _report_dropped(console, data.name, use, given, left, why)
    return trainer


def _group_figures(data: TrainingData, training: StageConfig) -> GroupLosses | PairFigures | None:
    """What tells categories and languages apart in the logs."""
    if GroupLosses.can_tell(data, training):
        return GroupLosses(data, training)
    return PairFigures(data) if PairFigures.can_tell(data, training) else None


def _choose_packing(training: StageConfig, data: TrainingData) -> None:
    """Conversations stay whole, and plain text loses nothing: "bfd" drops what is longer than a sequence."""
    if isinstance(training, SFTConfig) and training.packing_strategy is None:
        training.packing_strategy = "bfd_split" if data.is_plain_text else "bfd"


@contextmanager
def _explaining_errors(data: TrainingData) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError, NotImplementedError) as error:  # TRL's and transformers' own checks of options
        raise UserError(str(error)) from error
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise UserError(f"`model_init_kwargs` does not fit the model: {error}.") from error
        raise
    except TemplateError as error:
        raise UserError(
            f"A conversation in {data.name} does not fit the chat template: {error} Fix the data, or give the "
            "tokenizer a template that takes it."
        ) from error


@contextmanager
def _explaining_resumption(checkpoint: Path | None) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if checkpoint is None or "parameter group" not in str(error):
            raise
        raise UserError(
            f"{checkpoint} was written by a run in which other parts learnt: its optimiser does not fit ({error}). "
            "Resume with the `trainable` and the LoRA options of that run."
        ) from error


def _report_dropped(console: Console, name: str, use: str, given: Any, left: Any, why: str) -> None:
    """Say how many rows to train or to evaluate on the trainer has left out; of streams nobody knows."""
    if not isinstance(given, Dataset) or not isinstance(left, Dataset):
        return
    if not len(left):
        raise UserError(f"None of the examples in {name} can be {use} on: {why}.")
    if dropped := len(given) - len(left):
        what = "examples" if use == "trained" else "examples to evaluate on"
        console.print(f"[yellow]Left out {dropped:,} of {len(given):,} {what}:[/] {why}.")


def save_result(
    trainer: JaiTrainerMixin,
    arguments: StageArguments,
    base: BaseModel,
    console: Console,
    *,
    auto_class: type = AutoModelForCausalLM,
) -> Path:
    """Save the model, or the adapter, or with `merge_adapter` both, in the output folder."""
    out = Path(str(arguments.training.output_dir))
    merge = arguments.jai.merge_adapter
    if trainer.is_fsdp_enabled:  # the final model in one piece, whatever the checkpoints are
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    adapter = out / "adapter"
    trainer.save_model(str(adapter if merge else out), _internal_call=True)  # else it is pushed, half made
    trainer.save_state()
    if merge and trainer.is_world_process_zero():
        console.print("Merging the adapter …")
        labels = {} if auto_class is AutoModelForCausalLM else {"num_labels": 1}
        loading = {"dtype": arguments.model.dtype, **base.loading, **labels}
        merge_adapter(adapter, out, base.name, auto_class=auto_class, **loading)
        for path in out.glob(_ADAPTER_FILES):  # of pushes on the way: who loads the folder would add it once more
            path.unlink()
        base.tokenizer.save_pretrained(out)
        (adapter / "training_args.bin").unlink()
    return out


def push_result(trainer: JaiTrainerMixin, out: Path, dataset_name: str) -> None:
    """Upload the finished output folder as it lies there, for `push_to_hub`.

    The trainer's own method would save the model anew, over what `merge_adapter` and `write_record` have made of it,
    and upload a pickle of its arguments. What it pushed on the way and is no part of the result is deleted.
    """
    if not trainer.is_world_process_zero():
        return
    arguments = trainer.args
    # A path says nothing to others, and much about this machine.
    trainer.create_model_card(
        model_name=str(trainer.hub_model_id).rpartition("/")[2],
        dataset_name=None if Path(dataset_name).exists() else dataset_name,
    )
    trainer._finish_current_push()
    upload_folder(
        repo_id=str(trainer.hub_model_id),
        folder_path=out,
        commit_message="End of training",
        revision=arguments.hub_revision,
        ignore_patterns=["_*", "checkpoint-*"],
        delete_patterns=["training_args.bin", _ADAPTER_FILES],
    )


def end_training(trainer: JaiTrainerMixin) -> None:
    """Finish the trackers and the process group, after all that needs the other processes.

    The wrapper of data-parallel training goes first. If it were the last to hold gloo's process group, its destructor
    would wait for the group's thread while it has Python's lock, for which that thread may be waiting (torch 2.13: now
    and then a run that was done did not end).
    """
    trainer.model_wrapped = cast(nn.Module, trainer.model)
    trainer.accelerator.free_memory()
    if hasattr(trainer, "end"):  # transformers 5.18 and later
        trainer.end()


def say_what_is_next(
    out: Path,
    step: str,
    arguments: StageArguments,
    base: BaseModel,
    console: Console,
    *,
    auto_class: type = AutoModelForCausalLM,
) -> None:
    """Print where the result is, and the commands that use it."""
    shown = escape(str(out))
    if arguments.model.use_peft and not arguments.jai.merge_adapter:
        console.print(f"[bold green]Adapter written to[/] {shown} (for {escape(base.name)})")
        is_quantized = getattr(base.config, "quantization_config", None) is not None
        # PEFT's own classes do not reach experts in four bits, and transformers' call the model's method.
        kind, labels = (
            ("CausalLM", "") if auto_class is AutoModelForCausalLM else ("SequenceClassification", ", num_labels=1")
        )
        adapts_experts = bool(read_json(out / "adapter_config.json").get("target_parameters"))
        loader = (
            f"transformers.AutoModelFor{kind}" if is_quantized and adapts_experts else f"peft.AutoPeftModelFor{kind}"
        )
        ways = "run jai merge-adapter" + ("" if is_quantized else ", or train with `--merge_adapter true`")
        console.print(
            f"Load it with [bold]{loader}.from_pretrained({escape(repr(str(out)))}{labels})[/]. The next stage needs a "
            f"full checkpoint: {ways}."
        )
        if adapts_experts:
            console.print("vLLM and SGLang cannot serve LoRA on experts: merge the adapter first.")
        commands: list[Sequence[str | Path]] = []
        if base.is_jai:
            commands.append(
                ["jai", "merge-adapter", out, "OUT", *(["--base", "CKPT-IN-16-BITS"] if is_quantized else [])]
            )
        commands.append(["jai", "publish", out, "OWNER/NAME", "--base", "OWNER/BASE"])
        print_next(console, *commands)
        return
    console.print(f"[bold green]Checkpoint written to[/] {shown}")
    if not base.is_jai:
        print_next(console, ["jai", "convert", out, "OUT"])
        return
    if step == "reward":
        print_next(
            console,
            ["jai", "score", "ANSWERS.jsonl", "OUT", "--model", out],
            ["jai", "pairs", "PROMPTS", "OUT", "--model", "CKPT", "--by", "reward", "--reward-model", out],
        )
        return
    commands = [["jai", "generate", out, "…"], ["jai", "publish", out, "OWNER/NAME"]]
    if following := {"pretrain": "sft", "sft": "dpo"}.get(step):
        recipe = f"recipes/{following}.yaml"
        commands.insert(0, ["jai", following, "--config", recipe, "--model_name_or_path", out])
    print_next(console, *commands)


def run_as_script(main: Callable[[Sequence[str]], Path]) -> None:
    """Body of `python -m` and `accelerate launch -m`: a user's error is one line, and the exit status 1."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        Console(stderr=True).print(Text("Error: ", style="bold red") + Text(str(error)))
        raise SystemExit(1) from None
