# SPDX-License-Identifier: Apache-2.0
"""`jai snapshot`: of a dense JAI's checkpoint only the FFN weights, which become an expert (paper, section 3.1.3)."""

import json

from rich import filesize
from rich.console import Console
from rich.markup import escape

from jai.conversion.inputs.config import CONFIG_FILE
from jai.conversion.inputs.jai import feed_forward_shapes, open_jai, snapshot_config
from jai.conversion.output.checkpoint_folder import PlannedCheckpoint, checkpoint_folder, print_note, print_written
from jai.conversion.output.tensors import PlannedTensor
from jai.conversion.upcycle.options import SnapshotOptions
from jai.errors import UserError
from jai.files import refuse_existing


def snapshot(options: SnapshotOptions, *, console: Console | None = None) -> None:
    """Keep the FFN weights of a dense JAI, byte for byte, in a folder that `jai upcycle` takes and nothing loads.

    Args:
        options: what to do.
        console: where to print; None is standard output.

    Raises:
        UserError: for a checkpoint that is no dense JAI or is a snapshot already, damaged weights, an output folder
            that exists, or a full disk.
    """
    console = console or Console()
    refuse_existing(options.out)
    source = open_jai(options.checkpoint)
    if source.is_snapshot:
        raise UserError(f"{source.name} has only FFN weights already. Give it to jai upcycle as it is.")
    if source.config.num_local_experts > 1:
        raise UserError(
            f"{source.name} has {source.config.num_local_experts} experts in each layer. Snapshots are of a dense JAI: "
            "jai convert --experts 1."
        )
    tensors = [
        PlannedTensor(name, shape, source.reader.dtypes[name], (source.reader.copied(name),))
        for name, shape in feed_forward_shapes(source.config).items()
    ]
    planned = PlannedCheckpoint(
        step="snapshot",
        out=options.out,
        tensors=tensors,
        options={},
        inputs=[("model", source)],
        result={"global_step": source.global_step},
        max_shard_bytes=options.max_shard_size,
        workers=options.workers,
    )
    console.print(
        f"{escape(source.name)} → {escape(str(options.out))}: the FFN weights of {escape(source.title)}, "
        f"{filesize.decimal(planned.bytes)}",
        soft_wrap=True,
        highlight=False,
    )
    for note in source.notes:
        print_note(console, note)
    if options.dry_run:
        console.print("Dry run: nothing was written.")
        return
    with checkpoint_folder(planned, verify_bytes=options.verify, console=console) as folder:
        content = snapshot_config(source.config, source.global_step)
        (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print_written(console, "Snapshot", options.out, ["jai", "upcycle", "DENSE", "OUT", "--snapshots", options.out])
