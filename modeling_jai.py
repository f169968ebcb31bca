# Copyright 2026 The JAI authors
# SPDX-License-Identifier: Apache-2.0
"""JAI: phi-3 blocks repeated in place with skip alphas (paper, equation 1), and a router over experts.

With every alpha 0 a JAI is Mixtral; with one expert and no repeats it is Phi-3 without a sliding window.
Every checkpoint on the Hub includes this file. It imports only torch, transformers, `.configuration_jai` and
`.quantization_jai`; kernels attach from outside, through transformers' attention and experts interfaces.

Shape suffixes: B batch, S sequence, T = B * S tokens, H hidden_size, I intermediate_size, E experts, K experts per
token, N query heads, G key and value heads, D head_dim, V vocabulary.
"""

import functools
import inspect
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation, use_kernel_forward_from_hub
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices, packed_sequence_mask_function
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_jai import JaiConfig
from .quantization_jai import (
    JaiExperts4bit,
    peft_config_of_four_bits,
    quantizers_of_experts,
    refuse_implementation,
)

# transformers' name for the key/value cache: `cache` since 5.24.
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def takes_cache(forward: Callable) -> Callable:
    """Let a method take its argument `past_key_values` under the name `cache` too, if transformers uses that."""
    if CACHE == "past_key_values":
        return forward
    signature = inspect.signature(forward)
    parameter = inspect.Parameter(CACHE, inspect.Parameter.KEYWORD_ONLY, default=None)
    *others, last = signature.parameters.values()

    @functools.wraps(forward)
    def renaming(self, *args, **kwargs):
        if CACHE in kwargs:
            kwargs["past_key_values"] = kwargs.pop(CACHE)
        return forward(self, *args, **kwargs)

    # `generate` looks for the argument in the signature.
    renaming.__signature__ = signature.replace(parameters=[*others, parameter, last])  # type: ignore[attr-defined]
    return renaming


