# SPDX-License-Identifier: Apache-2.0
"""Where routers send tokens: the one count behind training logs, model cards and benchmarks.

The Space has a count of its own (`hub_card/space/routing.py`), because its files run without this package.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

# The module of a router: by name and not by class, for remote code has classes of its own, and PEFT puts a module
# around the router.
ROUTER_NAME = re.compile(r"(?P<backbone>.*)\.layers\.(?P<layer>\d+)\.mlp\.gate")


def count_choices(logits_TE: torch.Tensor, top_k: int, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """How often each expert is chosen, (E,) in fp32 on the logits' device.

    It goes by the logits and not by the ids that a router returns, which expert parallelism renumbers by rank.

    Args:
        logits_TE: a router's logits for T tokens.
        top_k: experts that a token is sent to.
        mask_T: 0 for tokens that do not count; None counts them all.
    """
    chosen_TK = logits_TE.topk(top_k, dim=-1).indices
    if mask_T is None:
        mask_T = logits_TE.new_ones(len(logits_TE))
    counts_E = torch.zeros(logits_TE.shape[-1], device=logits_TE.device)
    return counts_E.index_add_(0, chosen_TK.flatten(), mask_T.float().repeat_interleave(top_k))


def count_choices_by_group(logits_TE: torch.Tensor, top_k: int, group_T: torch.Tensor, groups: int) -> torch.Tensor:
    """How often the tokens of each group choose each expert, (groups, E) in fp32 on the logits' device.

    Args:
        logits_TE: a router's logits for T tokens.
        top_k: experts that a token is sent to.
        group_T: number of each token's group; a token of -1 is in none.
        groups: how many there are.
    """
    experts = logits_TE.shape[-1]
    chosen_TK = logits_TE.topk(top_k, dim=-1).indices
    of_expert_TK = group_T.clamp(min=0)[:, None] * experts + chosen_TK
    counts = torch.zeros(groups * experts, device=logits_TE.device)
    counts.index_add_(0, of_expert_TK.flatten(), (group_T >= 0).float().repeat_interleave(top_k))
    return counts.view(groups, experts)


@torch.no_grad()
def router_load(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[list[float]]:
    """Share of each layer's choices that each expert gets, layer by expert; each layer sums to 1.

    Args:
        model: a causal language model with routers, in evaluation mode.
        batches: arguments of its forward pass; tokens under the attention mask's zeros do not count.
    """
    counts_LE: torch.Tensor | None = None
    for batch in batches:
        logits_by_layer = model(**batch, use_cache=False, output_router_logits=True).router_logits
        mask = batch.get("attention_mask")
        mask_T = None if mask is None else mask.flatten()
        top_k = model.config.num_experts_per_tok
        counted_LE = torch.stack([count_choices(logits_TE, top_k, mask_T) for logits_TE in logits_by_layer])
        counts_LE = counted_LE if counts_LE is None else counts_LE + counted_LE
    if counts_LE is None:
        raise ValueError("there are no batches to count")
    return (counts_LE / counts_LE.sum(dim=-1, keepdim=True)).tolist()
