# SPDX-License-Identifier: Apache-2.0
"""What a stage is about to do, printed before it begins."""

import copy
import math

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, SchedulerType
from trl import ModelConfig

from jai.trainers.arguments import TrlConfig
from jai.trainers.data import TrainingData, estimate_tokens
from jai.trainers.source import Source


def count_parameters(source: Source, lora: LoraConfig | None) -> tuple[int, int]:
    """Parameters that will be trained, and in all (adapters included), counted without reading weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config, trust_remote_code=source.loading["trust_remote_code"])
        if lora is not None:
            model = get_peft_model(model, copy.deepcopy(lora))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in model.parameters())


def estimate_steps(
    training_args: TrlConfig, rows: int | None, tokens_per_row: float, packing: bool, max_length: int | None
) -> int | None:
    """Optimiser steps of the run; None where the number of rows is unknown and no `max_steps` is set."""
    if training_args.max_steps > 0:
        return training_args.max_steps
    if rows is None:
        return None
    if packing and max_length:
        rows = math.ceil(rows * tokens_per_row / max_length)
    batches = math.ceil(rows / (training_args.per_device_train_batch_size * training_args.world_size))
    steps = max(math.ceil(batches / training_args.gradient_accumulation_steps), 1)
    return math.ceil(steps * training_args.num_train_epochs)


def print_plan(
    console: Console,
    title: str,
    source: Source,
    data: TrainingData,
    training_args: TrlConfig,
    model_args: ModelConfig,
    lora: LoraConfig | None,
    *,
    loss_on: str,
    merge: bool,
) -> None:
    """Print a stage's plan. Tokens and steps are estimates from a sample of the rows."""
    max_length = training_args.max_length
    packing = getattr(training_args, "packing", False)
    tokens = estimate_tokens(data, source.tokenizer, max_length)
    steps = estimate_steps(training_args, data.rows, tokens, packing, max_length)
    trained, total = count_parameters(source, lora)
    batch = (
        training_args.per_device_train_batch_size,
        training_args.gradient_accumulation_steps,
        training_args.world_size,
    )

    model_name, data_name = escape(source.name), escape(data.name)
    if source.is_jai:
        code = "the installed jai package (no code from the checkpoint runs)"
    elif training_args.trust_remote_code:
        code = f"[bold]runs the model code in {model_name}[/] (trust_remote_code)"
    else:
        code = "transformers"
    if lora is None:
        adapter = "none: every weight is trained"
    else:
        targets = [*sorted(_names(lora.target_modules)), *(lora.target_parameters or [])]
        adapter = f"LoRA, rank {lora.r}, on {', '.join(targets)}"
        if lora.modules_to_save:
            adapter += f"; whole: {', '.join(lora.modules_to_save)}"
    length = f"at most {max_length:,} tokens each" if max_length else "of any length"
    size = "streamed" if data.rows is None else f"{data.rows:,} rows, about {data.rows * tokens:,.0f} tokens"
    autocast = ", autocast to bf16" if training_args.bf16 else ", autocast to fp16" if training_args.fp16 else ""

    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("model", model_name)
    table.add_row("code", code)
    table.add_row("parameters", f"{total:,}, of which {trained:,} are trained ({trained / total:.2%})")
    table.add_row("adapter", adapter)
    table.add_row("data", f"{data_name}: {size}; {'packed, ' if packing else ''}{length}")
    table.add_row("loss on", loss_on)
    table.add_row(
        "steps",
        f"{'unknown' if steps is None else f'about {steps:,}'}, each on {math.prod(batch):,} sequences "
        f"({batch[0]} a device x {batch[1]} accumulated x {batch[2]} processes)",
    )
    schedule = SchedulerType(training_args.lr_scheduler_type).value
    table.add_row("learning rate", f"{training_args.learning_rate:g}, {schedule}")
    table.add_row("device", f"{training_args.device.type}, weights in {model_args.dtype}{autocast}")
    table.add_row(
        "output", f"{escape(str(training_args.output_dir))} ({'adapter' if lora and not merge else 'full checkpoint'})"
    )
    console.print(table)


def _names(targets: str | set[str] | list[str] | None) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets or [])
