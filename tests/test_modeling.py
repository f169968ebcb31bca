# SPDX-License-Identifier: Apache-2.0
"""The model against its equation and against the real Mixtral, Phi-3 and TRL."""

import json
import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Phi3ForCausalLM
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import add_fused_lm_head

from jai import JaiForCausalLM, JaiForSequenceClassification, JaiModel


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Token ids `(batch, length)` without the special ones."""
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(model, reference, **tolerance):
    ours, theirs = gradients(model), gradients(reference)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# --- Equation 1 ---


def literal_equation_1(model: JaiModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Equation 1 as the paper writes it, keeping the output of every copy of every block. Counts n and d from 1."""
    config = model.config
    length = input_ids.shape[1]
    positions = model.rotary_emb(model.embed_tokens(input_ids), torch.arange(length)[None])
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, length, length).masked_fill(future, torch.finfo(torch.float32).min)

    def run(layer, x):
        x = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=positions, attention_mask=mask)[0]
        return x + layer.mlp(layer.post_attention_layernorm(x))

    layers = iter(model.layers)
    x = model.embed_tokens(input_ids)
    output = {(0, 1): x}
    last_copy = {0: 1}
    for n, repeats in enumerate(config.block_repeats, start=1):
        for d in range(1, repeats + 1):
            copy = list(islice(layers, config.block_size))
            if not copy:
                return model.norm(x)
            if d > 1:
                alpha = copy[0].skip_alpha
                x = x + alpha * output[n - 1, last_copy[n - 1]]
                if config.skip_alpha_normalize:
                    x = x / (1 + alpha)
            for layer in copy:
                x = run(layer, x)
            output[n, d] = x
        last_copy[n] = repeats
    return model.norm(x)


@st.composite
def plans(draw):
    block_size = draw(st.integers(1, 3))
    block_repeats = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    planned = block_size * sum(block_repeats)
    copies = sum(block_repeats) - len(block_repeats)
    return {
        "block_size": block_size,
        "block_repeats": block_repeats,
        "num_hidden_layers": draw(st.none() | st.integers(1, planned)),
        "skip_alpha": draw(st.lists(st.floats(-0.8, 2.0), min_size=copies, max_size=copies)),
        "skip_alpha_normalize": draw(st.booleans()),
        "num_experts": draw(st.sampled_from([1, 4])),
    }


def plan(block_repeats, alphas, **values):
    return {"block_size": 1, "block_repeats": block_repeats, "skip_alpha": alphas, **values}


@given(values=plans(), seed=st.integers(0, 2**16))
@example(values=plan([3, 1, 1], [0.3, 0.7]), seed=0)
@example(values=plan([1, 3, 1], [0.3, 0.7], block_size=2), seed=1)
@example(values=plan([1, 1, 3], [0.3, 0.7], block_size=3), seed=2)
@example(values=plan([2, 2, 2], [0.3, 0.7, 1.1], skip_alpha_normalize=True), seed=3)
@example(values=plan([2, 2, 2], [0.3, 0.7, 1.1], block_size=2, num_hidden_layers=7), seed=4)
def test_equation_1(tiny_config, values, seed):
    torch.manual_seed(seed)
    model = JaiModel(tiny_config(**values, attn_implementation="eager", experts_implementation="eager")).eval()
    input_ids = tokens(length=7, seed=seed)
    expected = literal_equation_1(model, input_ids)
    actual = model(input_ids).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    weights = {name: p for name, p in model.named_parameters() if "skip_alpha" in name or "embed" in name}
    probe = torch.randn_like(actual)
    for name, ours, theirs in zip(
        weights,
        torch.autograd.grad((actual * probe).sum(), list(weights.values())),
        torch.autograd.grad((expected * probe).sum(), list(weights.values())),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("block_repeats", [[3, 1, 1], [1, 3, 1], [1, 1, 3]])
def test_a_skip_changes_the_output(tiny_model, block_repeats):
    """So that the agreement above is no agreement of two models that ignore their alphas."""
    live = tiny_model(block_repeats=block_repeats, skip_alpha=0.5)
    dead = tiny_model(block_repeats=block_repeats, skip_alpha=0.0)
    assert (live(tokens()).logits - dead(tokens()).logits).abs().max() > 0.1


# --- The oracles: Mixtral and Phi-3 ---


SHARED_WITH_MIXTRAL = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "router_aux_loss_coef",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
]


