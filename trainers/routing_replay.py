# SPDX-License-Identifier: Apache-2.0
"""Routing replay: the experts that answered a prompt are the experts that learn from the answer.

Generation and training compute the same tokens in another order or another precision, and a token near the border
between two experts then goes to another one; what is trained is no longer what answered, and its likelihood jumps. So
the choices are recorded at the rollout and, with replay, made again in training, while the weights of the chosen
experts come from the live logits and so have their gradients (R3, Ma et al., 2025, arXiv 2510.11370).

It attaches to the routers by hooks. The load-balancing loss goes by the live logits alone, with replay or without.

Shape suffixes: B rows, S positions, L layers with a router, K experts of a token, T = B * S tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from jai.errors import UserError
from jai.modeling_jai import CACHE
from jai.router_load import ROUTER_NAME

UNKNOWN = -1  # where nothing was recorded: padding, and the last token, which the rollout never read


class RoutingReplay:
    """Records the choices of a model's routers in a rollout, and replays or compares them in later passes.

    Args:
        model: with routers that return logits, weights and expert ids (`JaiTopKRouter`).
        replays: whether the recorded choice is made again; if not, the disagreement alone is counted.

    Raises:
        UserError: for a model without routers.
    """

    def __init__(self, model: nn.Module, *, replays: bool):
        self._replays = replays
        self._ids: list[list[torch.Tensor]] = []  # by layer, passes of the rollout: (B, S, K)
        self._tokens: list[torch.Tensor] = []  # of the same passes: (B, S)
        self._is_recording = False
        self._followed_BSLK: torch.Tensor | None = None
        self._rows = 0  # how many of its rows have passed
        self._current_TLK: torch.Tensor | None = None
        self._in_pass = self._counts = False
        self._differing: torch.Tensor | None = None
        self._choices: torch.Tensor | None = None
        backbones: dict[str, None] = {}
        for name, module in model.named_modules():
            if (match := ROUTER_NAME.fullmatch(name)) is not None:
                backbones[match["backbone"]] = None
                module.register_forward_hook(self._at_router(len(self._ids)))
                self._ids.append([])
        if len(backbones) != 1:
            raise UserError(
                "`routing_replay` is on, and the model has no routers: it is dense, with one expert. Leave it out."
            )
        backbone = model.get_submodule(next(iter(backbones)))
        backbone.register_forward_pre_hook(self._open, with_kwargs=True)
        backbone.register_forward_hook(self._close, always_call=True)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the passes of the block, a generation with or without a cache."""
        self._forget()
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def recorded(self, input_ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor | None:
        """What was recorded for sequences, and forget it.

        Args:
            input_ids_BS: prompts, padded on the left as they were in the rollout, and completions.
            mask_BS: 0 for padding.

        Returns:
            Expert ids (B, S, L, K) in int16, `UNKNOWN` where nothing was recorded; None if the rollout read other
            tokens, so that its choices are of something else.
        """
        tokens = torch.cat(self._tokens, dim=1) if self._tokens else input_ids_BS[:, :0]
        ids = [torch.cat(passes, dim=1) for passes in self._ids if passes]
        self._forget()
        seen = min(tokens.shape[1], input_ids_BS.shape[1])
        # Only the last token of the longest sequences, which nothing is generated from, may be missing.
        last_BS = mask_BS.flip(1).cumsum(1).flip(1) == 1
        known_BS = mask_BS[:, :seen].bool()
        if (
            len(tokens) != len(input_ids_BS)
            or len(ids) != len(self._ids)
            or (mask_BS.bool() & ~last_BS)[:, seen:].any()
            or not torch.equal(tokens[:, :seen][known_BS], input_ids_BS[:, :seen][known_BS])
        ):
            return None
        shape = (*input_ids_BS.shape, len(ids), ids[0].shape[-1])
        routes_BSLK = torch.full(shape, UNKNOWN, dtype=torch.int16, device=input_ids_BS.device)
        routes_BSLK[:, :seen] = torch.stack(ids, dim=2)[:, :seen].to(routes_BSLK)
        return routes_BSLK.masked_fill_(mask_BS[..., None, None] == 0, UNKNOWN)

    def follow(self, routes_BSLK: torch.Tensor, *, counts: bool) -> None:
        """Let the passes from here on take these choices, their rows one after the other, until `stop`.

        The second pass of gradient checkpointing, in the backward pass, takes those of its first.

        Args:
            routes_BSLK: of `recorded`.
            counts: whether disagreements are counted.
        """
        self._followed_BSLK, self._rows, self._counts = routes_BSLK, 0, counts

    def stop(self) -> None:
        """Let routers choose by themselves."""
        self._followed_BSLK = self._current_TLK = None

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The share of choices in which rollout and training disagreed since the last call, as a logging key.

        A choice is one of the K experts of a token in a layer; it disagrees where the live router has that expert not
        among its own K. All ranks must call it together.

        Args:
            reduce: sums a tensor over the ranks.
        """
        if self._differing is None or self._choices is None:
            return {}
        differing, choices = reduce(torch.stack([self._differing, self._choices])).tolist()
        self._differing = self._choices = None
        return {"routing/disagreement": differing / choices} if choices else {}

    def _forget(self) -> None:
        for passes in (self._tokens, *self._ids):
            passes.clear()

    def _open(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._in_pass = True
        if not (self._is_recording or self._followed_BSLK is not None):
            return
        given = kwargs.get("input_ids", args[0] if args else None)
        tokens_BS = given if given is not None else kwargs["inputs_embeds"][..., 0]
        if self._is_recording:
            cache = kwargs.get("past_key_values", kwargs.get(CACHE))
            if cache is None or int(cache.get_seq_length()) == 0:  # without a cache, each pass reads all anew
                self._forget()
            self._tokens.append(tokens_BS)
        if self._followed_BSLK is not None:
            rows = slice(self._rows, self._rows + len(tokens_BS))
            routes_BSLK = self._followed_BSLK[rows]
            if routes_BSLK.shape[:2] != tokens_BS.shape:
                raise ValueError(
                    f"a pass over {tuple(tokens_BS.shape)} tokens cannot follow routes of "
                    f"{tuple(routes_BSLK.shape[:2])}"
                )
            self._rows += len(tokens_BS)
            self._current_TLK = routes_BSLK.flatten(0, 1).long()

    def _close(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        self._in_pass = False

    def _at_router(self, layer: int) -> Callable[[nn.Module, tuple, Any], Any]:
        def hook(router: nn.Module, args: tuple, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Any:
            logits_TE, _, ids_TK = output
            if self._is_recording:
                self._ids[layer].append(ids_TK.view(*self._tokens[-1].shape, -1))
            if self._current_TLK is None:
                return None
            routes_TK = self._current_TLK[:, layer]
            known_T1 = routes_TK[:, :1] != UNKNOWN
            if self._counts and self._in_pass:  # the second pass of checkpointing runs outside of the backbone's
                self._count(routes_TK, ids_TK, known_T1)
            if not self._replays:
                return None
            return logits_TE, *replay_choice(logits_TE, torch.where(known_T1, routes_TK, ids_TK))

        return hook

    @torch.no_grad()
    def _count(self, routes_TK: torch.Tensor, ids_TK: torch.Tensor, known_T1: torch.Tensor) -> None:
        differs_TK = (routes_TK[:, :, None] != ids_TK[:, None, :]).all(dim=-1) & known_T1
        differing, choices = differs_TK.sum().double(), known_T1.sum().double() * routes_TK.shape[-1]
        self._differing = differing if self._differing is None else self._differing + differing.to(self._differing)
        self._choices = choices if self._choices is None else self._choices + choices.to(self._choices)


def replay_choice(logits_TE: torch.Tensor, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's weights and expert ids, both (T, K), where the choice is given.

    The weights are those of the softmax over all experts, gathered and renormalised to sum to 1, so that every logit
    has its gradient (paper, section 3.1.3, with another choice than the best K).
    """
    weights_TK = logits_TE.float().softmax(dim=-1).gather(-1, ids_TK)
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True), ids_TK
