# SPDX-License-Identifier: Apache-2.0
"""A mixture of SwiGLU experts, forward and backward, on Triton kernels: `fused_experts`.

For one token, with its K chosen experts e_k and their weights w_k (JAI-1's report, section 3.1.3; Mixtral):

    out = sum over k of  w_k * down[e_k] @ ( silu(gate[e_k] @ x) * (up[e_k] @ x) )

Kept for the backward pass are x and the products before SwiGLU (`pre`), about 150 KiB a token at JAI-1's size, where
transformers' `grouped_mm` keeps 320; `save` trades more of it for time.

**Two autograd Functions.** Non-reentrant activation checkpointing stops recomputing once it has what was saved. So the
up-projection's Function saves everything, and the down-projection's, which comes after it, saves nothing: it hands the
gradient that it gets to the first one, which does the work of both. Recomputation then never runs the down-projection.

Shape suffixes: T tokens, H hidden_size, I intermediate_size, F = 2 * I, E experts, K experts of a token; others as in
`routing.py`.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .four_bits import NESTED, SCALED, FourBits, Packed
from .routing import FP8_GROUP, Routing

Save = Literal["x+pre", "x", "fp8-pre"]

# Two copies of these files in one process (the installed package, a Hub kernel) must not register the same operators.
NAMESPACE = re.sub(r"\W", "_", __package__ or "kernels")


class ExpertsLora(NamedTuple):
    """LoRA of the experts: a matrix becomes `W[e] + scale * b[e] @ a[e]`. A matrix without has factors of rank 0.

    Attributes:
        gate_up_a_ERH, gate_up_b_EFR: `(E, rank, H)` and `(E, 2 * I, rank)`.
        down_a_ERI, down_b_EHR: `(E, rank, I)` and `(E, H, rank)`; the rank may be another.
        gate_up_scale, down_scale: usually alpha / rank.
    """

    gate_up_a_ERH: torch.Tensor
    gate_up_b_EFR: torch.Tensor
    down_a_ERI: torch.Tensor
    down_b_EHR: torch.Tensor
    gate_up_scale: float
    down_scale: float


def fused_experts_reference(
    x_TH: torch.Tensor,
    gate_up_EFH: torch.Tensor,
    down_EHI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    lora: ExpertsLora | None = None,
) -> torch.Tensor:
    """`fused_experts` in plain operations, in the dtype of `x_TH` (float64 too), differentiable."""
    if lora is not None:
        gate_up_EFH = gate_up_EFH + lora.gate_up_scale * lora.gate_up_b_EFR @ lora.gate_up_a_ERH
        down_EHI = down_EHI + lora.down_scale * lora.down_b_EHR @ lora.down_a_ERI
    out_TH = torch.zeros_like(x_TH)
    for expert in range(gate_up_EFH.shape[0]):
        token, choice = torch.where(ids_TK == expert)
        gate, up = functional.linear(x_TH[token], gate_up_EFH[expert]).chunk(2, dim=-1)
        y = functional.linear(functional.silu(gate) * up, down_EHI[expert])
        out_TH = out_TH.index_add(0, token, y * weights_TK[token, choice, None].to(y.dtype))
    return out_TH


def fused_experts(
    x_TH: torch.Tensor,
    gate_up_EFH: torch.Tensor,
    down_EHI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    save: Save = "x+pre",
    lora: ExpertsLora | None = None,
    four_bits: FourBits | None = None,
) -> torch.Tensor:
    """The experts' weighted sum for every token, differentiable in `x`, the matrices, the router's weights and LoRA.

    Nothing asks the device for a value, so it can be captured in a CUDA graph; results are deterministic.

    Args:
        x_TH: tokens `(T, H)`; bf16, fp16 or fp32.
        gate_up_EFH: the experts' gate rows, then up rows `(E, 2 * I, H)`, in the dtype of `x_TH`; copied where it is
            not contiguous.
        down_EHI: `(E, H, I)`, likewise.
        ids_TK: the chosen experts `(T, K)`, int32 or int64, each expert at most once a token. Ids from E on are experts
            of other ranks and add nothing; negative ids are not allowed, and not checked.
        weights_TK: their weights `(T, K)`, any floating dtype.
        save: what is kept for the backward pass: `"x+pre"`; `"x"`, which runs the up-projection once more;
            `"fp8-pre"`, `pre` in 8 bits (e4m3, a power-of-two scale for every 128 values), about 81 KiB a token.
        lora: adapters in the dtype of `x_TH`. No merged matrix is made, and where the matrices are frozen no gradient
            of their size.
        four_bits: the matrices are in four bits: `gate_up` and `down` are their packed bytes, `(E, I * H)` and
            `(E, H * I / 2)` in uint8, and this is what they need beside. They are dequantised a tile at a time, in the
            backward pass again, and get no gradient.

    Returns:
        `(T, H)` in the dtype of `x_TH`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, and for an unknown `save`.
    """
    shape = _shape(x_TH, gate_up_EFH, down_EHI, four_bits)
    _check(x_TH, gate_up_EFH, down_EHI, ids_TK, weights_TK, save, lora, four_bits, shape)
    packing = [] if four_bits is None else [four_bits.code, *four_bits.gate_up_scales, *four_bits.down_scales]
    factors: Sequence[torch.Tensor] = () if lora is None else lora[:4]
    scales = [] if lora is None else list(lora[4:])
    differentiable = (x_TH, gate_up_EFH, down_EHI, weights_TK, *factors)
    if x_TH.shape[0] == 0:
        nothing = sum((tensor.sum() for tensor in differentiable), start=x_TH.new_zeros(()))
        return x_TH + 0 * nothing.to(x_TH.dtype)
    ids_TK, differentiable = ids_TK.contiguous(), tuple(tensor.contiguous() for tensor in differentiable)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)):
        x_TH, gate_up_EFH, down_EHI, weights_TK, *factors = differentiable
        act_RI, _, *routing = _ops.up(x_TH, gate_up_EFH, ids_TK, False, factors, scales, packing)
        return _ops.down(act_RI, down_EHI, weights_TK, *routing, factors, scales, packing)
    if torch.compiler.is_compiling():  # the compiler decides by itself what to recompute, and sees the operators
        return _Experts.apply(ids_TK, save, scales, packing, *differentiable)
    channel = _Channel()
    act_RI = _Up.apply(ids_TK, save, scales, packing, channel, *differentiable)
    return _Down.apply(act_RI, channel, scales, packing, *(tensor.detach() for tensor in differentiable[2:]))


def _shape(
    x_TH: torch.Tensor, gate_up_EFH: torch.Tensor, down_EHI: torch.Tensor, four_bits: FourBits | None
) -> tuple[torch.Size, torch.Size]:
    """The shapes of both matrices; those of packed bytes as they are unpacked, if the sizes allow."""
    if four_bits is None:
        return gate_up_EFH.shape, down_EHI.shape
    hidden = x_TH.shape[-1]
    shapes = []
    for packed, columns in ((gate_up_EFH, hidden), (down_EHI, None)):
        if packed.ndim != 2 or columns == 0:
            return gate_up_EFH.shape, down_EHI.shape
        numbers = packed.shape[1] * 2
        columns = numbers // hidden if columns is None else columns
        rows, rest = divmod(numbers, max(columns, 1))
        shapes.append(packed.shape if rest else torch.Size((packed.shape[0], rows, columns)))
    return shapes[0], shapes[1]


def _unpacked_width(gate_up: torch.Tensor, hidden: int) -> int:
    """Rows of a matrix of `hidden` columns, in full or packed."""
    return gate_up.shape[1] if gate_up.ndim == 3 else gate_up.shape[1] * 2 // hidden


def _operands(
    gate_up: torch.Tensor, down: torch.Tensor, packing: list[torch.Tensor]
) -> tuple[torch.Tensor | Packed, torch.Tensor | Packed]:
    """Both matrices as `launch` takes them; `packing` is empty, or the code and what each of them has of scales."""
    if not packing:
        return gate_up, down
    code, *scales = packing
    half = len(scales) // 2
    return Packed(gate_up, scales[:half], code), Packed(down, scales[half:], code)


def _check(x_TH, gate_up_EFH, down_EHI, ids_TK, weights_TK, save, lora, four_bits, shape) -> None:
    if save not in get_args(Save):
        raise ValueError(f"`save` is {save!r}; expected one of {', '.join(map(repr, get_args(Save)))}.")
    tensors = {"x": x_TH, "gate_up": gate_up_EFH, "down": down_EHI, "ids": ids_TK, "weights": weights_TK}
    gate_up_shape, down_shape = shape
    shaped = (x_TH.ndim, len(gate_up_shape), len(down_shape), ids_TK.ndim, weights_TK.ndim) == (2, 3, 3, 2, 2)
    if shaped:
        (tokens, hidden), (num_experts, double, columns) = x_TH.shape, gate_up_shape
        shaped = (
            columns == hidden
            and tuple(down_shape) == (num_experts, hidden, double // 2)
            and double % 2 == 0
            and ids_TK.shape == weights_TK.shape
            and ids_TK.shape[0] == tokens
        )
    if not shaped:
        raise ValueError(
            "Shapes do not fit: expected x (T, H), gate_up (E, 2 * I, H), down (E, H, I), ids (T, K) and weights "
            f"(T, K); given {_described(tensors)}."
        )
    if lora is not None:
        num_experts, double, hidden = gate_up_shape
        up_rank, down_rank = (factor.shape[1] for factor in (lora.gate_up_a_ERH, lora.down_a_ERI))
        expected = (
            (num_experts, up_rank, hidden),
            (num_experts, double, up_rank),
            (num_experts, down_rank, double // 2),
            (num_experts, hidden, down_rank),
        )
        if tuple(tuple(factor.shape) for factor in lora[:4]) != expected:
            shapes = ", ".join(str(tuple(factor.shape)) for factor in lora[:4])
            raise ValueError(f"LoRA's factors do not fit: expected {', '.join(map(str, expected))}; given {shapes}.")
        if any(factor.dtype != x_TH.dtype or factor.device != x_TH.device for factor in lora[:4]):
            raise ValueError(f"LoRA's factors must be {x_TH.dtype} on {x_TH.device}, as x is.")
    if four_bits is not None:
        _check_four_bits(tensors, four_bits, shape)
    expected_dtype = x_TH.dtype if four_bits is None else torch.uint8
    same_dtype = expected_dtype == gate_up_EFH.dtype == down_EHI.dtype
    if not same_dtype or x_TH.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            "x, gate_up and down must share one of bfloat16, float16 and float32, or the matrices be packed bytes in "
            f"uint8; given {_described(tensors)}."
        )
    if ids_TK.dtype not in (torch.int32, torch.int64) or not weights_TK.is_floating_point():
        raise ValueError(f"ids must be int32 or int64 and weights floating point; given {_described(tensors)}.")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        raise ValueError(f"All tensors must be on one device; given {_described(tensors)}.")


def _check_four_bits(tensors: dict[str, torch.Tensor], four_bits: FourBits, shape) -> None:
    for name, (num_experts, rows, columns), scales in zip(
        ("gate_up", "down"), shape, (four_bits.gate_up_scales, four_bits.down_scales), strict=True
    ):
        blocks = rows * columns // SCALED
        expected = [(num_experts, blocks), (num_experts, -(-blocks // NESTED)), (num_experts,), (256,)]
        given = [tuple(part.shape) for part in scales]
        dtypes = [part.dtype for part in scales]
        plain = given == expected[:1] and dtypes == [torch.float32]
        nested = given == expected and dtypes == [torch.uint8, *[torch.float32] * 3]
        if columns % SCALED or not (plain or nested):
            raise ValueError(
                f"The scales of {name} do not fit: expected {expected[0]} in float32, or with double quantisation "
                f"{expected}, the first in uint8, and columns that are a multiple of {SCALED}; given {given} in "
                f"{dtypes} for {columns} columns."
            )
        tensors[f"scales of {name}"] = scales[0]
    if four_bits.code.shape != (16,) or four_bits.code.dtype != torch.float32:
        raise ValueError(f"The code must be (16,) in float32; given {_described({'code': four_bits.code})}.")
    tensors["code"] = four_bits.code


def _described(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(t.shape)} {t.dtype} on {t.device}" for name, t in tensors.items())


@dataclass(slots=True)
class _Channel:
    """Carries the output's gradient from the second Function's backward to the first one's."""

    dout_TH: torch.Tensor | None = None
    routing: tuple[torch.Tensor, ...] = ()


