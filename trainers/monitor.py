# SPDX-License-Identifier: Apache-2.0
"""Where the router sends the tokens of training, layer by layer, and what the skip alphas are.

TRL's fused head bypasses the model's own forward, and the auxiliary loss pools all layers, which hides one layer's
imbalance. So this reads the routers themselves, by hooks.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import ProgressCallback, TrainerCallback

from jai.router_load import ROUTER_NAME, count_choices, count_choices_by_group
from jai.trainers.trainable import whole_alphas

_FIGURES = ("load_max", "load_min", "entropy")
_LAYER = re.compile(r".*\.layers\.(?P<layer>\d+)")


class RouterMonitor:
    """Sums up the routing of training batches on the device, until `pop` reads and clears it.

    With `languages`, also that of each language's tokens: `language_T` has the number of each token's language, or -1,
    of the batch that is passed forward.

    Tokens under the attention mask's zeros are left out. Counted is what happens in a training forward pass of the
    backbone with gradients on: not evaluation, not DPO's reference pass, and not the second pass of gradient
    checkpointing, which runs outside the backbone's forward.
    """

    def __init__(self, model: nn.Module, languages: Sequence[str] = ()):
        self.languages, self.language_T = list(languages), cast(torch.Tensor | None, None)
        self._alpha_owners: dict[int, nn.Module] = {}
        # layer -> (1 + languages, E + 2): tokens of each expert, entropy, tokens; the first row is of all tokens
        self._sums: dict[int, torch.Tensor] = {}
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
            entropy_T = -(log_p_TE.exp() * log_p_TE).sum(dim=-1)
            count_E = count_choices(logits_TE, top_k, mask_T)
            sums = torch.cat([count_E, torch.stack([entropy_T @ mask_T, mask_T.sum()])])[None]
            if self.languages:
                sums = torch.cat([sums, self._by_language(logits_TE, top_k, entropy_T)])
            self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

        return hook

    def _by_language(self, logits_TE: torch.Tensor, top_k: int, entropy_T: torch.Tensor) -> torch.Tensor:
        """Shape (languages, E + 2), as a row of `_sums`."""
        assert self.language_T is not None, "languages are given, and the batch's are not"
        language_T, languages = self.language_T.to(logits_TE.device), len(self.languages)
        count_LE = count_choices_by_group(logits_TE, top_k, language_T, languages)
        figures_T2 = torch.stack([entropy_T, torch.ones_like(entropy_T)], dim=1) * (language_T >= 0)[:, None]
        sums_L2 = figures_T2.new_zeros(languages, 2).index_add_(0, language_T.clamp(min=0), figures_T2)
        return torch.cat([count_LE, sums_L2], dim=1)

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The statistics since the last call, and the skip alphas as they are, as logging keys.

        `router/load/layer_03/expert_0` is the share of the layer's assignments that the expert got (they sum to 1),
        `router/load_max/layer_03` and `router/load_min/layer_03` the largest and smallest of them,
        `router/entropy/layer_03` the mean entropy of the router's softmax in nats (ln E when it is undecided), and
        `skip_alpha/layer_16` an alpha; `…/mean` is the mean over layers. With languages, a router's figures also have
        names such as `router/load/language/th/layer_03/expert_0` and `router/entropy/language/th/mean`, of the
        languages that came. All ranks must call it together.

        Args:
            reduce: sums a tensor over the ranks.
        """
        logs: dict[str, float] = {}
        if self._sums:
            layers = sorted(self._sums)
            device = self._sums[layers[0]].device
            sums = reduce(torch.stack([self._sums[layer].to(device) for layer in layers])).tolist()
            self._sums.clear()
            for group, name in enumerate(["", *(f"language/{language}/" for language in self.languages)]):
                rows = {layer: of_groups[group] for layer, of_groups in zip(layers, sums)}
                logs |= _router_figures({layer: row for layer, row in rows.items() if row[-1]}, name)
        if self._alpha_owners:
            alphas = whole_alphas(self._alpha_owners)
            logs |= {f"skip_alpha/layer_{layer:02}": alpha.item() for layer, alpha in alphas.items()}
            _add_means(logs, ("skip_alpha",))
        return logs


def _router_figures(sums: dict[int, list[float]], name: str) -> dict[str, float]:
    """Loads and entropy of each layer, and their means; nothing where no token was counted."""
    logs: dict[str, float] = {}
    for layer, (*tokens_E, entropy, tokens) in sums.items():
        loads = [expert / sum(tokens_E) for expert in tokens_E]
        for expert, load in enumerate(loads):
            logs[f"router/load/{name}layer_{layer:02}/expert_{expert}"] = load
        logs[f"router/load_max/{name}layer_{layer:02}"] = max(loads)
        logs[f"router/load_min/{name}layer_{layer:02}"] = min(loads)
        logs[f"router/entropy/{name}layer_{layer:02}"] = entropy / tokens
    if logs:
        _add_means(logs, tuple(f"router/{figure}{name and '/' + name.removesuffix('/')}" for figure in _FIGURES))
    return logs


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
