# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts in four bits: against PEFT's own on the dequantised weights, and its files."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_four_bits import INPUT_IDS, SIZES, experts_of, four_bits, inputs, pairs
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import LoadStateDictConfig

import jai.kernels.register  # noqa: F401  "jai_fused"
from jai import JaiForCausalLM
from jai.auto import load_causal_model
from jai.errors import UserError
from jai.modeling_jai import JaiExperts
from jai.quantization_jai import Lora4bit, ParamWrapper, peft_config_of_four_bits
from jai.trainers.expert_lora import adapting_four_bits

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def config(**options) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": [], "target_parameters": TARGETS, "init_lora_weights": False, **options}
    )


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "jai"
    tiny_model(**SIZES).save_pretrained(folder)
    return folder


def load(folder: Path, **options) -> JaiForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits(**options))


@pytest.fixture(scope="module")
def adapted(whole) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(load(whole), adapting_four_bits(config())).train()


def step(model: PeftModel, implementation: str) -> dict[str, torch.Tensor]:
    """The loss and the gradients of what learns."""
    model.base_model.model.set_experts_implementation(implementation)
    model.zero_grad()
    loss = model(INPUT_IDS, labels=INPUT_IDS).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **gradients}


@pytest.fixture(scope="module")
def expected(adapted, whole) -> dict[str, torch.Tensor]:
    """PEFT's own class on the dequantised model, with the same factors."""
    reference = get_peft_model(load(whole).dequantize(), config()).train()
    factors = {name: p for name, p in adapted.named_parameters() if ".lora_" in name}
    assert not reference.load_state_dict(factors, strict=False).unexpected_keys
    return step(reference, "eager")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", pytest.param("jai_fused", marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_of_peft_on_the_dequantised_model(adapted, expected, implementation):
    actual = step(adapted, implementation)
    assert len(actual) == 13  # three layers, two matrices, two factors
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("tokens", [1, 2, 30])
@pytest.mark.parametrize("rank", [3, 8])
def test_narrow_products_beside_the_matrices(whole, implementation, tokens, rank):
    """Ranks that no kernel likes, experts without rows, rows fewer than the experts, and one matrix alone."""
    experts, reference = pairs(experts_of(load(whole))[0], implementation)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((4, rank, 128), (4, 64, rank)))
    results = []
    for merged in (False, True):
        factors = a.clone().requires_grad_(), b.clone().requires_grad_()
        states, chosen, weights = inputs(tokens, unused=2)
        if merged:
            down = reference.down_proj.detach() + 0.5 * factors[1] @ factors[0]
            names = {"gate_up_proj": reference.gate_up_proj.detach(), "down_proj": down}
            out = torch.func.functional_call(reference, names, (states, chosen, weights))
        else:
            with experts.adapted("down_proj", Lora4bit(*factors, 0.5)):
                out = experts(states, chosen, weights)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), states.grad, weights.grad, *(factor.grad for factor in factors)))
    for actual, wanted in zip(*results):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert not experts.lora