class _Up(torch.autograd.Function):
    """The up-projection, which saves for both, and the gradient of everything."""

    @staticmethod
    def forward(ctx: Any, ids_TK, save: Save, scales: list[float], packing, channel: _Channel, *differentiable):
        act_RI, channel.routing = _up_and_save(ctx, ids_TK, save, scales, packing, differentiable)
        ctx.channel = channel
        return act_RI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _):
        dout_TH, ctx.channel.dout_TH = ctx.channel.dout_TH, None
        return None, None, None, None, None, *_backward(ctx, dout_TH, ctx.needs_input_grad[5:])


class _Down(torch.autograd.Function):
    """The down-projection, which saves nothing."""

    @staticmethod
    def forward(ctx: Any, act_RI, channel: _Channel, scales: list[float], packing, down_EHI, weights_TK, *factors):
        ctx.channel, ctx.act_shape = channel, act_RI.shape
        routing, channel.routing = channel.routing, ()
        return _ops.down(act_RI, down_EHI, weights_TK, *routing, factors, scales, packing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TH):
        ctx.channel.dout_TH = dout_TH
        stand_in = dout_TH.new_zeros(1).expand(ctx.act_shape)  # what counts is in the channel
        return stand_in, *(None for _ in ctx.needs_input_grad[1:])


