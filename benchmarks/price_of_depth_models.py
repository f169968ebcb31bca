# SPDX-License-Identifier: Apache-2.0
"""Ways to make a model deeper and to give it experts, as `price_of_depth.py` compares them."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from jai import JaiConfig, JaiForCausalLM
from jai.conversion.convert.command import convert
from jai.conversion.convert.options import ConvertOptions

NUM_EXPERTS, EXPERTS_PER_TOKEN = 4, 2
EXPERT_NOISE = {"noise-0.01": 0.01, "noise-0.1": 0.1}


@dataclass(frozen=True)
class Start:
    """How later copies of a block start in DUS.v2 (paper, equation 1)."""

    alpha: float
    trainable: bool = True
    normalize: bool = False
    duplicate_init: str = "copy"


def dus_v2(base: Path, block_repeats: Sequence[int], start: Start) -> JaiForCausalLM:
    """The base with its layers repeated in place (paper, section 3.1.2)."""
    return _converted(
        base,
        start.trainable,
        block_size=1,
        block_repeats=list(block_repeats),
        skip_alpha=start.alpha,
        skip_alpha_normalize=start.normalize,
        duplicate_init=start.duplicate_init,
    )


def dus_v1(base: Path, layers: int) -> JaiForCausalLM:
    """The base's first layers followed by its last ones, half of an even `layers` each (SOLAR's depth-up-scaling)."""
    return _converted(base, True, method="dus-v1", k=layers // 2)


def _converted(base: Path, alphas_trainable: bool, **options: Any) -> JaiForCausalLM:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "deep"
        convert(ConvertOptions(base=str(base), out=out, experts=1, **options), console=Console(quiet=True))
        return JaiForCausalLM.from_pretrained(out, skip_alpha_trainable=alphas_trainable)


@torch.no_grad()
def upcycle(snapshots: Sequence[JaiForCausalLM], start: str, seed: int) -> JaiForCausalLM:
    """A mixture of experts from snapshots of a dense model; the last gives all weights but experts' and routers'.

    Args:
        snapshots: the dense model at step 0 and later.
        start: of EXPERT_STARTS. With `snapshots` expert i is the MLP of snapshot i (paper, section 3.1.3), else
            expert 0 is the MLP of the last one, and the others are copies, copies with noise, or drawn at random.
        seed: of the routers and of what is drawn.
    """
    last = snapshots[-1]
    values = last.config.to_dict() | {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN}
    torch.manual_seed(seed)
    mixture = JaiForCausalLM(JaiConfig(**values))  # its routers and experts are drawn here
    kept = {name: tensor for name, tensor in last.state_dict().items() if ".mlp." not in name}
    mixture.load_state_dict(kept, strict=False)
    for layer, target in enumerate(mixture.model.layers):
        stacks = (target.mlp.experts.gate_up_proj, target.mlp.experts.down_proj)
        for expert in range(NUM_EXPERTS):
            if start == "random" and expert:
                continue
            source = snapshots[expert] if start == "snapshots" else last
            mlp = source.model.layers[layer].mlp
            matrices = (torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight)
            for stack, matrix in zip(stacks, matrices):
                noise = EXPERT_NOISE.get(start, 0.0) * matrix.std() if expert else 0.0
                stack[expert] = matrix + noise * torch.randn_like(matrix)
    return mixture


@torch.no_grad()
def expert_distance(model: PreTrainedModel) -> float | None:
    """Mean relative distance of pairs of experts, as `Measurement` defines it; None for a dense model."""
    if getattr(model.config, "num_local_experts", 1) == 1:
        return None
    distances = []
    for layer in model.model.layers:
        stacks = (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj)
        experts = torch.cat([stack.flatten(1) for stack in stacks], dim=1)
        for a, b in combinations(experts, 2):
            distances.append(((a - b).norm() / ((a.square().sum() + b.square().sum()) / 2).sqrt()).item())
    return mean(distances)
