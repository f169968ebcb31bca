# SPDX-License-Identifier: Apache-2.0
"""`jai merge`: several checkpoints of one model become one (paper, section 6.3).

It takes any safetensors checkpoints of one architecture. Every tensor of the output has a formula, with weights that
may depend on the layer; it is computed in fp32, in chunks, when it is written.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jai.configuration_jai import JaiConfig
from jai.conversion.inputs.config import CONFIG_FILE, GENERATION_CONFIG_FILE, load_generation_config, read_config
from jai.conversion.inputs.jai import load_jai_config
from jai.conversion.inputs.parts import Copied
from jai.conversion.inputs.tokenizer import first_with_tokenizer
from jai.conversion.inputs.values import dtype_names, is_rounded
from jai.conversion.merge.checkpoints import MergeInput, check_alike, open_input
from jai.conversion.merge.curves import Curve
from jai.conversion.merge.options import MergeOptions
from jai.conversion.merge.plan import count_layers, plan_merged_tensors
from jai.conversion.output.checkpoint_folder import (
    PlannedCheckpoint,
    checkpoint_folder,
    copy_code,
    copy_tokenizer,
    print_note,
    print_written,
    write_beside,
)
from jai.conversion.output.shards import plan_shards
from jai.errors import UserError
from jai.files import check_is_file, refuse_existing, work_folder


@dataclass(frozen=True)
class _MergeInputs:
    """The inputs of a merge, the base (where there is one) apart, and where each of their layers lies on the curves."""

    models: list[MergeInput]
    base: MergeInput | None
    places: list[int]

    @property
    def first(self) -> MergeInput:
        return self.models[0]

    @property
    def by_role(self) -> list[tuple[str, MergeInput]]:
        return [*([("base", self.base)] if self.base else []), *(("model", model) for model in self.models)]

    @property
    def tokenizer_folder(self) -> Path:
        """That of the first model that has a tokenizer."""
        return first_with_tokenizer([model.folder for model in self.models])


def merge(options: MergeOptions, *, console: Console | None = None) -> None:
    """Merge checkpoints into a checkpoint folder, complete for the Hub.

    Args:
        options: what to do.
        console: where the plan and the progress are printed; None is standard output.

    Raises:
        UserError: for checkpoints that differ in architecture, plan, tensors or tokenizer, weights that fit no layer,
            damaged weights, an output folder that exists, or a full disk.
    """
    console = console or Console()
    refuse_existing(options.out)
    downloads = work_folder(options.out) / "downloads"
    models = [open_input(name, downloads, planned_only=options.dry_run) for name in options.models]
    base = open_input(options.base, downloads, planned_only=options.dry_run) if options.base is not None else None
    for other in [*models[1:], *([base] if base else [])]:
        check_alike(models[0], other)
    readers = [*([base.reader] if base else []), *(model.reader for model in models)]
    inputs = _MergeInputs(models, base, _places(options, models[0]))
    generation = load_generation_config(inputs.first.folder)
    checkpoint = PlannedCheckpoint(
        step="merge",
        out=options.out,
        tensors=plan_merged_tensors(
            options, readers, inputs.places, ties_head=bool(inputs.first.config.get("tie_word_embeddings"))
        ),
        options=options.recorded(),
        inputs=[*inputs.by_role],
        tokenizer=inputs.tokenizer_folder,
        result={"layers": len(inputs.places)},
        max_shard_bytes=options.max_shard_size,
        workers=options.workers,
    )
    _print_plan(console, options, inputs, checkpoint)
    if options.dry_run:
        shards = plan_shards(checkpoint.tensors, options.max_shard_size)
        console.print(f"Dry run: nothing was written of {len(shards)} shards.")
        return

    with checkpoint_folder(checkpoint, verify_bytes=options.verify, console=console) as folder:
        if inputs.first.model_type == JaiConfig.model_type:
            config = load_jai_config(inputs.first.folder)
            if options.dtype:
                config.dtype = getattr(torch, options.dtype)
            write_beside(folder, config, tokenizer=inputs.tokenizer_folder, generation=generation)
            copy_code(folder)
        else:
            _copy_beside(folder, options, inputs)
    next_commands: dict[str, list[str | Path]] = {
        JaiConfig.model_type: ["jai", "inspect", options.out],
        "phi3": ["jai", "convert", options.out, "JAI"],
    }
    following = next_commands.get(inputs.first.model_type)
    print_written(console, "Merged model", options.out, *([following] if following else []))


def _places(options: MergeOptions, first: MergeInput) -> list[int]:
    """Where each layer lies: its index, or with `place_by: origin` that of the base's layer that it was copied from.

    Raises:
        UserError: for origins of a model that is no JAI.
    """
    layers = count_layers(first.reader)
    if not options.places_by_origin:
        return list(range(layers))
    if first.model_type != JaiConfig.model_type:
        raise UserError(
            f"place_by is origin, but {first.name} is not a JAI (model_type {first.model_type!r}): its layers are "
            "copies of none. Leave place_by out."
        )
    places = [planned.origin for planned in load_jai_config(first.folder).running_plan]
    if len(places) != layers:
        raise UserError(
            f"{first.name} has weights of {layers} layers, and its configuration plans {len(places)}. It is damaged, "
            "or not whole; fetch it again."
        )
    return places


def _copy_beside(folder: Path, options: MergeOptions, inputs: _MergeInputs) -> None:
    """What lies beside the weights of a model that is no JAI, as the first has it."""
    first = inputs.first.folder
    for path in (*sorted(first.glob("*.py")), first / GENERATION_CONFIG_FILE):
        if path.exists():
            check_is_file(path)
            shutil.copyfile(path, folder / path.name)
    config = read_config(first, "Give a folder that save_pretrained wrote.")
    if options.dtype:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = options.dtype
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    copy_tokenizer(folder, inputs.tokenizer_folder)


def _print_plan(console: Console, options: MergeOptions, inputs: _MergeInputs, checkpoint: PlannedCheckpoint) -> None:
    copied = sum(isinstance(part, Copied) for tensor in checkpoint.tensors for part in tensor.parts)
    size = filesize.decimal(checkpoint.bytes)
    dtypes = dtype_names(tensor.dtype for tensor in checkpoint.tensors)
    table = Table(title=f"{options.method} → {escape(str(options.out))}", title_justify="left")
    for column in ("", "from", "t" if options.method == "slerp" else "weight"):
        table.add_column(column)
    if inputs.base:
        table.add_row("base", escape(inputs.base.name), "")
    for number, model in enumerate(inputs.models):
        curve = options.curves[0 if options.method == "slerp" else number]
        weight = (
            ""
            if options.method == "slerp" and number == 0
            else _curve_text(curve, inputs.places, "base layer" if options.places_by_origin else "layer")
        )
        table.add_row(f"model {number + 1}", escape(model.name), weight)
    table.add_row("weights", f"{checkpoint.parameters:,} parameters, {size} in {' and '.join(dtypes)}", "")
    table.add_row("tensors", f"{len(checkpoint.tensors) - copied:,} computed, {copied:,} copied", "")
    console.print(table)
    if options.places_by_origin and all(curve.is_constant for curve in options.curves):
        print_note(console, "no weight depends on the layer, so --place-by changes nothing.")
    if options.dtype is None:
        _note_rounding(console, inputs, checkpoint)
    for note in dict.fromkeys(note for _, source in inputs.by_role for note in source.notes):
        print_note(console, note)
    without = [source.name for _, source in inputs.by_role if source.tokenizer is None]
    if without:
        print_note(console, f"no tokenizer.json to compare in {', '.join(without)}.")


def _note_rounding(console: Console, inputs: _MergeInputs, checkpoint: PlannedCheckpoint) -> None:
    for _, source in inputs.by_role:
        found = source.reader.dtypes
        rounded = [tensor for tensor in checkpoint.tensors if is_rounded(found[tensor.name], tensor.dtype)]
        if rounded:
            wide, narrow = (found[tensor.name] for tensor in rounded), (tensor.dtype for tensor in rounded)
            print_note(
                console,
                f"{len(rounded):,} tensors of {source.name} are {' and '.join(dtype_names(wide))}, and the output has "
                f"the first model's {' and '.join(dtype_names(narrow))}. --dtype float32 rounds nothing.",
            )


def _curve_text(curve: Curve, places: list[int], of: str) -> str:
    """For people: 0.25, or each bend with its layer."""
    if curve.is_constant:
        return f"{curve.points[0][1]:g}"
    position = 1 if curve.by_layer else max(max(places, default=0), 1)
    return ", ".join(f"{value:g} at {of} {place * position:.4g}" for place, value in curve.points)