def test_nothing_of_a_matrix_is_kept_for_the_backward_pass(whole):
    experts, _ = pairs(experts_of(load(whole))[0], "grouped_mm")
    own = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    a, b = torch.randn(4, 2, 64, requires_grad=True), torch.randn(4, 256, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with experts.adapted("gate_up_proj", Lora4bit(a, b, 1.0)):
            out = experts(*inputs(5))
        out.sum().backward()
    # Gate and up of ten rows, or the factor that is padded to a rank of eight; all matrices are 131,072 packed bytes.
    assert max(kept) <= max(10 * 256 * 4, 4 * 256 * 8 * 4)


def test_factors_of_another_number_of_experts_are_refused(whole):
    experts = experts_of(load(whole))[0]
    wrong = Lora4bit(torch.zeros(3, 2, 64), torch.zeros(3, 256, 2), 1.0)
    with pytest.raises(ValueError, match=r"factors of gate_up_proj are \(\(3, 2, 64\).*its experts need \(\(4, 2, 64"):
        experts.adapted("gate_up_proj", wrong).__enter__()


def test_its_file_is_pefts(adapted, whole, tmp_path):
    """Plain PEFT reads it on a model in full, ours on four bits, and both compute the same with the same weights."""
    adapted.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored["base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"].shape == (4 * 4, 64)
    assert stored["base_model.model.model.layers.0.mlp.experts.lora_B.weight"].shape == (64, 4 * 4)
    read = adapting_four_bits(PeftConfig.from_pretrained(tmp_path))
    # In training: in evaluation bitsandbytes' linear layers compute in bf16 on some processors.
    again = PeftModel.from_pretrained(load(whole), tmp_path, config=read).train()
    plain = PeftModel.from_pretrained(load(whole).dequantize(), tmp_path).train()
    merged = copy.deepcopy(plain).merge_and_unload()
    with torch.no_grad():
        expected = plain(INPUT_IDS).logits
        torch.testing.assert_close(again(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_transformers_loads_it_on_its_base_in_four_bits(adapted, whole, tmp_path):
    """By the adapter's folder alone, and beside one that is there."""
    load(whole).save_pretrained(tmp_path / "four")
    adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "four")}))
    with torch.no_grad():
        expected = adapted(INPUT_IDS).logits
        by_folder = load_causal_model("adapter", tmp_path / "adapter", trust_remote_code=False)
        torch.testing.assert_close(by_folder.train()(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-5)
        model = load(whole)
        model.load_adapter(tmp_path / "adapter", adapter_name="a")
        model.load_adapter(peft_config=config(r=2), adapter_state_dict={}, adapter_name="b")
        model.set_adapter("a")
        torch.testing.assert_close(model.train()(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-5)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_other_arguments_and_kinds_of_adapters_are_as_in_transformers(adapted, whole, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    where = {"subfolder": "adapter"}  # as a revision: of what is on the Hub
    for loading, own in ((None, where), (LoadStateDictConfig(download_kwargs=where), None)):
        assert peft_config_of_four_bits(tmp_path, None, loading, adapter_kwargs=own).r == 4
    model = load(whole).train()
    no_lora = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with torch.no_grad():
        expected = model(INPUT_IDS).logits
        model.load_adapter(peft_config=no_lora, adapter_state_dict={})
        torch.testing.assert_close(model(INPUT_IDS).logits, expected)  # IA3 begins with ones


def test_the_first_factor_of_an_expert_is_its_block_of_rows_and_the_second_every_fourth_column(adapted):
    """PEFT's order: `lora_A` has the experts slowest, `lora_B` fastest."""
    wrapper = adapted.base_model.model.model.layers[0].mlp.experts
    assert type(wrapper) is ParamWrapper
    lora = wrapper._lora(["default"])
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    for expert in range(4):
        assert torch.equal(lora.a_ERC[expert], a[4 * expert : 4 * expert + 4])
        assert torch.equal(lora.b_ERR[expert], b[:, expert::4])


def test_two_adapters_add_and_none_is_the_model_itself(whole):
    torch.manual_seed(0)
    model = get_peft_model(load(whole), adapting_four_bits(config()))
    model.add_adapter("two", adapting_four_bits(config(lora_alpha=16)))
    reference = get_peft_model(load(whole).dequantize(), config())
    reference.add_adapter("two", config(lora_alpha=16))
    reference.load_state_dict({n: p for n, p in model.named_parameters() if ".lora_" in n}, strict=False)
    results = []
    for each in (model, reference):
        each.train()  # as above
        each.base_model.set_adapter(["default", "two"])
        with torch.no_grad(), each.disable_adapter():
            without = each(INPUT_IDS).logits
        with torch.no_grad():
            results.append((each(INPUT_IDS).logits, without))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_dequantised_model_keeps_its_adapter(whole):
    """And can then be merged, of linear layers apart, whose class PEFT chose for bitsandbytes'."""
    experts_alone = config(target_modules=[], init_lora_weights=False)
    for given in (config(init_lora_weights=False), experts_alone):
        torch.manual_seed(0)
        model = get_peft_model(load(whole), adapting_four_bits(given)).train()
        with torch.no_grad():
            expected = model(INPUT_IDS).logits
            model.base_model.model.dequantize()
            torch.testing.assert_close(model(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert isinstance(merged.model.layers[0].mlp.experts, JaiExperts)
    with torch.no_grad():
        torch.testing.assert_close(merged(INPUT_IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_checkpointing_changes_nothing(whole):
    torch.manual_seed(0)
    model = get_peft_model(load(whole), adapting_four_bits(config())).train()
    expected = step(model, "grouped_mm")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(step(model, "grouped_mm"), expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_is_refused(whole, adapted):
    with pytest.raises(ValueError, match=r"cannot be merged into experts in four bits.*16 bits"):
        copy.deepcopy(adapted).merge_and_unload()
    with pytest.raises(UserError, match="take LoRA alone"):
        adapting_four_bits(IA3Config())
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        get_peft_model(load(whole), adapting_four_bits(config(lora_dropout=0.1)))
    # PEFT's own class would add to packed bytes: torch refuses that.
    with pytest.raises(ValueError, match="may not change the dtype"):
        get_peft_model(load(whole), config())(INPUT_IDS)
