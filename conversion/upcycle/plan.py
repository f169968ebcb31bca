# SPDX-License-Identifier: Apache-2.0
"""The plan of an upcycling (paper, section 3.1.3): which checkpoint each tensor comes from.

Expert 0 is the FFN of the dense JAI as it was before training, experts 1 and up are those of the snapshots. All other
weights come from one of these checkpoints; the routers are drawn.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from jai.configuration_jai import JaiConfig
from jai.conversion import names
from jai.conversion.inputs.jai import JaiCheckpoint, jai_shapes, open_jai, slice_names
from jai.conversion.inputs.parts import Part
from jai.conversion.output.drawn import drawn, with_noise
from jai.conversion.output.tensors import PlannedTensor
from jai.conversion.upcycle.options import UpcycleOptions
from jai.errors import UserError

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
class UpcycleInputs:
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


def open_upcycle_inputs(options: UpcycleOptions, *, planned_only: bool = False) -> UpcycleInputs:
    """Open and check all checkpoints that the options name.

    Raises:
        UserError: as `upcycle`.
    """
    experts = [open_jai(name, planned_only=planned_only) for name in (options.dense, *options.snapshots)]
    dense = experts[0]
    if dense.is_snapshot:
        raise UserError(f"DENSE, {dense.name}, has only FFN weights. Give the whole checkpoint of step 0.")
    seen: dict[Path, str] = {}
    for checkpoint in experts:
        if earlier := seen.get(checkpoint.folder.resolve()):
            raise UserError(
                f"{checkpoint.name} is given twice (also as {earlier}), which would make two experts the same. Give "
                "each checkpoint once; --expert-init copy makes experts that are all the same."
            )
        seen[checkpoint.folder.resolve()] = checkpoint.name
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
    inputs = UpcycleInputs(experts, base)
    for checkpoint in inputs.all:
        _check_same_model(checkpoint, dense)
    return inputs


def _check_same_model(checkpoint: JaiCheckpoint, dense: JaiCheckpoint) -> None:
    if checkpoint.config.num_local_experts > 1:
        raise UserError(
            f"{checkpoint.name} has {checkpoint.config.num_local_experts} experts in each layer already. Give a dense "
            "JAI and checkpoints of its training: jai convert --experts 1."
        )
    differing = [name for name in _SAME if getattr(checkpoint.config, name) != getattr(dense.config, name)]
    if differing:
        listed = ", ".join(
            f"{name} {getattr(checkpoint.config, name)} instead of {getattr(dense.config, name)}" for name in differing
        )
        raise UserError(
            f"{checkpoint.name} is not a state of the model {dense.name}: it has {listed}. Give checkpoints of one "
            "training."
        )


def upcycled_config(dense: JaiCheckpoint, options: UpcycleOptions) -> JaiConfig:
    """The configuration of the output: that of the dense JAI, with experts.

    Raises:
        UserError: for more experts than a configuration takes.
    """
    values = dense.config.to_dict()
    for name in ("num_experts_per_tok", "router_aux_loss_coef"):  # a dense JAI's are 1 and 0
        values.pop(name, None)
    values |= {
        "num_local_experts": options.num_experts,
        "architectures": ["JaiForCausalLM"],
        "dtype": options.dtype or str(dense.dtype).removeprefix("torch."),
    }
    try:
        return JaiConfig.from_dict(values)
    except (StrictDataclassError, ValueError) as error:
        raise UserError(f"The options do not fit {dense.name}: {error.__cause__ or error}") from None


def plan_upcycled_tensors(config: JaiConfig, inputs: UpcycleInputs, options: UpcycleOptions) -> list[PlannedTensor]:
    """Every tensor of the output, in the order in which it is written."""
    dtype = config.dtype
    assert isinstance(dtype, torch.dtype)  # transformers turns the name that `upcycled_config` gives into the dtype
    routers = {names.router_name(planned.layer) for planned in config.running_plan}
    tensors = []
    for name, shape in jai_shapes(config).items():
        parts: tuple[Part, ...]
        if names.is_expert_stack(name):
            parts = tuple(
                part
                for expert in range(config.num_local_experts)
                for part in _expert_parts(name, shape[1:], expert, config, inputs, options, dtype)
            )
        elif name in routers:
            parts = (drawn(name, shape, config.initializer_range, options.seed, dtype),)
        else:
            parts = (inputs.base.reader.cast(name, dtype),)
        tensors.append(PlannedTensor(name, shape, dtype, parts))
    return tensors


def _expert_parts(
    stack: str,
    shape: tuple[int, ...],
    expert: int,
    config: JaiConfig,
    inputs: UpcycleInputs,
    options: UpcycleOptions,
    dtype: torch.dtype,
) -> list[Part]:
    """One slice of an expert stack."""
    if options.expert_init == "random" and expert > 0:
        return [drawn(f"{stack}.{expert}", shape, config.initializer_range, options.seed, dtype)]
    reader = _expert_checkpoint(expert, inputs).reader
    noise = _noise(expert, inputs, options)
    if noise:
        return [with_noise(reader, name, f"{name}.{expert}", noise, options.seed, dtype) for name in slice_names(stack)]
    return [reader.cast(name, dtype) for name in slice_names(stack)]


def _expert_checkpoint(expert: int, inputs: UpcycleInputs) -> JaiCheckpoint:
    return inputs.experts[expert % len(inputs.experts)]


def _noise(expert: int, inputs: UpcycleInputs, options: UpcycleOptions) -> float:
    """Only copies get noise: an expert with a checkpoint of its own is kept as it is."""
    return 0.0 if expert < len(inputs.experts) or options.expert_init == "copy" else options.noise


def expert_text(expert: int, inputs: UpcycleInputs, options: UpcycleOptions) -> str:
    """What an expert is made of, for people."""
    if options.expert_init == "random" and expert > 0:
        return f"drawn at random with seed {options.seed}"
    noise = _noise(expert, inputs, options)
    text = f"the FFN of {_expert_checkpoint(expert, inputs).title}"
    return f"{text} with noise of {noise:g} of its spread" if noise else text
