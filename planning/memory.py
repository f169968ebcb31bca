# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a training step on one GPU, in bytes, from a configuration: docs/planning.md has the formulae.

Letters: T tokens of a micro-batch, H hidden_size, I intermediate_size, E experts, K experts of a token, R = T * K rows,
A query heads times head_dim, G key and value heads times head_dim, V vocabulary, L layers, c bytes of a number that is
computed with.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jai.configuration_jai import JaiConfig
from jai.planning.count import count_parameters, head_widths

Weights = Literal["float32", "bfloat16", "nf4", "nf4-double"]
Learning = Literal["full", "lora"]
Sharding = Literal["none", "fsdp", "hsdp"]
Experts = Literal["grouped_mm", "batched_mm", "eager", "jai_fused", "jai_fused_x", "jai_fused_fp8"]
Loss = Literal["chunked", "logits", "none"]

# NF4: 4 bits a weight, and for 64 of them a scale of 32 bits; with double quantisation one of 8 bits, and for 256 of
# these one of 32 (QLoRA paper, section 3).
NF4_BYTES = (4 + 32 / 64) / 8
DOUBLE_NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
WEIGHT_BYTES: dict[str, float] = {"float32": 4, "bfloat16": 2, "nf4": NF4_BYTES, "nf4-double": DOUBLE_NF4_BYTES}

# TRL's head: tokens and entries of the vocabulary whose logits are in memory at once (`trl.kernels.chunked_logprob`).
_TILE_TOKENS, _TILE_ENTRIES = 4096, 32768
_FP8_GROUP = 128  # of `jai_fused_fp8`


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How is trained.

    Attributes:
        learns: every weight ("full"), or LoRA on attention and experts with the new rows and routers beside it.
        weights: what the weights are stored in. Those in four bits are the projections and experts.
        compute: bytes of a number in products, 2 for bf16.
        rank: of LoRA.
        new_rows: rows that learn beside LoRA, in the embeddings and in the head.
        routers: whether routers learn beside LoRA.
        state: bytes of optimiser state a trained number: 8 for AdamW in fp32, 2 in eight bits.
        batch, length: sequences of a micro-batch, and their tokens.
        accumulates: whether gradients of several micro-batches are added up.
        checkpointing: whether a layer's activations are computed again in the backward pass.
        experts: implementation.
        autocast: whether products of an adapter in fp32 are computed in `compute` bytes.
        loss: TRL's head in chunks, all logits at once, or a head that is no language model's.
        trained: numbers that learn, where they are known; None counts them by `learns`, `new_rows` and `routers`.
        reference: whether a second, frozen model is in memory (DPO, KTO).
        on_cpu: TRL's head makes copies of its tile where Triton does not run.
        gpus, sharding, group: how many GPUs, and over how many of them weights, gradients and states are cut.
    """

    learns: Learning = "full"
    weights: Weights = "float32"
    compute: int = 2
    rank: int = 16
    new_rows: int = 0
    routers: bool = True
    state: float = 8.0
    batch: int = 1
    length: int = 4096
    accumulates: bool = True
    checkpointing: bool = True
    experts: Experts = "grouped_mm"
    autocast: bool = True
    loss: Loss = "chunked"
    trained: int | None = None
    reference: bool = False
    on_cpu: bool = False
    gpus: int = 1
    sharding: Sharding = "none"
    group: int | None = None

    @property
    def shards(self) -> int:
        """GPUs over which weights, gradients and states are cut."""
        if self.sharding == "none":
            return 1
        return self.gpus if self.sharding == "fsdp" else min(self.group or 8, self.gpus)

    @property
    def copies_experts(self) -> bool:
        """Whether every row has a copy of its expert; those in four bits are dequantised one by one instead."""
        return self.experts == "batched_mm" and self.weights not in ("nf4", "nf4-double")

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class Memory:
    """Peak memory on one GPU: the moment at which it is reached, and what is in memory then, in bytes by part."""

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Shape:
    """What the formulae are about, by its letters."""

    T: int
    H: int
    I: int
    E: int
    R: int
    A: int
    G: int
    V: int
    L: int
    heads: int
    c: int

    @classmethod
    def of(cls, config: JaiConfig, setup: Setup) -> "_Shape":
        used = config.num_experts_per_tok
        assert used is not None  # JaiConfig replaces None
        queries, keys = head_widths(config)
        return cls(
            T=setup.tokens,
            H=config.hidden_size,
            I=config.intermediate_size,
            E=config.num_local_experts,
            R=setup.tokens * used,
            A=queries,
            G=keys,
            V=config.vocab_size,
            L=len(config.running_plan),
            heads=config.num_attention_heads,
            c=setup.compute,
        )

    @property
    def expert_matrix(self) -> float:
        """Bytes of all experts' down-projections of a layer, computed with; the up-projections are twice that."""
        return float(self.c * self.E * self.I * self.H)


