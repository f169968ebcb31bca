# SPDX-License-Identifier: Apache-2.0
"""`jai convert`: a phi-3 checkpoint becomes a JAI, complete for the Hub."""

from collections.abc import Iterator
from typing import Any

from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from jai.configuration_jai import JaiConfig
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.convert.plan import ConversionPlan, origins, plan_conversion
from jai.conversion.convert.vocabulary import INIT_TEXTS, Vocabulary
from jai.conversion.output.checkpoint_folder import (
    PlannedCheckpoint,
    checkpoint_folder,
    copy_code,
    print_note,
    print_written,
    write_beside,
)
from jai.conversion.output.shards import OutputShard, plan_shards
from jai.files import refuse_existing

_LISTED_TOKENS = 10


def convert(
    options: ConvertOptions, vocabulary: Vocabulary | None = None, *, console: Console | None = None
) -> JaiConfig:
    """Convert a phi-3 checkpoint into a JAI checkpoint folder, complete for the Hub.

    Args:
        options: what to do. For a dry run the base may be a folder without weights.
        vocabulary: what `read_vocabulary` gives for them; None reads it. Read before PyTorch is imported, it takes no
            memory beside PyTorch's.
        console: where the plan and the progress are printed; None is standard output.

    Returns:
        The configuration of the JAI.

    Raises:
        UserError: for a base that is no phi-3, a plan that does not fit it, a tokenizer that does not extend its
            tokenizer, damaged weights, an output folder that exists, or a full disk. The output folder is complete or
            not there; finished shards wait beside it for the same command (`resumable_folder`).
    """
    console = console or Console()
    refuse_existing(options.out)
    plan = plan_conversion(options, vocabulary)
    checkpoint = PlannedCheckpoint(
        step="convert",
        out=options.out,
        tensors=plan.tensors,
        options=_recorded_options(options, plan.config),
        inputs=[("base", plan.base)],
        tokenizer=plan.tokenizer_folder,
        result={
            "layers": len(plan.config.layer_plan),
            "vocab_size": plan.vocabulary.size,
            "new_rows": plan.vocabulary.new_rows,
            "new_row_ids": ",".join(f"{run[0]}-{run[-1]}" for run in plan.vocabulary.new_runs()),  # for `new_rows`
            "new_rows_without_pieces": plan.vocabulary.without_pieces,
        },
        max_shard_bytes=options.max_shard_size,
        workers=options.workers,
    )
    _print_plan(console, options, plan)
    if options.dry_run:
        _print_shards(console, plan_shards(plan.tensors, options.max_shard_size))
        console.print("Dry run: nothing was written.")
        return plan.config

    with checkpoint_folder(checkpoint, verify_bytes=options.verify, console=console) as folder:
        write_beside(folder, plan.config, tokenizer=plan.tokenizer_folder, generation=plan.generation)
        copy_code(folder)
    print_written(
        console,
        "JAI",
        options.out,
        ["jai", "inspect", options.out],
        ["jai", "sft", "--config", "X.yaml", "--model_name_or_path", options.out],
    )
    return plan.config


def _recorded_options(options: ConvertOptions, config: JaiConfig) -> dict[str, Any]:
    """What decides the values of the output."""
    return options.recorded() | {
        "block_size": config.block_size,
        "block_repeats": config.block_repeats,
        "dtype": str(config.dtype).removeprefix("torch."),
    }


