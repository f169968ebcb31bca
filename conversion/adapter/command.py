# SPDX-License-Identifier: Apache-2.0
"""`jai merge-adapter`: a JAI with a LoRA adapter merged into it, written shard by shard.

The adapter may have been trained on the model in four bits: it is merged into the weights in 16 bits that those were
made of. Merged values are computed in fp32 and rounded once; PEFT rounds the change before it adds it. A reward model's
gives a whole reward model, with its calibration.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.markup import escape

from jai.configuration_jai import JaiConfig
from jai.conversion.adapter.files import CALIBRATION_FILE, CONFIG, WEIGHTS, adapter_folder, base_of, read_adapter_config
from jai.conversion.adapter.options import MergeAdapterOptions
from jai.conversion.adapter.plan import SCORE, plan_adapted_tensors, shapes_with_adapter
from jai.conversion.inputs.checkpoint import Checkpoint
from jai.conversion.inputs.config import load_generation_config
from jai.conversion.inputs.jai import jai_shapes, open_whole_jai
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.inputs.weight_sources import LocalFiles
from jai.conversion.output.checkpoint_folder import (
    PlannedCheckpoint,
    checkpoint_folder,
    copy_code,
    print_note,
    print_written,
    write_beside,
)
from jai.files import refuse_existing, sha256
from jai.provenance import Input, input_of, read_step


@dataclass(frozen=True)
class _Adapter(Checkpoint):
    """An adapter, whose configuration has another name than a model's."""

    def identity(self) -> dict[str, Any]:
        return {CONFIG: sha256(self.folder / CONFIG)} | self.reader.identity()

    def as_input(self, role: str) -> Input:
        files = {CONFIG: sha256(self.folder / CONFIG)} | self.reader.hashes()
        return input_of(role, self.name, files=files, made_by=read_step(self.folder))


def merge_lora(options: MergeAdapterOptions, *, console: Console | None = None) -> JaiConfig:
    """Write a JAI with an adapter merged into it.

    Args:
        options: what to do.
        console: where the plan and the progress are printed; None is standard output.

    Returns:
        The configuration of the result.

    Raises:
        UserError: for an adapter that does not fit the model, or is a variant of LoRA, a base that is quantised or no
            JAI, damaged weights, an output folder that exists, or a full disk.
    """
    console = console or Console()
    refuse_existing(options.out)
    folder = adapter_folder(options.adapter)
    config = read_adapter_config(folder)
    source = open_whole_jai(base_of(options.adapter, config, options.base), planned_only=options.dry_run)
    adapter = _Adapter(options.adapter, folder, CheckpointReader(LocalFiles(folder, [WEIGHTS])))
    shapes = shapes_with_adapter(jai_shapes(source.config), adapter.reader, source.config.hidden_size)
    tensors, counts = plan_adapted_tensors(source.reader, adapter.reader, config, shapes)
    checkpoint = PlannedCheckpoint(
        step="merge-adapter",
        out=options.out,
        tensors=tensors,
        options={},
        inputs=[("base", source), ("adapter", adapter)],
        tokenizer=_tokenizer_of(folder, source.folder),
        max_shard_bytes=options.max_shard_size,
        workers=options.workers,
    )
    changed = ", ".join(f"{count} {how}" for how, count in counts.items())
    console.print(
        f"[bold]{escape(source.name)} + {escape(options.adapter)} → {escape(str(options.out))}[/]: {len(tensors)} "
        f"tensors, {filesize.decimal(checkpoint.bytes)}; {changed}; rank {config.rank}, scale {config.scale:g}",
        highlight=False,
    )
    for note in source.notes:
        print_note(console, note)
    if options.dry_run:
        console.print("Dry run: nothing was written.", highlight=False)
        return source.config
    source.config.dtype = source.dtype
    if SCORE in shapes:  # of a reward model
        source.config.architectures, source.config.num_labels = ["JaiForSequenceClassification"], shapes[SCORE][0]
    generation = load_generation_config(source.folder)
    with checkpoint_folder(checkpoint, verify_bytes=options.verify, console=console) as out:
        write_beside(out, source.config, tokenizer=checkpoint.tokenizer, generation=generation)
        copy_code(out)
        if SCORE in shapes and (folder / CALIBRATION_FILE).exists():
            shutil.copyfile(folder / CALIBRATION_FILE, out / CALIBRATION_FILE)
    following: list[list[str | Path]] = [
        ["jai", "generate", options.out, "…"],
        ["jai", "publish", options.out, "OWNER/NAME"],
    ]
    if SCORE in shapes:
        following = [["jai", "score", "ANSWERS.jsonl", "OUT", "--model", options.out]]
    print_written(console, "Merged JAI", options.out, *following)
    return source.config


def _tokenizer_of(adapter: Path, base: Path) -> Path:
    """The adapter's, which may have another chat template than the base's; the base's where it has none."""
    return adapter if (adapter / "tokenizer.json").exists() else base