class _Experts(torch.autograd.Function):
    """Both in one."""

    @staticmethod
    def forward(ctx: Any, ids_TK, save: Save, scales: list[float], packing, *differentiable):
        act_RI, routing = _up_and_save(ctx, ids_TK, save, scales, packing, differentiable)
        _, _, down_EHI, weights_TK, *factors = differentiable
        return _ops.down(act_RI, down_EHI, weights_TK, *routing, factors, scales, packing)

    @staticmethod
    def backward(ctx: Any, dout_TH):
        return None, None, None, None, *_backward(ctx, dout_TH, ctx.needs_input_grad[4:])


def _up_and_save(
    ctx: Any,
    ids_TK,
    save: Save,
    scales: list[float],
    packing: list[torch.Tensor],
    differentiable: tuple[torch.Tensor, ...],
):
    x_TH, gate_up_EFH, _, _, *factors = differentiable
    act_RI, pre_RF, *routing = _ops.up(x_TH, gate_up_EFH, ids_TK, save != "x", factors, scales, packing)
    saved_pre = _ops.to_fp8(pre_RF) if save == "fp8-pre" else (pre_RF,)
    ctx.save, ctx.scales, ctx.num_packing = save, scales, len(packing)
    ctx.save_for_backward(*routing, *packing, *differentiable, *saved_pre)
    return act_RI, tuple(routing)


