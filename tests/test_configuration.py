# SPDX-License-Identifier: Apache-2.0
"""JaiConfig: JAI-1's figures, the layer plan, and what is refused."""

import json
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from jai import JaiConfig, JaiForCausalLM, JaiForSequenceClassification, JaiModel
from jai.configuration_jai import AUTO_MAP, plan_layers


@pytest.fixture(scope="module")
def jai_1() -> JaiForCausalLM:
    with torch.device("meta"):
        return JaiForCausalLM(JaiConfig())


def test_jai_1_counts_as_in_table_3(jai_1):
    counts = Counter()
    for name, parameter in jai_1.named_parameters():
        counts["alpha" if name.endswith("skip_alpha") else "weight"] += parameter.numel()
    assert counts == {"weight": 75_315_942_400, "alpha": 6}


def test_jai_1_has_about_40_billion_active_parameters(jai_1):
    config = jai_1.config
    active = 0
    for name, parameter in jai_1.named_parameters():
        share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
        active += parameter.numel() * share
    assert active - 6 == 40_083_788_800


def test_the_parts_of_jai_1(jai_1):
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    layer = jai_1.model.layers[0]
    assert count(jai_1.model.embed_tokens) == count(jai_1.lm_head) == 327_680_000
    assert count(layer.self_attn) == 65_536_000
    assert count(layer.mlp.experts) == 4 * 275_251_200
    assert count(layer.mlp.gate) == 20_480
    assert count(layer.input_layernorm) + count(layer.post_attention_layernorm) == 10_240
    assert count(jai_1.model.norm) == 5_120