def mixtral_of(model: JaiForCausalLM) -> MixtralForCausalLM:
    """A Mixtral with the weights of a JAI. The strict load proves that all names but the alphas are Mixtral's."""
    config = MixtralConfig(**{name: getattr(model.config, name) for name in SHARED_WITH_MIXTRAL})
    config._attn_implementation = model.config._attn_implementation
    mixtral = MixtralForCausalLM(config).eval()
    mixtral.set_experts_implementation(model.config._experts_implementation)
    mixtral.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("skip_alpha")}, strict=True)
    return mixtral


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_with_every_alpha_0_it_is_mixtral(tiny_model, attention, experts):
    model = tiny_model(
        skip_alpha=0.0, router_aux_loss_coef=0.1, attn_implementation=attention, experts_implementation=experts
    )
    mixtral = mixtral_of(model)
    input_ids = tokens()
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    arguments = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
        "output_router_logits": True,
        "output_hidden_states": True,
        "output_attentions": attention == "eager",
    }
    ours, theirs = model(**arguments), mixtral(**arguments)
    exact = {"rtol": 0, "atol": 0}
    for key in ("logits", "loss", "aux_loss", "router_logits", "hidden_states", "attentions"):
        torch.testing.assert_close(getattr(ours, key), getattr(theirs, key), **exact)
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(model, mixtral, rtol=1e-6, atol=1e-7)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
PHI3_ROPES = {
    "plain": {},
    "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}},
    "longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "max_position_embeddings": 64},
}


