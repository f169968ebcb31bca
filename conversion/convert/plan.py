# SPDX-License-Identifier: Apache-2.0
"""The plan of a conversion (paper, section 3.1): where every byte of the output comes from, before any is written.

Three steps, each by rows of tensors: new rows of the vocabulary are made from old ones, blocks of layers are repeated
in place, and the MLP of each layer becomes a stack of experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, Phi3Config

from jai.configuration_jai import JaiConfig, plan_layers
from jai.conversion import names
from jai.conversion.convert.embedding_rows import embedding_parts
from jai.conversion.convert.options import ConvertOptions
from jai.conversion.convert.vocabulary import Vocabulary, read_vocabulary
from jai.conversion.inputs.checkpoint import Checkpoint
from jai.conversion.inputs.config import load_generation_config
from jai.conversion.inputs.hub import HubFiles, resolve_checkpoint
from jai.conversion.inputs.parts import Part
from jai.conversion.inputs.phi3 import load_phi3_config
from jai.conversion.inputs.reader import UNTIED_NOTE, CheckpointReader
from jai.conversion.inputs.values import common_dtype, dtype_names
from jai.conversion.inputs.weight_files import has_weights, weight_map
from jai.conversion.inputs.weight_sources import PlannedFiles
from jai.conversion.output.drawn import constant, drawn, with_noise
from jai.conversion.output.tensors import PlannedTensor
from jai.errors import UserError
from jai.files import work_folder
from jai.tokenization.loading import has_tokenizer


@dataclass(frozen=True)
class ConversionPlan:
    """All that a conversion will do.

    Attributes:
        base: the checkpoint that is converted.
        base_config: its configuration.
        tokenizer_folder: where the output's tokenizer comes from, if it has one.
        generation: the base's settings of generation, if it has some.
        vocabulary: the output's rows.
        config: the output's configuration.
        notes: what is unusual about the base, for people.
        tensors: the output's tensors, in the order in which they are written.
    """

    base: Checkpoint
    base_config: Phi3Config
    tokenizer_folder: Path | None
    generation: GenerationConfig | None
    vocabulary: Vocabulary
    config: JaiConfig
    notes: list[str]
    tensors: list[PlannedTensor]

    @property
    def parameters(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


def plan_conversion(options: ConvertOptions, vocabulary: Vocabulary | None = None) -> ConversionPlan:
    """Check everything and plan every tensor.

    Args:
        options: what to do. For a dry run the base may lack its weights: their form follows from its configuration.
        vocabulary: what `read_vocabulary` gives for them, where it is read already.

    Raises:
        UserError: for a base that is no phi-3, a plan that does not fit it, a tokenizer that does not extend its
            tokenizer, or damaged weights.
    """
    folder = resolve_checkpoint(options.base, weights=not (options.stream or options.dry_run))
    base_config = load_phi3_config(folder)
    reader = _open_base(options, folder)
    notes = reader.leave_out_leftovers() if reader else []
    if reader and base_config.tie_word_embeddings:
        notes += reader.take_head_for_embeddings()
    vocabulary = vocabulary or read_vocabulary(options)
    new_folder = resolve_checkpoint(options.tokenizer, weights=False) if options.tokenizer else None
    _check_padding(base_config, vocabulary)
    is_untied = base_config.tie_word_embeddings and reader is not None and reader.has_untied_head
    if is_untied:
        base_config.tie_word_embeddings = False
        notes.append(UNTIED_NOTE)
    config = _jai_config(base_config, options, vocabulary)
    expected = names.source_shapes(config, base_config.vocab_size, base_config.num_hidden_layers)
    if reader is None:
        dtype = base_config.dtype if isinstance(base_config.dtype, torch.dtype) else torch.bfloat16
        reader = CheckpointReader(PlannedFiles(expected, dtype))
    reader.check(expected, spare=frozenset({names.LM_HEAD}))  # of a tied model, a copy of the embeddings
    base_dtypes = {reader.dtypes[name] for name in expected}
    config.dtype = getattr(torch, options.dtype) if options.dtype else common_dtype(base_dtypes)
    if len(base_dtypes) > 1:
        (dtype_name,) = dtype_names([config.dtype])
        notes.append(
            f"the base's weights are {' and '.join(dtype_names(base_dtypes))}; the output is all {dtype_name}."
        )
    return ConversionPlan(
        base=Checkpoint(options.base, folder, reader),
        base_config=base_config,
        tokenizer_folder=new_folder or (folder if has_tokenizer(folder) else None),
        generation=load_generation_config(folder),
        vocabulary=vocabulary,
        config=config,
        notes=notes,
        tensors=plan_converted_tensors(config, base_config, reader, options, vocabulary),
    )


def _check_padding(base: Phi3Config, vocabulary: Vocabulary) -> None:
    """Phi-3's configuration pads with 32000 where it says nothing; with fewer rows, no model can be loaded."""
    if base.pad_token_id is not None and base.pad_token_id >= vocabulary.size:
        raise UserError(
            f"The base's pad_token_id is {base.pad_token_id}, but the vocabulary has {vocabulary.size:,} rows. Set it "
            "in the base's config.json to an id of its tokenizer, or to null."
        )


def _open_base(options: ConvertOptions, folder: Path) -> CheckpointReader | None:
    """The base's weights; None for a dry run where they are not here."""
    is_local = Path(options.base).is_dir()
    if options.stream and is_local:
        raise UserError(f"--stream is for a base on the Hub, but {options.base} is a folder. Leave it out.")
    if options.dry_run and not (is_local and has_weights(folder)):
        return None
    if options.stream:
        files = HubFiles(options.base, folder, work_folder(options.out) / "downloads")
        return CheckpointReader(files, weight_map(folder))
    return CheckpointReader(folder)


