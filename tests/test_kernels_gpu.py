# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show of the kernels: bf16 at JAI-1's size, offsets past 2³¹, CUDA graphs, Inductor, memcheck.

    pytest tests/test_kernels_gpu.py tests/test_kernels_experts.py tests/test_kernels_cross_entropy.py

Needs about 60 GiB of GPU memory.
"""

import os
import shutil
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from jai.kernels.experts.fused import fused_experts, fused_experts_reference
from jai.kernels.head.loss import linear_cross_entropy, linear_cross_entropy_reference

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCABULARY = 5120, 17920, 4, 2, 64000


@pytest.fixture(autouse=True)
def _empty_device():
    yield
    torch.cuda.empty_cache()


def inputs_of(tokens: int, seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """bf16 inputs at JAI-1's size, drawn on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16) * std

    logits = torch.randn(tokens, EXPERTS, generator=generator, device="cuda")
    weights_TK, ids_TK = logits.softmax(-1).topk(TOP_K)
    return {
        "x_TH": normal(tokens, HIDDEN, std=scale),
        "gate_up_EFH": normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN, std=HIDDEN**-0.5),
        "down_EHI": normal(EXPERTS, HIDDEN, INTERMEDIATE, std=INTERMEDIATE**-0.5),
        "ids_TK": ids_TK,
        "weights_TK": weights_TK / weights_TK.sum(-1, keepdim=True),
    }


def leaves_of(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.requires_grad_() for name, tensor in inputs.items() if name != "ids_TK"]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("tokens", [1, 7, 509])
@pytest.mark.parametrize("save", ["x+pre", "x", "fp8-pre"])
def test_experts_in_bf16_against_float64(tokens, save):
    inputs = inputs_of(tokens)
    exact = {name: tensor.double() if name != "ids_TK" else tensor for name, tensor in inputs.items()}
    dout_TH = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    expected_TH = fused_experts_reference(**exact)
    out_TH = fused_experts(**inputs, save=save)
    assert relative_error(out_TH, expected_TH) < 6e-3
    del expected_TH
    for name in ("x_TH", "gate_up_EFH", "down_EHI", "weights_TK"):  # one at a time: each in float64 is 4 GB and more
        leaf, exact_leaf = inputs[name].requires_grad_(), exact[name].requires_grad_()
        (gradient,) = torch.autograd.grad(fused_experts(**inputs, save=save), leaf, dout_TH)
        (expected,) = torch.autograd.grad(fused_experts_reference(**exact), exact_leaf, dout_TH.double())
        assert relative_error(gradient, expected) < (6e-2 if save == "fp8-pre" else 1e-2), name
        leaf.requires_grad_(False)
        exact_leaf.requires_grad_(False)


def test_offsets_past_two_to_the_31():
    """65,536 tokens: 4.7 billion products before SwiGLU. The tokens of each half must come out as by themselves."""
    inputs = inputs_of(65536)
    x_TH = inputs["x_TH"].requires_grad_()
    out_TH = fused_experts(**inputs)
    (dx_TH,) = torch.autograd.grad(out_TH, x_TH, torch.ones_like(out_TH))
    for half in (slice(0, 32768), slice(32768, None)):
        part = {name: inputs[name][half].detach() for name in ("x_TH", "ids_TK", "weights_TK")}
        leaf = part["x_TH"].requires_grad_()
        out = fused_experts(**{**inputs, **part})
        (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        assert relative_error(out_TH[half], out) < 1e-3
        assert relative_error(dx_TH[half], gradient) < 1e-3


def test_the_same_bits_twice():
    def run() -> list[torch.Tensor]:
        inputs = inputs_of(1024)
        leaves = leaves_of(inputs)
        out_TH = fused_experts(**inputs)
        return [out_TH.detach(), *torch.autograd.grad(out_TH, leaves, torch.ones_like(out_TH))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("tokens", [1, 2048])
def test_cuda_graph(tokens):
    """Forward and backward in one graph, replayed on other tokens that go to other experts."""
    inputs = inputs_of(tokens)
    leaves = leaves_of(inputs)
    dout_TH = torch.ones(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        out_TH = fused_experts(**inputs)
        return out_TH, *torch.autograd.grad(out_TH, leaves, dout_TH)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs are made there
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = inputs_of(tokens, seed=1)
    with torch.no_grad():
        for name in ("x_TH", "ids_TK", "weights_TK"):
            inputs[name].copy_(fresh[name])
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)


def test_compiled_by_inductor():
    inputs = inputs_of(256)
    leaves = leaves_of(inputs)
    expected = fused_experts(**inputs)
    compiled = torch.compile(fused_experts, fullgraph=True)(**inputs)
    assert torch.equal(compiled, expected)
    dout_TH = torch.ones_like(expected)
    for one, other in zip(
        torch.autograd.grad(compiled, leaves, dout_TH), torch.autograd.grad(expected, leaves, dout_TH), strict=True
    ):
        assert torch.equal(one, other)


def test_cross_entropy_in_bf16_against_float64():
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(1031, HIDDEN, generator=generator, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator, device="cuda") * HIDDEN**-0.5).bfloat16()
    weight.requires_grad_()
    labels = torch.randint(0, VOCABULARY, (1031,), generator=generator, device="cuda")
    labels[::7] = -100
    loss = linear_cross_entropy(hidden, weight, labels)
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = linear_cross_entropy_reference(*exact, labels)
    assert relative_error(loss, expected) < 1e-3
    for gradient, other in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, exact), strict=True
    ):
        assert relative_error(gradient, other) < 1e-2


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_memcheck(tmp_path):
    code = (
        "import torch\n"
        "from jai.kernels.experts.fused import fused_experts\n"
        "for tokens, hidden, inner in ((37, 64, 96), (37, 67, 53), (1, 128, 128)):\n"
        "    x, gu, d = (torch.randn(*shape, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "                for shape in ((tokens, hidden), (4, 2 * inner, hidden), (4, hidden, inner)))\n"
        "    weights, ids = torch.rand(tokens, 4, device='cuda').topk(2)\n"
        "    fused_experts(x, gu, d, ids, weights).sum().backward()\n"
        "torch.cuda.synchronize()\n"
    )
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    # Each tensor in an allocation of its own: within PyTorch's large ones memcheck sees no access past a tensor's end.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