def trained_parameters(config: JaiConfig, setup: Setup) -> dict[str, int]:
    """Numbers that learn, by part: all weights, or those of an adapter."""
    count = count_parameters(config)
    if setup.learns == "full":
        return {"weights": count.total + count.skip_alphas}
    return {
        "LoRA": lora_parameters(config, setup, config.num_local_experts),
        "new rows": 2 * setup.new_rows * config.hidden_size,
        "routers": count.routers if setup.routers else 0,
    }


def lora_parameters(config: JaiConfig, setup: Setup, experts: int) -> int:
    """Numbers of LoRA's factors for attention and so many experts of each layer."""
    s = _Shape.of(config, setup)
    attention = 2 * (s.H + s.A) + 2 * (s.H + s.G)
    # An expert's gate and up are one matrix; a dense MLP's are two.
    of_experts = experts * (2 * s.H + 3 * s.I) if s.E > 1 else 3 * (s.H + s.I)
    return setup.rank * s.L * (attention + of_experts)


def weight_bytes(config: JaiConfig, setup: Setup) -> float:
    """Bytes of the stored weights, adapters left out; all of them, on whichever GPU."""
    count = count_parameters(config)
    whole, stored = count.total + count.skip_alphas, WEIGHT_BYTES[setup.weights]
    if setup.weights not in ("nf4", "nf4-double"):
        return stored * whole
    quantised = count.attention + count.experts
    return stored * quantised + setup.compute * (whole - quantised)


def saved_by_layer(config: JaiConfig, setup: Setup) -> dict[str, float]:
    """Bytes that a layer keeps for its backward pass, by part."""
    s, full = _Shape.of(config, setup), setup.learns == "full"
    c, t_h = s.c, s.T * s.H
    # A norm computes in fp32: in fp32 it keeps the residual stream itself. Its output before the weight is kept if the
    # weight learns, and after it for the products that follow.
    norm = 4 * t_h + 4 * s.T + (c * t_h if full else 0)
    adapted = c < 4 and not full  # PEFT makes a copy of what goes into each adapted projection
    attention = c * (2 * s.T * s.A + 2 * s.T * s.G) + 4 * s.T * s.heads
    copy = c if setup.autocast else 4
    inputs = copy * (3 * t_h + s.T * s.A) if adapted else c * t_h
    parts = {"norms": 2.0 * norm, "attention": float(attention + inputs)}
    if s.E == 1:
        parts["MLP"] = float(c * (t_h + 4 * s.T * s.I))
        return parts
    keeps_input = full or setup.routers or setup.experts.startswith("jai_fused")
    router = 12 * s.T * s.E + 32 * s.R + (c * t_h if keeps_input else 0)
    rows: float
    if setup.experts == "jai_fused":
        rows = c * s.R * 2 * s.I
    elif setup.experts == "jai_fused_fp8":
        rows = s.R * 2 * s.I * (1 + 1 / _FP8_GROUP)
    elif setup.experts == "jai_fused_x":
        rows = 0
    else:
        rows = c * s.R * (2 * s.H + 4 * s.I)
    if setup.copies_experts:
        rows += 3 * c * s.R * s.I * s.H  # a copy of its expert
    parts |= {"router": float(router), "experts": float(rows)}
    if not full:
        factors = s.c * s.E * setup.rank * (2 * s.H + 3 * s.I)
        if setup.weights in ("bfloat16", "float32") and not setup.experts.startswith("jai_fused"):
            parts["experts merged with LoRA"] = 3 * s.expert_matrix  # PEFT adds the factors' product to the matrices
        parts["experts"] += factors
    return parts