def _jai_config(base: Phi3Config, options: ConvertOptions, vocabulary: Vocabulary) -> JaiConfig:
    """The configuration of the output, but for its dtype.

    Raises:
        UserError: if the plan does not cover the base's layers exactly, or the values do not fit each other.
    """
    if options.is_plain:
        block_size, repeats = 1, [1] * len(origins(options, base.num_hidden_layers))
    else:
        options.check_fits(base.num_hidden_layers)
        block_size, repeats = options.blocks
    assert base.rope_parameters is not None  # transformers replaces None
    rope = dict(base.rope_parameters)
    if options.rope_theta is not None:
        rope["rope_theta"] = options.rope_theta
    longrope: dict[str, Any] = {}
    if rope["rope_type"] == "longrope":
        longrope["original_max_position_embeddings"] = base.original_max_position_embeddings
    try:
        return JaiConfig(
            vocab_size=vocabulary.size,
            hidden_size=base.hidden_size,
            intermediate_size=base.intermediate_size,
            num_attention_heads=base.num_attention_heads,
            num_key_value_heads=base.num_key_value_heads,
            head_dim=getattr(base, "head_dim", None),
            hidden_act=base.hidden_act,
            max_position_embeddings=base.max_position_embeddings,
            initializer_range=base.initializer_range,
            rms_norm_eps=base.rms_norm_eps,
            pad_token_id=base.pad_token_id,
            bos_token_id=base.bos_token_id,
            eos_token_id=base.eos_token_id,
            tie_word_embeddings=base.tie_word_embeddings,
            attention_dropout=base.attention_dropout,
            rope_parameters=rope,
            block_size=block_size,
            block_repeats=repeats,
            skip_alpha=options.start_alpha,
            skip_alpha_normalize=options.skip_alpha_normalize,
            num_local_experts=options.experts,
            architectures=["JaiForCausalLM"],
            **longrope,
        )
    except (StrictDataclassError, ValueError) as error:
        raise UserError(f"The options do not fit the base: {error.__cause__ or error}") from None


def origins(options: ConvertOptions, base_layers: int) -> list[int]:
    """The base's layer for each layer of the output.

    Raises:
        UserError: if the plan does not fit a base of `base_layers` layers.
    """
    options.check_fits(base_layers)
    if options.layers is not None:
        return options.layers
    if options.k is not None:
        return [*range(options.k), *range(base_layers - options.k, base_layers)]
    return [planned.origin for planned in plan_layers(*options.blocks)]


def plan_converted_tensors(
    config: JaiConfig, base: Phi3Config, reader: CheckpointReader, options: ConvertOptions, vocabulary: Vocabulary
) -> list[PlannedTensor]:
    """Every tensor of the output, in the order in which it is written: as the model runs, the head last."""
    dtype = config.dtype
    assert isinstance(dtype, torch.dtype)  # transformers turns the name that `_jai_config` gives into the dtype

    def rows(source: names.RowsOf) -> Part:
        return reader.cast(source.name, dtype, source.start, source.stop)

    outer = []
    for name, source in names.outer_sources(config, base.vocab_size).items():
        if name == names.FINAL_NORM:
            outer.append(PlannedTensor(name, source.shape, dtype, (rows(source),)))
        else:
            parts = embedding_parts(reader, name, vocabulary, options.start_of_rows, options.seed, dtype)
            outer.append(PlannedTensor(name, (vocabulary.size, config.hidden_size), dtype, parts))
    layers = []
    seen: set[int] = set()
    for planned, origin in zip(config.layer_plan, origins(options, base.num_hidden_layers)):
        starts_as_identity = origin in seen and options.start_of_copies == "identity"
        seen.add(origin)
        for name, source in names.layer_sources(config, planned.layer, origin).items():
            is_stack = names.is_expert_stack(name)
            shape = (config.num_local_experts, *source.shape) if is_stack else source.shape
            if starts_as_identity and names.writes_to_residual(name):
                parts = (constant(0.0, shape, dtype),)
            elif is_stack:
                parts = _expert_parts(reader, name, source, config, options, dtype)
            else:
                parts = (rows(source),)
            layers.append(PlannedTensor(name, shape, dtype, parts))
        if config.num_local_experts > 1:
            shape = (config.num_local_experts, config.hidden_size)
            name = names.router_name(planned.layer)
            router = drawn(name, shape, config.initializer_range, options.seed, dtype)
            layers.append(PlannedTensor(name, shape, dtype, (router,)))
        if planned.adds_anchor:
            alpha = constant(config.initial_skip_alphas[planned.layer], (1,), dtype)
            layers.append(PlannedTensor(names.skip_alpha_name(planned.layer), (1,), dtype, (alpha,)))
    embeddings, *rest = outer
    return [embeddings, *layers, *rest]


def _expert_parts(
    reader: CheckpointReader,
    name: str,
    source: names.RowsOf,
    config: JaiConfig,
    options: ConvertOptions,
    dtype: torch.dtype,
) -> tuple[Part, ...]:
    """One slice for each expert. Expert 0 is the base's MLP (paper, section 3.1.3)."""
    first = reader.cast(source.name, dtype, source.start, source.stop)
    parts: list[Part] = [first]
    for expert in range(1, config.num_local_experts):
        expert_name = f"{name}.{expert}"
        if options.start_of_experts == "copy":
            parts.append(first)
        elif options.start_of_experts == "noise":
            parts.append(with_noise(reader, source.name, expert_name, options.noise, options.seed, dtype))
        else:
            parts.append(drawn(expert_name, source.shape, config.initializer_range, options.seed, dtype))
    return tuple(parts)
