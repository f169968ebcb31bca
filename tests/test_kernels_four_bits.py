# SPDX-License-Identifier: Apache-2.0
"""The fused experts on matrices in four bits, in Triton's interpreter, against the same matrices dequantised."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type

pytest.importorskip("triton")

from test_kernels_experts import DEVICE, random_inputs, random_lora, relative_error

from jai.kernels.experts import launch, tiles
from jai.kernels.experts.four_bits import FourBits, Packed, dequantize_reference
from jai.kernels.experts.fused import ExpertsLora, fused_experts, fused_experts_reference
from jai.quantization_jai import Matrices4bit, quantize_matrices

CODES = {kind: get_4bit_type(kind, device="cpu") for kind in ("nf4", "fp4")}


def scales_of(matrices: Matrices4bit) -> list[torch.Tensor]:
    return [part for part in matrices[1:5] if part is not None]


def packed_inputs(
    tokens: int, hidden: int = 64, intermediate: int = 128, experts: int = 3, double=False, kind="nf4"
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments for `fused_experts`, and the same with the matrices dequantised."""
    inputs = random_inputs(tokens, hidden, intermediate, experts, 2)
    gate_up, down = (
        quantize_matrices(inputs[name].cpu().float(), kind, double) for name in ("gate_up_EFH", "down_EHI")
    )
    whole = {
        **inputs,
        "gate_up_EFH": gate_up.dequantize(torch.float32).to(DEVICE),
        "down_EHI": down.dequantize(torch.float32).to(DEVICE),
    }
    scales = [[part.to(DEVICE) for part in scales_of(matrices)] for matrices in (gate_up, down)]
    four_bits = FourBits(CODES[kind].to(DEVICE), *scales)
    packed = {"gate_up_EFH": gate_up.packed.to(DEVICE), "down_EHI": down.packed.to(DEVICE)}
    return {**inputs, **packed, "four_bits": four_bits}, whole


