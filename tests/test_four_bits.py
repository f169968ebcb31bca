# SPDX-License-Identifier: Apache-2.0
"""Experts in four bits: what is stored, what is computed, what is kept, and what is refused."""

import copy
import gc
import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import jai.kernels.register  # noqa: F401  "jai_fused"
from jai import JaiForCausalLM, JaiForSequenceClassification, quantization_jai
from jai.modeling_jai import JaiExperts
from jai.planning.memory import WEIGHT_BYTES
from jai.quantization_jai import (
    JaiBnb4BitHfQuantizer,
    JaiExperts4bit,
    JaiFineGrainedFP8HfQuantizer,
    lora_reaching_four_bits,
    quantize_matrices,
)
from loopback_hub import LoopbackHub

SIZES = {"hidden_size": 64, "intermediate_size": 128, "block_repeats": [1, 2]}
INPUT_IDS = torch.arange(5, 25).reshape(2, 10)


def four_bits(double: bool = False, **options) -> BitsAndBytesConfig:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **options}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double, **options)


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    """A checkpoint that is not quantised."""
    folder = tmp_path_factory.mktemp("whole") / "jai"
    tiny_model(**SIZES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["nf4", "double"])
def model(whole, request) -> JaiForCausalLM:
    return AutoModelForCausalLM.from_pretrained(whole, quantization_config=four_bits(request.param))


def experts_of(model: nn.Module) -> list[JaiExperts4bit]:
    return [module for module in model.modules() if isinstance(module, JaiExperts4bit)]


def pairs(experts: JaiExperts4bit, implementation: str) -> tuple[JaiExperts4bit, JaiExperts]:
    """The experts, and the same dequantised for good, with a configuration of their own."""
    experts = copy.deepcopy(experts)
    experts.config._experts_implementation = implementation
    return experts, experts.dequantized(torch.float32)


def inputs(tokens: int, hidden_size: int = 64, unused: int | None = None) -> tuple[torch.Tensor, ...]:
    """Hidden states, chosen experts and their weights; one expert of four may be chosen by no token."""
    generator = torch.Generator().manual_seed(tokens)
    order = torch.rand(tokens, 4, generator=generator)
    if unused is not None:
        order[:, unused] = -1
    states = torch.randn(tokens, hidden_size, generator=generator)
    weights = torch.rand(tokens, 2, generator=generator)
    return states.requires_grad_(), order.topk(2).indices, weights.requires_grad_()


# --- what is stored


