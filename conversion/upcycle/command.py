# SPDX-License-Identifier: Apache-2.0
"""`jai upcycle`: a dense JAI and snapshots of its training become a mixture of experts (paper, section 3.1.3).

Expert 0 is the FFN of the dense JAI as it was before training, experts 1 and up are those of the snapshots. All other
weights come from one of these checkpoints; the routers are drawn.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jai.configuration_jai import JaiConfig
from jai.conversion import names
from jai.conversion.inputs.jai import JaiCheckpoint, jai_shapes, open_jai, slice_names
from jai.conversion.inputs.parts import Part
from jai.conversion.inputs.reader import UNTIED_NOTE
from jai.conversion.inputs.values import dtype_names, is_rounded
from jai.conversion.output.beside import write_beside
from jai.conversion.output.checkpoint_folder import Output
from jai.conversion.output.drawn import drawn, with_noise
from jai.conversion.output.tensors import PlannedTensor
from jai.conversion.upcycle.options import UpcycleOptions
from jai.errors import UserError
from jai.files import refuse_existing

# What makes two checkpoints states of one model.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "block_size",
    "block_repeats",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "skip_alpha_normalize",
)


@dataclass(frozen=True)
class Sources:
    """The checkpoints that an upcycled JAI is made of.

    Attributes:
        experts: those that give an expert each, the dense one first.
        base: the one that gives all other weights.
    """

    experts: list[JaiCheckpoint]
    base: JaiCheckpoint

    @property
    def dense(self) -> JaiCheckpoint:
        return self.experts[0]

    @property
    def all(self) -> list[JaiCheckpoint]:
        return [*self.experts, self.base]


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
    sources = open_sources(options, planned_only=options.dry_run)
    config = plan_config(sources.dense, options)
    tensors = plan_tensors(config, sources, options)
    _print_plan(console, options, config, sources, tensors)
    if options.dry_run:
        console.print("Dry run: nothing was written.")
        return config

    output = Output(
        step="upcycle",
        out=options.out,
        tensors=tensors,
        options=options.recorded() | {"dtype": str(config.dtype).removeprefix("torch.")},
        identity={
            "experts": [source.reader.identity() for source in sources.experts],
            "base weights": sources.base.reader.identity(),
        },
        max_shard_bytes=options.max_shard_size,
        workers=options.workers,
    )
    output.write(
        lambda folder: write_beside(folder, config, tokenizer=sources.dense.folder, generation=sources.dense.folder),
        lambda: [
            sources.dense.as_input("dense"),
            *(snapshot.as_input("snapshot") for snapshot in sources.experts[1:]),
            sources.base.as_input("base weights"),
        ],
        {"experts": [_expert_text(expert, sources, options) for expert in range(options.num_experts)]},
        verify_bytes=options.verify,
        console=console,
    )

    out = escape(str(options.out))
    console.print(f"[bold green]JAI written to[/] {out}", soft_wrap=True)
    console.print(f"Next: jai inspect {out}", soft_wrap=True, highlight=False)
    console.print(f"      jai sft --config X.yaml --model_name_or_path {out}", soft_wrap=True, highlight=False)
    return config


def open_sources(options: UpcycleOptions, *, planned_only: bool = False) -> Sources:
    """Open and check all checkpoints that the options name.

    Raises:
        UserError: as `upcycle`.
    """
    experts = [open_jai(name, planned_only=planned_only) for name in (options.dense, *options.snapshots)]
    dense = experts[0]
    if dense.is_snapshot:
        raise UserError(f"DENSE, {dense.name}, has only FFN weights. Give the whole checkpoint of step 0.")
    seen: dict[Path, str] = {}
    for source in experts:
        if earlier := seen.get(source.folder.resolve()):
            raise UserError(
                f"{source.name} is given twice (also as {earlier}), which would make two experts the same. Give each "
                "checkpoint once; --expert-init copy makes experts that are all the same."
            )
        seen[source.folder.resolve()] = source.name
    if options.base_weights == "first":
        base = dense
    elif options.base_weights == "last":
        base = experts[-1]
    else:
        base = open_jai(options.base_weights, planned_only=planned_only)
    if base.is_snapshot:
        raise UserError(
            f"--base-weights is {options.base_weights}, but {base.name} has only FFN weights. Give --base-weights "
            "first (DENSE), or a whole checkpoint, such as the one that this snapshot was taken from."
        )
    sources = Sources(experts, base)
    for source in sources.all:
        _check_same_model(source, dense)
    return sources


def _check_same_model(source: JaiCheckpoint, dense: JaiCheckpoint) -> None:
    if source.config.num_local_experts > 1:
        raise UserError(
            f"{source.name} has {source.config.num_local_experts} experts in each layer already. Give a dense JAI and "
            "checkpoints of its training: jai convert --experts 1."
        )
    differing = [name for name in _SAME if getattr(source.config, name) != getattr(dense.config, name)]
    if differing:
        listed = ", ".join(
            f"{name} {getattr(source.config, name)} instead of {getattr(dense.config, name)}" for name in differing
        )
        raise UserError(
            f"{source.name} is no state of the model {dense.name}: it has {listed}. Give checkpoints of one training."
        )


def plan_config(dense: JaiCheckpoint, options: UpcycleOptions) -> JaiConfig:
    """The configuration of the output: that of the dense JAI, with experts."""
    values = dense.config.to_dict()
    for name in ("num_experts_per_tok", "router_aux_loss_coef"):  # a dense JAI's are 1 and 0
        values.pop(name, None)
    return JaiConfig.from_dict(
        values
        | {
            "num_local_experts": options.num_experts,
            "architectures": ["JaiForCausalLM"],
            "dtype": options.dtype or str(dense.dtype).removeprefix("torch."),
        }
    )


def plan_tensors(config: JaiConfig, sources: Sources, options: UpcycleOptions) -> list[PlannedTensor]:
    """Every tensor of the output, in the order in which it is written."""
    dtype = config.dtype
    assert isinstance(dtype, torch.dtype)  # transformers turns the name that `plan_config` gives into the dtype
    routers = {names.router_name(planned.layer) for planned in config.running_plan}
    tensors = []
    for name, shape in jai_shapes(config).items():
        parts: tuple[Part, ...]
        if names.is_expert_stack(name):
            parts = tuple(
                part
                for expert in range(config.num_local_experts)
                for part in _expert_parts(name, shape[1:], expert, config, sources, options, dtype)
            )
        elif name in routers:
            parts = (drawn(name, shape, config.initializer_range, options.seed, dtype),)
        else:
            parts = (sources.base.reader.cast(name, dtype),)
        tensors.append(PlannedTensor(name, shape, dtype, parts))
    return tensors


def _expert_parts(
    stack: str,
    shape: tuple[int, ...],
    expert: int,
    config: JaiConfig,
    sources: Sources,
    options: UpcycleOptions,
    dtype: torch.dtype,
) -> list[Part]:
    """One slice of an expert stack."""
    if options.expert_init == "random" and expert > 0:
        return [drawn(f"{stack}.{expert}", shape, config.initializer_range, options.seed, dtype)]
    reader = _expert_source(expert, sources).reader
    noise = _noise(expert, sources, options)
    if noise:
        return [with_noise(reader, name, f"{name}.{expert}", noise, options.seed, dtype) for name in slice_names(stack)]
    return [reader.cast(name, dtype) for name in slice_names(stack)]


def _expert_source(expert: int, sources: Sources) -> JaiCheckpoint:
    return sources.experts[expert % len(sources.experts)]


def _noise(expert: int, sources: Sources, options: UpcycleOptions) -> float:
    """Only copies get noise: an expert with a checkpoint of its own is kept as it is."""
    return 0.0 if expert < len(sources.experts) or options.expert_init == "copy" else options.noise


def _expert_text(expert: int, sources: Sources, options: UpcycleOptions) -> str:
    if options.expert_init == "random" and expert > 0:
        return f"drawn at random with seed {options.seed}"
    noise = _noise(expert, sources, options)
    text = f"the FFN of {_expert_source(expert, sources).title}"
    return f"{text} with noise of {noise:g} of its spread" if noise else text


def _print_plan(
    console: Console, options: UpcycleOptions, config: JaiConfig, sources: Sources, tensors: list[PlannedTensor]
) -> None:
    dtype = str(config.dtype).removeprefix("torch.")
    parameters, size = sum(tensor.numel for tensor in tensors), sum(tensor.bytes for tensor in tensors)
    table = Table(
        title=f"{escape(options.dense)} → {escape(str(options.out))}", title_justify="left", show_header=False
    )
    for expert in range(options.num_experts):
        table.add_row(f"expert {expert}", escape(_expert_text(expert, sources, options)))
    table.add_row("all other weights", escape(sources.base.title))
    table.add_row("routers", f"drawn with seed {options.seed}; {config.num_experts_per_tok} experts for a token")
    table.add_row("layers", str(config.num_hidden_layers))
    table.add_row("weights", f"{parameters:,} parameters, {filesize.decimal(size)} in {dtype}")
    console.print(table)
    found = {dtype for source in sources.all for dtype in source.reader.dtypes.values()}
    assert isinstance(config.dtype, torch.dtype)
    if options.dtype is None and any(is_rounded(wide, config.dtype) for wide in found):
        _note(
            console,
            f"the checkpoints are {' and '.join(dtype_names(found))}, and the output has DENSE's {dtype}. --dtype "
            "float32 rounds nothing.",
        )
    if any(source.is_untied for source in sources.all):
        _note(console, UNTIED_NOTE)


def _note(console: Console, text: str) -> None:
    console.print(f"[yellow]Note:[/] {text}", highlight=False, soft_wrap=True)
