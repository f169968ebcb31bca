# SPDX-License-Identifier: Apache-2.0
"""Generation: cached = full, padded = unpadded, static and compiled = dynamic, LongRoPE = Phi-3's."""

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    Phi3ForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from jai import JaiForCausalLM

GREEDY = {"do_sample": False, "eos_token_id": None}


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def full_forward_greedy(model: PreTrainedModel, input_ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        logits = model(input_ids, use_cache=False).logits[:, -1]
        input_ids = torch.cat((input_ids, logits.argmax(-1, keepdim=True)), dim=-1)
    return input_ids


@pytest.fixture(params=["eager", "sdpa"])
def model(request, tiny_model) -> JaiForCausalLM:
    return tiny_model(attn_implementation=request.param)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_cached_greedy_generation_is_the_full_forward(model, cache):
    expected = full_forward_greedy(model, tokens(), 10)
    generated = model.generate(tokens(), max_new_tokens=10, cache_implementation=cache, **GREEDY)
    assert torch.equal(generated, expected)


@torch.no_grad()
@pytest.mark.parametrize("dense", [False, True])
def test_cached_logits_are_those_of_the_full_forward(tiny_model, dense):
    model = tiny_model(num_experts=1 if dense else 4)
    expected = model(tokens(), use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        logits = [model(tokens()[:, :4], past_key_values=cache).logits]
        # one by one, then several at once
        logits += [model(tokens()[:, i : i + 1], past_key_values=cache).logits for i in range(4, 7)]
        logits += [model(tokens()[:, 7:], past_key_values=cache).logits]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_forward_returns_a_cache_unless_told_otherwise(tiny_model):
    model = tiny_model()
    cache = model(tokens()[:, :8]).past_key_values
    assert cache.get_seq_length() == 8
    continued = model(tokens()[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(continued, model(tokens()).logits[:, 8:], rtol=1e-5, atol=1e-5)
    assert model(tokens(), use_cache=False).past_key_values is None


@torch.no_grad()
def test_left_padded_is_unpadded(model):
    short, long = tokens(1, 5), tokens(1, 9, seed=1)
    padded = torch.cat((torch.nn.functional.pad(short, (4, 0)), long))
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    logits = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[:1, 4:], model(short).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1:], model(long).logits, rtol=1e-5, atol=1e-5)
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=8, **GREEDY)
    assert torch.equal(generated[:1, 4:], full_forward_greedy(model, short, 8))
    assert torch.equal(generated[1:], full_forward_greedy(model, long, 8))


@torch.no_grad()
def test_right_padded_is_unpadded(model):
    short, long = tokens(1, 5), tokens(1, 9, seed=1)
    padded = torch.cat((torch.nn.functional.pad(short, (0, 4)), long))
    logits = model(padded, attention_mask=(padded != 0).long()).logits
    torch.testing.assert_close(logits[:1, :5], model(short).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[1:], model(long).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_batch_generates_when_the_config_asks_for_router_logits(tiny_model, cache):
    """As after training with the auxiliary loss. Mixtral fails here: its mask is longer than the new tokens."""
    model = tiny_model(output_router_logits=True)
    mask = torch.ones_like(tokens())
    mask[0, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "cache_implementation": cache, **GREEDY}
    generated = model.generate(tokens(), **arguments)
    model.config.output_router_logits = False
    assert torch.equal(generated, model.generate(tokens(), **arguments))


@torch.no_grad()
def test_beams_and_assistants_agree_with_plain_search(tiny_model):
    """Both rearrange or shorten the cache."""
    model = tiny_model()
    expected = full_forward_greedy(model, tokens(1), 8)
    assistant = tiny_model(seed=1, num_hidden_layers=3)
    assert torch.equal(model.generate(tokens(1), assistant_model=assistant, max_new_tokens=8, **GREEDY), expected)
    beams = model.generate(tokens(1), num_beams=3, max_new_tokens=8, **GREEDY)

    def score(sequence):
        steps = model(sequence[:, :-1]).logits.log_softmax(-1).gather(-1, sequence[:, 1:, None])
        return steps[:, -8:].sum()

    assert score(beams) >= score(expected)


@torch.no_grad()
def test_continuous_batching_generates_the_same(tiny_model):
    """The engine of `transformers serve`: all requests lie packed in one row over a paged cache."""
    model = tiny_model()
    prompts = [tokens(1, length, seed=length) for length in (4, 7, 9)]
    expected = [full_forward_greedy(model, prompt, 6)[0, prompt.shape[1] :].tolist() for prompt in prompts]
    model.set_attn_implementation("paged|eager")
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # the default takes all memory
    requests = model.generate_batch([prompt[0].tolist() for prompt in prompts], config, small)
    generated = {tuple(request.prompt_ids): request.generated_tokens for request in requests.values()}
    assert [generated[tuple(prompt[0].tolist())] for prompt in prompts] == expected


@torch.no_grad()
def test_a_conversation_continues_from_its_cache(tiny_model):
    model = tiny_model()
    first = model.generate(tokens(1), max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    second_turn = torch.cat((first.sequences, tokens(1, 4, seed=3)), dim=-1)
    expected = full_forward_greedy(model, second_turn, 5)
    continued = model.generate(second_turn, past_key_values=first.past_key_values, max_new_tokens=5, **GREEDY)
    assert torch.equal(continued, expected)


@torch.no_grad()
def test_longrope_generates_as_phi3_across_the_switch(tiny_phi3, phi3_oracle, tmp_path):
    """At 17 tokens all angles change, and keys that were cached with the short factors are of no use."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 3.0, 9.0, 27.0],
    }
    stretched = {"rope_parameters": rope, "original_max_position_embeddings": 16, "max_position_embeddings": 64}
    folder = tiny_phi3(tmp_path, sliding_window=None, **stretched)
    phi3 = Phi3ForCausalLM.from_pretrained(folder).eval()
    model = phi3_oracle.jai_of(phi3)
    expected = full_forward_greedy(phi3, tokens(1, 12), 16)
    assert torch.equal(full_forward_greedy(model, tokens(1, 12), 16), expected)
    assert torch.equal(model.generate(tokens(1, 12), max_new_tokens=16, **GREEDY), expected)


@torch.no_grad()
def compiled_greedy(model: JaiForCausalLM, backend: str) -> torch.Tensor:
    """Ten tokens by a compiled forward over a static cache: a prefill, then one token at a time."""
    torch._dynamo.reset()
    forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=32)
    sequence = step = tokens()
    for _ in range(10):
        start = sequence.shape[1] - step.shape[1]
        position_ids = torch.arange(start, sequence.shape[1])[None]
        step = forward(step, position_ids=position_ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        sequence = torch.cat((sequence, step), dim=-1)
    return sequence


@pytest.mark.parametrize(
    ("backend", "experts"),
    [
        ("eager", "batched_mm"),
        ("aot_eager", "grouped_mm"),
        pytest.param("inductor", "batched_mm", marks=pytest.mark.slow),
        pytest.param("inductor", "grouped_mm", marks=pytest.mark.slow),
    ],
)
def test_compiled_with_a_static_cache_decodes_the_same(tiny_model, backend, experts):
    model = tiny_model(experts_implementation=experts, block_repeats=[1, 2])  # a skip, in few layers: a trace is slow
    assert torch.equal(compiled_greedy(model, backend), full_forward_greedy(model, tokens(), 10))


def test_compiled_training_with_packed_documents(tiny_model):
    """Under a trace the mask cannot look at the positions, so it keeps documents apart always."""
    model = tiny_model(block_repeats=[1, 2])
    documents = [tokens(1, 5), tokens(1, 7, seed=1)]
    position_ids = torch.cat([torch.arange(5), torch.arange(7)])[None]
    torch._dynamo.reset()
    forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    expected = torch.cat([model(document).logits for document in documents], dim=1)
    for mask in (None, torch.ones(1, 12, dtype=torch.long)):
        packed = forward(torch.cat(documents, dim=1), attention_mask=mask, position_ids=position_ids, use_cache=False)
        torch.testing.assert_close(packed.logits, expected, rtol=1e-4, atol=1e-4)