@use_kernel_forward_from_hub("RMSNorm")
class JaiRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight.to(hidden_states.dtype) * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class JaiRotaryEmbedding(nn.Module):
    # Keep the attribute names: transformers uses them to recompute the buffers of any *RotaryEmbedding.
    def __init__(self, config: JaiConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        compute = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: JaiConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies of plain RoPE, `(rotary_dim / 2,)`, and the scaling of attention (1)."""
        rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float, device=device) / rotary_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update  # LongRoPE switches its factors when the context outgrows the original one
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(x.device.type if x.device.type != "mps" else "cpu", enabled=False):
            angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
            angles = torch.cat((angles, angles), dim=-1)
            cos = angles.cos() * self.attention_scaling
            sin = angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    q_BNSD: torch.Tensor, k_BGSD: torch.Tensor, cos_BSD: torch.Tensor, sin_BSD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys. With a partial rotary factor, cos and sin are narrower and the rest passes through."""
    cos, sin = cos_BSD.unsqueeze(1), sin_BSD.unsqueeze(1)
    rotary_dim = cos.shape[-1]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
        turned = turned * cos + rotate_half(turned) * sin
        return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned

    return rotate(q_BNSD), rotate(k_BGSD)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain operations: the reference, and the one that can return its weights."""
    key_BNSD = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value_BNSD = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key_BNSD.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value_BNSD).transpose(1, 2).contiguous(), weights


class JaiAttention(nn.Module):
    """Grouped-query attention, with phi-3's fused `qkv_proj` split into three for tensor parallelism and LoRA."""

    apply_rotary_pos_emb = staticmethod(apply_rotary_pos_emb)  # an attribute, so that kernels can replace it per model

    def __init__(self, config: JaiConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        query, key = self.apply_rotary_pos_emb(query, key, *position_embeddings)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class JaiMLP(nn.Module):
    """The gated MLP of a dense JAI (one expert, no router)."""

    def __init__(self, config: JaiConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class JaiTopKRouter(nn.Module):
    """Softmax over all experts in fp32; the top K weights are renormalized to sum to 1 (paper, section 3.1.3)."""

    def __init__(self, config: JaiConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits `(T, E)`, weights `(T, K)` and expert ids `(T, K)`."""
        x_TH = hidden_states.reshape(-1, self.hidden_dim)
        logits_TE = F.linear(x_TH, self.weight.to(x_TH.dtype))  # it may be trained in fp32 beside weights in bf16
        weights_TK, ids_TK = logits_TE.float().softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits_TE, weights_TK / weights_TK.sum(dim=-1, keepdim=True), ids_TK


@use_experts_implementation
class JaiExperts(nn.Module):
    """All experts of a layer in two 3-D parameters. `forward` is the "eager" implementation; others replace it."""

    def __init__(self, config: JaiConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out_TH = torch.zeros_like(hidden_states)
        # Ids of `num_experts` and above belong to other ranks under expert parallelism.
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out_TH.index_add_(0, token, (y * top_k_weights[token, choice, None]).to(out_TH.dtype))
        return out_TH

    def in_four_bits(self, quantization) -> JaiExperts4bit:
        """The 4-bit replacement of these experts, for loading with a `BitsAndBytesConfig`."""
        return JaiExperts4bit(self, quantization)


class JaiSparseMoeBlock(nn.Module):
    """A router and its experts."""

    def __init__(self, config: JaiConfig):
        super().__init__()
        self.gate = JaiTopKRouter(config)
        self.experts = JaiExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x_TH = hidden_states.view(-1, hidden_states.shape[-1])
        _, weights_TK, ids_TK = self.gate(x_TH)
        return self.experts(x_TH, ids_TK, weights_TK).view(hidden_states.shape)


class JaiDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm layer. At the start of a later copy of a block, it adds alpha times the anchor to its input."""

    def __init__(self, config: JaiConfig, layer_idx: int):
        super().__init__()
        planned = config.layer_plan[layer_idx]
        self.takes_anchor = planned.takes_anchor
        self.skip_alpha_normalize = config.skip_alpha_normalize
        # Shape (1,), because FSDP2 refuses 0-d parameters. A frozen alpha is a buffer, because loading a checkpoint
        # makes every parameter trainable again.
        if not planned.adds_anchor:
            self.register_parameter("skip_alpha", None)
        elif config.skip_alpha_trainable:
            self.skip_alpha = nn.Parameter(torch.empty(1))
        else:
            self.register_buffer("skip_alpha", torch.empty(1))
        self.layer_idx = layer_idx
        self.self_attn = JaiAttention(config, layer_idx)
        self.mlp = JaiMLP(config) if config.num_local_experts == 1 else JaiSparseMoeBlock(config)
        self.input_layernorm = JaiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = JaiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        anchor: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`hidden_states` and `anchor` are `(B, S, H)`; only the first layer of a later copy reads the anchor."""
        if self.skip_alpha is not None:
            alpha = self.skip_alpha.to(hidden_states.dtype)  # it may be trained in fp32 beside weights in bf16
            hidden_states = hidden_states + alpha * anchor
            if self.skip_alpha_normalize:
                hidden_states = hidden_states / (1 + alpha)
        residual = hidden_states
        hidden_states, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@auto_docstring
class JaiPreTrainedModel(PreTrainedModel):
    config: JaiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["JaiDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]  # `generate(use_mtp=True)` reads them by this pattern
    _can_record_outputs = {
        "router_logits": OutputRecorder(JaiTopKRouter, index=0),
        "hidden_states": JaiDecoderLayer,
        "attentions": JaiAttention,
    }

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        with quantizers_of_experts():
            return super().from_pretrained(*args, **kwargs)

    def load_adapter(self, peft_model_id=None, *args, peft_config=None, load_config=None, **kwargs):
        """As in transformers, but LoRA can adapt 4-bit experts."""
        if any(isinstance(module, JaiExperts4bit) for module in self.modules()):
            peft_config = peft_config_of_four_bits(peft_model_id, peft_config, load_config, **kwargs)
        return super().load_adapter(peft_model_id, *args, peft_config=peft_config, load_config=load_config, **kwargs)

    def set_experts_implementation(self, experts_implementation: str | dict):
        chosen = experts_implementation
        for module in self.modules():
            refuse_implementation(module, chosen.get("") if isinstance(chosen, dict) else chosen)
        super().set_experts_implementation(experts_implementation)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, JaiExperts4bit):
            raise ValueError(
                "The checkpoint lacks weights of its experts, and 4-bit experts cannot be initialized at random."
            )
        if isinstance(module, JaiExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, JaiTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, JaiDecoderLayer) and module.skip_alpha is not None:
            init.constant_(module.skip_alpha, self.config.initial_skip_alphas[module.layer_idx])

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Parameters of the model; a quantized weight counts as one parameter, not as its packed bytes."""
        count = super().num_parameters(only_trainable, exclude_embeddings)
        for experts in [] if only_trainable else self.modules():
            if isinstance(experts, JaiExperts4bit):
                count += experts.num_weights() - sum(stored.numel() for stored in experts.parameters())
        return count

    def save_pretrained(self, *args, **kwargs):
        # FSDP2 replaces the model's class by a subclass, whose name and file would be saved as the remote code.
        wrapper = type(self)
        if wrapper.__module__.startswith("torch."):
            model_class = next(cls for cls in wrapper.__mro__ if "_auto_class" in vars(cls))
            for name in ("__module__", "__name__", "__qualname__"):
                setattr(wrapper, name, getattr(model_class, name))
        super().save_pretrained(*args, **kwargs)


def offer_peft_defaults():
    """Register JAI's default target modules with PEFT, if the process has imported it.

    They are Llama's, since the layers have the same names; but where Llama's are only q and v, all of attention.
    """
    peft = sys.modules.get("peft.utils.constants")
    for name, table in vars(peft).items() if peft else ():
        if name.endswith("_MODULES_MAPPING") and "llama" in table:
            few = table["llama"] == ["q_proj", "v_proj"]
            table.setdefault("jai", ["q_proj", "k_proj", "v_proj", "o_proj"] if few else table["llama"])


@auto_docstring
class JaiModel(JaiPreTrainedModel):
    def __init__(self, config: JaiConfig):
        super().__init__(config)
        offer_peft_defaults()
        config.validate_architecture()  # again: `num_hidden_layers` may have been set since the config was made
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(JaiDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = JaiRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = JaiRotaryEmbedding(config)
        # For each skip connection: the layer whose input is the anchor, and the layer that adds it.
        self.skips = [(p.layer - p.copy * config.block_size, p.layer) for p in config.running_plan if p.adds_anchor]
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        causal_mask = self._causal_mask(inputs_embeds, attention_mask, position_ids, past_key_values)
        # After the mask: transformers looks for packed documents only if there is no cache, and `use_cache` is on by
        # default (the loss of four packed documents would silently change from 224.487 to 226.172).
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        hidden_states = inputs_embeds
        anchor = None  # the input of the current block's first copy: Output(n - 1, last copy) in equation 1
        self._refuse_cut_skips()
        if kwargs.get("output_router_logits"):
            self._refuse_lost_auxiliary_loss()
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            if getattr(decoder_layer, "takes_anchor", False):
                anchor = hidden_states
            adds_anchor = getattr(decoder_layer, "skip_alpha", None) is not None
            # Positional, because reentrant checkpointing passes gradients only through positional tensors.
            hidden_states = decoder_layer(
                hidden_states,
                anchor if adds_anchor else None,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values})

    def _causal_mask(self, inputs_embeds, attention_mask, position_ids, past_key_values):
        """transformers' causal mask, but packed documents are kept apart even if there is a 2-D attention mask."""
        same_document = None
        if attention_mask is not None and len(attention_mask.shape) != 2:
            pass  # the caller's own mask, used as it is
        elif past_key_values is not None:
            self._refuse_packed_beside_cache(attention_mask, position_ids)
        else:
            position_ids_BS = position_ids.expand(inputs_embeds.shape[0], -1)
            attention_mask, same_document = self._keep_documents_apart(attention_mask, position_ids_BS)
        return create_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids, and_mask_function=same_document
        )

    def _refuse_packed_beside_cache(self, attention_mask, position_ids):
        is_checked = position_ids.shape[1] > 1 and not is_tracing(position_ids)
        if is_checked and self._positions_restart(position_ids, attention_mask):
            raise ValueError(
                "`position_ids` restart (packed documents) beside `past_key_values`: the documents would see each "
                "other through the cache. Leave `past_key_values` out, or give one document a row."
            )

    def _keep_documents_apart(self, attention_mask, position_ids_BS):
        """The attention mask for transformers, and a mask function that keeps documents apart (None if not needed).

        By itself transformers looks at restarting `position_ids` only if there is no attention mask.
        """
        if attention_mask is None or attention_mask.shape != position_ids_BS.shape:  # it may cover a tuned prefix too
            return attention_mask, None
        if not is_tracing(attention_mask):
            if not self._positions_restart(position_ids_BS, attention_mask):  # one document a row, padded or not
                return attention_mask, None
            if attention_mask.all():
                return None, None
            if "flash" in self.config._attn_implementation:
                raise ValueError(
                    "`position_ids` restart (packed documents) and `attention_mask` masks padding in the same batch; "
                    "flash attention takes one or the other. Pack without padding and leave `attention_mask` out."
                )
        return attention_mask, packed_sequence_mask_function(find_packed_sequence_indices(position_ids_BS))

    @staticmethod
    def _positions_restart(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether the positions of two neighbouring tokens, neither of them padding, are not consecutive."""
        restarts = position_ids.diff() != 1
        if attention_mask is not None:
            real = attention_mask[:, -position_ids.shape[1] :] != 0  # the mask covers what a cache holds, too
            restarts = restarts & real[:, 1:] & real[:, :-1]
        return bool(restarts.any())

    def _refuse_cut_skips(self):
        """A pipeline stage receives `hidden_states` but no anchor, so a skip across stages would be wrong."""
        for anchor_layer, layer in self.skips:
            if hasattr(self.layers[anchor_layer], "self_attn") != hasattr(self.layers[layer], "self_attn"):
                starts = [planned.layer for planned in self.config.running_plan if planned.takes_anchor]
                raise ValueError(
                    f"The pipeline is cut between layers {anchor_layer} and {layer}, which a skip connection joins. "
                    f"Cut it only before one of the layers {starts}, or use tensor or expert parallelism."
                )

    def _refuse_lost_auxiliary_loss(self):
        """Reentrant checkpointing records the router logits in its first pass, which has no gradients."""
        reentrant = any(
            getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant")
            for layer in self.layers
            if getattr(layer, "gradient_checkpointing", False)
        )
        if reentrant and self.training and torch.is_grad_enabled() and self.config.router_aux_loss_coef:
            raise ValueError(
                "Under reentrant gradient checkpointing the router's auxiliary loss has no gradient. Give "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`, or `router_aux_loss_coef=0`.'
            )


def keep_positions(x_BSH: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The last n positions (0: all), those of a 1-D tensor, or by row those of a 2-D one (ids or a boolean mask)."""
    if isinstance(logits_to_keep, int):
        return x_BSH[:, -logits_to_keep:]
    if logits_to_keep.ndim == 1:
        return x_BSH[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return x_BSH[logits_to_keep]
    return torch.take_along_dim(x_BSH, logits_to_keep[..., None], dim=1)


@auto_docstring
class JaiForCausalLM(JaiPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: JaiConfig):
        super().__init__(config)
        self.model = JaiModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        r"""
        Example:

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> model = AutoModelForCausalLM.from_pretrained("your-org/your-jai", trust_remote_code=True)
        >>> tokenizer = AutoTokenizer.from_pretrained("your-org/your-jai", trust_remote_code=True)
        >>> inputs = tokenizer("ประเทศไทยมี", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
        ```"""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)

        aux_loss = None
        if output_router_logits and self.config.num_local_experts > 1:
            mask_BS = None
            if attention_mask is not None and len(attention_mask.shape) == 2:
                mask_BS = attention_mask[:, -outputs.last_hidden_state.shape[1] :]  # less what a cache holds
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, self.config.num_local_experts, self.config.num_experts_per_tok, mask_BS
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)

        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    @takes_cache
    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        # `generate` accepts embeddings only if this signature names them.
        # LongRoPE rotates all keys differently once the context outgrows the original one, so the cache is recomputed.
        rope = self.config.rope_parameters
        limit = rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else None
        if limit and past_key_values is not None and 0 < past_key_values.get_seq_length() <= limit < input_ids.shape[1]:
            past_key_values, kwargs["next_sequence_length"] = None, None
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **{CACHE: past_key_values}, **kwargs
        )


# These build their base model themselves: transformers' `__init__` uses AutoModel, which refuses remote code.


class JaiForSequenceClassification(GenericForSequenceClassification, JaiPreTrainedModel):
    """JAI with a linear head on the last token: a classifier, or a reward model with `num_labels=1`."""

    def __init__(self, config: JaiConfig):
        JaiPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = JaiModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class JaiForTokenClassification(GenericForTokenClassification, JaiPreTrainedModel):
    """JAI with a linear head on every token: a tagger, or a process reward model with `num_labels=2`."""

    def __init__(self, config: JaiConfig):
        JaiPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = JaiModel(config)
        self.dropout = nn.Dropout(0.1)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class JaiForQuestionAnswering(GenericForQuestionAnswering, JaiPreTrainedModel):
    """JAI with two linear heads on every token, for where an answer starts and where it ends."""

    def __init__(self, config: JaiConfig):
        JaiPreTrainedModel.__init__(self, config)
        self.model = JaiModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


JaiModel.register_for_auto_class("AutoModel")
JaiForCausalLM.register_for_auto_class("AutoModelForCausalLM")
JaiForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
JaiForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
JaiForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")

__all__ = [
    "JaiForCausalLM",
    "JaiForQuestionAnswering",
    "JaiForSequenceClassification",
    "JaiForTokenClassification",
    "JaiModel",
    "JaiPreTrainedModel",
]
