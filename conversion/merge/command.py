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
from jai.conversion.inputs.parts import Copied
from jai.conversion.inputs.values import dtype_names, is_rounded
from jai.conversion.inspect_checkpoint import load_jai_config
from jai.conversion.merge.checkpoints import MergeInput, check_alike, open_input
from jai.conversion.merge.curves import Curve
from jai.conversion.merge.options import MergeOptions
from jai.conversion.merge.plan import count_layers, plan_tensors
from jai.conversion.output.beside import copy_tokenizer, hashes_beside, write_beside
from jai.conversion.output.checkpoint_folder import Output
from jai.conversion.output.shards import plan_shards
from jai.conversion.output.tensors import PlannedTensor
from jai.files import refuse_existing, work_folder


@dataclass(frozen=True)
class _Merge:
    """A planned merge: its inputs, the base (where there is one) apart, and every tensor of the output."""

    models: list[MergeInput]
    base: MergeInput | None
    tensors: list[PlannedTensor]
    layers: int

    @property
    def first(self) -> MergeInput:
        return self.models[0]

    @property
    def inputs(self) -> list[tuple[str, MergeInput]]:
        return [*([("base", self.base)] if self.base else []), *(("model", model) for model in self.models)]

    @property
    def tokenizer_folder(self) -> Path:
        """That of the first model that has a tokenizer."""
        return next((model.folder for model in self.models if model.tokenizer), self.first.folder)


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
    plan = _Merge(models, base, plan_tensors(options, readers), count_layers(readers[0]))
    _print_plan(console, options, plan)
    if options.dry_run:
        console.print(
            f"Dry run: nothing was written of {len(plan_shards(plan.tensors, options.max_shard_size))} shards."
        )
        return

    output = Output(
        step="merge",
        out=options.out,
        tensors=plan.tensors,
        options=options.recorded(),
        identity={
            f"{role} {number}": {"weights": source.reader.identity(), "beside": hashes_beside(source.folder)}
            for number, (role, source) in enumerate(plan.inputs)
        },
        max_shard_bytes=options.max_shard_size,
        workers=options.workers,
    )
    output.write(
        lambda folder: _write_beside(folder, options, plan),
        lambda: [source.as_input(role) for role, source in plan.inputs],
        {"layers": plan.layers},
        verify_bytes=options.verify,
        console=console,
    )

    console.print(f"[bold green]Merged model written to[/] {escape(str(options.out))}", soft_wrap=True)
    next_command = {JaiConfig.model_type: f"jai inspect {options.out}", "phi3": f"jai convert {options.out} JAI"}
    if plan.first.model_type in next_command:
        console.print(f"Next: {next_command[plan.first.model_type]}", soft_wrap=True, highlight=False, markup=False)


def _write_beside(folder: Path, options: MergeOptions, plan: _Merge) -> None:
    """Configuration, code and tokenizer: a JAI's are written anew, another model's are copied."""
    first = plan.first.folder
    if plan.first.model_type == JaiConfig.model_type:
        config = load_jai_config(first)
        if options.dtype:
            config.dtype = getattr(torch, options.dtype)
        write_beside(folder, config, tokenizer=plan.tokenizer_folder, generation=first)
        return
    for path in (*sorted(first.glob("*.py")), first / "generation_config.json"):
        if path.exists():
            shutil.copyfile(path, folder / path.name)
    config = json.loads((first / "config.json").read_text(encoding="utf-8"))
    if options.dtype:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = options.dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    copy_tokenizer(folder, plan.tokenizer_folder)


def _print_plan(console: Console, options: MergeOptions, plan: _Merge) -> None:
    copied = sum(isinstance(part, Copied) for tensor in plan.tensors for part in tensor.parts)
    size = filesize.decimal(sum(tensor.bytes for tensor in plan.tensors))
    dtypes = dtype_names(tensor.dtype for tensor in plan.tensors)
    table = Table(title=f"{options.method} → {escape(str(options.out))}", title_justify="left")
    for column in ("", "from", "t" if options.method == "slerp" else "weight"):
        table.add_column(column)
    if plan.base:
        table.add_row("base", escape(plan.base.name), "")
    for number, model in enumerate(plan.models):
        curve = options.curves[0 if options.method == "slerp" else number]
        weight = "" if options.method == "slerp" and number == 0 else _curve_text(curve, plan.layers)
        table.add_row(f"model {number + 1}", escape(model.name), weight)
    parameters = sum(tensor.numel for tensor in plan.tensors)
    table.add_row("weights", f"{parameters:,} parameters, {size} in {' and '.join(dtypes)}", "")
    table.add_row("tensors", f"{len(plan.tensors) - copied:,} computed, {copied:,} copied", "")
    console.print(table)
    if options.dtype is None:
        _note_rounding(console, plan)
    without = [source.name for _, source in plan.inputs if source.tokenizer is None]
    if without:
        _note(console, f"no tokenizer.json to compare in {', '.join(without)}.")


def _note_rounding(console: Console, plan: _Merge) -> None:
    for _, source in plan.inputs:
        found = source.reader.dtypes
        rounded = [tensor for tensor in plan.tensors if is_rounded(found[tensor.name], tensor.dtype)]
        if rounded:
            wide, narrow = (found[tensor.name] for tensor in rounded), (tensor.dtype for tensor in rounded)
            _note(
                console,
                f"{len(rounded):,} tensors of {source.name} are {' and '.join(dtype_names(wide))}, and the output has "
                f"the first model's {' and '.join(dtype_names(narrow))}. --dtype float32 rounds nothing.",
            )


def _note(console: Console, text: str) -> None:
    console.print(f"[yellow]Note:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _curve_text(curve: Curve, layers: int) -> str:
    """For people: 0.25, or each bend with its layer."""
    if curve.is_constant:
        return f"{curve.points[0][1]:g}"
    position = 1 if curve.by_layer else max(layers - 1, 1)
    return ", ".join(f"{value:g} at layer {place * position:.4g}" for place, value in curve.points)
