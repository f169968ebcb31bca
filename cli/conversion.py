# SPDX-License-Identifier: Apache-2.0
"""Verbs that make checkpoints of checkpoints."""

from typing import Annotated

import typer

from jai.cli.verb import verb
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.export.options import ExportOptions
from jai.conversion.merge.options import MergeOptions
from jai.conversion.upcycle.options import SnapshotOptions, UpcycleOptions

app = typer.Typer()


@verb(app, ConvertOptions, config="recipes/convert_phi3_medium.yaml")
def convert(options: ConvertOptions) -> None:
    """Turn a phi-3 checkpoint into a JAI: vocabulary, depth, experts. Run again after a break, it goes on."""
    from jai.conversion.convert.command import convert
    from jai.conversion.convert.verify import verify_conversion

    convert(options)
    if options.verify and not options.dry_run and not options.stream:
        verify_conversion(options)


@verb(app, UpcycleOptions, config="plan.yaml")
def upcycle(options: UpcycleOptions) -> None:
    """Make experts of a dense JAI and snapshots of its training. Run again after a break, it goes on."""
    from jai.conversion.upcycle.command import upcycle

    upcycle(options)


@verb(app, SnapshotOptions)
def snapshot(options: SnapshotOptions) -> None:
    """Keep only the FFN weights of a dense JAI, for jai upcycle."""
    from jai.conversion.upcycle.snapshot import snapshot

    snapshot(options)


@verb(app, MergeOptions, config="recipes/merge_m3.yaml")
def merge(options: MergeOptions) -> None:
    """Merge checkpoints of one architecture, with weights by layer. Run again after a break, it goes on."""
    from jai.conversion.merge.command import merge

    merge(options)


@verb(app, ExportOptions)
def export(options: ExportOptions) -> None:
    """Write a JAI without skips as a Mixtral or a Phi-3.

    Engines that do not have its code can serve that."""
    from jai.conversion.export.command import export

    export(options)


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Folder or Hub id of a JAI, or jai-1 for the paper's, without weights."),
    ],
) -> None:
    """Show the layer plan, the parameters and the memory they take."""
    from jai.conversion.inspect_checkpoint import inspect

    inspect(path)