def test_the_layout_is_that_of_the_pull_request(whole):
    """bitsandbytes' `Experts4bit` reads it: packed bytes and absolute maxima, an expert a row, under its names."""
    experts = experts_of(AutoModelForCausalLM.from_pretrained(whole, quantization_config=four_bits()))[0]
    source = JaiForCausalLM.from_pretrained(whole).model.layers[0].mlp.experts
    stored = experts.state_dict()
    assert {name: (tuple(value.shape), value.dtype) for name, value in stored.items()} == {
        "gate_up_proj": ((4, 256 * 64 // 2), torch.uint8),
        "gate_up_absmax": ((4, 256 * 64 // 64), torch.float32),
        "down_proj": ((4, 64 * 128 // 2), torch.uint8),
        "down_absmax": ((4, 64 * 128 // 64), torch.float32),
    }
    for name in ("gate_up_proj", "down_proj"):
        for expert, matrix in enumerate(getattr(source, name).detach()):
            packed, state = bitsandbytes.functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
            assert torch.equal(stored[name][expert], packed.reshape(-1))
            assert torch.equal(stored[name.replace("proj", "absmax")][expert], state.absmax)


@pytest.mark.parametrize("sizes", [(5120, 17920), (128, 384)], ids=["JAI-1", "small"])
def test_bytes_a_parameter(tiny_config, sizes):
    with torch.device("meta"):
        experts = JaiExperts(tiny_config(hidden_size=sizes[0], intermediate_size=sizes[1]))
    whole = sum(parameter.numel() for parameter in experts.parameters())
    for double, least, most in ((False, 0.5625, 0.57), (True, 0.5156, 0.53)):
        with torch.device("meta"):
            stored = experts.in_four_bits(four_bits(double)).parameters()
        actual = sum(p.numel() * p.element_size() for p in stored) / whole
        assert least <= actual <= most
        if sizes[0] == 5120:
            assert actual == pytest.approx(WEIGHT_BYTES["nf4-double" if double else "nf4"], rel=1e-5)


def test_parameters_count_as_what_they_stand_for(model, whole):
    exact = JaiForCausalLM.from_pretrained(whole)
    assert model.num_parameters() == exact.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == exact.num_parameters(exclude_embeddings=True)
    names = ("lm_head", "embed", "norm", "mlp.gate", "skip_alpha")
    kept = sum(p.numel() for name, p in exact.named_parameters() if any(part in name for part in names))
    assert model.num_parameters(only_trainable=True) == kept


def test_nothing_of_the_experts_is_trained_or_sent_to_other_processes(model):
    for experts in experts_of(model):
        assert not any(parameter.requires_grad for parameter in experts.parameters())
        assert not list(experts.buffers())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 64), (2, 6, 192), (2, 300, 64)], ids=str)  # 8, 18 and 300 blocks an expert
def test_it_dequantises_to_what_bitsandbytes_makes_of_each_expert(quant_type, double, shape):
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    matrices = quantize_matrices(weights, quant_type, double)
    expected = []
    for matrix in weights:
        packed, state = bitsandbytes.functional.quantize_4bit(
            matrix, blocksize=64, quant_type=quant_type, compress_statistics=double
        )
        expected.append(bitsandbytes.functional.dequantize_4bit(packed, state))
    assert torch.equal(matrices.dequantize(torch.bfloat16), torch.stack(expected))
    assert torch.equal(matrices.of(slice(1, 2)).dequantize(torch.bfloat16)[0], expected[1])
    again = matrices.of(torch.tensor([1, 0, 1])).dequantize(torch.bfloat16)
    assert torch.equal(again, torch.stack([expected[1], expected[0], expected[1]]))


# --- what is computed


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
@pytest.mark.parametrize("unused", [None, 0, 3])
def test_outputs_and_gradients_are_those_of_the_dequantised_weights(model, implementation, tokens, unused):
    experts, reference = pairs(experts_of(model)[0], implementation)
    results = []
    for module in (experts, reference):
        states, chosen, weights = inputs(tokens, unused=unused)
        out = module(states, chosen, weights)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), states.grad, weights.grad))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_no_tokens_at_all(model):
    for implementation in ("eager", "grouped_mm"):
        experts, _ = pairs(experts_of(model)[0], implementation)
        assert experts(*inputs(0)).shape == (0, 64)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_nothing_of_a_matrix_is_kept_for_the_backward_pass(model, implementation, tokens):
    """What is kept beside the model's own bytes is a few rows a token, whatever the matrices' size."""
    experts, _ = pairs(experts_of(model)[0], implementation)
    smallest_matrix = 64 * 128 // 2  # an expert's down projection in four bits, in bytes
    own = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    kept = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(*inputs(tokens)).sum().backward()
    largest = tokens * 2 * 2 * 128 * 4  # gate and up of each chosen expert
    assert max(kept) == largest
    if tokens == 1:
        assert largest < smallest_matrix  # so that the line above would see one


def test_no_dequantised_matrix_lives_between_the_passes(model):
    """Nor in an attribute, which the hooks above would not see."""
    experts, _ = pairs(experts_of(model)[0], "grouped_mm")
    gc.collect()
    before = {id(each) for each in gc.get_objects() if isinstance(each, torch.Tensor)}
    out = experts(*inputs(3))
    made = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and id(each) not in before]
    assert max(each.numel() for each in made if each.is_floating_point()) < 64 * 128
    out.sum().backward()


def test_autocast_decides_the_type_of_the_product(model):
    experts, _ = pairs(experts_of(model)[0], "eager")
    states, chosen, weights = inputs(7)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(states, chosen, weights)
    out.sum().backward()
    assert out.dtype == states.grad.dtype == torch.float32
    experts.compute_dtype = torch.bfloat16
    assert torch.equal(out, experts(states, chosen, weights))
    experts.compute_dtype = torch.float32
    assert not torch.equal(out, experts(states, chosen, weights))


def test_the_result_has_the_type_of_the_rows(model):
    """Whatever the product is computed in."""
    states, chosen, weights = inputs(5)
    assert experts_of(model)[0](states.bfloat16(), chosen, weights).dtype == torch.bfloat16


def test_the_whole_model_computes_and_generates(model, whole):
    """Close to the model in full, as far as four bits are, and the same however the experts are computed."""
    results = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            results.append(model(INPUT_IDS).logits.log_softmax(-1))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[1], results[2], rtol=1e-4, atol=1e-4)
    tokens = model.generate(INPUT_IDS, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 14)
    with torch.no_grad():
        exact = JaiForCausalLM.from_pretrained(whole)(INPUT_IDS).logits.log_softmax(-1)
    assert (results[0].exp() * (results[0] - exact)).sum(-1).mean() < 0.5


