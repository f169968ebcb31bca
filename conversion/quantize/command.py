# SPDX-License-Identifier: Apache-2.0
"""`jai quantize`: a JAI in four bits, written shard by shard: neither model need fit in memory.

The result is what `from_pretrained` with a `BitsAndBytesConfig` and `save_pretrained` make, to the last bit of every
weight, and loads by itself.
"""

from pathlib import Path

import torch
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import BitsAndBytesConfig

from jai.configuration_jai import JaiConfig
from jai.conversion.inputs.config import load_generation_config
from jai.conversion.inputs.jai import open_whole_jai
from jai.conversion.output.checkpoint_folder import (
    PlannedCheckpoint,
    checkpoint_folder,
    copy_code,
    print_note,
    print_written,
    write_beside,
)
from jai.conversion.output.shards import plan_shards
from jai.conversion.quantize.options import QuantizeOptions
from jai.conversion.quantize.plan import QUANT_TYPE, QuantizedPlan, plan_quantized_tensors
from jai.errors import UserError
from jai.files import refuse_existing
from jai.quantization_jai import refuse_old_bitsandbytes


def quantize(options: QuantizeOptions, *, console: Console | None = None) -> JaiConfig:
    """Write a JAI with its experts and linear layers in NF4.

    Args:
        options: what to do.
        console: where the plan and the progress are printed; None is standard output.

    Returns:
        The configuration of the result.

    Raises:
        UserError: for a JAI whose sizes are no multiple of 64, for a snapshot, damaged weights, an output folder that
            exists, a full disk, or a bitsandbytes that is too old.
        ModuleNotFoundError: without bitsandbytes.
    """
    console = console or Console()
    refuse_existing(options.out)
    try:
        refuse_old_bitsandbytes()
    except ModuleNotFoundError:
        raise
    except ImportError as error:
        raise UserError(str(error)) from None
    source = open_whole_jai(options.model, planned_only=options.dry_run)
    config = source.config
    dtype = getattr(torch, options.dtype) if options.dtype else source.dtype
    config.dtype = dtype
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=QUANT_TYPE,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=dtype,
    ).to_dict()
    plan = plan_quantized_tensors(source.reader, config, dtype, double=options.double_quant)
    checkpoint = PlannedCheckpoint(
        step="quantize",
        out=options.out,
        tensors=plan.tensors,
        options={
            "quant_type": QUANT_TYPE,
            "double_quant": options.double_quant,
            "dtype": str(dtype).removeprefix("torch."),
        },
        inputs=[("model", source)],
        tokenizer=source.folder,
        max_shard_bytes=options.max_shard_size,
        workers=options.workers,
        packages=("bitsandbytes",),
    )
    console.print(_plan_table(options, checkpoint, plan))
    for note in source.notes:
        print_note(console, note)
    if options.dry_run:
        shards = plan_shards(checkpoint.tensors, options.max_shard_size)
        console.print(f"Dry run: nothing was written of {len(shards)} shards.", highlight=False)
        return config

    generation = load_generation_config(source.folder)
    with checkpoint_folder(checkpoint, verify_bytes=options.verify, console=console) as folder:
        write_beside(folder, config, tokenizer=source.folder, generation=generation)
        copy_code(folder)
    following: list[list[str | Path]] = [
        ["jai", "generate", options.out, "…"],
        ["jai", "publish", options.out, "OWNER/NAME"],
    ]
    print_written(console, "JAI in four bits", options.out, *following)
    return config


def _plan_table(options: QuantizeOptions, checkpoint: PlannedCheckpoint, plan: QuantizedPlan) -> Table:
    title = f"{escape(options.model)} → {escape(str(options.out))}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = "NF4 in blocks of 64 weights" + (", the blocks' scales in 8 bits" if options.double_quant else "")
    table.add_column("")
    for column in ("weights", "size", "bytes a weight"):
        table.add_column(column, justify="right")
    table.add_column("as")
    whole = str(checkpoint.options["dtype"])
    for part, (weights, size, is_quantized) in plan.parts.items():
        form = "NF4" if is_quantized else whole
        table.add_row(part, f"{weights:,}", filesize.decimal(size), f"{size / weights:.3f}", form)
    total = checkpoint.bytes / checkpoint.parameters
    table.add_row("all", f"{checkpoint.parameters:,}", filesize.decimal(checkpoint.bytes), f"{total:.3f}", "")
    return table
