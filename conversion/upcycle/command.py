# SPDX-License-Identifier: Apache-2.0
"""`jai upcycle`: a dense JAI and snapshots of its training become a mixture of experts (paper, section 3.1.3)."""

import torch
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jai.configuration_jai import JaiConfig
from jai.conversion.inputs.config import load_generation_config
from jai.conversion.inputs.values import dtype_names, is_rounded
from jai.conversion.output.checkpoint_folder import (
    PlannedCheckpoint,
    checkpoint_folder,
    copy_code,
    print_note,
    print_written,
    write_beside,
)
from jai.conversion.upcycle.options import UpcycleOptions
from jai.conversion.upcycle.plan import (
    UpcycleInputs,
    expert_text,
    open_upcycle_inputs,
    plan_upcycled_tensors,
    upcycled_config,
)
from jai.files import refuse_existing


def upcycle(options: UpcycleOptions, *, console: Console | None = None) -> JaiConfig:
    """Make a mixture of experts of a dense JAI: a checkpoint folder, complete for the Hub.

    Args:
        options: what to do. For a dry run the checkpoints may be without weights.
        console: where the plan and the progress are printed; None is standard output.

    Returns:
        The configuration of the result.

    Raises:
        UserError: for a checkpoint that is not dense, snapshots of another model, a checkpoint that is given twice,
            damaged weights, an output folder that exists, or a full disk.
    """
    console = console or Console()
    refuse_existing(options.out)
    inputs = open_upcycle_inputs(options, planned_only=options.dry_run)
    config = upcycled_config(inputs.dense, options)
    generation = load_generation_config(inputs.dense.folder)
    checkpoint = PlannedCheckpoint(
        step="upcycle",
        out=options.out,
        tensors=plan_upcycled_tensors(config, inputs, options),
        options=options.recorded() | {"dtype": str(config.dtype).removeprefix("torch.")},
        inputs=[
            ("dense", inputs.dense),
            *(("snapshot", snapshot) for snapshot in inputs.experts[1:]),
            ("base weights", inputs.base),
        ],
        tokenizer=inputs.dense.folder,
        result={"experts": [expert_text(expert, inputs, options) for expert in range(options.num_experts)]},
        max_shard_bytes=options.max_shard_size,
        workers=options.workers,
    )
    _print_plan(console, options, config, inputs, checkpoint)
    if options.dry_run:
        console.print("Dry run: nothing was written.")
        return config

    with checkpoint_folder(checkpoint, verify_bytes=options.verify, console=console) as folder:
        write_beside(folder, config, tokenizer=inputs.dense.folder, generation=generation)
        copy_code(folder)
    print_written(
        console,
        "JAI",
        options.out,
        ["jai", "inspect", options.out],
        ["jai", "sft", "--config", "X.yaml", "--model_name_or_path", options.out],
    )
    return config


def _print_plan(
    console: Console,
    options: UpcycleOptions,
    config: JaiConfig,
    inputs: UpcycleInputs,
    checkpoint: PlannedCheckpoint,
) -> None:
    dtype = str(config.dtype).removeprefix("torch.")
    table = Table(
        title=f"{escape(options.dense)} → {escape(str(options.out))}", title_justify="left", show_header=False
    )
    for expert in range(options.num_experts):
        table.add_row(f"expert {expert}", escape(expert_text(expert, inputs, options)))
    table.add_row("all other weights", escape(inputs.base.title))
    table.add_row("routers", f"drawn with seed {options.seed}; {config.num_experts_per_tok} experts for a token")
    table.add_row("layers", str(config.num_hidden_layers))
    table.add_row("weights", f"{checkpoint.parameters:,} parameters, {filesize.decimal(checkpoint.bytes)} in {dtype}")
    console.print(table)
    found = {dtype for one in inputs.all for dtype in one.reader.dtypes.values()}
    assert isinstance(config.dtype, torch.dtype)
    if options.dtype is None and any(is_rounded(wide, config.dtype) for wide in found):
        print_note(
            console,
            f"the checkpoints are {' and '.join(dtype_names(found))}, and the output has DENSE's {dtype}. --dtype "
            "float32 rounds nothing.",
        )
    for note in dict.fromkeys(note for one in inputs.all for note in one.notes):
        print_note(console, note)