@pytest.mark.parametrize("double", [False, True])
def test_an_evaluation_changes_neither_weights_nor_gradients(whole, tmp_path, double):
    """bitsandbytes 0.50 packs linear layers on CPUs with AVX512-BF16: what is saved or trained later is then wrong."""
    results = []
    for evaluated in (False, True):
        model = JaiForCausalLM.from_pretrained(whole, quantization_config=four_bits(double))
        if evaluated:
            model.generate(INPUT_IDS, max_new_tokens=2)
        model.train()(INPUT_IDS, labels=INPUT_IDS).loss.backward()
        model.eval().save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        results.append((model.model.embed_tokens.weight.grad, saved))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())
    again = JaiForCausalLM.from_pretrained(tmp_path)(INPUT_IDS).logits
    torch.testing.assert_close(again, model.dequantize()(INPUT_IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model, reentrant):
    model = copy.deepcopy(model).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) > 3
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_it_compiles_without_a_break(model, dtype):
    experts, _ = pairs(experts_of(model)[0], "grouped_mm")
    experts.compute_dtype = dtype
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for tokens in (1, 40):
        results = []
        for module in (experts, compiled):
            states, chosen, weights = inputs(tokens)
            out = module(states, chosen, weights)
            out.sum().backward()
            results.append((out.detach(), states.grad, weights.grad))
        torch.testing.assert_close(*results)
        torch.compiler.reset()


def test_without_torchs_product_by_groups_it_is_the_same(model, monkeypatch):
    """As on a GPU before Ampere."""
    experts, _ = pairs(experts_of(model)[0], "grouped_mm")
    results = []
    for has_it in (True, False):
        monkeypatch.setattr("jai.quantization_jai._has_grouped_mm", lambda rows, has_it=has_it: has_it)
        states, chosen, weights = inputs(9, unused=1)
        out = experts(states, chosen, weights)
        out.sum().backward()
        results.append((out.detach(), states.grad))
    torch.testing.assert_close(*results)


# --- saving and loading


@pytest.mark.parametrize("cast", ["bfloat16", "to", "inner"])
def test_no_cast_rounds_the_scales(model, cast):
    """transformers refuses `to(dtype)`, `half` and `float` of the whole model, and lets the others through."""
    model = copy.deepcopy(model)
    expected = {name: value.clone() for name, value in experts_of(model)[0].state_dict().items()}
    if cast == "bfloat16":
        model.bfloat16()
    elif cast == "to":
        experts_of(model)[0].to("cpu", torch.float16)
    else:
        model.model.layers.half()
    actual = experts_of(model)[0].state_dict()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    assert experts_of(model)[0].to("meta").gate_up_proj.device.type == "meta"


