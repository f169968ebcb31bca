# SPDX-License-Identifier: Apache-2.0
"""Verbs that make checkpoints of checkpoints, and the one that shows what a checkpoint is made of.

Before PyTorch is imported, which takes seconds, the files of all inputs are looked at; and so that its 260 MB are all
that a conversion takes, tokenizers are read (`jai.conversion.inputs.tokenizer`).
"""

from functools import partial
from pathlib import Path

import typer

from jai.cli.verb import verb
from jai.conversion.adapter.files import adapter_folder, base_of, read_adapter_config
from jai.conversion.adapter.options import MergeAdapterOptions
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.export.options import ExportOptions
from jai.conversion.inputs.first_look import (
    look_at_checkpoint,
    read_any_config,
    read_jai_config,
    read_jai_or_snapshot_config,
    read_whole_jai_config,
)
from jai.conversion.inputs.phi3 import read_phi3_config
from jai.conversion.inputs.tokenizer import (
    check_tokenizer_files,
    check_tokenizer_json,
    first_with_tokenizer,
    read_tokenizer_content,
)
from jai.conversion.inspect_options import PAPERS_JAI, InspectOptions
from jai.conversion.merge.options import MergeOptions
from jai.conversion.quantize.options import QuantizeOptions
from jai.conversion.upcycle.options import SnapshotOptions, UpcycleOptions
from jai.files import refuse_existing
from jai.hub import local_folder
from jai.tokenization.loading import has_tokenizer

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_LARGE_BLOCK = 1 << 20  # bytes; values are computed in chunks of 4 to 32 MB

app = typer.Typer()


@verb(
    app,
    ConvertOptions,
    config="recipes/convert_phi3_medium.yaml",
    examples=(
        "jai convert microsoft/Phi-3-medium-4k-instruct converted --tokenizer tokenizer",
        "jai convert phi3-mini small --block-repeats 1,1,2,2,2,2,1,1 --experts 2",
        "jai convert phi3-medium solar --method dus-v1 --k 32 --experts 1",
    ),
)
def convert(options: ConvertOptions) -> None:
    """Turn a phi-3 into a JAI with more tokens, layers, experts.

    If interrupted, run the same command again to resume."""
    _prepare(options.out)
    folder = look_at_checkpoint(options.base, read_phi3_config, needs_weights=not options.dry_run)
    layers = read_phi3_config(folder).get("num_hidden_layers")
    if isinstance(layers, int):
        options.check_fits(layers)
    if options.tokenizer is not None:
        check_tokenizer_json(local_folder(options.tokenizer))
    from jai.conversion.convert.vocabulary import read_vocabulary

    vocabulary = read_vocabulary(options)
    _read_tokenizer(options.tokenizer or options.base)
    from jai.conversion.convert.command import convert

    convert(options, vocabulary)
    if options.verify and not options.dry_run and not options.stream:
        # It imports the models, which the conversion itself has no need of: 230 MB.
        from jai.conversion.convert.verify import verify_conversion

        verify_conversion(options)


@verb(
    app,
    UpcycleOptions,
    config="plan.yaml",
    examples=(
        "jai upcycle dense upcycled --base-weights pretrained \\\n"
        "    --snapshots run/checkpoint-2000 run/checkpoint-4000 run/checkpoint-6000",
    ),
)
def upcycle(options: UpcycleOptions) -> None:
    """Turn a dense JAI and its training snapshots into experts.

    If interrupted, run the same command again to resume."""
    named = {options.base_weights} - {"last", "first"}
    _prepare(options.out)
    for name in (options.dense, *options.snapshots, *sorted(named)):
        look_at_checkpoint(name, read_jai_or_snapshot_config, needs_weights=not options.dry_run)
    _read_tokenizer(options.dense)
    from jai.conversion.upcycle.command import upcycle

    upcycle(options)


@verb(
    app,
    SnapshotOptions,
    examples=("jai snapshot run/checkpoint-2000 snapshots/step-2000",),
)
def snapshot(options: SnapshotOptions) -> None:
    """Save only the FFN weights of a dense JAI, for jai upcycle.

    If interrupted, run the same command again to resume."""
    _prepare(options.out)
    look_at_checkpoint(options.checkpoint, read_jai_or_snapshot_config)
    from jai.conversion.upcycle.snapshot import snapshot

    snapshot(options)


