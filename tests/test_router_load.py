# SPDX-License-Identifier: Apache-2.0
"""The one count of where routers send tokens."""

import pytest
import torch

from jai.router_load import count_choices, router_load


def test_choices_are_counted_token_by_token():
    logits_TE = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    mask_T = (torch.arange(50) % 3 > 0).long()
    expected = torch.zeros(5)
    for logits_E, counts in zip(logits_TE.tolist(), mask_T.tolist()):
        for expert in sorted(range(5), key=lambda expert: -logits_E[expert])[:2]:
            expected[expert] += counts
    assert count_choices(logits_TE, 2, mask_T).tolist() == expected.tolist()
    assert count_choices(logits_TE, 2).sum() == 100


def test_load_is_what_the_experts_compute_with(tiny_model):
    """Padding aside: the load of a padded batch is that of its rows alone, as the routers' own choices say."""
    model = tiny_model()
    rows = [torch.arange(3, 30), torch.arange(40, 51)]
    chosen = [[] for _ in range(7)]
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda gate, args, output, i=i: chosen[i].append(output[2].flatten()))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for row in rows:
            model(row[None])
    for hook in hooks:
        hook.remove()
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    loads = router_load(model, [batch])
    assert len(loads) == 7
    for load, ids in zip(loads, chosen):
        counts = torch.cat(ids).bincount(minlength=4)
        assert load == pytest.approx((counts / counts.sum()).tolist())
    assert any(load[0] != pytest.approx(0.25, abs=0.02) for load in loads)
    halves = [{"input_ids": row[None]} for row in rows]
    assert router_load(model, halves) == [pytest.approx(load) for load in loads]