@pytest.mark.parametrize("length", [12, 40])  # LongRoPE changes its factors at 16
@pytest.mark.parametrize("rope", PHI3_ROPES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_with_one_expert_and_no_repeats_it_is_phi3(tiny_phi3, phi3_oracle, tmp_path, rope, attention, length):
    folder = tiny_phi3(tmp_path, **{"sliding_window": None, **PHI3_ROPES[rope]})
    phi3 = Phi3ForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    model = phi3_oracle.jai_of(phi3)
    input_ids = tokens(length=length)
    mask = torch.ones_like(input_ids)
    mask[0, :4] = 0
    ours = model(input_ids, attention_mask=mask, labels=input_ids)
    theirs = phi3(input_ids, attention_mask=mask, labels=input_ids)
    tolerance = {"rtol": 1e-5, "atol": 3e-6}
    torch.testing.assert_close(ours.logits, theirs.logits, **tolerance)
    torch.testing.assert_close(ours.loss, theirs.loss, **tolerance)
    ours.loss.backward()
    theirs.loss.backward()
    expected = phi3_oracle.split(gradients(phi3), phi3.config)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_identical_experts_are_the_dense_model(tiny_model):
    """Top-2 of four copies, with weights that sum to 1, is the one MLP: what upcycling relies on."""
    dense = tiny_model(num_experts=1)
    sparse = tiny_model(num_experts=4)
    shared = dense.state_dict()
    for index in range(dense.config.num_hidden_layers):
        prefix = f"model.layers.{index}.mlp."
        gate, up = shared.pop(f"{prefix}gate_proj.weight"), shared.pop(f"{prefix}up_proj.weight")
        shared[f"{prefix}experts.gate_up_proj"] = torch.cat((gate, up)).expand(4, -1, -1)
        shared[f"{prefix}experts.down_proj"] = shared.pop(f"{prefix}down_proj.weight").expand(4, -1, -1)
    missing, unexpected = sparse.load_state_dict(shared, strict=False)
    assert not unexpected
    assert all(name.endswith("mlp.gate.weight") for name in missing)
    torch.testing.assert_close(sparse(tokens()).logits, dense(tokens()).logits, rtol=1e-5, atol=1e-5)


# --- Different ways to compute the same ---


def test_eager_attention_is_sdpa(tiny_model):
    model = tiny_model()
    input_ids = tokens()
    mask = torch.ones_like(input_ids)
    mask[1, :5] = 0
    labels = input_ids.clone()
    labels[1, :6] = -100  # the first real token too: it would be predicted from padding
    results = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        output = model(input_ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        results[attention] = (output.logits[mask.bool()], gradients(model))
    torch.testing.assert_close(results["eager"], results["sdpa"], rtol=1e-5, atol=2e-6)


def test_all_expert_implementations_agree(tiny_model):
    model = tiny_model(router_aux_loss_coef=0.1, output_router_logits=True)
    results = {}
    for experts in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(experts)
        model.zero_grad()
        output = model(tokens(), labels=tokens())
        output.loss.backward()
        results[experts] = (output.logits, output.aux_loss, gradients(model))
    torch.testing.assert_close(results["batched_mm"], results["eager"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(results["grouped_mm"], results["eager"], rtol=1e-5, atol=2e-6)


def test_an_experts_implementation_from_outside_is_used(tiny_model):
    """What our own kernels rely on: transformers finds the decorator in the model's file."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    calls = []

    def half(self, hidden_states, top_k_index, top_k_weights):
        calls.append(self)
        return hidden_states / 2

    ALL_EXPERTS_FUNCTIONS.register("half", half)
    try:
        model = tiny_model()
        model.set_experts_implementation("half")
        model(tokens())
        assert len(calls) == 7
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop("half")


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tiny_model, use_reentrant, num_experts):
    model = tiny_model(num_experts=num_experts).train()

    def run():
        model.zero_grad()
        output = model(tokens(), labels=tokens())
        output.loss.backward()
        return output.loss.detach(), gradients(model)

    plain = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    checkpointed = run()
    alphas = [gradient for name, gradient in plain[1].items() if name.endswith("skip_alpha")]
    assert len(alphas) == 4
    assert all(gradient.abs() > 0 for gradient in alphas)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_keeps_the_auxiliary_loss_or_refuses(tiny_model):
    """Mixtral loses the gradient of its auxiliary loss under reentrant checkpointing, in silence."""
    model = tiny_model(router_aux_loss_coef=0.5, output_router_logits=True).train()

    def run():
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        return gradients(model)

    plain = run()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(run(), plain, rtol=1e-5, atol=1e-6)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match=r'Give `gradient_checkpointing_kwargs=\{"use_reentrant": False\}`'):
        run()
    model.config.router_aux_loss_coef = 0.0
    run()


def test_bf16_is_close_to_fp32(tiny_model):
    """By their KL divergence; looser with experts, because a router in bf16 may choose another one for a token."""
    for num_experts, bound in ((1, 1e-3), (4, 5e-3)):
        model = tiny_model(num_experts=num_experts)
        with torch.no_grad():
            full = model(tokens(4, 40)).logits
            half = model.bfloat16()(tokens(4, 40)).logits
        assert half.dtype == torch.bfloat16
        divergence = F.kl_div(half.float().log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none")
        assert divergence.sum(-1).mean() < bound


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_autocast_is_close_to_fp32(tiny_model, experts):
    """`bf16=True` of every trainer: fp32 weights, bf16 products."""
    model = tiny_model(experts_implementation=experts, output_router_logits=True, router_aux_loss_coef=0.1)
    full = model(tokens(), labels=tokens())
    full.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(tokens(), labels=tokens())
    half.loss.backward()
    torch.testing.assert_close(half.loss.float(), full.loss, rtol=0.02, atol=0)
    for name, gradient in gradients(model).items():
        if "mlp" not in name:  # a router in bf16 may choose another expert for a token
            assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.9, name


# --- The disk ---


@pytest.mark.parametrize(
    "values", [{}, {"num_experts": 1}, {"skip_alpha_trainable": False}, {"tie_word_embeddings": True}]
)
def test_a_model_survives_the_disk_bit_for_bit(tiny_model, tmp_path, values):
    model = tiny_model(**values)
    with torch.no_grad():  # not the start values, which the config knows
        for name, tensor in model.state_dict().items():
            if name.endswith("skip_alpha"):
                tensor.copy_(torch.randn(1))
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".py"}
    loaded, report = JaiForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(model(tokens()).logits, loaded(tokens()).logits)


def test_names_on_disk_are_mixtrals(tiny_model, tmp_path):
    tiny_model(block_repeats=[2]).save_pretrained(tmp_path)
    layer = {
        "self_attn.q_proj.weight": (32, 32),
        "self_attn.k_proj.weight": (16, 32),
        "self_attn.v_proj.weight": (16, 32),
        "self_attn.o_proj.weight": (32, 32),
        "mlp.gate.weight": (4, 32),
        "mlp.experts.gate_up_proj": (4, 96, 32),
        "mlp.experts.down_proj": (4, 32, 48),
        "input_layernorm.weight": (32,),
        "post_attention_layernorm.weight": (32,),
    }
    expected = {f"model.layers.{index}.{name}": shape for index in (0, 1) for name, shape in layer.items()}
    expected |= {"model.layers.1.skip_alpha": (1,), "model.embed_tokens.weight": (99, 32)}
    expected |= {"model.norm.weight": (32,), "lm_head.weight": (99, 32)}
    saved = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == expected


def test_frozen_alphas_stay_frozen(tiny_model, tmp_path):
    tiny_model(skip_alpha_trainable=False, skip_alpha=[0.1, 0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    model = JaiForCausalLM.from_pretrained(tmp_path).train()
    assert not any(name.endswith("skip_alpha") for name, _ in model.named_parameters())
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("skip_alpha")}
    assert [round(float(alpha), 6) for alpha in before.values()] == [0.1, 0.2, 0.3, 0.4]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    for name, buffer in model.named_buffers():
        if name.endswith("skip_alpha"):
            assert not buffer.requires_grad
            assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("trainable", [True, False])
def test_alphas_start_as_the_config_says(tiny_model, trainable):
    alphas = tiny_model(skip_alpha=[0.1, 0.2, 0.3, 0.4], skip_alpha_trainable=trainable).model.state_dict()
    found = {name: alpha for name, alpha in alphas.items() if name.endswith("skip_alpha")}
    assert list(found) == [f"layers.{index}.skip_alpha" for index in (1, 3, 4, 6)]
    torch.testing.assert_close(torch.cat(list(found.values())), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert all(alpha.shape == (1,) for alpha in found.values())


def test_a_checkpoint_without_alphas_starts_them_from_the_config(tiny_model, tmp_path):
    """A Mixtral's weights under a JAI's config."""
    model = tiny_model(skip_alpha=0.0)
    mixtral_of(model).save_pretrained(tmp_path, save_original_format=False)
    config = json.loads((tmp_path / "config.json").read_text())
    model.config.skip_alpha = 0.25
    (tmp_path / "config.json").write_text(json.dumps({**config, **model.config.to_dict()}))
    loaded = JaiForCausalLM.from_pretrained(tmp_path)
    alphas = [p for name, p in loaded.named_parameters() if name.endswith("skip_alpha")]
    assert len(alphas) == 4
    assert all(alpha.item() == 0.25 for alpha in alphas)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


# --- Fewer layers, and pipelines ---


@pytest.mark.parametrize("count", range(1, 7))
def test_fewer_layers_run_the_first_of_the_plan(tiny_model, tmp_path, count):
    full = tiny_model()
    full.save_pretrained(tmp_path)
    states = full(tokens(), output_hidden_states=True).hidden_states
    short = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=count)
    assert len(short.model.layers) == count
    hidden = short(tokens(), output_hidden_states=True)
    torch.testing.assert_close(hidden.hidden_states[:-1], states[:count])
    torch.testing.assert_close(hidden.hidden_states[-1], full.model.norm(states[count]))


def cut(model: JaiForCausalLM, stage: int, at: int) -> None:
    """What transformers' pipeline does to the stage (0 or 1) of a model that is cut before layer `at`."""
    layers = model.model.layers
    for index in range(len(layers)):
        if (index >= at) == (stage == 0):
            layers[index] = PipelineIdentityLayer()
    if stage == 0:
        model.model.norm = PipelineIdentityLayer()
        model.lm_head = PipelineIdentityLayer()
    else:
        model.model.embed_tokens = PipelineIdentityLayer()


# block_size 2, block_repeats [1, 3, 1]: skips join layer 2 to 4 and to 6
@pytest.mark.parametrize("at", [1, 2, 8, 9])
def test_a_pipeline_cut_between_blocks_computes_the_same(tiny_model, at):
    values = {"block_size": 2, "block_repeats": [1, 3, 1]}
    expected = tiny_model(**values)(tokens()).logits
    first, second = tiny_model(**values), tiny_model(**values)
    cut(first, 0, at)
    cut(second, 1, at)
    hidden_states = first.model(tokens()).last_hidden_state
    torch.testing.assert_close(second(inputs_embeds=hidden_states).logits, expected)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("at", [3, 4, 5, 6])
def test_a_pipeline_cut_through_a_live_skip_raises_on_both_sides(tiny_model, stage, at):
    model = tiny_model(block_size=2, block_repeats=[1, 3, 1])
    cut(model, stage, at)
    arguments = {"input_ids": tokens()} if stage == 0 else {"inputs_embeds": torch.randn(2, 12, 32)}
    with pytest.raises(ValueError, match=r"Cut it only before one of the layers \[0, 2, 8\]"):
        model.model(**arguments)


def test_a_cut_inside_the_last_copy_loses_no_anchor(tiny_model):
    """Between layers 6 and 7 the anchor has been used for the last time."""
    values = {"block_size": 2, "block_repeats": [1, 3, 1]}
    expected = tiny_model(**values)(tokens()).logits
    first, second = tiny_model(**values), tiny_model(**values)
    cut(first, 0, 7)
    cut(second, 1, 7)
    hidden_states = first.model(tokens()).last_hidden_state
    torch.testing.assert_close(second(inputs_embeds=hidden_states).logits, expected)


# --- The loss: labels, TRL, what is kept ---


def test_labels_are_shifted_and_ignored_as_in_mixtral(tiny_model):
    model = tiny_model()
    labels = tokens().clone()
    labels[0, :6] = -100
    output = model(tokens(), labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].reshape(-1, 99), labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(tokens(), labels=labels, shift_labels=shifted).loss, expected)


@pytest.mark.parametrize("count", [7, torch.tensor(7)])
def test_num_items_in_batch_divides_the_sum_of_losses(tiny_model, count):
    model = tiny_model(skip_alpha=0.0, router_aux_loss_coef=0.1, output_router_logits=True)
    mixtral = mixtral_of(model)
    ours = model(tokens(), labels=tokens(), num_items_in_batch=count).loss
    theirs = mixtral(tokens(), labels=tokens(), num_items_in_batch=count, output_router_logits=True).loss
    plain = model(tokens(), labels=tokens(), output_router_logits=False).loss
    torch.testing.assert_close(ours, theirs)
    auxiliary = 0.1 * model(tokens()).aux_loss
    torch.testing.assert_close(ours, plain * 22 / 7 + auxiliary)


@pytest.mark.parametrize(
    "keep",
    [
        1,
        5,
        torch.tensor([0, 3, 11]),
        torch.tensor([[0, 3], [5, 1]]),
        torch.arange(24).reshape(2, 12) % 5 == 0,
    ],
    ids=["last", "last 5", "ids", "ids by row", "mask"],
)
def test_logits_to_keep(tiny_model, keep):
    model = tiny_model()
    logits = model(tokens()).logits
    if isinstance(keep, int):
        expected = logits[:, -keep:]
    elif keep.ndim == 1:
        expected = logits[:, keep]
    elif keep.dtype == torch.bool:
        expected = logits[keep]
    else:
        expected = torch.stack([row[ids] for row, ids in zip(logits, keep)])
    torch.testing.assert_close(model(tokens(), logits_to_keep=keep).logits, expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("count", [None, 31])
def test_trls_fused_loss_is_the_models_own(tiny_model, num_experts, padded, count):
    values = {"num_experts": num_experts, "router_aux_loss_coef": 0.3, "output_router_logits": num_experts > 1}
    own, fused = tiny_model(**values), tiny_model(**values)
    add_fused_lm_head(fused)
    arguments = {"input_ids": tokens(), "labels": tokens(), "num_items_in_batch": count}
    if padded:
        mask = torch.ones_like(tokens())
        mask[0, -5:] = 0
        arguments |= {"attention_mask": mask, "labels": tokens().masked_fill(mask == 0, -100)}
    ours, theirs = own(**arguments), fused(**arguments, fused_lm_head=True)
    torch.testing.assert_close(theirs.loss, ours.loss)
    if num_experts > 1:
        assert ours.aux_loss > 0
        torch.testing.assert_close(theirs.aux_loss, ours.aux_loss)
    else:
        assert ours.aux_loss is None
    ours.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(fused, own, rtol=1e-5, atol=1e-6)


def test_the_auxiliary_loss_pools_the_layers_and_skips_padding(tiny_model):
    model = tiny_model()
    mask = torch.ones_like(tokens())
    mask[0, :5] = 0
    output = model(tokens(), attention_mask=mask, output_router_logits=True)
    assert len(output.router_logits) == 7
    torch.testing.assert_close(output.aux_loss, load_balancing_loss_func(output.router_logits, 4, 2, mask))
    unpadded = [model(tokens()[:1, 5:], output_router_logits=True), model(tokens()[1:], output_router_logits=True)]
    together = tuple(torch.cat(pair) for pair in zip(*[part.router_logits for part in unpadded]))
    torch.testing.assert_close(output.aux_loss, load_balancing_loss_func(together, 4, 2), rtol=1e-4, atol=1e-5)


def test_outputs_are_recorded(tiny_model):
    output = tiny_model(attn_implementation="eager")(
        tokens(), output_hidden_states=True, output_attentions=True, output_router_logits=True
    )
    assert len(output.hidden_states) == 8
    assert [weights.shape for weights in output.attentions] == [(2, 4, 12, 12)] * 7
    assert [logits.shape for logits in output.router_logits] == [(24, 4)] * 7
    assert all(math.isclose(float(weights.detach().sum()), 2 * 4 * 12, rel_tol=1e-5) for weights in output.attentions)


def test_a_reward_model_reads_the_last_token(tiny_config):
    torch.manual_seed(0)
    model = JaiForSequenceClassification(tiny_config(num_labels=1)).eval()
    padded = F.pad(tokens(), (0, 4), value=0)
    mask = (padded != 0).long()
    alone = model(tokens()).logits
    assert alone.shape == (2, 1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits, alone)
    torch.testing.assert_close(alone, model.score(model.model(tokens()).last_hidden_state[:, -1]))
