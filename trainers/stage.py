# SPDX-License-Identifier: Apache-2.0
"""What the stages have in common: the way from a built trainer to a finished folder."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from jinja2 import TemplateError
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from transformers import Trainer
from trl import ModelConfig

from jai.errors import UserError
from jai.trainers.arguments import JaiTrainingArguments, TrlConfig
from jai.trainers.data import TrainingData
from jai.trainers.lora import merge_adapter
from jai.trainers.record import write_record
from jai.trainers.source import Source

_RECORDED_TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "packing",
    "packing_strategy",
    "assistant_only_loss",
    "completion_only_loss",
    "loss_type",
    "beta",
    "router_aux_loss_coef",
    "gradient_checkpointing",
    "bf16",
    "fp16",
    "seed",
)
_RECORDED_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "use_dora")


def hush_known_warnings() -> None:
    """Keep warnings off the screen that no user can act on."""
    # TRL still says gradient checkpointing, where transformers has begun to say activation checkpointing.
    warnings.filterwarnings("ignore", message=".*activation_checkpointing.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found.*")


def main_console() -> Console:
    """A console that is silent on all processes but the main one."""
    return Console(quiet=not PartialState().is_main_process)


def loading_arguments(
    model_args: ModelConfig, training_args: TrlConfig, jai_args: JaiTrainingArguments
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the trainer, in which `model_init_kwargs` has the last word.

    Raises:
        UserError: for an experts implementation that is not known.
    """
    arguments = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "use_safetensors": True,  # nothing pickled
        "experts_implementation": jai_args.experts_implementation,
        **cast(dict[str, Any], training_args.model_init_kwargs or {}),
    }
    experts = arguments["experts_implementation"]
    if experts is None:
        del arguments["experts_implementation"]
        return arguments
    from jai.kernels.register import ALL_EXPERTS_FUNCTIONS  # importing it makes "jai_fused" known

    known = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    if experts not in known:
        raise UserError(f"`experts_implementation` is {experts!r}; expected one of {', '.join(sorted(known))}.")
    return arguments


@contextmanager
def building_trainer(data: TrainingData) -> Iterator[None]:
    """Around the construction of a trainer, which tokenises the data.

    Raises:
        UserError: if a conversation cannot be rendered.
    """
    try:
        yield
    except TemplateError as error:
        raise UserError(
            f"A conversation in {data.name} does not fit the chat template: {error} Mend the data, or give the "
            "tokenizer a template that takes it."
        ) from error


def report_dropped(console: Console, data: TrainingData, dropped: int, left: int, why: str) -> None:
    """Say how many training examples were left out.

    Raises:
        UserError: if none is left.
    """
    if left == 0:
        raise UserError(f"None of the examples in {data.name} can be trained on: {why}.")
    if dropped:
        console.print(f"[yellow]Left out {dropped:,} of {dropped + left:,} examples:[/] {why}.")


def train_and_save(
    trainer: Trainer,
    stage: str,
    source: Source,
    data: TrainingData,
    model_args: ModelConfig,
    jai_args: JaiTrainingArguments,
    resume: str | None,
    console: Console,
) -> Path:
    """Train, and leave a whole checkpoint (or an adapter) with its record in the output folder."""
    args = trainer.args
    out = Path(str(args.output_dir))
    metrics = trainer.train(resume_from_checkpoint=resume).metrics
    if trainer.is_fsdp_enabled:  # the final model in one piece, whatever the checkpoints are
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    adapter = out / "adapter"
    trainer.save_model(str(adapter if jai_args.merge_adapter else out))
    trainer.save_state()
    if trainer.is_world_process_zero():
        if jai_args.merge_adapter:
            console.print("Merging the adapter …")
            merge_adapter(adapter, out, source.name, dtype=model_args.dtype, **source.loading)
            source.tokenizer.save_pretrained(out)
            (adapter / "training_args.bin").unlink()
        options = {name: getattr(args, name) for name in _RECORDED_TRAINING if hasattr(args, name)}
        if model_args.use_peft:
            options |= {name: getattr(model_args, name) for name in _RECORDED_LORA}
            options |= {"lora_targets": jai_args.lora_targets, "lora_router": jai_args.lora_router}
        write_record(out, source, data, trainer, stage, options, metrics)
        _say_where(console, out, stage, source, is_adapter=model_args.use_peft and not jai_args.merge_adapter)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.name)
    if hasattr(trainer, "end"):  # transformers 5.18 and later
        trainer.end()
    return out


def _say_where(console: Console, out: Path, stage: str, source: Source, *, is_adapter: bool) -> None:
    folder, base = escape(str(out)), escape(source.name)
    if is_adapter:
        console.print(f"[bold green]Adapter written to[/] {folder} (for {base})")
        console.print(f'Next: [bold]AutoModelForCausalLM.from_pretrained("{folder}")[/] loads it with its model.')
        console.print("      `--merge_adapter true` makes a full checkpoint, which the next stage needs.")
        console.print(f"      [bold]jai publish {folder} OWNER/NAME --base OWNER/BASE[/]")
        return
    console.print(f"[bold green]Checkpoint written to[/] {folder}")
    if not source.is_jai:
        console.print(f"Next: [bold]jai convert {folder} OUT[/]")
        return
    following = {"pretrain": "sft", "sft": "dpo"}.get(stage)
    if following:
        console.print(f"Next: [bold]jai {following} --config recipes/{following}.yaml --model_name_or_path {folder}[/]")
    console.print(f'{"      " if following else "Next: "}[bold]jai generate {folder} "…"[/]')
    console.print(f"      [bold]jai publish {folder} OWNER/NAME[/]")


def run_as_script(main: Callable[[Sequence[str]], Path]) -> None:
    """Body of `python -m` and `accelerate launch -m`: a user's error is one line, and the exit status 1."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        Console(stderr=True).print(Text("Error: ", style="bold red") + Text(str(error)))
        raise SystemExit(1) from None
