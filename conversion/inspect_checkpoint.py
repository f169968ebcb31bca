# SPDX-License-Identifier: Apache-2.0
"""`jai inspect`: what a JAI is made of, from its configuration and its weights' headers. No weights are loaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import Phi3Config

from jai.configuration_jai import JaiConfig, PlannedLayer
from jai.conversion import names
from jai.conversion.inputs.hub import resolve_checkpoint
from jai.conversion.inputs.jai import load_jai_config, open_jai_weights
from jai.conversion.inputs.stored_weights import read_number, read_tensors
from jai.conversion.inputs.weight_files import has_weights, weight_files
from jai.conversion.inspect_options import PAPERS_JAI, InspectOptions
from jai.conversion.output.checkpoint_folder import print_note
from jai.errors import UserError
from jai.planning.count import ParameterCount, count_parameters
from jai.planning.memory import DOUBLE_NF4_BYTES, NF4_BYTES
from jai.planning.report import training_table

GB = 1e9
PHI3_MEDIUM = Phi3Config(
    hidden_size=5120,
    intermediate_size=17920,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=10,
    sliding_window=2047,
)


@dataclass(frozen=True)
class Inspection:
    """What `jai inspect` shows.

    Attributes:
        name: what was inspected.
        config: its configuration.
        count: its parameters.
        skip_alphas: value of each skip alpha by layer; from the weights where there are any.
        checkpoint_bytes: size of the weights on disk; None without weights.
    """

    name: str
    config: JaiConfig
    count: ParameterCount
    skip_alphas: dict[int, float]
    checkpoint_bytes: int | None

    @property
    def plan(self) -> tuple[PlannedLayer, ...]:
        return self.config.running_plan


def inspect(options: InspectOptions, *, console: Console | None = None) -> Inspection:
    """Print the layer plan, the parameter table beside phi-3's, and what it takes to store, serve and train a JAI.

    Args:
        options: what to show: a JAI, or the default configuration without weights.
        console: where to print; None is standard output.

    Raises:
        UserError: if it is no JAI.
    """
    console = console or Console()
    name, size = options.model, None
    if name == PAPERS_JAI:
        config = JaiConfig()
        alphas = config.initial_skip_alphas
    else:
        folder = resolve_checkpoint(name)
        config = load_jai_config(folder)
        alphas = config.initial_skip_alphas
        if has_weights(folder) and getattr(config, "quantization_config", None):
            alphas, size = _look_at_quantized(folder, alphas)
        elif has_weights(folder):
            reader, notes = open_jai_weights(name, folder, config)
            alphas = {layer: reader.rows(names.skip_alpha_name(layer)).item() for layer in alphas}
            size = reader.size
            for note in notes:
                print_note(console, note)
    inspection = Inspection(
        name=name,
        config=config,
        count=count_parameters(config),
        skip_alphas=alphas,
        checkpoint_bytes=size,
    )
    console.print(layer_table(inspection))
    console.print(parameter_table(inspection))
    console.print(memory_table(inspection))
    if options.train is not None:
        console.print(training_table(options, config))
    return inspection


def _look_at_quantized(folder: Path, alphas: Iterable[int]) -> tuple[dict[int, float], int]:
    """Values of the skip alphas, and bytes of the weight files, of a checkpoint whose shapes are the quantiser's."""
    stored = read_tensors(folder)
    found = {layer: names.skip_alpha_name(layer) for layer in alphas}
    lost = [name for name in found.values() if name not in stored]
    if lost:
        raise UserError(f"The weights in {folder} lack {lost[0]}. Fetch or save the checkpoint again.")
    values = {layer: read_number(folder, name, stored[name]) for layer, name in found.items()}
    return values, sum(path.stat().st_size for path in weight_files(folder))


def layer_table(inspection: Inspection) -> Table:
    """One row for each copy of each block: which layers it has and where they come from."""
    config = inspection.config
    title = f"Layer plan of {inspection.name}: {config.num_hidden_layers} layers"
    table = Table(title=title, title_justify="left")
    for column in ("block", "copy", "layers", "origin layers", "skip alpha"):
        table.add_column(column, justify="right")
    for opening in inspection.plan:
        if not opening.opens_copy:
            continue
        copy = [p for p in inspection.plan if (p.block, p.copy) == (opening.block, opening.copy)]
        alpha = inspection.skip_alphas.get(opening.layer)
        table.add_row(
            str(opening.block + 1),
            f"{opening.copy + 1} of {config.block_repeats[opening.block]}",
            _range(copy[0].layer, copy[-1].layer),
            _range(copy[0].origin, copy[-1].origin),
            "" if alpha is None else f"{alpha:.4g}",
        )
    table.caption = "Layers count from 0, as in the weights' names; blocks and copies from 1, as in the paper."
    return table


