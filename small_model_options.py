# SPDX-License-Identifier: Apache-2.0
"""What a small model is told: its shape, and how it is trained. Imports no PyTorch."""

from dataclasses import dataclass
from typing import Literal

from jai.options import option


@dataclass(frozen=True)
class ModelShape:
    """Shape of a small phi-3, and how it begins."""

    hidden_size: int = option(128, help="Width.", at_least=1)
    intermediate_size: int = option(352, help="Width of the MLP.", at_least=1)
    num_hidden_layers: int = option(4, help="Layers.", at_least=1)
    num_attention_heads: int = option(4, help="Heads, all with keys and values of their own.", at_least=1)
    initializer_range: float = option(
        0.05,
        help="Standard deviation of the first weights; phi-3's 0.02 hardly learns at such widths.",
        above=0,
    )


@dataclass(frozen=True)
class Training:
    """How a small model is trained. Without decay, any point of a run may be read."""

    tokens: int = option(help="Tokens of a whole run, rounded down to rows.", at_least=1)
    context: int = option(256, help="Tokens of a row.", at_least=2)
    batch_rows: int = option(8, help="Rows of a step.", at_least=1)
    learning_rate: float = option(2e-3, help="Of AdamW.", above=0)
    warmup_steps: int = option(20, help="Steps over which the learning rate rises.", at_least=0)
    decay: bool = option(False, help="Whether it falls to 0 after that, by a cosine, or stays.")
    weight_decay: float = option(0.1, help="Of all matrices.", at_least=0)
    pretrain_tokens: int = option(
        0,
        help="0, or tokens on which each seed's model is first trained with the base tokenizer; every arm of an "
        "ablation then starts from it, new rows at the mean of their pieces' rows.",
        at_least=0,
    )
    dtype: Literal["float32", "bfloat16"] = option(
        "bfloat16", help="Of the matrix products; weights and softmax are fp32."
    )
    device: str = option("cpu", help="A torch device.")

    @property
    def rows(self) -> int:
        """Rows of a whole run."""
        return self.tokens // self.context
