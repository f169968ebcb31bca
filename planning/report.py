# SPDX-License-Identifier: Apache-2.0
"""A planned training as a table."""

from rich.table import Table

from jai.configuration_jai import JaiConfig
from jai.errors import UserError
from jai.planning.advice import MARGIN, fits, what_would_fit
from jai.planning.memory import Memory, Setup, peak_memory, saved_by_layer, trained_parameters
from jai.planning.options import PlanOptions
from jai.planning.time import DEVICES, speed

_DAY = 24 * 3600


def setup_of(options: PlanOptions, config: JaiConfig) -> Setup:
    """The setup that the options describe.

    Raises:
        UserError: for options that do not fit the model.
    """
    if options.new_rows > config.vocab_size:
        raise UserError(f"new_rows is {options.new_rows:,}, and the vocabulary has {config.vocab_size:,}. Give fewer.")
    is_cut = options.gpus > 1 and options.sharding != "none"
    weights = {"full": "float32", "lora": "bfloat16", "qlora": "nf4-double" if options.double_quant else "nf4"}
    return Setup(
        learns="full" if options.train == "full" else "lora",
        weights=weights[options.train or "full"],  # type: ignore[arg-type]
        # Where FSDP does not cast weights to bf16, grouped_mm computes experts in their own fp32.
        compute=4 if options.train == "full" and not is_cut else 2,
        rank=options.lora_r,
        new_rows=options.new_rows,
        state=8.0 if options.optimizer == "adamw" else 2.0,
        batch=options.batch_size,
        length=options.max_length,
        checkpointing=options.gradient_checkpointing,
        experts=options.experts_implementation,
        loss=options.loss,
        gpus=options.gpus,
        sharding=options.sharding if is_cut else "none",
        group=options.group,
    )


def memory_line(memory: Memory) -> str:
    """The peak and its parts in a line."""
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in memory.parts.items() if size)
    return f"{gigabytes(memory.total)} GB, in the {memory.moment}: {parts}"


def training_table(options: PlanOptions, config: JaiConfig) -> Table:
    """What a training takes on one GPU, whether it fits, and how fast it is.

    Raises:
        UserError: as `setup_of`.
    """
    setup, device = setup_of(options, config), DEVICES[options.gpu]
    memory = peak_memory(config, setup)
    cut = "" if setup.sharding == "none" else f", {setup.sharding} over {setup.shards}"
    title = f"Training ({options.train}) on {options.gpus:,} x {options.gpu}{cut}"
    table = Table(title=title, title_justify="left")
    table.add_column(f"on one GPU, in the {memory.moment}")
    table.add_column("GB", justify="right")
    for name, size in memory.parts.items():
        if size:
            table.add_row(name, gigabytes(size))
    table.add_row("peak", gigabytes(memory.total), style="bold")
    for name, size in saved_by_layer(config, setup).items():
        table.add_row(f"  a layer keeps, of its {name}", gigabytes(size))
    trained = sum(trained_parameters(config, setup).values())
    moved = speed(config, setup, device, options.utilization)
    reached = moved.utilisation(device, options.gpus)
    lines = [
        _fit(config, setup, memory, device.memory),
        f"{trained:,} parameters are trained; {moved.flops / 1e9:,.1f} GFLOP a token.",
        f"A micro-batch of {setup.tokens:,} tokens a GPU: {moved.computing:.2f} s at {options.utilization:.1%}"
        + (f"; {moved.sent / 1e9:,.1f} GB sent by each GPU, {moved.sending:.2f} s." if moved.sent else "."),
        f"{moved.tokens:,.0f} tokens a second, limited by {moved.limit} ({reached:.1%} of the peak); a day: "
        f"{moved.tokens * _DAY / 1e9:,.2f} B tokens.",
    ]
    table.caption, table.caption_justify = "\n".join(lines), "left"
    return table


def _fit(config: JaiConfig, setup: Setup, memory: Memory, size: float) -> str:
    if fits(config, setup, size):
        return f"Fits: {gigabytes(memory.total)} of {gigabytes(size)} GB."
    text = f"Does not fit: {gigabytes(memory.total)} GB, and {MARGIN:.0%} of {gigabytes(size)} GB can be filled"
    found = what_would_fit(config, setup, size)
    return f"{text}; nothing here would." if found is None else f"{text}; {found[0]} would: {gigabytes(found[1])} GB."


def gigabytes(number: float) -> str:
    return f"{number / 1e9:,.1f}" if number >= 1e8 else f"{number / 1e9:.4f}"