@verb(
    app,
    MergeOptions,
    config="recipes/merge_m3.yaml",
    examples=(
        "jai merge merged --models thai reasoning --weights 0.6,0.4",
        "jai merge merged --models thai code --method ties --base sft --density 0.5",
    ),
)
def merge(options: MergeOptions) -> None:
    """Merge models of one architecture, with weights by layer.

    If interrupted, run the same command again to resume."""
    _prepare(options.out)
    names = [*options.models, *([options.base] if options.base is not None else [])]
    folders = [look_at_checkpoint(name, read_any_config, needs_weights=not options.dry_run) for name in names]
    for folder in folders:
        read_tokenizer_content(folder)
    _read_tokenizer(first_with_tokenizer(folders[: len(options.models)]))
    from jai.conversion.merge.command import merge

    merge(options)


@verb(
    app,
    ExportOptions,
    examples=(
        "jai export merged mixtral",
        "jai export dense phi3 --to phi3",
    ),
)
def export(options: ExportOptions) -> None:
    """Save a JAI as a Mixtral or Phi-3, if its skip alphas are 0.

    Serving engines run these without JAI's code. If interrupted, run the same command again to resume."""
    _prepare(options.out)
    look_at_checkpoint(options.model, read_jai_config)
    _read_tokenizer(options.model)
    from jai.conversion.export.command import export

    export(options)


@verb(
    app,
    QuantizeOptions,
    examples=("jai quantize dpo dpo-nf4 --double-quant",),
)
def quantize(options: QuantizeOptions) -> None:
    """Quantize a JAI to 4 bits (NF4), experts included.

    The model is never in memory as a whole. If interrupted, run the same command again to resume."""
    _prepare(options.out)
    look_at_checkpoint(options.model, read_whole_jai_config, needs_weights=not options.dry_run)
    _read_tokenizer(options.model)
    from jai.conversion.quantize.command import quantize

    quantize(options)


@verb(
    app,
    MergeAdapterOptions,
    examples=("jai merge-adapter sft sft-merged",),
)
def merge_adapter(options: MergeAdapterOptions) -> None:
    """Merge a LoRA adapter into the weights of its JAI.

    An adapter trained on 4-bit weights is merged into the 16-bit checkpoint. If interrupted, run the same command
    again to resume."""
    _prepare(options.out)
    folder = adapter_folder(options.adapter)
    base = base_of(options.adapter, read_adapter_config(folder), options.base)
    remedy = "Give the checkpoint in 16 or 32 bits that it was made from: --base CKPT"
    look_at_checkpoint(base, partial(read_whole_jai_config, remedy=remedy), needs_weights=not options.dry_run)
    _read_tokenizer(base)
    from jai.conversion.adapter.command import merge_lora

    merge_lora(options)


@verb(
    app,
    InspectOptions,
    examples=(
        "jai inspect converted",
        "jai inspect jai-1 --train full --gpus 64 --gpu H200",
    ),
)
def inspect(options: InspectOptions) -> None:
    """Show the layer plan, parameter counts and memory needs."""
    if options.model != PAPERS_JAI:
        look_at_checkpoint(options.model, read_jai_config, needs_weights=False)
    from jai.conversion.inspect_checkpoint import inspect

    inspect(options)


def _prepare(out: Path) -> None:
    """Refuse an output that is there already, and keep memory small."""
    _give_back_large_blocks()
    refuse_existing(out)


def _read_tokenizer(name: str | Path) -> None:
    """Read the tokenizer that the output gets, for the check that comes when all is planned."""
    folder = local_folder(name)
    if has_tokenizer(folder):
        check_tokenizer_files(folder)


def _give_back_large_blocks() -> None:
    """Let glibc give large blocks back to the system as soon as they are freed.

    By itself it keeps them once some were freed, and chunks leave holes in the heaps of the threads: `--expert-init
    noise` took 440 to 480 MB for 340, and a plain conversion 298 to 306 for 292, in as much time.
    """
    import ctypes  # here, for `jai --help` needs none

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # macOS and musl have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
