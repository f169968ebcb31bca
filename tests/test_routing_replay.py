# SPDX-License-Identifier: Apache-2.0
"""Routing replay: the rollout's experts in training, against the model as it is and a literal implementation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jai.errors import UserError
from jai.trainers.routing_replay import UNKNOWN, RoutingReplay, replay_choice

LAYERS, EXPERTS, TOP_K = 7, 4, 2
PROMPTS, NEW = 6, 5


def rollout(model: nn.Module, replay: RoutingReplay, **options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (B, S), their mask, and the routes of a generation from prompts that are padded on the left."""
    torch.manual_seed(1)
    prompts = torch.randint(3, 99, (4, PROMPTS))
    mask = torch.ones_like(prompts)
    mask[0, :3] = mask[2, :1] = 0
    prompts[mask == 0] = 0
    with replay.recording(), torch.no_grad():
        tokens = model.generate(
            prompts, attention_mask=mask, do_sample=True, max_new_tokens=NEW, min_new_tokens=NEW, **options
        )
    mask = torch.cat([mask, torch.ones(4, NEW, dtype=mask.dtype)], dim=1)
    mask[1, -2:] = 0  # an answer that ended earlier
    routes = replay.recorded(tokens, mask)
    assert routes is not None
    return tokens, mask, routes


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def backward(model: nn.Module, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits (B, S, V), after the backward pass of the real tokens' mean loss."""
    model.zero_grad()
    logits = model(tokens, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    (loss * mask[:, 1:].flatten()).sum().backward()
    return logits.detach()


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_recorded_is_what_the_routers_chose(tiny_model, use_cache):
    model = tiny_model()
    tokens, mask, routes = rollout(model, RoutingReplay(model, replays=True), use_cache=use_cache)
    assert routes.shape == (4, PROMPTS + NEW, LAYERS, TOP_K)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, output_router_logits=True).router_logits
    chosen = torch.stack([each.topk(TOP_K).indices.view(*tokens.shape, TOP_K) for each in logits], dim=2)
    known = mask.bool()
    known[:, -1] = False  # the last token was never read
    assert (routes[~known] == UNKNOWN).all()
    assert torch.equal(routes[known].long(), chosen[known])


def test_the_models_own_choices_replayed_are_the_model_to_the_bit(tiny_model):
    model = tiny_model()
    replay = RoutingReplay(model, replays=True)
    tokens, mask, routes = rollout(model, replay)
    expected_logits = backward(model, tokens, mask)
    expected = gradients(model)
    replay.follow(routes, counts=True)
    logits = backward(model, tokens, mask)
    replay.stop()
    assert torch.equal(logits, expected_logits)
    for name, grad in gradients(model).items():
        assert torch.equal(grad, expected[name]), name
    assert replay.pop(lambda sums: sums) == {"routing/disagreement": 0.0}
    assert replay.pop(lambda sums: sums) == {}


class LiteralRouter(nn.Module):
    """The router whose choice is given: the definition, with a softmax and a division written out."""

    def __init__(self, weight: nn.Parameter, ids_TK: torch.Tensor):
        super().__init__()
        self.weight, self.ids_TK = weight, ids_TK

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden_states.reshape(-1, hidden_states.shape[-1]) @ self.weight.T
        e = torch.exp(logits)
        rows = torch.arange(len(e))
        first, second = e[rows, self.ids_TK[:, 0]], e[rows, self.ids_TK[:, 1]]
        return logits, torch.stack([first / (first + second), second / (first + second)], dim=1), self.ids_TK


def shifted(routes: torch.Tensor) -> torch.Tensor:
    """Other experts for every known token."""
    return torch.where(routes == UNKNOWN, routes, (routes + 1) % EXPERTS)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_other_choices_are_those_of_a_literal_router(tiny_model, checkpointing):
    model, literal = tiny_model().train(), tiny_model().train()
    for each in (model, literal):
        each.config.router_aux_loss_coef = 0.0
    replay = RoutingReplay(model, replays=True)
    tokens, mask, routes = rollout(model, replay)
    routes = shifted(routes)
    # Where nothing is known the live choice stands. It depends on the layers below, so the replayed pass tells it.
    live: list[torch.Tensor] = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: live.append(args[1]))
        for layer in model.model.layers
    ]
    replay.follow(routes, counts=False)
    with torch.no_grad():
        model(tokens, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, ids in zip(literal.model.layers, live):
        layer.mlp.gate = LiteralRouter(layer.mlp.gate.weight, ids)
    known = (routes != UNKNOWN).flatten(0, 1)
    for layer, ids in enumerate(live):
        assert torch.equal(ids[known[:, layer]], routes.flatten(0, 1)[:, layer][known[:, layer]].long())

    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
    replay.follow(routes, counts=True)
    logits = backward(model, tokens, mask)
    replay.stop()
    torch.testing.assert_close(logits, backward(literal, tokens, mask), atol=1e-5, rtol=1e-5)
    expected = gradients(literal)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, expected[name], atol=2e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(found[f"model.layers.{layer}.mlp.gate.weight"].abs().max() > 1e-6 for layer in range(LAYERS))
    sums: list[torch.Tensor] = []
    assert 0 < replay.pop(lambda each: sums.append(each) or each)["routing/disagreement"] <= 1
    assert sums[0][1] == known.sum()  # the second pass of checkpointing is not counted again


def test_every_logit_has_its_gradient():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    weights, _ = replay_choice(logits, torch.tensor([[3, 1]]))
    assert weights[0].tolist() == pytest.approx([1 / (1 + torch.e**2), torch.e**2 / (1 + torch.e**2)])
    halves, _ = replay_choice(logits.detach().bfloat16(), torch.tensor([[3, 1]]))
    assert halves.dtype == torch.float32  # as the router's own
    assert torch.equal(halves, weights.detach())
    weights[0, 0].backward()
    share = weights[0, 0].item()
    assert logits.grad[0].tolist() == pytest.approx([0, -share * (1 - share), 0, share * (1 - share)], abs=1e-6)


def test_the_share_of_disagreement_is_exact(tiny_model):
    """Of one layer alone, whose live choice is then that of the model, 3 of 8 tokens' choices are altered."""
    model = tiny_model()
    replay = RoutingReplay(model, replays=False)
    tokens = torch.arange(3, 11).view(2, 4)
    with torch.no_grad():
        logits = model(tokens, output_router_logits=True).router_logits
    own = torch.stack([each.topk(TOP_K).indices.view(2, 4, TOP_K) for each in logits], dim=2).to(torch.int16)
    routes = own.clone()
    others = [next(e for e in range(EXPERTS) if e not in own[0, token, 2]) for token in range(3)]
    routes[0, 0, 2, 0] = others[0]  # one of two
    routes[0, 1, 2, 1] = others[1]
    routes[0, 2, 2] = own[0, 2, 2].flip(0)  # the same experts in another order agree
    routes[1, 3] = UNKNOWN
    routes[1, 0, 5] = torch.tensor([e for e in range(EXPERTS) if e not in own[1, 0, 5]])  # both
    for rows in (slice(0, 1), slice(1, 2)):  # rows one after the other, in passes of one
        if rows.start == 0:
            replay.follow(routes, counts=True)
        model(tokens[rows])
    replay.stop()
    model(tokens)  # follows nothing
    choices = 7 * LAYERS * TOP_K
    assert replay.pop(lambda sums: 2 * sums) == {"routing/disagreement": (1 + 1 + 2) / choices}

    replay.follow(routes, counts=False)
    model(tokens)
    assert replay.pop(lambda sums: sums) == {}
    replay.follow(routes, counts=True)
    model(tokens)
    assert replay.pop(lambda sums: sums)
    replay.follow(torch.full_like(routes, UNKNOWN), counts=True)
    model(tokens)
    assert replay.pop(lambda sums: sums) == {}  # nothing to compare with
    replay.follow(routes, counts=True)
    with pytest.raises(ValueError, match="cannot follow routes"):
        model(tokens[:, :2])
    model.model.layers[0].mlp.gate(torch.zeros(8, model.config.hidden_size))  # outside of a pass, though one failed
    assert replay.pop(lambda sums: sums) == {}


def test_without_replay_nothing_changes(tiny_model):
    model = tiny_model()
    replay = RoutingReplay(model, replays=False)
    tokens, mask, routes = rollout(model, replay)
    expected = backward(model, tokens, mask)
    replay.follow(shifted(routes), counts=True)
    assert torch.equal(backward(model, tokens, mask), expected)


def test_choices_of_other_tokens_are_not_taken(tiny_model):
    model = tiny_model()
    replay = RoutingReplay(model, replays=True)
    with replay.recording(), torch.no_grad():
        tokens = model.generate(torch.full((2, 4), 5), do_sample=False, max_new_tokens=3, min_new_tokens=3)
    other = tokens.clone()
    other[1, 4] += 1
    assert replay.recorded(other, torch.ones_like(tokens)) is None
    assert replay.recorded(tokens, torch.ones_like(tokens)) is None  # they are forgotten
    with replay.recording(), torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(tokens))
    assert replay.recorded(tokens, torch.ones_like(tokens)) is None


def test_passes_after_a_rollout_are_not_recorded(tiny_model):
    model = tiny_model()
    replay = RoutingReplay(model, replays=True)
    tokens = torch.full((2, 4), 5)
    with replay.recording(), torch.no_grad():
        model(tokens)
    with torch.no_grad():
        model(tokens + 1)
    assert replay.recorded(tokens, torch.ones_like(tokens)) is not None


@pytest.mark.parametrize("what", ["fewer rows", "more tokens", "an empty rollout"])
def test_choices_of_other_rollouts_are_not_taken(tiny_model, what):
    model = tiny_model()
    replay = RoutingReplay(model, replays=True)
    tokens = torch.full((2, 4), 5)
    with replay.recording(), torch.no_grad():
        model(tokens)
    if what == "an empty rollout":
        with replay.recording():
            pass
    asked = {"fewer rows": tokens[:1], "more tokens": tokens.repeat(1, 2)}.get(what, tokens)
    assert replay.recorded(asked, torch.ones_like(asked)) is None


def test_a_dense_model_has_nothing_to_replay(tiny_model):
    with pytest.raises(UserError, match="no routers"):
        RoutingReplay(tiny_model(num_local_experts=1, num_experts_per_tok=1), replays=True)