def _backward(ctx: Any, dout_TH: torch.Tensor, needed: tuple[bool, ...]) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing gives each out a single time
    routing, rest = saved[: len(Routing._fields)], saved[len(Routing._fields) :]
    packing, rest = rest[: ctx.num_packing], rest[ctx.num_packing :]
    differentiable, saved_pre = rest[: len(needed)], rest[len(needed) :]
    x_TH, gate_up_EFH, down_EHI, weights_TK, *factors = differentiable
    pre_RF = _ops.from_fp8(*saved_pre, x_TH.dtype) if ctx.save == "fp8-pre" else saved_pre[0]
    gradients = _ops.backward(
        dout_TH.contiguous(),
        x_TH,
        gate_up_EFH,
        down_EHI,
        weights_TK,
        pre_RF,
        *routing,
        factors,
        ctx.scales,
        list(packing),
        list(needed),
    )
    return tuple(
        gradient if wanted and tensor.numel() else None
        for gradient, wanted, tensor in zip(gradients, needed, differentiable, strict=True)
    )


class _ops:
    """The operators, under this copy's namespace. torch.compile sees each as one node, by its fake implementation."""

    up: Any
    down: Any
    backward: Any
    to_fp8: Any
    from_fp8: Any


def _operator(function):
    @functools.wraps(function)
    def on_its_device(*arguments):
        with torch.cuda.device_of(arguments[0]):  # Triton starts kernels on the current device
            return function(*arguments)

    name = function.__name__.removeprefix("_op_")
    operator = torch.library.custom_op(f"{NAMESPACE}::experts_{name}", on_its_device, mutates_args=())
    setattr(_ops, name, staticmethod(operator))
    return operator