def working_of_layer(config: JaiConfig, setup: Setup) -> float:
    """Bytes that a layer's backward pass takes beyond what was kept, its weights' gradients included."""
    s, full = _Shape.of(config, setup), setup.learns == "full"
    if s.E == 1:
        gradients = 3 * s.c * s.I * s.H if full else 0
        return float(max(2 * s.c * s.T * s.I + gradients / 3, gradients) + s.c * s.T * s.H)
    rows_i, rows_h, matrix = s.c * s.R * s.I, s.c * s.R * s.H, s.expert_matrix
    if setup.experts.startswith("jai_fused"):
        kept = 0 if setup.experts == "jai_fused" else 2 * rows_i  # computed again
        down, up = (matrix, 3 * matrix) if full else (0.0, 0.0)
        return kept + max(4 * rows_i + rows_h + down, 2 * rows_i + rows_h + up)
    if setup.experts == "eager":
        if full:  # a slice's gradient is as large as the whole parameter's, and is added to it
            return max(5 * matrix - 2 * rows_i, 2 * rows_i / s.E + matrix)
        if setup.weights in ("nf4", "nf4-double"):  # the experts' rows beside what is put together of them
            return 3 * rows_i + matrix / s.E
        return 2 * rows_i / s.E + 2 * matrix
    if full:
        down, up = matrix, 3 * matrix
    elif setup.weights in ("nf4", "nf4-double"):  # dequantised, one matrix at a time
        down, up = matrix, 2 * matrix + 2 * rows_i
    else:
        down, up = matrix, 2 * matrix
    if setup.copies_experts:  # gradients of the copies
        return rows_i * s.H + up
    combine = 8 * s.R * s.H + rows_h
    return max(2 * rows_i - rows_h + down, up - 2 * rows_i, combine)


def _head(config: JaiConfig, setup: Setup) -> float:
    """Bytes of the head and its loss in the backward pass, beyond what the layers keep."""
    s = _Shape.of(config, setup)
    learns = setup.learns == "full" or setup.new_rows > 0
    merged = s.c * s.V * s.H if setup.learns != "full" and setup.new_rows else 0  # PEFT's copy of the whole matrix
    norm = (8 + s.c) * s.T * s.H
    if setup.loss == "none":
        return float(norm)
    if setup.loss == "logits":
        return float(3 * 4 * s.T * s.V + norm + merged)
    tile = min(s.T, _TILE_TOKENS) * _TILE_ENTRIES * s.c
    copies = 7 * 4 * min(s.T, _TILE_TOKENS) * min(s.V, _TILE_ENTRIES) if setup.on_cpu else 0
    gradient = (4 + (s.c if s.c < 4 else 0)) * s.V * s.H if learns else 0
    return float(tile + copies + norm + gradient + merged)


def moments(config: JaiConfig, setup: Setup) -> Iterator[Memory]:
    """The moments of a step at which memory may be at its peak."""
    s, full = _Shape.of(config, setup), setup.learns == "full"
    trained = sum(trained_parameters(config, setup).values()) if setup.trained is None else setup.trained
    # An adapter learns in fp32; weights that learn in full, and their gradients, are as they are stored.
    number = WEIGHT_BYTES[setup.weights] if full else 4.0
    shards = setup.shards
    state = {
        "weights": weight_bytes(config, setup) / shards,
        "adapter": 0.0 if full else number * trained / shards,
        "optimiser": setup.state * (number / 4 if setup.state == 8 else 1) * trained / shards,
    }
    if setup.reference:
        state["reference model"] = state["weights"]
    gradients = number * trained / shards
    saved, working = sum(saved_by_layer(config, setup).values()), working_of_layer(config, setup)
    head = _head(config, setup)
    count = count_parameters(config)
    layer = (count.total - count.embeddings) / s.L
    of_head = min(number * s.V * s.H / shards, gradients) if full else 0.0
    # FSDP: the running layer and the one that is fetched ahead, whole, and the gradients of one; embeddings and head.
    unsharded = 0.0
    if shards > 1:
        stored = weight_bytes(config, setup) / (count.total + count.skip_alphas) if setup.weights[0] == "n" else s.c
        unsharded = 2 * stored * layer + stored * count.embeddings
    elif setup.gpus > 1:  # DDP sends copies of the gradients
        unsharded = gradients
    checkpoint = float(s.c * s.T * s.H) if setup.checkpointing else saved
    kept = checkpoint * s.L + float(s.c * s.T * s.H)
    own = saved if setup.checkpointing else 0.0
    before = gradients if setup.accumulates else 0.0
    yield Memory("head", state | _parts(before, kept, 0.0, head, unsharded))
    yield Memory(
        "backward pass of the last layer",
        state | _parts(max(before, of_head), kept, own, working, unsharded),
    )
    after = gradients if setup.accumulates else max(gradients - number * layer / shards * full, 0.0)
    yield Memory("backward pass of the first layer", state | _parts(after, checkpoint, own, working, unsharded))
    yield Memory("optimiser's step", state | _parts(gradients, 0.0, 0.0, 0.0, 0.0))


def _parts(gradients: float, kept: float, layer: float, working: float, unsharded: float) -> dict[str, float]:
    return {
        "gradients": gradients,
        "activations kept": kept,
        "activations of the layer that is computed again": layer,
        "working memory": working,
        "gathered or sent": unsharded,
    }


def peak_memory(config: JaiConfig, setup: Setup) -> Memory:
    """The largest of a step's moments."""
    return max(moments(config, setup), key=lambda memory: memory.total)
