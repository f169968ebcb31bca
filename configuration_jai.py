# Copyright 2026 The JAI authors
# SPDX-License-Identifier: Apache-2.0
"""Configuration of JAI: phi-3 blocks, repeated in place with skip alphas, and a router over experts.

This file ships to the Hub beside every checkpoint, so it imports nothing but transformers.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import transformers
from huggingface_hub.dataclasses import strict
from packaging import version
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

# The names of transformers' activations. To read them from `transformers.activations` imports 160 MB, which reading a
# configuration has no need of.
ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "prelu",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)

AUTO_MAP = {
    "AutoConfig": "configuration_jai.JaiConfig",
    "AutoModel": "modeling_jai.JaiModel",
    "AutoModelForCausalLM": "modeling_jai.JaiForCausalLM",
    "AutoModelForSequenceClassification": "modeling_jai.JaiForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_jai.JaiForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_jai.JaiForQuestionAnswering",
}

_ATTENTION_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
# Apart from the experts', because transformers takes an entry without a module for a misprint.
_DENSE_PLAN = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}

# transformers renamed Mixtral's expert-parallel styles in 5.19; vLLM and SGLang pin versions on both sides.
_EXPERT_PARALLEL = (
    {"layers.*.mlp.experts": "ep_dispatch_experts"}
    if version.parse(transformers.__version__) >= version.parse("5.19.0")
    else {"layers.*.mlp.gate": "ep_router", "layers.*.mlp.experts": "moe_tp_experts"}
)

# What a configuration may ask for: well beyond every model known, and little enough that a plan of it fits in memory. A
# file may hold anything, and what reads it (`jai inspect`, a Space) should say so before it allocates.
MAX_LAYERS = 10_000
_MAX_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_attention_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31 - 1,
    "num_local_experts": 2**14,
}
_MAX_LABELS = 100_000  # transformers makes a dictionary of them
_NUMBER_RANGES = {
    "initializer_range": (0, 1_000),
    "rms_norm_eps": (0, 1),
    "attention_dropout": (0, 1),
    "router_aux_loss_coef": (0, 1_000_000),
}
_SKIP_ALPHA_RANGE = (-10_000, 10_000)
_ROPE_FACTOR_RANGE = (1e-3, 1e6)
_ROPE_RANGES = {
    "rope_theta": (2, 1e12),
    "original_max_position_embeddings": (2, 1e9),
    "partial_rotary_factor": (1e-3, 1),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), _ROPE_FACTOR_RANGE),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), _ROPE_FACTOR_RANGE),
}
_OPTIONAL_IN_ROPE = ("attention_factor", "beta_fast", "beta_slow")
_ROPE_LISTS = ("short_factor", "long_factor")


def _is_between(value: Any, least: float, most: float) -> bool:
    """Whether it is a number in that range: no NaN, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _shown(value: Any) -> str:
    """The value for an error's text, cut where a file made it long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


@dataclass(frozen=True)
class PlannedLayer:
    """Where one layer of a JAI comes from (paper, Table 2). All indices count from 0.

    Attributes:
        layer: index of the layer in the JAI.
        block: index of its block, n in equation 1.
        copy: which run of the block it belongs to, d in equation 1 (0 is the first).
        origin: index of the layer of the base model that it was copied from.
        opens_copy: whether it is the first layer of its copy.
    """

    layer: int
    block: int
    copy: int
    origin: int
    opens_copy: bool

    @property
    def takes_anchor(self) -> bool:
        """Its input is the anchor of equation 1: what enters the first copy of the block."""
        return self.opens_copy and self.copy == 0

    @property
    def adds_anchor(self) -> bool:
        """It owns a skip alpha and adds alpha x anchor to its input."""
        return self.opens_copy and self.copy > 0


def plan_layers(block_size: int, block_repeats: list[int] | tuple[int, ...]) -> tuple[PlannedLayer, ...]:
    """Lay out the blocks: block n has `block_size` layers and runs `block_repeats[n]` times in place.

    >>> [p.origin for p in plan_layers(2, [1, 2])]
    [0, 1, 2, 3, 2, 3]

    Raises:
        ValueError: for a plan of more than `MAX_LAYERS` layers.
    """
    planned = block_size * sum(block_repeats)
    if planned > MAX_LAYERS:
        raise ValueError(
            f"`block_size`={block_size} with `block_repeats`={_shown(block_repeats)} plans {planned:,} layers. Plan at "
            f"most {MAX_LAYERS:,}."
        )
    layers: list[PlannedLayer] = []
    for block, repeats in enumerate(block_repeats):
        for copy in range(repeats):
            for offset in range(block_size):
                layers.append(
                    PlannedLayer(
                        layer=len(layers),
                        block=block,
                        copy=copy,
                        origin=block * block_size + offset,
                        opens_copy=offset == 0,
                    )
                )
    return tuple(layers)


@strict
class JaiConfig(PreTrainedConfig):
    r"""Configuration of a JAI. The defaults are JAI-1 (paper, Tables 2 and 3): 75.3 B parameters, 64 layers, 4 experts.

    Args:
        vocab_size: entries of the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: width inside each expert (or inside the MLP of a dense JAI).
        num_hidden_layers: layers to run. `None` runs the whole plan, `block_size * sum(block_repeats)`; fewer runs its
            first layers; more is an error.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads (grouped-query attention).
        head_dim: width of one head; `None` is `hidden_size // num_attention_heads`.
        hidden_act: activation of the gate.
        max_position_embeddings: longest context the model is made for, in tokens.
        initializer_range: standard deviation of freshly drawn weights.
        rms_norm_eps: epsilon of the norms.
        block_size: layers of a block.
        block_repeats: how often each block runs in place; copies have weights of their own.
        skip_alpha: start value of the skip alphas of equation 1 where weights are drawn fresh: one number for all, or
            one for each copy after the first, in layer order. The trained values live in the weights.
        skip_alpha_trainable: whether the alphas are parameters (else they are buffers; both are in the state dict).
        skip_alpha_normalize: divide by 1 + alpha after adding the anchor. Ours, not the paper's.
        num_local_experts: experts of a layer (`num_experts` is the same key); 1 is the dense JAI, without a router.
        num_experts_per_tok: experts chosen for a token; `None` is `min(2, num_experts)`.
        output_router_logits: return the router's logits, and add the auxiliary loss to the loss.
        router_aux_loss_coef: weight of the load-balancing loss; 0 for a dense JAI.
        rope_parameters: RoPE, as in transformers; the default is plain RoPE with base 1,000,000.
        num_mtp_layers: layers in the checkpoint that predict tokens after the next, for `generate(use_mtp=True)`; the
            model itself does not load them.

    JAI drops phi-3's window (paper, section 3.2): a `sliding_window` other than `None` is refused, and there is no such
    attribute, because transformers takes every configuration that has one for a model with windows.

    Raises:
        ValueError: (inside huggingface_hub's `StrictDataclassError`) if the values do not fit each other.
    """

    model_type = "jai"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}
    default_theta = 1_000_000.0
    norm_topk_prob = True  # read by engines that route by themselves: some take one expert a token for unnormalised
    base_model_tp_plan = {
        **_ATTENTION_PLAN,
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        **_EXPERT_PARALLEL,
    }

    vocab_size: int = 64000
    hidden_size: int = 5120
    intermediate_size: int = 17920
    num_hidden_layers: int | None = None
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 10
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 32000
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 32000
    tie_word_embeddings: bool = False
    attention_dropout: float | int = 0.0
    block_size: int = 4
    block_repeats: list[int] | tuple[int, ...] = (1, 1, 1, 2, 3, 3, 2, 1, 1, 1)
    skip_alpha: float | int | list[float | int] = 0.1
    skip_alpha_trainable: bool = True
    skip_alpha_normalize: bool = False
    num_local_experts: int = 4
    num_experts_per_tok: int | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.001
    rope_parameters: RopeParameters | dict | None = None
    num_mtp_layers: int | None = None

    def __post_init__(self, **kwargs):
        self.num_local_experts = kwargs.pop("num_experts", self.num_local_experts)
        self.block_repeats = list(self.block_repeats)
        if self.num_hidden_layers is None:
            self.num_hidden_layers = self.block_size * sum(self.block_repeats)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.num_experts_per_tok is None:
            self.num_experts_per_tok = min(2, self.num_local_experts)
        if self.num_local_experts == 1:
            # TRL asks any model with `output_router_logits` for its auxiliary loss unless the weight is 0.
            self.router_aux_loss_coef = 0.0
            self.base_model_tp_plan = {**_ATTENTION_PLAN, **_DENSE_PLAN}  # type: ignore[misc]
        # Whole from the start, and flat: saving adds only the entry of the saved class, and a load from the Hub may
        # have put the name of the first repository before the others.
        auto_map = kwargs.get("auto_map")
        kwargs["auto_map"] = {**(auto_map if isinstance(auto_map, dict) else {}), **AUTO_MAP}
        # No field of its own: transformers puts this attribute over the entry of `rope_parameters`, even a None.
        original_context = kwargs.pop("original_max_position_embeddings", None)
        if original_context is not None:
            self.original_max_position_embeddings = original_context
        if kwargs.get("sliding_window") is None:
            kwargs.pop("sliding_window", None)
        if not _is_between(kwargs.get("num_labels", 2), 0, _MAX_LABELS):
            raise ValueError(f"`num_labels` is {_shown(kwargs['num_labels'])}; expected 0 to {_MAX_LABELS:,}.")
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, TypeError) as error:
            # A dtype that torch does not have, a name that is a property here: transformers fails at them.
            raise ValueError(f"The configuration has a value that does not fit: {error}") from error

    @property
    def layer_plan(self) -> tuple[PlannedLayer, ...]:
        """The whole plan, `block_size * sum(block_repeats)` layers, of which the first `num_hidden_layers` run."""
        return plan_layers(self.block_size, self.block_repeats)

    @property
    def running_plan(self) -> tuple[PlannedLayer, ...]:
        """The layers that run."""
        return self.layer_plan[: self.num_hidden_layers]

    @property
    def initial_skip_alphas(self) -> dict[int, float]:
        """What the skip alphas start from where weights are drawn, by the index of the running layer that owns one."""
        owners = [planned.layer for planned in self.layer_plan if planned.adds_anchor]
        values = self.skip_alpha if isinstance(self.skip_alpha, list) else [self.skip_alpha] * len(owners)
        return {layer: float(value) for layer, value in zip(owners, values) if layer < self.num_hidden_layers}

    @property
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]] | None:
        """A pipeline carries `hidden_states` from stage to stage and no anchor, so a model with a skip has no plan."""
        if any(planned.adds_anchor for planned in self.running_plan):
            return None
        return {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
            "norm": (["hidden_states"], ["hidden_states"]),
        }

    def get_mtp_config(self):
        """transformers', for a plan of so many plain layers: those of multi-token prediction count from 0 again."""
        config = super().get_mtp_config()
        config.block_size, config.block_repeats, config.skip_alpha = config.num_hidden_layers, [1], 0.0
        return config

    def validate_architecture(self):
        """Part of `@strict`'s validation: refuse values that do not fit each other, and say what to change."""
        self._check_plan()
        self._check_skip_alphas()
        self._check_heads()
        self._check_experts()
        self._check_ranges()
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"`hidden_act` is {_shown(self.hidden_act)}; expected one of {', '.join(ACTIVATIONS)}.")
        window = getattr(self, "sliding_window", None)
        if window is not None:
            raise ValueError(f"`sliding_window` is {window}, but JAI has no window (paper, section 3.2). Leave it out.")
        super().validate_architecture()

    def _check_plan(self):
        if self.block_size < 1:
            raise ValueError(f"`block_size` is {self.block_size}; a block needs at least 1 layer.")
        if not self.block_repeats or min(self.block_repeats) < 1:
            raise ValueError(
                f"`block_repeats` is {_shown(self.block_repeats)}; every block must run at least once. To drop a "
                "block, leave its layers out of the base model."
            )
        planned = len(self.layer_plan)
        if not 0 <= self.num_hidden_layers <= planned:
            raise ValueError(
                f"`num_hidden_layers` is {self.num_hidden_layers}, but `block_size`={self.block_size} with "
                f"`block_repeats`={_shown(self.block_repeats)} plans {planned} layers. Give {planned} or fewer (fewer "
                "runs the first layers), or change the plan."
            )

    def _check_skip_alphas(self):
        values = self.skip_alpha if isinstance(self.skip_alpha, list) else [self.skip_alpha]
        copies = sum(repeats - 1 for repeats in self.block_repeats)
        if isinstance(self.skip_alpha, list) and len(values) != copies:
            raise ValueError(
                f"`skip_alpha` has {len(values)} values, but `block_repeats`={_shown(self.block_repeats)} makes "
                f"{copies} copies after the first. Give {copies} values, or one number for all."
            )
        for value in values:
            if not _is_between(value, *_SKIP_ALPHA_RANGE):
                least, most = _SKIP_ALPHA_RANGE
                raise ValueError(f"`skip_alpha` has {_shown(value)}; expected numbers from {least:,} to {most:,}.")
        if self.skip_alpha_normalize and -1 in self.initial_skip_alphas.values():
            raise ValueError("`skip_alpha` of -1 divides by zero when `skip_alpha_normalize` is true; choose another.")

    def _check_heads(self):
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if min(heads, kv_heads) < 1 or heads % kv_heads:
            raise ValueError(
                f"`num_attention_heads` ({heads}) must be a multiple of `num_key_value_heads` ({kv_heads})."
            )
        if self.hidden_size % heads and self.head_dim == self.hidden_size // heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) is not a multiple of `num_attention_heads` ({heads}). Change one "
                "of them, or give `head_dim`."
            )

    def _check_experts(self):
        if self.num_local_experts < 1:
            raise ValueError(f"`num_experts` is {self.num_local_experts}; give 1 for a dense JAI, or more.")
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"`num_experts_per_tok` is {self.num_experts_per_tok}, but there are {self.num_local_experts} experts. "
                f"Give a number from 1 to {self.num_local_experts}."
            )

    def _check_ranges(self):
        ranges = {name: (1, most) for name, most in _MAX_SIZES.items()} | _NUMBER_RANGES
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not _is_between(value, least, most):
                raise ValueError(f"`{name}` is {_shown(value)}; expected a number from {least:,} to {most:,}.")
        if self.num_mtp_layers is not None and not 1 <= self.num_mtp_layers <= MAX_LAYERS:
            raise ValueError(
                f"`num_mtp_layers` is {_shown(self.num_mtp_layers)}; expected a number from 1 to {MAX_LAYERS:,}, or "
                "none at all."
            )

    def validate_rope(self):
        """Part of `@strict`'s validation: refuse what transformers only warns of, and what the model would fail at."""
        rope: dict[str, Any] = dict(self.rope_parameters or {})
        rope_type, known = rope.get("rope_type", "default"), ["default", *ROPE_INIT_FUNCTIONS]
        if rope_type not in known:
            raise ValueError(f"`rope_type` is {_shown(rope_type)}; expected one of {', '.join(known)}.")
        for name, (least, most) in _ROPE_RANGES.items():
            may_be_none = name in _OPTIONAL_IN_ROPE or (name == "factor" and rope_type == "longrope")
            is_left_out = name not in rope or (may_be_none and rope[name] is None)
            if not is_left_out and not _is_between(rope[name], least, most):
                raise ValueError(
                    f"`{name}` of RoPE is {_shown(rope[name])}; expected a number from {least:g} to {most:g}."
                )
        rotary_dim = int(self.head_dim * rope.get("partial_rotary_factor", 1))
        if rotary_dim < 1:
            raise ValueError(
                f"`partial_rotary_factor` of RoPE is {rope['partial_rotary_factor']}, too little to turn any of the "
                f"{self.head_dim} numbers of a head."
            )
        for name in _ROPE_LISTS:
            factors, pairs = rope.get(name), rotary_dim // 2
            numbers = factors if isinstance(factors, list) else []
            fits = len(numbers) == pairs and all(_is_between(number, *_ROPE_FACTOR_RANGE) for number in numbers)
            if name in rope and not fits:
                raise ValueError(
                    f"`{name}` of RoPE is {_shown(factors)}; expected a list of {pairs} positive numbers, one for two "
                    "numbers of a head."
                )
        try:
            super().validate_rope()
        except KeyError as error:  # an entry that this type needs is missing
            raise ValueError(error.args[0]) from error


JaiConfig.register_for_auto_class()

__all__ = ["JaiConfig"]
