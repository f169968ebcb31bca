# SPDX-License-Identifier: Apache-2.0
"""The fused experts under Triton's interpreter (without a GPU), against float64 and transformers' own experts."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

pytest.importorskip("triton", reason="Triton is not installed")

import jai.kernels.register as register
from jai import JaiForCausalLM
from jai.kernels.experts import launch
from jai.kernels.experts.fused import ExpertsLora, fused_experts, fused_experts_reference
from jai.kernels.experts.routing import ALIGNMENT, combine_reference, padded_rows, permute_reference, route_reference
from jai.kernels.experts.tiles import FOLDER, PRODUCTS, read_tiles, tile_file

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that is taken and not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_ids(tokens: int, experts: int, top_k: int, generator: torch.Generator | None = None) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=generator).topk(top_k, dim=-1).indices.to(DEVICE)


def random_inputs(tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + hidden)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    return {
        "x_TH": normal(tokens, hidden),
        "gate_up_EFH": normal(experts, 2 * intermediate, hidden, scale=hidden**-0.5),
        "down_EHI": normal(experts, hidden, intermediate, scale=intermediate**-0.5),
        "ids_TK": random_ids(tokens, experts, top_k, generator),
        "weights_TK": torch.rand(tokens, top_k, generator=generator).to(DEVICE),
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def assert_equals_float64(inputs: dict[str, torch.Tensor], tolerance: float, **options) -> None:
    """Output and all four gradients, against the reference in float64."""
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items() if name != "ids_TK"}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
    out_TH = fused_experts(**inputs, **options)
    expected_TH = fused_experts_reference(**exact, ids_TK=inputs["ids_TK"])
    dout_TH = torch.randn(out_TH.shape, generator=torch.Generator().manual_seed(1)).to(out_TH)
    gradients = torch.autograd.grad(out_TH, list(leaves.values()), dout_TH)
    expected = torch.autograd.grad(expected_TH, list(exact.values()), dout_TH.double())
    assert relative_error(out_TH, expected_TH) < tolerance
    for name, gradient, expected_gradient in zip(leaves, gradients, expected, strict=True):
        assert gradient.dtype == leaves[name].dtype, name
        assert relative_error(gradient, expected_gradient) < tolerance, name


class TestRouting:
    @given(
        tokens=st.integers(1, 40), experts=st.integers(1, 9), elsewhere=st.integers(0, 3), seed=st.integers(0, 2**16)
    )
    @settings(max_examples=15, deadline=None)
    def test_equals_the_reference(self, tokens, experts, elsewhere, seed):
        generator = torch.Generator().manual_seed(seed)
        ids_TK = random_ids(tokens, experts + elsewhere, min(2, experts), generator)
        self.assert_same(ids_TK, experts)

    def test_many_blocks(self):
        self.assert_same(random_ids(1500, 5, 2), 4)

    def test_more_experts_than_fit_a_block(self):
        self.assert_same(random_ids(150, 130, 3), 128)

    @staticmethod
    def assert_same(ids_TK: torch.Tensor, experts: int) -> None:
        expected, actual = route_reference(ids_TK, experts), launch.route(ids_TK, experts)
        here = expected.offsets_E[-1]
        torch.testing.assert_close(actual.order_R[:here], expected.order_R[:here], rtol=0, atol=0)
        for name in ("slots_TK", "padded_slots_TK", "offsets_E", "padded_offsets_E"):
            torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0, msg=name)
        assert (expected.padded_offsets_E % ALIGNMENT == 0).all()
        assert expected.padded_offsets_E[-1] <= padded_rows(ids_TK.numel(), experts)

    def test_rows_go_and_come_back(self):
        x_TH = torch.randn(13, 19, device=DEVICE)
        routing = route_reference(random_ids(13, 5, 2), 4)  # expert 4 is elsewhere
        weights_TK = torch.rand(13, 2, device=DEVICE)
        for padded, slots_TK in ((False, routing.slots_TK), (True, routing.padded_slots_TK)):
            ends = routing.padded_offsets_E if padded else routing.offsets_E
            expected = permute_reference(x_TH, routing, padded)[: ends[-1]]
            rows = launch.permute(x_TH, routing, padded)
            torch.testing.assert_close(rows[: ends[-1]], expected, rtol=0, atol=0)
            for weights in (None, weights_TK):
                back_TH = launch.combine(rows, slots_TK, weights)
                torch.testing.assert_close(back_TH, combine_reference(rows, slots_TK, weights))
                factor_TK = (slots_TK >= 0) * (1 if weights is None else weights)
                torch.testing.assert_close(back_TH, x_TH * factor_TK.sum(1, keepdim=True))


class TestGradients:
    @pytest.mark.parametrize(
        ("tokens", "hidden", "intermediate", "experts", "top_k"),
        [
            pytest.param(9, 64, 80, 4, 2, id="tma"),
            pytest.param(7, 37, 53, 3, 2, id="primes"),
            pytest.param(1, 64, 48, 4, 1, id="one-token"),
            pytest.param(70, 16, 16, 2, 1, id="top-1"),
            pytest.param(5, 16, 24, 3, 3, id="every-expert"),
        ],
    )
    def test_shapes(self, tokens, hidden, intermediate, experts, top_k):
        assert_equals_float64(random_inputs(tokens, hidden, intermediate, experts, top_k), 1e-6)

    def test_fp16(self):
        assert_equals_float64(random_inputs(9, 64, 48, 3, 2, torch.float16), 2e-3)

    @pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter is wrong on bfloat16")
    def test_bf16(self):
        assert_equals_float64(random_inputs(300, 256, 320, 4, 2, torch.bfloat16), 2e-2)

    def test_all_tokens_to_one_expert(self):
        inputs = random_inputs(9, 32, 48, 4, 1)
        assert_equals_float64({**inputs, "ids_TK": torch.full_like(inputs["ids_TK"], 2)}, 1e-6)

    def test_an_expert_without_tokens_has_a_zero_gradient(self):
        inputs = random_inputs(6, 32, 48, 3, 2)
        inputs["ids_TK"] = torch.tensor([0, 2], device=DEVICE).repeat(6, 1)
        assert_equals_float64(inputs, 1e-6)
        leaf = inputs["gate_up_EFH"].requires_grad_()
        fused_experts(**inputs).sum().backward()
        assert (leaf.grad[1] == 0).all()
        assert (leaf.grad[0] != 0).any()

    def test_experts_of_other_ranks_add_nothing(self):
        inputs = random_inputs(8, 32, 48, 3, 2)
        inputs["ids_TK"] = random_ids(8, 6, 2)
        inputs["ids_TK"][0] = torch.tensor([3, 5])
        assert (inputs["ids_TK"] >= 3).any()
        assert_equals_float64(inputs, 1e-6)

    def test_not_contiguous(self):
        inputs = random_inputs(6, 32, 48, 3, 2)
        strided = {
            name: tensor.transpose(0, -1).contiguous().transpose(0, -1)
            if name != "ids_TK"
            else tensor.repeat(1, 2)[:, :2]
            for name, tensor in inputs.items()
        }
        assert not strided["x_TH"].is_contiguous()
        assert_equals_float64(strided, 1e-6)
        torch.testing.assert_close(fused_experts(**strided), fused_experts(**inputs), rtol=0, atol=0)

    def test_no_tokens(self):
        inputs = random_inputs(1, 32, 48, 3, 2)
        inputs = {
            name: tensor[:0] if name in ("x_TH", "ids_TK", "weights_TK") else tensor for name, tensor in inputs.items()
        }
        leaf = inputs["down_EHI"].requires_grad_()
        out_TH = fused_experts(**inputs)
        out_TH.sum().backward()
        assert out_TH.shape == (0, 32)
        assert (leaf.grad == 0).all()

    @pytest.mark.parametrize("trained", ["x_TH", "gate_up_EFH", "down_EHI", "weights_TK"])
    def test_only_what_is_trained_gets_a_gradient(self, trained):
        inputs = random_inputs(4, 16, 16, 2, 2)
        inputs[trained].requires_grad_()
        fused_experts(**inputs).square().sum().backward()
        exact = {name: tensor.detach().double() if name != "ids_TK" else tensor for name, tensor in inputs.items()}
        exact[trained].requires_grad_()
        fused_experts_reference(**exact).square().sum().backward()
        assert relative_error(inputs[trained].grad, exact[trained].grad) < 1e-6
        assert all(tensor.grad is None for name, tensor in inputs.items() if name != trained)

    def test_the_same_bits_twice(self):
        def run() -> list[torch.Tensor]:
            inputs = random_inputs(9, 32, 48, 3, 2)
            leaves = [tensor.requires_grad_() for name, tensor in inputs.items() if name != "ids_TK"]
            out_TH = fused_experts(**inputs)
            return [out_TH.detach(), *torch.autograd.grad(out_TH.sum(), leaves)]

        for first, second in zip(run(), run(), strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=0)

    def test_backward_twice(self):
        inputs = random_inputs(4, 16, 16, 2, 1)
        leaf = inputs["x_TH"].requires_grad_()
        out = fused_experts(**inputs).sum()
        (first,) = torch.autograd.grad(out, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(out, leaf)
        torch.testing.assert_close(first, second, rtol=0, atol=0)


class TestSave:
    def test_x_alone_gives_the_same_gradients(self):
        assert_equals_float64(random_inputs(9, 32, 48, 3, 2), 1e-6, save="x")

    def test_fp8_gives_nearly_the_same(self):
        # e4m3 has three bits of mantissa, and the interpreter rounds 7.9995 to 4 (no carry): a GPU does better
        assert_equals_float64(random_inputs(9, 32, 160, 3, 2), 0.12, save="fp8-pre")

    def test_fp8_holds_four_bits_at_any_scale(self):
        """Values of e4m3's own grid come back exactly, whatever the scale of their row."""
        generator = torch.Generator().manual_seed(0)
        mantissas_RC = torch.randint(8, 16, (40, 300), generator=generator) * 2.0 ** torch.randint(-4, 1, (40, 300))
        signs_RC = torch.randint(0, 2, (40, 300), generator=generator) * 2 - 1
        x_RC = (mantissas_RC * signs_RC * 2.0 ** torch.arange(-60, 60, 3)[:, None]).to(DEVICE)
        x_RC[7, 128:256] = 0
        values_RC, exponents_RG = launch.to_fp8(x_RC)
        assert (values_RC.dtype, exponents_RG.dtype) == (torch.float8_e4m3fn, torch.int8)
        assert exponents_RG.shape == (40, 3)
        torch.testing.assert_close(launch.from_fp8(values_RC, exponents_RG, torch.float32), x_RC, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("implementation", "most_KiB"), [("jai_fused", 151), ("jai_fused_fp8", 82), ("jai_fused_x", 11)]
    )
    def test_bytes_kept_for_backward_at_the_size_of_jai_1(self, implementation, most_KiB):
        """Counted on fake tensors: 16,384 tokens, bf16; the matrices, which live anyway, do not count."""
        assert kept_bytes_per_token(implementation) / 1024 <= most_KiB
        if implementation == "jai_fused":
            assert kept_bytes_per_token("grouped_mm") / 1024 > 300

    def test_checkpointing_does_not_run_the_down_projection_again(self, monkeypatch):
        runs: list[str] = []
        product = launch.rows_by_expert
        monkeypatch.setattr(
            launch, "rows_by_expert", lambda kernel, *a, **k: (runs.append(kernel), product(kernel, *a, **k))[1]
        )
        inputs = random_inputs(4, 16, 16, 2, 2)
        leaves = [tensor.requires_grad_() for name, tensor in inputs.items() if name != "ids_TK"]
        expected = torch.autograd.grad(fused_experts(**inputs).sum(), leaves)
        runs.clear()
        out_TH = checkpoint(lambda: inputs["x_TH"] + fused_experts(**inputs), use_reentrant=False)
        assert runs == ["down"]
        gradients = torch.autograd.grad(out_TH.sum() - inputs["x_TH"].sum(), leaves)
        assert runs == ["down", "down_gradient", "up_gradient"]
        for gradient, same in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, same)

    def test_reentrant_checkpointing(self):
        inputs = random_inputs(4, 16, 16, 2, 2)
        leaf = inputs["x_TH"].requires_grad_()
        (expected,) = torch.autograd.grad(fused_experts(**inputs).sum(), leaf)
        checkpoint(lambda x_TH: fused_experts(**{**inputs, "x_TH": x_TH}), leaf, use_reentrant=True).sum().backward()
        torch.testing.assert_close(leaf.grad, expected)