@pytest.mark.parametrize("double", [False, True])
def test_what_was_loaded_in_four_bits_is_saved_again(whole, tmp_path, double):
    """As after new rows of the vocabulary; transformers 5.23 itself cannot."""
    JaiForCausalLM.from_pretrained(whole, quantization_config=four_bits(double)).save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path / "second", max_shard_size="40kB")
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert again.vocab_size == 120
    assert torch.equal(again(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_it_saves_and_loads_the_same_bytes(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(experts_of(again)) == 3
    expected, actual = model.state_dict(), again.state_dict()
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    assert not any(parameter.requires_grad for experts in experts_of(again) for parameter in experts.parameters())
    half = JaiForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16, num_labels=1)
    scales = {parameter.dtype for name, parameter in half.named_parameters() if "absmax" in name and "mlp" in name}
    assert scales <= {torch.float32, torch.uint8}  # not cast with the rest
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.0.mlp.experts.gate_up_proj").get_dtype() == "U8"


def test_it_dequantises_whole(model):
    restored = copy.deepcopy(model).eval().dequantize()
    assert not experts_of(restored)
    assert not any(layer.mlp.experts.training for layer in restored.model.layers)
    assert not hasattr(restored.config, "quantization_config")
    expected = experts_of(model)[1].matrices("down_proj").dequantize(torch.float32)
    assert torch.equal(restored.model.layers[1].mlp.experts.down_proj, expected)
    assert restored(INPUT_IDS).logits.shape == (2, 10, 99)


def test_what_was_stored_in_four_bits_is_saved_whole(model, tmp_path):
    model.save_pretrained(tmp_path / "four")
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "four").dequantize()
    of_saved = copy.deepcopy(model).dequantize().state_dict()  # saving leaves the dtype in the configuration as text
    assert all(torch.equal(weight, of_saved[name]) for name, weight in restored.state_dict().items())
    restored.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert not hasattr(again.config, "quantization_config")
    assert again.state_dict().keys() == restored.state_dict().keys()
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in restored.state_dict().items())


def test_experts_alone_are_quantised_and_dequantised(whole):
    """Linear layers are skipped by their names, and transformers 5.23 fails to dequantise none."""
    how = four_bits(llm_int8_skip_modules=["lm_head", "q_proj", "k_proj", "v_proj", "o_proj"])
    model = JaiForCausalLM.from_pretrained(whole, quantization_config=how)
    assert len(experts_of(model)) == 3
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    expected = model(INPUT_IDS).logits
    torch.testing.assert_close(model.dequantize()(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-4)


STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.distributed import DistributedConfig
whole, out, adapter = sys.argv[1:]
how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(whole, trust_remote_code=True, quantization_config=how)
assert type(model.model.layers[0].mlp.experts).__module__.startswith("transformers_modules.")
model.save_pretrained(out)
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
ids = torch.arange(5, 25).reshape(2, 10)
logits = {"four bits": again(ids).logits}
logits["by its folder"] = AutoModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)(ids).logits
again.load_adapter(adapter)
logits["beside it"] = again(ids).logits
model.push_to_hub("loopback/four")
logits["from the Hub"] = AutoModelForCausalLM.from_pretrained("loopback/four", trust_remote_code=True)(ids).logits
torch.save(logits, out + "/logits.pt")
for folder, how in ((whole, {"quantization_config": how}), (out, {})):
    try:
        cut = DistributedConfig(tp_size=1)
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, distributed_config=cut, **how)
    except ValueError as error:
        print(error)
"""


def test_a_process_without_the_package_quantises_saves_and_loads(whole, tmp_path, run_as_stranger):
    """And loads an adapter of its experts, by its folder too; and pushes to the Hub, and loads it from there."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(whole, quantization_config=four_bits())
    expected = dict.fromkeys(("four bits", "from the Hub"), model(INPUT_IDS).logits)
    adapted = get_peft_model(model, lora_reaching_four_bits(lora)).eval()
    lora.base_model_name_or_path = str(tmp_path / "out")
    adapted.save_pretrained(tmp_path / "adapter")
    expected |= dict.fromkeys(("by its folder", "beside it"), adapted(INPUT_IDS).logits)
    folders = [str(folder) for folder in (whole, tmp_path / "out", tmp_path / "adapter")]
    with LoopbackHub(tmp_path / "hub") as hub:
        run = run_as_stranger(STRANGER, hub.environment(), *folders)
        assert run.returncode == 0, run.stderr
        assert (
            hub.content("loopback/four", "model.safetensors") == (tmp_path / "out" / "model.safetensors").read_bytes()
        )
    assert (tmp_path / "out" / "quantization_jai.py").exists()
    torch.testing.assert_close(torch.load(tmp_path / "out" / "logits.pt"), expected)
    assert (expected["beside it"] - expected["four bits"]).abs().max() > 0.1
    assert run.stdout.count("cannot be split over devices") == 2  # packed bytes cut by rows would mix experts


