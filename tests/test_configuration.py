# SPDX-License-Identifier: Apache-2.0
"""JaiConfig: JAI-1's figures, the layer plan, and what is refused."""

import contextlib
import copy
import dataclasses
import json
import re
import subprocess
import sys
import tracemalloc
from collections import Counter

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from jai import JaiConfig, JaiForCausalLM, JaiForSequenceClassification, JaiModel
from jai.configuration_jai import ACTIVATIONS, AUTO_MAP, plan_layers
from jai.modeling_jai import JaiRotaryEmbedding

REFUSALS = (StrictDataclassError, ValueError)  # the kinds with which transformers refuses values


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
    assert set(config.initial_skip_alphas.values()) == {0.1}


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
        "`hidden_size` (34) is not a multiple of `num_attention_heads` (4). Change one of them, or give",
    ),
    ({"num_experts": 0}, "give 1 for a dense JAI, or more"),
    ({"num_experts_per_tok": 5}, "but there are 4 experts. Give a number from 1 to 4"),
    ({"num_experts_per_tok": 0}, "Give a number from 1 to 4"),
    ({"sliding_window": 2047}, "JAI has no window (paper, section 3.2). Leave it out"),
    ({"skip_alpha": float("nan")}, "`skip_alpha` has nan; expected numbers from -10,000 to 10,000"),
    ({"skip_alpha": [0.1, 0.2, float("inf"), 0.4]}, "`skip_alpha` has inf; expected numbers"),
    ({"rms_norm_eps": float("nan")}, "`rms_norm_eps` is nan; expected a number from 0 to 1"),
    ({"router_aux_loss_coef": -0.1}, "`router_aux_loss_coef` is -0.1; expected a number from 0"),
    ({"vocab_size": 0}, "`vocab_size` is 0; expected a number from 1 to 16,777,216"),
    ({"hidden_size": -32}, "`hidden_size` is -32; expected a number from 1"),
    ({"vocab_size": True}, "expected int, got bool"),
    ({"vocab_size": 1e9}, "expected int, got float"),
    ({"block_size": "2"}, "expected int, got str"),
    ({"block_repeats": [1, True]}, "block_repeats"),
    ({"dtype": "float17"}, "has no attribute 'float17'"),
    ({"layer_plan": 3}, "layer_plan"),
    ({"num_labels": "3"}, "`num_labels` is '3'; expected 0 to 100,000"),
    (
        {"rope_theta": "abc", "rope_parameters": None},
        "`rope_theta` of RoPE is 'abc'; expected a number from 2 to 1e+12",
    ),
    ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "`rope_type` is 'su'; expected one of default, "),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -5}}, "`rope_theta` of RoPE is -5"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "Missing required keys"),
    (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}},
        "`short_factor` of RoPE is [1.0]; expected a list of 4 positive numbers",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2}},
        "`partial_rotary_factor` of RoPE is 2; expected a number from 0.001 to 1",
    ),
]