def kept_bytes_per_token(implementation: str, tokens: int = 16384) -> float:
    with FakeTensorMode(), torch.device("cpu"):
        config = MixtralConfig(hidden_size=5120, intermediate_size=17920, num_local_experts=4, num_experts_per_tok=2)
        config._experts_implementation = implementation
        torch.set_default_dtype(torch.bfloat16)
        try:
            experts = MixtralExperts(config)
        finally:
            torch.set_default_dtype(torch.float32)
        matrices = {parameter.untyped_storage()._cdata for parameter in experts.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in matrices:
                kept[storage._cdata] = storage.nbytes()
                storages.append(storage)
            return tensor

        storages: list[torch.UntypedStorage] = []  # alive, so that no two have the same address
        x_TH = torch.empty(tokens, 5120, dtype=torch.bfloat16, requires_grad=True)
        ids_TK = torch.empty(tokens, 2, dtype=torch.int64)
        weights_TK = torch.empty(tokens, 2, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            experts(x_TH, ids_TK, weights_TK)
    return sum(kept.values()) / tokens


def random_lora(inputs: dict[str, torch.Tensor], up_rank: int, down_rank: int) -> ExpertsLora:
    (experts, double, hidden), dtype = inputs["gate_up_EFH"].shape, inputs["x_TH"].dtype
    generator = torch.Generator().manual_seed(7)
    shapes = (experts, up_rank, hidden), (experts, double, up_rank), (experts, down_rank, double // 2)
    factors = (torch.randn(shape, generator=generator) * 0.3 for shape in (*shapes, (experts, hidden, down_rank)))
    return ExpertsLora(*(factor.to(DEVICE, dtype).requires_grad_() for factor in factors), 0.5, 2.0)


class TestLora:
    @pytest.mark.parametrize(("up_rank", "down_rank"), [(4, 8), (5, 0), (0, 3)])
    def test_gradients(self, up_rank, down_rank):
        inputs = random_inputs(7, 37, 53, 3, 2)
        lora = random_lora(inputs, up_rank, down_rank)
        exact = {name: tensor.double() if name != "ids_TK" else tensor for name, tensor in inputs.items()}
        exact_lora = ExpertsLora(*(factor.detach().double().requires_grad_() for factor in lora[:4]), *lora[4:])
        leaves = [inputs["x_TH"].requires_grad_(), inputs["weights_TK"].requires_grad_(), *lora[:4]]
        exact_leaves = [exact["x_TH"].requires_grad_(), exact["weights_TK"].requires_grad_(), *exact_lora[:4]]
        out_TH, expected_TH = fused_experts(**inputs, lora=lora), fused_experts_reference(**exact, lora=exact_lora)
        assert relative_error(out_TH, expected_TH) < 1e-6
        dout_TH = torch.randn_like(out_TH)
        out_TH.backward(dout_TH)
        expected_TH.backward(dout_TH.double())
        for leaf, exact_leaf in zip(leaves, exact_leaves, strict=True):
            if leaf.numel():
                assert relative_error(leaf.grad, exact_leaf.grad) < 1e-6

    def test_no_tensor_of_the_size_of_the_matrices(self, monkeypatch):
        """Neither a merged matrix nor its gradient. Operators hide what they make from a dispatch mode, so each way in
        which they take memory is watched, and a trained matrix shows that the watch sees them."""
        inputs = random_inputs(2, 192, 96, 2, 1)  # larger matrices than 64 padded rows an expert
        lora = random_lora(inputs, 2, 2)
        made: list[int] = []

        def watched(function):
            def take(*args, **kwargs):
                made.append((tensor := function(*args, **kwargs)).numel())
                return tensor

            return take

        for owner, name in (
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_zeros"),
            (torch.Tensor, "__matmul__"),
            (torch, "empty"),
            (torch, "zeros"),
            (torch, "empty_like"),
            (torch, "zeros_like"),
            (torch, "baddbmm"),
        ):
            monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
        smallest = inputs["down_EHI"].numel()
        fused_experts(**inputs, lora=lora).sum().backward()
        assert 0 < max(made) < smallest
        made.clear()
        inputs["down_EHI"].requires_grad_()
        fused_experts(**inputs, lora=lora).sum().backward()
        assert max(made) >= smallest

    def test_peft(self):
        """`target_parameters` on a JAI-like model: the same output and gradients as PEFT's merged matrices."""
        model = get_peft_model(
            mixtral(),
            LoraConfig(
                r=4,
                target_modules=[],
                target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                init_lora_weights=False,
            ),
        )
        ids = torch.tensor([[1, 2, 3, 4]], device=DEVICE)
        results = []
        for implementation in ("eager", "jai_fused"):
            model.base_model.model.set_experts_implementation(implementation)
            model.zero_grad()
            output = model(input_ids=ids, labels=ids)
            output.loss.backward()
            results.append(
                (output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
            )
        (logits, gradients), (fused_logits, fused_gradients) = results
        torch.testing.assert_close(fused_logits, logits, rtol=1e-5, atol=1e-5)
        assert len(gradients) == 8
        for name, gradient in gradients.items():
            torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    def test_peft_factors_are_seen(self, monkeypatch):
        """PEFT's private parametrisation is read by three attributes: should they go, this says so."""
        targets = ["mlp.experts.down_proj"]
        model = get_peft_model(mixtral(), LoraConfig(r=4, target_modules=[], target_parameters=targets))
        model.base_model.model.set_experts_implementation("jai_fused")
        seen = []
        compute = register.fused_experts
        monkeypatch.setattr(register, "fused_experts", lambda *a, **k: (seen.append(k["lora"]), compute(*a, **k))[1])
        ids = torch.tensor([[1, 2]], device=DEVICE)
        model(input_ids=ids)
        assert [lora.down_a_ERI.shape[1] for lora in seen] == [4, 4]
        assert {lora.gate_up_a_ERH.shape[1] for lora in seen} == {0}
        with model.disable_adapter():
            model(input_ids=ids)
        assert seen[2:] == [None, None]

    def test_bad_factors_are_one_message(self):
        inputs = random_inputs(4, 16, 16, 2, 2)
        lora = random_lora(inputs, 4, 4)
        with pytest.raises(ValueError, match=r"LoRA's factors do not fit: expected .*; given"):
            fused_experts(**inputs, lora=lora._replace(down_a_ERI=lora.down_a_ERI[:, :2]))
        with pytest.raises(ValueError, match=r"LoRA's factors must be torch\.float32 on"):
            fused_experts(**inputs, lora=lora._replace(down_a_ERI=lora.down_a_ERI.double()))


class TestOperators:
    def test_opcheck(self):
        inputs = random_inputs(4, 16, 16, 2, 2)
        operators = torch.ops.jai_kernels_experts
        lora = random_lora(inputs, 2, 3)
        factors, scales = [factor.detach() for factor in lora[:4]], list(lora[4:])
        up = (inputs["x_TH"], inputs["gate_up_EFH"], inputs["ids_TK"], True, factors, scales, [])
        act_RI, pre_RF, *routing = operators.experts_up(*up)
        down = (act_RI, inputs["down_EHI"], inputs["weights_TK"], *routing, factors, scales, [])
        torch.library.opcheck(operators.experts_up, up, test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(operators.experts_down, down, test_utils=("test_schema", "test_faketensor"))
        backward = (torch.randn_like(inputs["x_TH"]), inputs["x_TH"], inputs["gate_up_EFH"], inputs["down_EHI"])
        backward += (
            inputs["weights_TK"],
            pre_RF,
            *routing,
            factors,
            scales,
            [],
            [True, False, True, True, *[True] * 4],
        )
        torch.library.opcheck(operators.experts_backward, backward, test_utils=("test_schema", "test_faketensor"))
        fp8 = operators.experts_to_fp8(pre_RF)
        torch.library.opcheck(operators.experts_to_fp8, (pre_RF,), test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(operators.experts_from_fp8, (*fp8, torch.float32), test_utils="test_faketensor")

    def test_compiled_without_a_break(self):
        inputs = random_inputs(4, 16, 16, 2, 2)
        leaves = [tensor.requires_grad_() for name, tensor in inputs.items() if name != "ids_TK"]
        expected = fused_experts(**inputs)
        compiled = torch.compile(fused_experts, backend="aot_eager", fullgraph=True)(**inputs)
        torch.testing.assert_close(compiled, expected)
        for ours, same in zip(
            torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(ours, same)

    def test_nothing_asks_the_device(self):
        """A CUDA graph can hold neither a value that is read nor a shape that depends on one."""
        asking = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select}

        class NoQuestions(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                assert function.overloadpacket not in asking, f"{function} waits for the device"
                return function(*args, **(kwargs or {}))

        inputs = random_inputs(4, 16, 16, 2, 2)
        x_TH, gate_up_EFH, down_EHI, ids_TK, weights_TK = inputs.values()
        with NoQuestions():
            routing = launch.route(ids_TK, 2)
            act_RI, pre_RF = launch.up(launch.permute(x_TH, routing), gate_up_EFH, routing, True)
            y_RH = launch.rows_by_expert("down", act_RI, down_EHI, routing.offsets_E, 8, True)
            launch.combine(y_RH, routing.slots_TK, weights_TK)
            dout_PH = launch.permute(x_TH, routing, padded=True)
            dact_PI = launch.rows_by_expert("down_gradient", dout_PH, down_EHI, routing.padded_offsets_E, 8, False)
            dpre_PF, act_PI, _ = launch.swiglu_backward(dact_PI, pre_RF, weights_TK, routing)
            launch.weight_gradient(dout_PH, act_PI, routing)
            launch.rows_by_expert("up_gradient", dpre_PF, gate_up_EFH, routing.padded_offsets_E, 8, False)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"save": "y"}, "`save` is 'y'; expected one of 'x\\+pre', 'x', 'fp8-pre'"),
            ({"x_TH": torch.zeros(4, 15)}, "Shapes do not fit: expected x \\(T, H\\).*given x \\(4, 15\\)"),
            ({"down_EHI": torch.zeros(2, 16, 15)}, "Shapes do not fit"),
            ({"weights_TK": torch.zeros(4, 1)}, "Shapes do not fit"),
            ({"x_TH": torch.zeros(4, 16, dtype=torch.float64)}, "must share one of bfloat16, float16 and float32"),
            ({"ids_TK": torch.zeros(4, 2)}, "ids must be int32 or int64"),
            ({"weights_TK": torch.zeros(4, 2, device="meta")}, "must be on one device"),
        ],
    )
    def test_one_message_says_what_was_given(self, change, message):
        with pytest.raises(ValueError, match=message):
            fused_experts(**{**random_inputs(4, 16, 16, 2, 2), **change})


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mixtral(**changes) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=4, **changes)).to(DEVICE)


def qwen3_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, head_dim=8)
    return Qwen3MoeForCausalLM(config).to(DEVICE)


