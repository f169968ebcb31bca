# SPDX-License-Identifier: Apache-2.0
"""The one table of tensor names, phi-3 <-> JAI, used both ways.

phi-3 fuses matrices that JAI keeps apart; every JAI tensor is a run of rows of one phi-3 tensor:

| phi-3                       | rows                | JAI, dense          | JAI, mixture of experts         |
| --------------------------- | ------------------- | ------------------- | ------------------------------- |
| `self_attn.qkv_proj.weight` | queries             | `self_attn.q_proj`  | the same                        |
|                             | keys                | `self_attn.k_proj`  | the same                        |
|                             | values              | `self_attn.v_proj`  | the same                        |
| `mlp.gate_up_proj.weight`   | gate, then up       | `gate_proj, up_proj`| `mlp.experts.gate_up_proj[e]`   |
| `mlp.down_proj.weight`      | all                 | `mlp.down_proj`     | `mlp.experts.down_proj[e]`      |
| everything else             | all                 | its own name        | its own name                    |

A router (`mlp.gate.weight`) and a skip alpha (`skip_alpha`) have no counterpart in phi-3.
"""

from dataclasses import dataclass

from jai.configuration_jai import JaiConfig


@dataclass(frozen=True)
class RowsOf:
    """Rows `start:stop` of a phi-3 tensor, which has `total` rows; `width` is None for a vector."""

    name: str
    start: int
    stop: int
    total: int
    width: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.stop - self.start
        return (rows,) if self.width is None else (rows, self.width)

    @property
    def source_shape(self) -> tuple[int, ...]:
        return (self.total,) if self.width is None else (self.total, self.width)


EMBEDDINGS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
MTP_PREFIX = "mtp."  # of layers for multi-token prediction, which `jai pretrain` makes and keeps on demand


def outer_sources(config: JaiConfig, vocab_size: int) -> dict[str, RowsOf]:
    """JAI name -> phi-3 rows for what is outside the layers; `vocab_size` is the phi-3 model's."""
    hidden = config.hidden_size
    sources = {
        EMBEDDINGS: RowsOf(EMBEDDINGS, 0, vocab_size, vocab_size, hidden),
        FINAL_NORM: RowsOf(FINAL_NORM, 0, hidden, hidden, None),
    }
    if not config.tie_word_embeddings:
        sources[LM_HEAD] = RowsOf(LM_HEAD, 0, vocab_size, vocab_size, hidden)
    return sources


def source_shapes(config: JaiConfig, vocab_size: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the phi-3 model with `vocab_size` rows and `layers` layers."""
    sources = [*outer_sources(config, vocab_size).values()]
    for layer in range(layers):
        sources += layer_sources(config, 0, layer).values()
    return {source.name: source.source_shape for source in sources}


def layer_sources(config: JaiConfig, layer: int, origin: int) -> dict[str, RowsOf]:
    """JAI name -> phi-3 rows for JAI layer `layer`, made from phi-3 layer `origin`.

    For a mixture of experts, the rows of `mlp.experts.*` are those of one expert.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    kv_heads, head_dim = kv_head_shape(config)
    queries = config.num_attention_heads * head_dim
    keys = kv_heads * head_dim
    qkv_rows = queries + 2 * keys

    def rows(name: str, start: int, stop: int, total: int, width: int | None) -> RowsOf:
        return RowsOf(f"model.layers.{origin}.{name}", start, stop, total, width)

    sources = {
        "input_layernorm.weight": rows("input_layernorm.weight", 0, hidden, hidden, None),
        "self_attn.q_proj.weight": rows("self_attn.qkv_proj.weight", 0, queries, qkv_rows, hidden),
        "self_attn.k_proj.weight": rows("self_attn.qkv_proj.weight", queries, queries + keys, qkv_rows, hidden),
        "self_attn.v_proj.weight": rows("self_attn.qkv_proj.weight", queries + keys, qkv_rows, qkv_rows, hidden),
        "self_attn.o_proj.weight": rows("self_attn.o_proj.weight", 0, hidden, hidden, queries),
        "post_attention_layernorm.weight": rows("post_attention_layernorm.weight", 0, hidden, hidden, None),
    }
    if config.num_local_experts == 1:
        sources |= {
            "mlp.gate_proj.weight": rows("mlp.gate_up_proj.weight", 0, inner, 2 * inner, hidden),
            "mlp.up_proj.weight": rows("mlp.gate_up_proj.weight", inner, 2 * inner, 2 * inner, hidden),
            "mlp.down_proj.weight": rows("mlp.down_proj.weight", 0, hidden, hidden, inner),
        }
    else:
        sources |= {
            "mlp.experts.gate_up_proj": rows("mlp.gate_up_proj.weight", 0, 2 * inner, 2 * inner, hidden),
            "mlp.experts.down_proj": rows("mlp.down_proj.weight", 0, hidden, hidden, inner),
        }
    return {f"model.layers.{layer}.{name}": source for name, source in sources.items()}


def kv_head_shape(config: JaiConfig) -> tuple[int, int]:
    """Key and value heads, and the width of a head: `JaiConfig` replaces None by the numbers when it is made."""
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    return config.num_key_value_heads, config.head_dim


def is_expert_stack(name: str) -> bool:
    """Whether a JAI tensor stacks one slice for each expert."""
    return ".mlp.experts." in name


def router_name(layer: int) -> str:
    return f"model.layers.{layer}.mlp.gate.weight"


def skip_alpha_name(layer: int) -> str:
    return f"model.layers.{layer}.skip_alpha"


def writes_to_residual(name: str) -> bool:
    """Whether a tensor is the last of its branch: with it at zero, the layer is the identity."""
    return name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.experts.down_proj"))