def test_other_models_see_nothing_of_it(whole, tmp_path):
    before = dict(AUTO_QUANTIZER_MAPPING)
    JaiForCausalLM.from_pretrained(whole, quantization_config=four_bits())
    with pytest.raises(OSError, match="none"):
        JaiForCausalLM.from_pretrained(tmp_path / "none", quantization_config=four_bits())
    assert before == AUTO_QUANTIZER_MAPPING
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(vocab_size=50, num_hidden_layers=1, num_local_experts=2, **sizes))
    mixtral.save_pretrained(tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits())
    assert type(loaded.hf_quantizer).__module__.startswith("transformers.")


@pytest.mark.parametrize("pre_quantized", [False, True])
def test_devices_are_planned_with_the_bytes_that_experts_take(tiny_model, pre_quantized):
    """By `device_map="auto"`, and for the memory that is reserved before loading."""
    with torch.device("meta"):
        model = tiny_model(**SIZES)
    quantizer = JaiBnb4BitHfQuantizer(four_bits(), pre_quantized=pre_quantized)
    quantizer.preprocess_model(model, dtype=torch.float32, device_map={"": "cpu"})
    experts, name = experts_of(model)[0], "model.layers.0.mlp.experts"
    sizes = {
        key: parameter.numel() * quantizer.param_element_size(model, f"{name}.{key}", parameter)
        for key, parameter in experts.named_parameters()
    }
    assert sizes == {
        "gate_up_proj": 4 * 256 * 64 / 2,
        "gate_up_absmax": 4 * 256 * 64 / 64 * 4,
        "down_proj": 4 * 64 * 128 / 2,
        "down_absmax": 4 * 64 * 128 / 64 * 4,
    }


# Sixteen layers of 28 MB, 450 MB in all, are loaded in four bits or quantised by the verb; says the peak of what the
# process has for itself, and how much of that the quantised model is.
PEAK = """
import sys, threading, torch
from pathlib import Path
from transformers import BitsAndBytesConfig
import bitsandbytes.functional
from jai import JaiForCausalLM
from jai.conversion.quantize.command import quantize
from jai.conversion.quantize.options import QuantizeOptions

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

way, folder, out = sys.argv[1:]
how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
bitsandbytes.functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4")
done, before, peak, kept = threading.Event(), anonymous(), [0], 0
watcher = threading.Thread(target=watch)
watcher.start()
if way == "load":
    model = JaiForCausalLM.from_pretrained(folder, quantization_config=how)
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
elif way == "reload":
    model = JaiForCausalLM.from_pretrained(folder)
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
else:
    quantize(QuantizeOptions(model=folder, out=Path(out)))
done.set()
watcher.join()
print("peak", peak[0] - before - kept)
"""


@pytest.mark.slow
def test_loading_takes_the_memory_of_one_layer(tiny_model, tmp_path, record_property):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "block_repeats": [16], "block_size": 1}
    tiny_model(**sizes).save_pretrained(tmp_path / "whole", max_shard_size="100MB")
    layer = 4 * (3 * 512 * 1024 * 4 + 3 * 512 * 512)
    figures = {}
    for way, folder, bound in (
        ("load", "whole", 1.5 * layer),
        ("quantize", "whole", 1.5 * layer),
        ("reload", "out", 0.5 * layer),
    ):
        command = [sys.executable, "-c", PEAK, way, str(tmp_path / folder), str(tmp_path / "out")]
        # Matrices of this size stay in glibc's heap when they are freed; those of a real model go back at once.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.returncode == 0, run.stderr
        figures[way] = int(run.stdout.split()[-1])
        assert figures[way] < bound, f"{way}: {figures}, of layers of {layer:,} bytes"
    record_property("figures", f"peaks beside the result: {figures}, of layers of {layer:,} bytes")