def test_defaults_are_jai_1():
    config = JaiConfig()
    expected = {
        "model_type": "jai",
        "vocab_size": 64000,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "block_size": 4,
        "block_repeats": [1, 1, 1, 2, 3, 3, 2, 1, 1, 1],
        "num_hidden_layers": 64,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert set(config.skip_alphas.values()) == {0.1}


def test_the_plan_of_jai_1_is_table_2():
    plan = JaiConfig().layer_plan
    origins = [planned.origin for planned in plan]
    blocks = [list(range(4 * n, 4 * n + 4)) for n in range(10)]
    usage = [1, 1, 1, 2, 3, 3, 2, 1, 1, 1]
    assert origins == [layer for block, times in zip(blocks, usage) for _ in range(times) for layer in block]
    assert [planned.layer for planned in plan if planned.adds_anchor] == [16, 24, 28, 36, 40, 48]
    assert [planned.layer for planned in plan if planned.takes_anchor] == [0, 4, 8, 12, 20, 32, 44, 52, 56, 60]


@given(block_size=st.integers(1, 5), block_repeats=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_every_origin_layer_is_used_as_often_as_its_block_repeats(block_size, block_repeats):
    plan = plan_layers(block_size, block_repeats)
    assert [planned.layer for planned in plan] == list(range(block_size * sum(block_repeats)))
    assert Counter(planned.origin for planned in plan) == {
        block * block_size + offset: repeats
        for block, repeats in enumerate(block_repeats)
        for offset in range(block_size)
    }
    assert sum(planned.adds_anchor for planned in plan) == sum(block_repeats) - len(block_repeats)
    assert sum(planned.takes_anchor for planned in plan) == len(block_repeats)


REFUSED = [
    ({"num_hidden_layers": 8}, "plans 7 layers. Give 7 or fewer (fewer runs the first layers), or change the plan"),
    ({"num_hidden_layers": -1}, "Give 7 or fewer"),
    ({"block_size": 0}, "a block needs at least 1 layer"),
    ({"block_repeats": []}, "every block must run at least once"),
    ({"block_repeats": [2, 0, 2]}, "To drop a block, leave its layers out of the base model"),
    ({"block_repeats": [2, -1]}, "every block must run at least once"),
    ({"skip_alpha": [0.1, 0.2]}, "makes 4 copies after the first. Give 4 values, or one number for all"),
    ({"skip_alpha": -1, "skip_alpha_normalize": True}, "divides by zero"),
    ({"num_key_value_heads": 3}, "`num_attention_heads` (4) must be a multiple of `num_key_value_heads` (3)"),
    ({"num_key_value_heads": 0}, "must be a multiple of `num_key_value_heads` (0)"),
    ({"num_attention_heads": 0}, "`num_attention_heads` (0) must be a multiple of"),
    (
        {"hidden_size": 34},
        "`hidden_size` (34) is no multiple of `num_attention_heads` (4). Change one of them, or give",
    ),
    ({"num_experts": 0}, "give 1 for a dense JAI, or more"),
    ({"num_experts_per_tok": 5}, "but there are 4 experts. Give a number from 1 to 4"),
    ({"num_experts_per_tok": 0}, "Give a number from 1 to 4"),
    ({"sliding_window": 2047}, "JAI has no window (paper, section 3.2). Leave it out"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[json.dumps(values) for values, _ in REFUSED])
def test_values_that_do_not_fit_are_refused_with_what_to_change(tiny_config, values, message):
    with pytest.raises(Exception, match=re.escape(message)):
        tiny_config(**values)


@pytest.mark.parametrize("model_class", [JaiModel, JaiForCausalLM, JaiForSequenceClassification])
def test_more_layers_than_the_plan_are_refused_when_set_after_construction(tiny_config, model_class):
    config = tiny_config()
    config.num_hidden_layers = 9
    with pytest.raises(ValueError, match=r"plans 7 layers\. Give 7 or fewer"):
        model_class(config)


def test_a_head_dim_of_its_own_needs_no_divisible_hidden_size(tiny_config):
    config = tiny_config(hidden_size=36, num_attention_heads=8, head_dim=8)
    assert JaiForCausalLM(config)(torch.arange(5)[None]).logits.shape == (1, 5, 99)


def test_num_experts_and_num_local_experts_are_one_key(tiny_config):
    config = tiny_config(num_local_experts=4, num_experts=2)
    assert config.num_experts == config.num_local_experts == 2
    config.num_experts = 3
    assert config.num_local_experts == 3
    assert "num_experts" not in config.to_dict()


def test_a_dense_jai_has_no_router_and_no_auxiliary_loss(tiny_config):
    config = tiny_config(num_experts=1, router_aux_loss_coef=0.5)
    assert config.num_experts_per_tok == 1
    assert config.router_aux_loss_coef == 0.0
    assert not any("gate.weight" in name or "experts" in name for name in JaiForCausalLM(config).state_dict())


def test_fewer_layers_keep_the_plan(tiny_config):
    config = tiny_config(num_hidden_layers=4)
    assert len(config.layer_plan) == 7
    assert [planned.layer for planned in config.running_plan] == [0, 1, 2, 3]


@pytest.mark.parametrize("rope_type", ["yarn", "longrope"])
@pytest.mark.parametrize("where", ["rope_parameters", "attribute", "default"])
def test_the_original_context_of_a_stretched_rope(tiny_config, rope_type, where):
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    values = {"original_max_position_embeddings": None}
    if where == "rope_parameters":
        rope["original_max_position_embeddings"] = 32
    elif where == "attribute":
        values["original_max_position_embeddings"] = 32
    config = tiny_config(rope_parameters=rope, **values)
    JaiModel(config)
    expected = 128 if where == "default" else 32
    assert config.rope_parameters["original_max_position_embeddings"] == expected
    assert JaiConfig.from_dict(config.to_dict()).rope_parameters == config.rope_parameters


def test_a_config_survives_the_disk(tiny_config, tmp_path):
    config = tiny_config(skip_alpha=[0.1, 0.2, 0.3, 0.4], skip_alpha_normalize=True, num_hidden_layers=5)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is JaiConfig
    assert loaded.to_diff_dict() == {**config.to_diff_dict(), "transformers_version": loaded.transformers_version}
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    assert saved["model_type"] == "jai"


def test_auto_map_loses_the_name_of_the_repository_it_came_from():
    prefixed = {key: f"somebody/jai--{value}" for key, value in AUTO_MAP.items()}
    assert JaiConfig(auto_map={**prefixed, "AutoTokenizer": "x.Y"}).auto_map == {**AUTO_MAP, "AutoTokenizer": "x.Y"}


def test_a_pipeline_plan_exists_only_without_a_live_skip(tiny_config):
    def has_plan(**values):
        config = tiny_config(**values)
        model = JaiForCausalLM(config)
        assert model.supports_pp_plan == (config.base_model_pp_plan is not None)
        return model.supports_pp_plan

    assert not has_plan(block_repeats=[1, 2, 1])
    assert has_plan(block_repeats=[1, 1, 1])
    assert has_plan(block_repeats=[1, 1, 2], num_hidden_layers=3)  # the skip of the last block does not run