class TestTransformers:
    @pytest.mark.parametrize("family", ["jai", "mixtral", "qwen3_moe"])
    def test_a_model_computes_the_same(self, family, tiny_config):
        torch.manual_seed(0)
        jai = tiny_config(block_repeats=[1, 2])  # a skip, in few layers
        model = {"jai": lambda: JaiForCausalLM(jai).to(DEVICE), "mixtral": mixtral, "qwen3_moe": qwen3_moe}[family]()
        ids = torch.randint(0, 64, (2, 5), device=DEVICE)
        results = []
        for implementation in ("eager", "jai_fused"):
            model.set_experts_implementation(implementation)
            model.zero_grad()
            output = model(input_ids=ids, labels=ids)
            output.loss.backward()
            results.append((output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
        (logits, gradients), (fused_logits, fused_gradients) = results
        torch.testing.assert_close(fused_logits, logits, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    def test_generate(self):
        model = mixtral()
        ids = torch.randint(0, 64, (1, 4), device=DEVICE)
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        model.set_experts_implementation("jai_fused")
        assert model.generate(ids, max_new_tokens=4, do_sample=False).tolist() == expected.tolist()
        assert model.config._experts_implementation == "jai_fused"

    def test_autocast_computes_in_its_dtype(self, monkeypatch):
        model = mixtral()
        model.set_experts_implementation("jai_fused")
        seen = []
        compute = register.fused_experts
        monkeypatch.setattr(register, "fused_experts", lambda *a, **k: (seen.append(a[0].dtype), compute(*a, **k))[1])
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = model(
                input_ids=torch.tensor([[1, 2, 3]], device=DEVICE), labels=torch.tensor([[1, 2, 3]], device=DEVICE)
            ).loss
        loss.backward()
        assert set(seen) == {torch.float16}
        assert model.model.layers[0].mlp.experts.down_proj.grad.dtype == torch.float32

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (lambda: mixtral(hidden_act="gelu"), "MixtralExperts has another activation than SwiGLU's silu"),
            (
                lambda: GptOssForCausalLM(
                    GptOssConfig(**SIZES, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
                ).to(DEVICE),
                "GptOssExperts has biases",
            ),
        ],
    )
    def test_falls_back_and_says_why_once(self, model, reason, caplog, monkeypatch):
        monkeypatch.setattr(register, "_warned", set())
        model = model()
        ids = torch.tensor([[1, 2, 3]], device=DEVICE)
        model.set_experts_implementation("grouped_mm")
        expected = model(ids).logits
        model.set_experts_implementation("jai_fused")
        with caplog.at_level(logging.WARNING, logger="jai.kernels.register"):
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
        assert [reason in record.getMessage() for record in caplog.records] == [True]
        assert '"jai_fused" falls back to "grouped_mm"' in caplog.text

    def test_a_gate_of_its_own_is_seen(self):
        """`_apply_gate` is transformers' private name: should it go, this says so."""
        experts = mixtral().model.layers[0].mlp.experts
        assert type(experts)._apply_gate.__module__ == "transformers.integrations.moe"
        assert register.why_not(experts, torch.zeros(1, 32, device=DEVICE)) is None
        changed = type("ClampedExperts", (type(experts),), {"_apply_gate": lambda self, gate_up: gate_up})
        experts.__class__ = changed
        assert "another activation" in register.why_not(experts, torch.zeros(1, 32, device=DEVICE))

    @pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
    def test_without_a_gpu_grouped_mm_computes(self, tmp_path):
        code = (
            "import torch, jai.kernels.register\n"
            "from transformers import MixtralConfig, MixtralForCausalLM\n"
            f"model = MixtralForCausalLM(MixtralConfig(**{SIZES}, intermediate_size=48, num_local_experts=4))\n"
            "ids = torch.tensor([[1, 2, 3]])\n"
            "expected = model(ids).logits\n"
            "model.set_experts_implementation('jai_fused')\n"
            "assert torch.equal(model(ids).logits, expected)\n"
        )
        result = run_clean(code, tmp_path, interpret=False)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count('falls back to "grouped_mm": the hidden states are on cpu') == 1


def run_clean(code: str, folder: Path, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


class TestTiles:
    def test_every_file_serves_every_product_for_any_number_of_rows(self):
        for path in FOLDER.glob("*.json"):
            for product in PRODUCTS:
                entries = read_tiles(path)[product]
                assert entries[-1][0] is None, f"{path.name}: {product} has no entry for many rows"
                limits = [rows for rows, _ in entries[:-1]]
                assert limits == sorted(limits)
                for _, tile in entries:
                    if tile is not None and product == "weight_gradient":
                        assert ALIGNMENT % tile.block_k == 0

    def test_the_file_of_a_gpu(self):
        assert tile_file("NVIDIA H100 80GB HBM3", (9, 0)).stem in ("NVIDIA_H100_80GB_HBM3", "sm_90")
        assert tile_file("NVIDIA A100-SXM4-80GB", (8, 0)).stem in ("NVIDIA_A100-SXM4-80GB", "sm_80")
        assert tile_file("NVIDIA L4", (8, 9)).stem == "other"


class TestHubKernel:
    def test_loads_from_a_folder_without_jai(self, tmp_path):
        pytest.importorskip("kernels", reason="the package `kernels` is not installed")
        out = tmp_path / "kernel"
        command = [sys.executable, "-m", "jai.kernels.hub_package", str(out)]
        written = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert written.returncode == 0, written.stderr
        assert "hf upload" in written.stdout
        code = (
            "import sys\n"
            "from pathlib import Path\n"
            "import torch\n"
            "from kernels import get_local_kernel\n"
            "from transformers import MixtralConfig, MixtralForCausalLM\n"
            f"kernel = get_local_kernel(Path({str(out)!r}))\n"
            "assert not [name for name in sys.modules if name.split('.')[0] == 'jai']\n"
            f"model = MixtralForCausalLM(MixtralConfig(**{SIZES}, intermediate_size=48, num_local_experts=4))\n"
            "ids = torch.tensor([[1, 2, 3]])\n"
            "expected = model(ids).logits\n"
            "model.set_experts_implementation('jai_fused')\n"
            "torch.testing.assert_close(model(ids, labels=ids).logits, expected)\n"
            "model(ids, labels=ids).loss.backward()\n"
            "import jai.kernels.register\n"  # beside the installed package
            "torch.testing.assert_close(model(ids).logits, expected)\n"
            "hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(40, 16)\n"
            "loss = kernel.linear_cross_entropy(hidden, weight, torch.arange(5))\n"
            "torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, torch.arange(5)))\n"
            "loss.backward()\n"
            "assert kernel.linear_log_probs and kernel.use_linear_cross_entropy\n"
        )
        loaded = run_clean(code, tmp_path, interpret=True)
        assert loaded.returncode == 0, loaded.stderr
        again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert again.returncode != 0
        assert "exists already" in again.stderr


def test_the_names_are_registered():
    for name in register.IMPLEMENTATIONS:
        assert name in ALL_EXPERTS_FUNCTIONS