RANK = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from jai import JaiForCausalLM
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = JaiForCausalLM.from_pretrained(sys.argv[1]).train()
wrapped = DistributedDataParallel(model)
ids = torch.load(sys.argv[2]).chunk(2)[dist.get_rank()]
wrapped(ids, labels=ids).loss.backward()
if dist.get_rank() == 0:
    torch.save({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, sys.argv[3])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_one(whole, tmp_path):
    """Data-parallel over gloo: the gradients of what is trained beside the experts are those of one process."""
    JaiForCausalLM.from_pretrained(whole, quantization_config=four_bits()).save_pretrained(tmp_path / "four")
    ids = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, *map(str, (tmp_path / "four", tmp_path / "ids.pt", tmp_path / "out.pt"))]
    workers = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    model = JaiForCausalLM.from_pretrained(tmp_path / "four").train()
    (sum(model(half, labels=half).loss for half in ids.chunk(2)) / 2).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(expected) > 10
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=1e-4, atol=1e-6)


# --- what is refused


def test_a_form_of_four_bits_that_is_none(whole):
    with pytest.raises(ValueError, match=r"`bnb_4bit_quant_type` is 'nf5'; expected nf4 or fp4"):
        JaiForCausalLM.from_pretrained(whole, quantization_config=four_bits(bnb_4bit_quant_type="nf5"))


def test_sizes_that_are_no_multiple_of_a_block(tiny_model, tmp_path):
    for sizes, message in (
        ({"hidden_size": 32, "intermediate_size": 64}, r"`hidden_size` is 32.*multiple of 64"),
        ({"hidden_size": 64, "intermediate_size": 96}, r"`intermediate_size` is 96.*multiple of 64"),
    ):
        tiny_model(**{**SIZES, **sizes}).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            JaiForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits())


def test_a_checkpoint_of_another_number_of_experts(whole):
    """Refused before it is quantised: packed bytes of another shape say less."""
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        JaiForCausalLM.from_pretrained(whole, num_local_experts=5, quantization_config=four_bits())


def test_an_old_or_missing_bitsandbytes(whole, monkeypatch):
    with monkeypatch.context() as patch:
        installed = metadata.version
        patch.setattr(metadata, "version", lambda name: "0.49.2" if name == "bitsandbytes" else installed(name))
        with pytest.raises(ImportError, match=r"0\.49\.2 is installed.*need 0\.50 or later"):
            JaiForCausalLM.from_pretrained(whole, quantization_config=four_bits())
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="requires bitsandbytes"):
        JaiForCausalLM.from_pretrained(whole, quantization_config=four_bits())


def test_the_oldest_bitsandbytes_is_the_same_wherever_it_stands():
    home = Path(quantization_jai.__file__).parent
    for file in ("pyproject.toml", "README.md", "hub_card/card_template.md"):
        assert set(re.findall(r"bitsandbytes>=([\d.]+)", (home / file).read_text())) == {quantization_jai.BITSANDBYTES}
    page = " ".join((home / "docs/four-bits.md").read_text().split())
    assert f"bitsandbytes {quantization_jai.BITSANDBYTES} or later" in page
    assert f"older than {quantization_jai.BITSANDBYTES}" in page


def test_eight_bits_would_leave_the_experts(whole, tiny_model, tmp_path):
    eight = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match=r"leave the experts.*load_in_4bit=True"):
        JaiForCausalLM.from_pretrained(whole, quantization_config=eight)
    eight.llm_int8_skip_modules = ["lm_head", "mlp.experts"]
    model = JaiForCausalLM.from_pretrained(whole, quantization_config=eight)
    model.save_pretrained(tmp_path / "eight")
    again = JaiForCausalLM.from_pretrained(tmp_path / "eight")
    assert again.is_loaded_in_8bit
    again.save_pretrained(tmp_path / "again")
    assert JaiForCausalLM.from_pretrained(tmp_path / "again").state_dict().keys() == again.state_dict().keys()
    tiny_model(**SIZES, num_local_experts=1).save_pretrained(tmp_path / "dense")
    JaiForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_experts_that_are_to_be_skipped_stay_whole(whole, tmp_path):
    how = four_bits(llm_int8_skip_modules=["lm_head", "mlp.experts"])
    model = JaiForCausalLM.from_pretrained(whole, quantization_config=how)
    assert not experts_of(model)
    model.save_pretrained(tmp_path)
    assert not experts_of(JaiForCausalLM.from_pretrained(tmp_path))


