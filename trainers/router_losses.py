# SPDX-License-Identifier: Apache-2.0
"""The routers' losses, layer by layer, with gradients: load balancing, and the z-loss.

TRL's fused head returns no router logits, and transformers pools all layers into one auxiliary loss, in which one
layer's imbalance can hide another's. So logits are taken from the routers by hooks, and each layer has losses of its
own; what is trained is their mean, and what is logged is each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from jai.router_load import ROUTER_NAME


@dataclass
class RouterLossOptions:
    """The router's auxiliary loss, for which some of TRL's trainers have no code, or no weight."""

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the router's load-balancing loss, which is added to TRL's; 0 does without. Default: the "
            "model's own."
        },
    )


def balance_weight(given: float | None, config: PreTrainedConfig) -> float:
    """Weight of the load-balancing loss: the one that is given, else the model's own."""
    return float(getattr(config, "router_aux_loss_coef", 0.0)) if given is None else given


def balance_loss(logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """The load-balancing loss of one layer, top_k where every expert gets as much (Switch Transformer, equation 4).

    For one layer it is transformers' `load_balancing_loss_func`.

    Args:
        logits_TE: a router's, of the tokens that count, of shape (tokens, experts).
        top_k: experts that a token is sent to.
    """
    experts = logits_TE.shape[-1]
    probabilities_TE = logits_TE.float().softmax(dim=-1)
    chosen_TK = probabilities_TE.topk(top_k, dim=-1).indices
    load_E = nn.functional.one_hot(chosen_TK, experts).sum(dim=1).float().mean(dim=0)
    return experts * (load_E * probabilities_TE.mean(dim=0)).sum()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of (log Σ exp of the logits)² (ST-MoE, equation 5), for one layer."""
    return logits_TE.float().logsumexp(dim=-1).square().mean()


class RouterLosses:
    """Takes the router logits of training forward passes, until `pop` makes losses of them."""

    def __init__(self, model: nn.Module):
        self._logits: dict[int, tuple[torch.Tensor, int]] = {}
        self._taking = False
        for name in {match["backbone"] for name, _ in model.named_modules() if (match := ROUTER_NAME.fullmatch(name))}:
            backbone = model.get_submodule(name)
            backbone.register_forward_pre_hook(self._open)
            backbone.register_forward_hook(self._close, always_call=True)
        for name, module in model.named_modules():
            if (match := ROUTER_NAME.fullmatch(name)) is not None:
                module.register_forward_hook(self._take(int(match["layer"])))

    def _open(self, backbone: nn.Module, args: tuple) -> None:
        self._logits.clear()
        # Not the second pass of gradient checkpointing, which runs the layers alone.
        self._taking = backbone.training and torch.is_grad_enabled()

    def _close(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        self._taking = False

    def _take(self, layer: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(router: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            if self._taking:
                self._logits[layer] = output[0], output[2].shape[-1]

        return hook

    def pop(self, is_text_T: torch.Tensor) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """The load-balancing loss and the z-loss of each layer, of the last forward pass.

        Args:
            is_text_T: which of the pass's tokens count; padding does not.
        """
        logits = {layer: (each[is_text_T.to(each.device)], top_k) for layer, (each, top_k) in self._logits.items()}
        self._logits.clear()
        balance = {layer: balance_loss(each, top_k) for layer, (each, top_k) in sorted(logits.items())}
        return balance, {layer: z_loss(each) for layer, (each, _) in sorted(logits.items())}


def mean_of(losses: dict[int, torch.Tensor]) -> torch.Tensor:
    """The mean over layers."""
    return torch.stack(list(losses.values())).mean()
