# SPDX-License-Identifier: Apache-2.0
"""Parameters of a JAI by part, from its configuration."""

from dataclasses import dataclass

from jai.configuration_jai import JaiConfig


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a JAI by part.

    Attributes:
        embeddings: `embed_tokens` and, unless tied, `lm_head`.
        attention: all attention matrices.
        experts: all experts (or the MLPs of a dense JAI).
        routers: all routers.
        norms: all norms.
        skip_alphas: skip alphas, trainable or frozen.
        active: parameters that one token uses, its embedding rows counted as whole matrices.
    """

    embeddings: int
    attention: int
    experts: int
    routers: int
    norms: int
    skip_alphas: int
    active: int

    @property
    def total(self) -> int:
        """All weights without the skip alphas, as the paper counts."""
        return self.embeddings + self.attention + self.experts + self.routers + self.norms


def head_widths(config: JaiConfig) -> tuple[int, int]:
    """Heads times their dimension: of queries, and of keys or values."""
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    assert kv_heads is not None  # JaiConfig replaces None
    assert head_dim is not None
    return config.num_attention_heads * head_dim, kv_heads * head_dim


def count_parameters(config: JaiConfig) -> ParameterCount:
    """Count the parameters of a configuration from its shapes (paper, Table 3)."""
    hidden, layers = config.hidden_size, len(config.running_plan)
    used_experts = config.num_experts_per_tok
    assert used_experts is not None  # JaiConfig replaces None
    attention = layers * 2 * hidden * sum(head_widths(config))
    expert = 3 * hidden * config.intermediate_size
    routers = layers * hidden * config.num_local_experts if config.num_local_experts > 1 else 0
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    norms = (2 * layers + 1) * hidden
    return ParameterCount(
        embeddings=embeddings,
        attention=attention,
        experts=layers * config.num_local_experts * expert,
        routers=routers,
        norms=norms,
        skip_alphas=sum(planned.adds_anchor for planned in config.running_plan),
        active=embeddings + attention + layers * used_experts * expert + routers + norms,
    )