def _print_plan(console: Console, options: ConvertOptions, plan: ConversionPlan) -> None:
    base, config, vocabulary = plan.base_config, plan.config, plan.vocabulary
    dtype = str(config.dtype).removeprefix("torch.")
    runs = ",".join(map(str, config.block_repeats))
    block = "1 layer" if config.block_size == 1 else f"{config.block_size} layers"
    stack = f"layers {_runs_text(origins(options, base.num_hidden_layers))}" if options.is_plain else ""
    copies = len(config.initial_skip_alphas)
    later_copies = f"{options.start_of_copies}, {copies} skip alphas at {options.start_alpha:g}" if copies else "none"
    window = getattr(base, "sliding_window", None)
    rope, new_rope = base.rope_parameters, config.rope_parameters
    assert rope is not None  # transformers replaces None
    assert new_rope is not None
    theta, new_theta = rope["rope_theta"], new_rope["rope_theta"]

    table = Table(title=escape(f"{options.base} → {options.out}"), title_justify="left")
    for column in ("", "phi-3", "JAI"):
        table.add_column(column)
    table.add_row("layers", str(base.num_hidden_layers), str(len(config.layer_plan)))
    table.add_row("plan", "", stack or f"blocks of {block}, run {runs} times")
    table.add_row("later copies", "", later_copies)
    table.add_row("experts", "1", f"{config.num_local_experts}, {config.num_experts_per_tok} for a token")
    table.add_row("vocabulary", f"{base.vocab_size:,}", f"{config.vocab_size:,}")
    for label, count, source in _row_sources(options, vocabulary):
        table.add_row(label, "", f"{count:,}: {source}")
    table.add_row("RoPE base", f"{theta:,g}", f"{new_theta:,g}")
    table.add_row("sliding window", str(window or "none"), "none")
    table.add_row("weights", "", f"{plan.parameters:,} parameters, {filesize.decimal(plan.bytes)} in {dtype}")
    console.print(table)

    for note in plan.notes:
        print_note(console, note)
    if window is not None and window < base.max_position_embeddings:
        print_note(console, f"the window of {window} is dropped, as in the paper: longer contexts attend further back.")
    if new_theta != theta:
        print_note(console, "another RoPE base changes the function until the model is trained with it.")
    if copies and (options.start_of_copies == "copy" or options.start_alpha != 0):
        print_note(
            console, "later copies change the function; --verify says by how much. --duplicate-init identity keeps it."
        )
    if plan.tokenizer_folder is None:
        print_note(console, "the base has no tokenizer files, so neither will the output.")
    if vocabulary.without_pieces:
        named = [f"{token} ({id_})" for id_, token in vocabulary.without_pieces.items()]
        listed = ", ".join(named[:_LISTED_TOKENS]) + (", …" if len(named) > _LISTED_TOKENS else "")
        print_note(
            console, f"{len(named):,} new tokens have no pieces; their rows are {INIT_TEXTS['random']}: {listed}."
        )


def _row_sources(options: ConvertOptions, vocabulary: Vocabulary) -> Iterator[tuple[str, int, str]]:
    """Where the rows come from, with how many there are of each kind; in all there are as many as tokens."""
    with_pieces, without = len(vocabulary.pieces), len(vocabulary.without_pieces)
    if vocabulary.new_rows or vocabulary.spare:
        yield "rows kept", vocabulary.size - vocabulary.new_rows, "the base's, as they are"
    if vocabulary.spare:
        yield "", len(vocabulary.spare), "of these, spare ones for new tokens without pieces"
    if options.start_of_rows == "random":
        with_pieces, without = 0, with_pieces + without
    if with_pieces:
        yield "new rows", with_pieces, INIT_TEXTS[options.start_of_rows]
    if without:
        yield "new rows", without, INIT_TEXTS["random"]


def _runs_text(layers: list[int]) -> str:
    """Layers for people: 0–31, 8–39."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def _print_shards(console: Console, shards: list[OutputShard]) -> None:
    table = Table(Column("shard", no_wrap=True), "tensors", "bytes", "from", title="Shards", title_justify="left")
    for shard in shards:
        table.add_row(
            shard.name, f"{len(shard.tensors):,}", f"{shard.size:,}", shard.tensors[0].name.removeprefix("model.")
        )
    table.add_row("in all", f"{sum(len(s.tensors) for s in shards):,}", f"{sum(s.size for s in shards):,}", "")
    console.print(table)