@_operator
def _op_up(
    x_TH: torch.Tensor,
    gate_up_EFH: torch.Tensor,
    ids_TK: torch.Tensor,
    save_pre: bool,
    factors: list[torch.Tensor],
    scales: list[float],
    packing: list[torch.Tensor],
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # act, pre, routing
    from . import launch

    routing = launch.route(ids_TK, gate_up_EFH.shape[0])
    gate_up, _ = _operands(gate_up_EFH, gate_up_EFH, packing)
    act_RI, pre_RF = _project_up(x_TH, gate_up, routing, factors, scales, save_pre)
    return act_RI, pre_RF, *routing


def _project_up(
    x_TH: torch.Tensor,
    gate_up_EFH: torch.Tensor | Packed,
    routing: Routing,
    factors: list[torch.Tensor],
    scales: list[float],
    save_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """act, and the products before it (empty without `save_pre`)."""
    from . import launch

    x_RH, ends_E = launch.permute(x_TH, routing), routing.offsets_E
    adapted = _adapts(factors[:2])
    if not adapted and not isinstance(gate_up_EFH, Packed):
        return launch.up(x_RH, gate_up_EFH, routing, save_pre)
    pre_RF = launch.rows_by_expert("down", x_RH, gate_up_EFH, ends_E, x_RH.shape[0], transposed=True)
    if adapted:
        a_ERH, b_EFR = factors[:2]
        inner_RR = launch.narrow_rows_by_expert(x_RH, a_ERH, ends_E, transposed=True)
        launch.add_rows_by_expert(pre_RF, inner_RR, b_EFR, ends_E, transposed=True, scale=scales[0])
    return launch.swiglu(pre_RF, routing), pre_RF if save_pre else pre_RF.new_empty(0)


def _adapts(factors: Sequence[torch.Tensor]) -> bool:
    """Whether a matrix has LoRA: two factors, of a rank above 0."""
    return bool(factors) and factors[0].numel() > 0


@_op_up.register_fake
def _(x_TH, gate_up_EFH, ids_TK, save_pre, factors, scales, packing):
    num_experts, double = gate_up_EFH.shape[0], _unpacked_width(gate_up_EFH, x_TH.shape[1])
    rows = ids_TK.shape[0] * ids_TK.shape[1]
    int32 = torch.int32
    return (
        x_TH.new_empty((rows, double // 2)),
        x_TH.new_empty((rows, double) if save_pre else 0),
        ids_TK.new_empty(rows, dtype=int32),
        ids_TK.new_empty(ids_TK.shape, dtype=int32),
        ids_TK.new_empty(ids_TK.shape, dtype=int32),
        ids_TK.new_empty(num_experts, dtype=int32),
        ids_TK.new_empty(num_experts, dtype=int32),
    )


@_operator
def _op_down(
    act_RI: torch.Tensor,
    down_EHI: torch.Tensor,
    weights_TK: torch.Tensor,
    order_R: torch.Tensor,
    slots_TK: torch.Tensor,
    padded_slots_TK: torch.Tensor,
    offsets_E: torch.Tensor,
    padded_offsets_E: torch.Tensor,
    factors: list[torch.Tensor],
    scales: list[float],
    packing: list[torch.Tensor],
) -> torch.Tensor:
    from . import launch

    _, down = _operands(down_EHI, down_EHI, packing)
    y_RH = launch.rows_by_expert("down", act_RI, down, offsets_E, act_RI.shape[0], transposed=True)
    if _adapts(factors[2:]):
        a_ERI, b_EHR = factors[2:]
        inner_RR = launch.narrow_rows_by_expert(act_RI, a_ERI, offsets_E, transposed=True)
        launch.add_rows_by_expert(y_RH, inner_RR, b_EHR, offsets_E, transposed=True, scale=scales[1])
    return launch.combine(y_RH, slots_TK, weights_TK)


@_op_down.register_fake
def _(act_RI, down_EHI, weights_TK, *routing_and_lora):
    return act_RI.new_empty((weights_TK.shape[0], _unpacked_width(down_EHI, act_RI.shape[1])))


@_operator
def _op_backward(
    dout_TH: torch.Tensor,
    x_TH: torch.Tensor,
    gate_up_EFH: torch.Tensor,
    down_EHI: torch.Tensor,
    weights_TK: torch.Tensor,
    pre_RF: torch.Tensor,
    order_R: torch.Tensor,
    slots_TK: torch.Tensor,
    padded_slots_TK: torch.Tensor,
    offsets_E: torch.Tensor,
    padded_offsets_E: torch.Tensor,
    factors: list[torch.Tensor],
    scales: list[float],
    packing: list[torch.Tensor],
    needed: list[bool],
) -> list[torch.Tensor]:
    """Gradients of x, gate_up, down, weights and LoRA's factors; empty where not `needed`.

    An empty `pre_RF` is computed anew. All rows here are in padded buffers (`ends_E`), but for those of `pre_RF`.
    """
    from . import launch

    routing = Routing(order_R, slots_TK, padded_slots_TK, offsets_E, padded_offsets_E)
    ends_E, rows = padded_offsets_E, order_R.numel()
    needs_x, needs_gate_up, needs_down, needs_weights, *_ = needed
    gate_up, down = _operands(gate_up_EFH, down_EHI, packing)
    # One each: an operator's results may not share memory.
    gradients = [x_TH.new_empty(0) for _ in needed]
    if pre_RF.numel() == 0:
        _, pre_RF = _project_up(x_TH, gate_up, routing, factors, scales, save_pre=True)

    dout_PH = launch.permute(dout_TH, routing, padded=True)
    dact_PI = launch.rows_by_expert("down_gradient", dout_PH, down, ends_E, rows, transposed=False)
    if _adapts(factors[2:]):
        a_ERI, b_EHR = factors[2:]
        dinner_PR = launch.narrow_rows_by_expert(dout_PH, b_EHR, ends_E, transposed=False)
        launch.add_rows_by_expert(dact_PI, dinner_PR, a_ERI, ends_E, transposed=False, scale=scales[1])
    dpre_PF, act_PI, dweight_R = launch.swiglu_backward(dact_PI, pre_RF, weights_TK, routing)
    del pre_RF
    if needs_weights:
        here_TK = slots_TK >= 0
        gradients[3] = torch.where(here_TK, dweight_R[slots_TK.clamp(min=0)], 0).to(weights_TK.dtype)
    if needs_down:
        gradients[2] = launch.weight_gradient(dout_PH, act_PI, routing)
    if _adapts(factors[2:]):
        inner_PR = launch.narrow_rows_by_expert(act_PI, a_ERI, ends_E, transposed=True)
        gradients[6] = launch.weight_gradient(dinner_PR, act_PI, routing, narrow=True).mul_(scales[1])
        gradients[7] = launch.weight_gradient(dout_PH, inner_PR, routing, narrow=True).mul_(scales[1])
    del dout_PH, act_PI

    if needs_gate_up or _adapts(factors[:2]):
        x_PH = launch.permute(x_TH, routing, padded=True)
    if needs_gate_up:
        gradients[1] = launch.weight_gradient(dpre_PF, x_PH, routing)
    if _adapts(factors[:2]):
        a_ERH, b_EFR = factors[:2]
        inner_PR = launch.narrow_rows_by_expert(x_PH, a_ERH, ends_E, transposed=True)
        dinner_PR = launch.narrow_rows_by_expert(dpre_PF, b_EFR, ends_E, transposed=False)
        gradients[4] = launch.weight_gradient(dinner_PR, x_PH, routing, narrow=True).mul_(scales[0])
        gradients[5] = launch.weight_gradient(dpre_PF, inner_PR, routing, narrow=True).mul_(scales[0])
    if needs_x:
        dx_PH = launch.rows_by_expert("up_gradient", dpre_PF, gate_up, ends_E, rows, transposed=False)
        if _adapts(factors[:2]):
            launch.add_rows_by_expert(dx_PH, dinner_PR, a_ERH, ends_E, transposed=False, scale=scales[0])
        gradients[0] = launch.combine(dx_PH, padded_slots_TK)
    return gradients


@_op_backward.register_fake
def _(dout_TH, x_TH, gate_up_EFH, down_EHI, weights_TK, pre_RF, *rest):
    factors, _, _, needed = rest[-4:]
    given = (x_TH, gate_up_EFH, down_EHI, weights_TK, *factors)
    computed = [*needed[:4], *(factor.numel() > 0 for factor in factors)]
    return [torch.empty_like(t) if wanted else x_TH.new_empty(0) for t, wanted in zip(given, computed, strict=True)]


@_operator
def _op_to_fp8(pre_RF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from . import launch

    return launch.to_fp8(pre_RF)


@_op_to_fp8.register_fake
def _(pre_RF):
    groups = -(-pre_RF.shape[1] // FP8_GROUP)
    return pre_RF.new_empty(pre_RF.shape, dtype=torch.float8_e4m3fn), pre_RF.new_empty(
        (pre_RF.shape[0], groups), dtype=torch.int8
    )


@_operator
def _op_from_fp8(values_RF: torch.Tensor, exponents_RG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from . import launch

    return launch.from_fp8(values_RF, exponents_RG, dtype)


@_op_from_fp8.register_fake
def _(values_RF, exponents_RG, dtype):
    return values_RF.new_empty(values_RF.shape, dtype=dtype)