def test_a_name_that_skips_nothing_is_said(whole, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(quantization_jai.logger, "warning", said.append)
    skipped = ["lm_head", "mlp.experts.gate_up_proj", "model.layers.1"]
    for bits in ("load_in_4bit", "load_in_8bit"):
        how = BitsAndBytesConfig(**{bits: True}, llm_int8_skip_modules=[*skipped, "mlp.experts"])
        JaiForCausalLM.from_pretrained(whole, quantization_config=how).save_pretrained(tmp_path / bits)
        (warning,) = said
        assert "has 'mlp.experts.gate_up_proj'" in warning
        JaiForCausalLM.from_pretrained(tmp_path / bits)
        assert len(said) == 1  # what is stored is as it is
        said.clear()


def test_an_implementation_that_cannot_read_four_bits(model, whole):
    with pytest.raises(ValueError, match=r'"deepgemm".*four bits'):
        JaiForCausalLM.from_pretrained(whole, quantization_config=four_bits(), experts_implementation="deepgemm")
    with pytest.raises(ValueError, match=r'"sonicmoe".*four bits'):
        model.set_experts_implementation("sonicmoe")
    with pytest.raises(ValueError, match=r'"sonicmoe".*four bits'):
        model.set_experts_implementation({"": "sonicmoe"})
    for name in ("sonicmoe", "deepgemm"):
        experts, _ = pairs(experts_of(model)[0], "eager")
        experts.config._experts_implementation = name
        with pytest.raises(ValueError, match=rf'"{name}".*cannot compute.*eager, grouped_mm, batched_mm'):
            experts(*inputs(3))
    experts.config._experts_implementation = "nonsense"
    with pytest.raises(KeyError, match="nonsense"):
        experts(*inputs(3))


def test_fp8_is_transformers_own_and_our_kernels_are_refused_beside_it(tiny_config):
    """On the meta device: what FP8 computes needs a GPU."""
    for implementation, message in (("grouped_mm", None), ("jai_fused", r'"jai_fused".*experts in FP8.*grouped_mm')):
        with torch.device("meta"):
            model = JaiForCausalLM(tiny_config(hidden_size=256, intermediate_size=128))
        model.config._experts_implementation = implementation
        quantizer = JaiFineGrainedFP8HfQuantizer(FineGrainedFP8Config(), pre_quantized=False)
        if message:
            with pytest.raises(ValueError, match=message):
                quantizer.preprocess_model(model, dtype=torch.bfloat16)
            continue
        quantizer.preprocess_model(model, dtype=torch.bfloat16)
        experts = model.model.layers[0].mlp.experts
        assert type(experts).__name__ == "FP8Experts"
        assert experts.gate_up_proj.shape == (4, 256, 256)
        assert experts.gate_up_proj_scale_inv.shape == (4, 2, 2)  # blocks of 128 x 128
        assert type(model.lm_head) is nn.Linear
        with pytest.raises(ValueError, match="FP8"):
            model.set_experts_implementation("jai_fused")


def test_one_that_says_that_it_reads_four_bits_is_called(model, monkeypatch):
    def read(experts, states, chosen, weights):
        return experts.matrices("gate_up_proj").packed

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "reads", read)
    experts, _ = pairs(experts_of(model)[0], "reads")
    with pytest.raises(ValueError, match="cannot compute"):
        experts(*inputs(3))
    read.reads_four_bits = True
    assert experts(*inputs(3)) is experts.gate_up_proj


def test_a_checkpoint_without_its_scales(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.experts.down_absmax"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of its experts"):
        JaiForCausalLM.from_pretrained(tmp_path)
