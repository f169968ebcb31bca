# SPDX-License-Identifier: Apache-2.0
"""Where the router sends the tokens of training, layer by layer, and what the skip alphas are.

TRL's fused head bypasses the model's own forward, and the auxiliary loss pools all layers, which hides one layer's
imbalance. So this reads the routers themselves, by hooks.
"""

import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, TrainerCallback

from jai.router_load import ROUTER_NAME, count_choices

_LAYER = re.compile(r".*\.layers\.(?P<layer>\d+)")


class RouterMonitor:
    """Sums up the routing of training batches on the device, until `pop` reads and clears it.

    Tokens under the attention mask's zeros are left out. Counted is what happens in a training forward pass of the
    backbone with gradients on: not evaluation, not DPO's reference pass, and not the second pass of gradient
    checkpointing, which runs outside the backbone's forward.
    """

    def __init__(self, model: nn.Module):
        self._alpha_owners: dict[int, nn.Module] = {}
        self._sums: dict[int, torch.Tensor] = {}  # layer -> (E + 2,): tokens of each expert, entropy, tokens
        self._counting = False
        self._mask_T: torch.Tensor | None = None
        backbones = set()
        for name, module in model.named_modules():
            if (match := ROUTER_NAME.fullmatch(name)) is not None:
                backbones.add(match["backbone"])
                module.register_forward_hook(self._count(int(match["layer"])))
            elif (match := _LAYER.fullmatch(name)) is not None and getattr(module, "skip_alpha", None) is not None:
                self._alpha_owners[int(match["layer"])] = module
        for name in backbones:
            backbone = model.get_submodule(name)
            backbone.register_forward_pre_hook(self._open, with_kwargs=True)
            backbone.register_forward_hook(self._close, always_call=True)

    def _open(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask_T = mask.reshape(-1) if mask is not None and mask.ndim == 2 else None
        self._counting = backbone.training and torch.is_grad_enabled()

    def _close(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        self._counting = False
        self._mask_T = None

    def _count(self, layer: int) -> Callable[[nn.Module, tuple, Any], None]:
        def hook(router: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            if not self._counting:
                return
            logits_TE, top_k = output[0].detach().float(), output[2].shape[-1]
            mask_T = logits_TE.new_ones(len(logits_TE)) if self._mask_T is None else self._mask_T.to(logits_TE)
            log_p_TE = logits_TE.log_softmax(dim=-1)
            entropy = -(log_p_TE.exp() * log_p_TE).sum(dim=-1) @ mask_T
            sums = torch.cat([count_choices(logits_TE, top_k, mask_T), torch.stack([entropy, mask_T.sum()])])
            self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

        return hook

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The statistics since the last call, and the skip alphas as they are, as logging keys.

        `router/load/layer_03/expert_0` is the share of the layer's assignments that the expert got (they sum to 1),
        `router/load_max/layer_03` and `router/load_min/layer_03` the largest and smallest of them,
        `router/entropy/layer_03` the mean entropy of the router's softmax in nats (ln E when it is undecided), and
        `skip_alpha/layer_16` an alpha; `…/mean` is the mean over layers. All ranks must call it together.

        Args:
            reduce: sums a tensor over the ranks.
        """
        logs: dict[str, float] = {}
        if self._sums:
            layers = sorted(self._sums)
            device = self._sums[layers[0]].device
            sums = reduce(torch.stack([self._sums[layer].to(device) for layer in layers])).tolist()
            self._sums.clear()
            for layer, (*tokens_E, entropy, tokens) in zip(layers, sums):
                assignments = sum(tokens_E)
                loads = [expert / assignments for expert in tokens_E]
                for expert, load in enumerate(loads):
                    logs[f"router/load/layer_{layer:02}/expert_{expert}"] = load
                logs[f"router/load_max/layer_{layer:02}"] = max(loads)
                logs[f"router/load_min/layer_{layer:02}"] = min(loads)
                logs[f"router/entropy/layer_{layer:02}"] = entropy / tokens
            _add_means(logs, ("router/load_max", "router/load_min", "router/entropy"))
        if self._alpha_owners:
            alphas = torch.stack([_read_alpha(owner) for owner in self._alpha_owners.values()]).tolist()
            logs |= {f"skip_alpha/layer_{layer:02}": alpha for layer, alpha in zip(self._alpha_owners, alphas)}
            _add_means(logs, ("skip_alpha",))
        return logs


def _read_alpha(owner: nn.Module) -> torch.Tensor:
    alpha = cast(torch.Tensor, owner.skip_alpha).detach()
    return (alpha.full_tensor() if isinstance(alpha, DTensor) else alpha).float().cpu().squeeze()


def _add_means(logs: dict[str, float], groups: tuple[str, ...]) -> None:
    for group in groups:
        values = [value for key, value in logs.items() if key.startswith(f"{group}/layer_")]
        logs[f"{group}/mean"] = sum(values) / len(values)


class ReadableProgress(ProgressCallback):
    """transformers' progress bar and log lines, without the statistics of single layers.

    They are hundreds of keys in a 64-layer model; trackers and `trainer_state.json` get them all.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=_without_layers(logs), **kwargs)


class ReadablePrinter(TrainerCallback):
    """The same for `disable_tqdm`: one line of figures for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero:
            figures = _without_layers(logs).items()
            print({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in figures})


def _without_layers(logs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in logs.items() if "/layer_" not in key and key != "total_flos"}