# As a damaged or malicious config.json may have them; planned one by one, each would take gigabytes.
ABSURD = [
    ({"num_hidden_layers": 10**9}, "plans 7 layers. Give 7 or fewer"),
    ({"block_repeats": [10**9]}, "plans 1,000,000,000 layers. Plan at most 10,000"),
    ({"block_repeats": [1] * 10**5}, "plans 100,000 layers"),
    ({"block_size": 10**12, "num_hidden_layers": 4}, "plans 7,000,000,000,000 layers"),
    ({"vocab_size": 10**12}, "`vocab_size` is 1000000000000; expected a number from 1 to 16,777,216"),
    ({"num_experts": 10**9}, "`num_local_experts` is 1000000000"),
    ({"num_attention_heads": 2 * 10**9, "hidden_size": 4 * 10**9}, "`hidden_size` is 4000000000"),
    ({"max_position_embeddings": 10**18}, "`max_position_embeddings` is 1000000000000000000"),
    ({"num_labels": 10**9}, "`num_labels` is 1000000000; expected 0 to 100,000"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[json.dumps(values) for values, _ in REFUSED])
def test_values_that_do_not_fit_are_refused_with_what_to_change(tiny_config, values, message):
    with pytest.raises(REFUSALS, match=re.escape(message)):
        tiny_config(**values)


@contextlib.contextmanager
def little_memory():
    """Fails where Python allocates more than 16 MiB, whatever else is raised."""
    tracemalloc.start()
    try:
        yield
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 16 * 2**20


@pytest.mark.parametrize(("values", "message"), ABSURD, ids=[json.dumps(values)[:60] for values, _ in ABSURD])
def test_absurd_plans_are_refused_before_they_are_made(tiny_config, values, message):
    with pytest.raises(REFUSALS, match=re.escape(message)) as refused, little_memory():
        tiny_config(**values)
    assert len(str(refused.value)) < 500


ANY_NUMBER = st.integers(-3, 9) | st.integers(-(10**13), 10**13) | st.floats() | st.sampled_from([10**400, 1e308])
ANY_SCALAR = st.none() | st.booleans() | ANY_NUMBER | st.text(max_size=5)
ANY_VALUE = ANY_SCALAR | st.lists(ANY_SCALAR, max_size=5) | st.dictionaries(st.text(max_size=3), ANY_SCALAR, max_size=2)
ROPES = (
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "truncate": False},
    {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "proportional"},
)
ROPE_KEYS = sorted({"rope_theta", "original_max_position_embeddings", "type"}.union(*ROPES))
ROPE_VALUES = st.sampled_from([1, 4.0, 32, 0.5, 0.1]) | st.lists(st.floats(0.5, 8), min_size=4, max_size=4) | ANY_VALUE
ROPE = st.builds(
    lambda rope, changed: {"rope_theta": 10_000.0} | rope | changed,
    st.sampled_from(ROPES),
    st.dictionaries(st.sampled_from(ROPE_KEYS), ROPE_VALUES, max_size=2),
)
OTHER_KEYS = (
    "num_experts", "num_labels", "rope_theta", "rope_scaling", "partial_rotary_factor", "sliding_window", "auto_map",
    "original_max_position_embeddings", "torch_dtype", "layer_types", "running_plan", "name_or_path",
)  # fmt: skip
KEYS = (*(field.name for field in dataclasses.fields(JaiConfig)), *OTHER_KEYS)
NUMBERS = [name for name, kind in JaiConfig.__annotations__.items() if kind in (int, float, float | int)]


@given(values=st.dictionaries(st.sampled_from(KEYS), ANY_VALUE | ROPE, min_size=1, max_size=3))
def test_any_values_are_a_configuration_or_one_kind_of_error(tiny_config, values):
    try:
        with little_memory():
            config = tiny_config(**copy.deepcopy(values))
    except REFUSALS:
        return
    assert len(config.running_plan) == config.num_hidden_layers
    assert config.initial_skip_alphas.keys() == {p.layer for p in config.running_plan if p.adds_anchor}
    stored = json.dumps({name: getattr(config, name) for name in NUMBERS}, allow_nan=False)
    assert "true" not in stored


@given(rope=ROPE)
def test_any_rope_that_is_taken_can_be_computed(tiny_config, rope):
    try:
        config = tiny_config(rope_parameters=copy.deepcopy(rope))
    except REFUSALS:
        return
    assert JaiRotaryEmbedding(config).inv_freq.isfinite().all()


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


def test_a_configuration_is_read_without_the_model_and_its_code():
    code = (
        "import sys; from jai.configuration_jai import JaiConfig; JaiConfig()\n"
        "model_code = {'jai.modeling_jai', 'transformers.modeling_utils', 'transformers.generation.utils'}\n"
        "print(sorted(model_code & sys.modules.keys()))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert finished.stdout.strip() == "[]"


def test_activations_are_those_of_transformers():
    from transformers.activations import ACT2FN

    assert set(ACTIVATIONS) <= set(ACT2FN)
    assert all(isinstance(ACT2FN[name], torch.nn.Module) for name in ACTIVATIONS)