def parameter_table(inspection: Inspection) -> Table:
    """The paper's Table 3: the JAI beside phi-3-medium."""
    config, count, phi3 = inspection.config, inspection.count, PHI3_MEDIUM
    phi3_count = count_parameters(
        JaiConfig(
            vocab_size=phi3.vocab_size,
            hidden_size=phi3.hidden_size,
            intermediate_size=phi3.intermediate_size,
            num_attention_heads=phi3.num_attention_heads,
            num_key_value_heads=phi3.num_key_value_heads,
            block_size=1,
            block_repeats=[1] * phi3.num_hidden_layers,
            num_local_experts=1,
        )
    )
    table = Table(title="Architecture (paper, Table 3)", title_justify="left")
    table.add_column("")
    table.add_column("phi-3-medium", justify="right")
    table.add_column(inspection.name, justify="right")
    table.add_row("parameters", _billions(phi3_count.total), _billions(count.total))
    table.add_row("active for a token", _billions(phi3_count.active), _billions(count.active))
    table.add_row("  embeddings", f"{phi3_count.embeddings:,}", f"{count.embeddings:,}")
    table.add_row("  attention", f"{phi3_count.attention:,}", f"{count.attention:,}")
    table.add_row("  experts", f"{phi3_count.experts:,}", f"{count.experts:,}")
    table.add_row("  routers", "", f"{count.routers:,}")
    table.add_row("  norms", f"{phi3_count.norms:,}", f"{count.norms:,}")
    table.add_row("  skip alphas", "", f"{count.skip_alphas:,}")
    table.add_row("embedding size", f"{phi3.hidden_size:,}", f"{config.hidden_size:,}")
    table.add_row("intermediate size", f"{phi3.intermediate_size:,}", f"{config.intermediate_size:,}")
    table.add_row("experts (used)", "1", f"{config.num_local_experts} ({config.num_experts_per_tok})")
    table.add_row("layers", str(phi3.num_hidden_layers), str(config.num_hidden_layers))
    table.add_row("vocabulary", f"{phi3.vocab_size:,}", f"{config.vocab_size:,}")
    table.add_row(
        "heads (key/value)",
        f"{phi3.num_attention_heads} ({phi3.num_key_value_heads})",
        f"{config.num_attention_heads} ({config.num_key_value_heads})",
    )
    phi3_rope, rope = phi3.rope_parameters, config.rope_parameters
    assert phi3_rope is not None  # transformers replaces None
    assert rope is not None
    table.add_row("RoPE base", f"{phi3_rope['rope_theta']:,.0f}", f"{rope['rope_theta']:,.0f}")
    table.add_row("sliding window", str(phi3.sliding_window), "none")
    return table


def memory_table(inspection: Inspection) -> Table:
    """Sizes in GB (10^9 bytes) of weights and of the cache; what training takes is planned with `--train`."""
    config, count = inspection.config, inspection.count
    weights = count.total + count.skip_alphas
    # Embeddings, head, norms and routers stay in bf16.
    quantised = count.attention + count.experts
    four_bits, double = ((each * quantised + 2 * (weights - quantised)) for each in (NF4_BYTES, DOUBLE_NF4_BYTES))
    kv_heads, head_dim = names.kv_head_shape(config)
    cache = 2 * 2 * len(inspection.plan) * kv_heads * head_dim
    table = Table(title="Memory for serving, without activations", title_justify="left")
    table.add_column("")
    table.add_column("GB", justify="right")
    if inspection.checkpoint_bytes is not None:
        is_quantized = bool(getattr(config, "quantization_config", None))
        table.add_row(
            "checkpoint on disk" + (", quantised" if is_quantized else ""), _gigabytes(inspection.checkpoint_bytes)
        )
    table.add_row("weights in bf16", _gigabytes(2 * weights))
    table.add_row("weights in 4 bits (NF4), experts too", _gigabytes(four_bits))
    table.add_row("the same, their scales in 8 bits (double quantisation)", _gigabytes(double))
    context = config.max_position_embeddings
    table.add_row(f"cache of one context of {context:,} tokens in bf16", _gigabytes(cache * context))
    return table


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _billions(number: int) -> str:
    return f"{number:,} ({number / 1e9:.1f} B)" if number >= 1e8 else f"{number:,}"


def _gigabytes(number: float) -> str:
    return f"{number / GB:,.1f}" if number >= 1e8 else f"{number / GB:.4f}"