def assert_same(packed: dict, whole: dict[str, torch.Tensor], lora: ExpertsLora | None = None, **options) -> None:
    """Output and the gradients of x, of the router's weights and of LoRA, against the reference in float64."""
    leaves = [packed[name].detach().requires_grad_() for name in ("x_TH", "weights_TK")]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_lora = None
    if lora is not None:
        exact_lora = ExpertsLora(*(factor.detach().double().requires_grad_() for factor in lora[:4]), *lora[4:])
        leaves, exact = [*leaves, *lora[:4]], [*exact, *exact_lora[:4]]
    out_TH = fused_experts(**{**packed, "x_TH": leaves[0], "weights_TK": leaves[1]}, lora=lora, **options)
    expected_TH = fused_experts_reference(
        exact[0],
        whole["gate_up_EFH"].double(),
        whole["down_EHI"].double(),
        packed["ids_TK"],
        exact[1],
        lora=exact_lora,
    )
    dout_TH = torch.randn(out_TH.shape, generator=torch.Generator().manual_seed(1)).to(out_TH)
    used = [place for place, leaf in enumerate(leaves) if leaf.numel()]
    gradients = torch.autograd.grad(out_TH, [leaves[place] for place in used], dout_TH)
    expected = torch.autograd.grad(expected_TH, [exact[place] for place in used], dout_TH.double())
    assert relative_error(out_TH, expected_TH) < 2e-6
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert relative_error(gradient, expected_gradient) < 2e-6


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "experts"),
    [
        (1, 64, 128, 3),
        pytest.param(8, 64, 64, 4, marks=pytest.mark.slow),
        pytest.param(5, 192, 64, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_computes_what_the_dequantised_matrices_do(tokens, hidden, intermediate, experts, double):
    assert_same(*packed_inputs(tokens, hidden, intermediate, experts, double))


@pytest.mark.parametrize("double", [pytest.param(False, marks=pytest.mark.slow), True], ids=["single", "double"])
@pytest.mark.parametrize("tokens", [1, *(pytest.param(each, marks=pytest.mark.slow) for each in range(2, 9))])
def test_the_tiles_of_a_gpu_decode_one_to_eight_tokens(tokens, double, monkeypatch):
    """In the interpreter, whose own tile is a square of one block of scales."""
    chosen = []

    def of_a_gpu(device: torch.device, rows: int, transposed: bool) -> tiles.Tile:
        chosen.append(tiles.four_bit_tile(torch.device("cuda"), rows, transposed))
        return chosen[-1]

    monkeypatch.setattr(launch, "four_bit_tile", of_a_gpu)
    assert_same(*packed_inputs(tokens, 128, 64, 2 if tokens == 1 else 3, double))
    # All rows of an expert are in one tile, so that its matrix is read once; the backward pass has another.
    assert [tile.block_m >= 2 * tokens and tile == tiles.FOUR_BIT_DECODING_TILE for tile in chosen[:2]] == [True, True]
    assert set(chosen[2:]) == {tiles.FOUR_BIT_TILE}


def test_more_rows_have_the_larger_tile():
    for rows, expected in ((16, tiles.FOUR_BIT_DECODING_TILE), (17, tiles.FOUR_BIT_TILE)):
        assert tiles.four_bit_tile(torch.device("cuda"), rows, transposed=True) == expected


@pytest.mark.parametrize(
    ("save", "up_rank", "down_rank"),
    [("x+pre", 2, 3), pytest.param("x", 0, 3, marks=pytest.mark.slow), pytest.param("x", 2, 0, marks=pytest.mark.slow)],
)
def test_lora_beside_them(save, up_rank, down_rank):
    packed, whole = packed_inputs(3, 64, 64, 2, double=True, kind="fp4")
    assert_same(packed, whole, random_lora(whole, up_rank, down_rank), save=save)


def test_many_scales_of_scales():
    """More than 256 blocks an expert, and a number that is no multiple of 256: 128 * 192 / 64 = 384."""
    packed, whole = packed_inputs(6, 192, 64, 2, double=True)
    assert packed["four_bits"].gate_up_scales[1].shape == (2, 2)
    assert_same(packed, whole)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_the_plain_reference_dequantises_as_bitsandbytes_does(kind, double):
    weights = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(0))
    matrices = quantize_matrices(weights, kind, double)
    packed = Packed(matrices.packed, scales_of(matrices), CODES[kind])
    assert torch.equal(dequantize_reference(packed, 64, torch.float32), matrices.dequantize(torch.float32))


def test_nothing_of_a_matrix_is_kept_or_made():
    packed, _ = packed_inputs(2)
    packed["x_TH"].requires_grad_()
    own = {tensor.untyped_storage().data_ptr() for tensor in (packed["gate_up_EFH"], packed["down_EHI"])}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused_experts(**packed).sum().backward()
    scales = 3 * 256 * 64 // 64 * 4
    assert max(kept) <= max(scales, 4 * 256 * 4)  # all scales, or gate and up of four rows
    assert max(kept) < 3 * 256 * 64 // 2


def test_the_same_in_a_compiled_graph():
    packed, _ = packed_inputs(1, 64, 64, 2, double=True)

    def compute(x_TH):
        return fused_experts(**{**packed, "x_TH": x_TH}).square().sum()

    results = []
    for function in (compute, torch.compile(compute, fullgraph=True, backend="aot_eager")):
        x_TH = packed["x_TH"].detach().clone().requires_grad_()
        function(x_TH).backward()
        results.append(x_TH.grad)
    torch.testing.assert_close(*results)
    torch.compiler.reset()


def test_no_tokens():
    packed, _ = packed_inputs(1)
    packed |= {name: packed[name][:0] for name in ("x_TH", "ids_TK", "weights_TK")}
    packed["x_TH"].requires_grad_()
    out_TH = fused_experts(**packed)
    out_TH.sum().backward()
    assert out_TH.shape == (0, 64)


def test_what_does_not_fit_is_refused():
    packed, whole = packed_inputs(4, double=True)
    code, up_scales, down_scales = packed["four_bits"]
    for changed, message in (
        ({"gate_up_EFH": packed["gate_up_EFH"][:, :-1]}, "Shapes do not fit"),
        ({"gate_up_EFH": whole["gate_up_EFH"], "down_EHI": whole["down_EHI"]}, "packed bytes in uint8"),
        ({"down_EHI": packed["down_EHI"][:2]}, "Shapes do not fit"),
        ({"four_bits": FourBits(code, up_scales[:1], down_scales)}, "scales of gate_up do not fit"),
        ({"four_bits": FourBits(code, up_scales, [part[:2] for part in down_scales])}, "scales of down do not fit"),
        ({"four_bits": FourBits(code.half(), up_scales, down_scales)}, "The code must be"),
        ({"four_bits": None}, "Shapes do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_experts(**{**packed, **changed})
