# SPDX-License-Identifier: Apache-2.0
"""`jai export`: a JAI whose skips are all zero, in the form of a model that every engine knows.

With every alpha 0 a JAI with experts is a Mixtral, and a dense one is a Phi-3 without a window. Only names and the
order of bytes differ, so every tensor is copied. The names are those that such checkpoints have on the Hub: of Mixtral
one `w1` (gate), `w2` (down) and `w3` (up) for each expert, of Phi-3 fused matrices.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.markup import escape
from transformers import MixtralConfig, Phi3Config, PreTrainedConfig

from jai.configuration_jai import JaiConfig
from jai.conversion import names
from jai.conversion.export.options import Architecture, ExportOptions
from jai.conversion.inputs.config import CONFIG_FILE, load_generation_config
from jai.conversion.inputs.jai import JaiCheckpoint, jai_shapes, open_whole_jai, slice_names
from jai.conversion.inputs.values import common_dtype
from jai.conversion.output.checkpoint_folder import (
    PlannedCheckpoint,
    checkpoint_folder,
    print_note,
    print_written,
    write_beside,
)
from jai.conversion.output.tensors import PlannedTensor
from jai.errors import UserError
from jai.files import read_json, refuse_existing

# Of the configuration, what both forms take as it is.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)
_OF_EXPERTS = ("num_local_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")
_MIXTRAL_MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_LISTED_ALPHAS = 8


def export(options: ExportOptions, *, console: Console | None = None) -> PreTrainedConfig:
    """Write a JAI as a Mixtral or a Phi-3 that computes the same.

    Args:
        options: what to do.
        console: where the plan and the progress are printed; None is standard output.

    Returns:
        The configuration of the result.

    Raises:
        UserError: for a JAI that the form cannot express (skip alphas that are not 0, the wrong number of experts, a
            RoPE that it does not have), damaged weights, an output folder that exists, or a full disk.
    """
    console = console or Console()
    refuse_existing(options.out)
    source = open_whole_jai(options.model)
    _refuse_skips(source)
    plan = {"mixtral": _mixtral_config, "phi3": _phi3_config}[options.to]
    config = plan(source)
    kind = type(config).__name__.removesuffix("Config")
    generation = load_generation_config(source.folder)
    checkpoint = PlannedCheckpoint(
        step="export",
        out=options.out,
        tensors=plan_exported_tensors(source, options.to),
        options={"to": options.to},
        inputs=[("model", source)],
        tokenizer=source.folder,
        max_shard_bytes=options.max_shard_size,
        workers=options.workers,
    )
    console.print(
        f"{escape(options.model)} → {escape(str(options.out))}: {len(checkpoint.tensors):,} tensors of a {kind}, "
        f"{filesize.decimal(checkpoint.bytes)}, all copied as they are.",
        soft_wrap=True,
        highlight=False,
    )
    for note in source.notes:
        print_note(console, note)
    if options.dry_run:
        console.print("Dry run: nothing was written.")
        return config

    with checkpoint_folder(checkpoint, verify_bytes=options.verify, console=console) as folder:
        write_beside(folder, config, tokenizer=source.folder, generation=generation)
        _add_older_rope_keys(folder / CONFIG_FILE)
    print_written(console, kind, options.out, ["jai", "generate", options.out, "…"], ["vllm", "serve", options.out])
    return config


def _refuse_skips(source: JaiCheckpoint) -> None:
    """The alphas are in the weights; what the configuration says is only where they began."""
    owners = [planned.layer for planned in source.config.running_plan if planned.adds_anchor]
    alphas = {layer: source.reader.rows(names.skip_alpha_name(layer)).item() for layer in owners}
    live = {layer: alpha for layer, alpha in alphas.items() if alpha != 0}
    if live:
        listed = ", ".join(f"layer {layer} {alpha:.4g}" for layer, alpha in [*live.items()][:_LISTED_ALPHAS])
        more = f" and {len(live) - _LISTED_ALPHAS} more" if len(live) > _LISTED_ALPHAS else ""
        raise UserError(
            f"{source.name} has {len(live)} skip alphas that are not 0 ({listed}{more}), and other architectures have "
            "no skips. Serve it as a JAI, with its own code; or convert with `--skip-alpha 0` (and "
            "`skip_alpha_trainable: false` to keep it so) before training."
        )


def plan_exported_tensors(source: JaiCheckpoint, to: Architecture) -> list[PlannedTensor]:
    """Every tensor of the output: ranges of the JAI's bytes."""
    return [*{"mixtral": _mixtral_tensors, "phi3": _phi3_tensors}[to](source)]


