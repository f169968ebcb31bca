# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of training on a token: the one count behind plans, logs and benchmarks.

Matrix products alone. A weight that learns takes six operations: two forwards, two for the gradient of what goes in,
two for its own. A frozen one takes four. What checkpointing computes again is not counted, as in the model FLOPs
utilisation of PaLM (appendix B).
"""

from torch import nn

from jai.configuration_jai import JaiConfig
from jai.planning.count import head_widths

LEARNS, FROZEN = 6.0, 4.0


def attention_flops(layers: int, width: int, length: int) -> float:
    """Operations of the scores and of the weighted values, a token: causal, so over half of the sequence on average.

    Args:
        layers: how many.
        width: heads times their dimension.
        length: tokens of a sequence.
    """
    return LEARNS * layers * width * length


def model_flops(model: nn.Module, config: JaiConfig, length: int) -> float:
    """Operations of training on a token, by what of the model learns.

    Args:
        model: a causal language model, with or without an adapter; its weights are not read. Not with weights in four
            bits, whose shapes are the quantiser's.
        config: its configuration.
        length: tokens of a sequence.
    """
    used = float(config.num_experts_per_tok or 1) / config.num_local_experts
    flops = attention_flops(len(config.running_plan), head_widths(config)[0], length)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or ("embed_tokens" in name and not config.tie_word_embeddings):
            continue
        share = used if ".experts." in name else 1.0
        flops += (LEARNS if parameter.requires_grad else FROZEN) * share * parameter.numel()
    return flops