def _mixtral_config(source: JaiCheckpoint) -> MixtralConfig:
    config = source.config
    if config.num_local_experts == 1:
        raise UserError(f"{source.name} is dense, and Mixtral has experts. Give --to phi3.")
    rope = _rope(config)
    if rope["rope_type"] == "longrope":
        raise UserError(
            f"{source.name} has LongRoPE, for which Phi-3 and JAI compute the cache again where a text outgrows the "
            "original context. Mixtral does not, so it would go wrong there. Serve it as a JAI."
        )
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{source.name} rotates only a part of each head, and Mixtral all of it. Serve it as a JAI.")
    return MixtralConfig(
        **_values(source, (*_SHARED, *_OF_EXPERTS)),
        head_dim=config.head_dim,
        sliding_window=None,
        rope_parameters=rope,
        architectures=["MixtralForCausalLM"],
    )


def _phi3_config(source: JaiCheckpoint) -> Phi3Config:
    config = source.config
    if config.num_local_experts > 1:
        raise UserError(
            f"{source.name} has {config.num_local_experts} experts in each layer, and Phi-3 has none. Give --to "
            "mixtral."
        )
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        raise UserError(
            f"{source.name} has heads of {config.head_dim}, and Phi-3's are hidden_size / num_attention_heads = "
            f"{config.hidden_size // config.num_attention_heads}. Serve it as a JAI."
        )
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "longrope"):
        raise UserError(
            f"{source.name} has RoPE of type {rope['rope_type']!r}, and Phi-3 only plain RoPE and LongRoPE. Serve it "
            "as a JAI."
        )
    return Phi3Config(
        **_values(source, _SHARED),
        original_max_position_embeddings=getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        ),
        sliding_window=None,
        rope_parameters=rope,
        architectures=["Phi3ForCausalLM"],
    )


def _values(source: JaiCheckpoint, keys: tuple[str, ...]) -> dict[str, Any]:
    dtype = str(source.dtype).removeprefix("torch.")
    return {key: getattr(source.config, key) for key in keys} | {"dtype": dtype}


def _rope(config: JaiConfig) -> dict[str, Any]:
    assert config.rope_parameters is not None  # transformers replaces None
    return dict(config.rope_parameters)


def _mixtral_tensors(source: JaiCheckpoint) -> Iterator[PlannedTensor]:
    reader = source.reader
    for name, shape in jai_shapes(source.config).items():
        dtype = reader.dtypes[name]
        if names.is_expert_stack(name):
            layer, matrices = name.split(".mlp.")[0], slice_names(name)
            rows = shape[1] // len(matrices)
            for expert in range(shape[0]):
                whole = reader.copied(name, expert, expert + 1)
                length = whole.length // len(matrices)
                for number, matrix in enumerate(matrices):
                    kind = _MIXTRAL_MATRICES[matrix.split(".")[-2]]
                    target = f"{layer}.block_sparse_moe.experts.{expert}.{kind}.weight"
                    part = replace(whole, start=whole.start + number * length, length=length)
                    yield PlannedTensor(target, (rows, shape[2]), dtype, (part,))
        elif not name.endswith(".skip_alpha"):
            target = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
            yield PlannedTensor(target, shape, dtype, (reader.copied(name),))


def _phi3_tensors(source: JaiCheckpoint) -> Iterator[PlannedTensor]:
    config, reader = source.config, source.reader
    embeddings, *outer = names.outer_sources(config, config.vocab_size).items()
    rows_of = dict([embeddings])
    for planned in config.running_plan:
        rows_of |= names.layer_sources(config, planned.layer, planned.layer)
    rows_of |= dict(outer)
    pieces: dict[str, list[str]] = {}
    for name, rows in rows_of.items():
        pieces.setdefault(rows.name, []).append(name)
    for target, parts in pieces.items():
        ordered = sorted(parts, key=lambda name: rows_of[name].start)
        shape = rows_of[ordered[0]].source_shape
        dtype = common_dtype(reader.dtypes[name] for name in ordered)
        yield PlannedTensor(target, shape, dtype, tuple(reader.cast(name, dtype) for name in ordered))


def _add_older_rope_keys(path: Path) -> None:
    """For transformers 4, and engines that pin it: they would ignore `rope_parameters`, and take another base."""
    content = read_json(path)
    rope = dict(content["rope_parameters"])
    rope_type = rope.pop("rope_type")
    content["rope_theta"] = rope.pop("rope_theta")
    if (partial := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        content["partial_rotary_factor"] = partial
    if rope_type == "longrope":  # Phi-3's, which has it beside
        rope.pop("original_max_position_embeddings", None)
    if rope_type != "default":
        content["rope_scaling"] = {"type": rope_type, **rope}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
