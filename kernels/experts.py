# SPDX-License-Identifier: Apache-2.0
"""A mixture of SwiGLU experts, forward and backward, on Triton kernels: `fused_experts`.

For one token, with its K chosen experts e_k and their weights w_k (JAI-1's report, section 3.1.3; Mixtral):

    out = sum over k of  w_k * down[e_k] @ ( silu(gate[e_k] @ x) * (up[e_k] @ x) )

Kept for the backward pass are x and the products before SwiGLU (`pre`), about 150 KiB a token at JAI-1's size, where
transformers' `grouped_mm` keeps 324; `save` trades more of it for time.

**Two autograd Functions.** Non-reentrant activation checkpointing stops recomputing once it has what was saved. So the
up-projection's Function saves everything, and the down-projection's, which comes after it, saves nothing: it hands the
gradient that it gets to the first one, which does the work of both. Recomputation then never runs the down-projection.

Shape suffixes: T tokens, H hidden_size, I intermediate_size, F = 2 * I, E experts, K experts of a token; others as in
`routing.py`.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .routing import FP8_GROUP, Routing

Save = Literal["x+pre", "x", "fp8-pre"]

# Two copies of these files in one process (the installed package, a Hub kernel) must not register the same operators.
NAMESPACE = re.sub(r"\W", "_", __package__ or "kernels")


def fused_experts_reference(
    x_TH: torch.Tensor,
    gate_up_EFH: torch.Tensor,
    down_EHI: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor:
    """`fused_experts` in plain operations, in the dtype of `x_TH` (float64 too), differentiable."""
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
) -> torch.Tensor:
    """The experts' weighted sum for every token, differentiable in `x`, both matrices and the router's weights.

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

    Returns:
        `(T, H)` in the dtype of `x_TH`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, and for an unknown `save`.
    """
    _check(x_TH, gate_up_EFH, down_EHI, ids_TK, weights_TK, save)
    if x_TH.shape[0] == 0:
        return x_TH + 0 * (gate_up_EFH.sum() + down_EHI.sum() + weights_TK.sum()).to(x_TH.dtype)
    x_TH, gate_up_EFH, down_EHI = x_TH.contiguous(), gate_up_EFH.contiguous(), down_EHI.contiguous()
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
    differentiable = (x_TH, gate_up_EFH, down_EHI, weights_TK)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiable)):
        act_RI, _, *routing = _ops.up(x_TH, gate_up_EFH, ids_TK, False)
        return _ops.down(act_RI, down_EHI, weights_TK, *routing)
    if torch.compiler.is_compiling():  # the compiler decides by itself what to recompute, and sees the operators
        return _Experts.apply(x_TH, gate_up_EFH, down_EHI, weights_TK, ids_TK, save)
    channel = _Channel()
    act_RI = _Up.apply(x_TH, gate_up_EFH, down_EHI, weights_TK, ids_TK, save, channel)
    return _Down.apply(act_RI, down_EHI.detach(), weights_TK.detach(), channel)


def _check(x_TH, gate_up_EFH, down_EHI, ids_TK, weights_TK, save) -> None:
    if save not in get_args(Save):
        raise ValueError(f"`save` is {save!r}; expected one of {', '.join(map(repr, get_args(Save)))}.")
    given = ", ".join(
        f"{name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        for name, tensor in (
            ("x", x_TH),
            ("gate_up", gate_up_EFH),
            ("down", down_EHI),
            ("ids", ids_TK),
            ("weights", weights_TK),
        )
    )
    shaped = (x_TH.ndim, gate_up_EFH.ndim, down_EHI.ndim, ids_TK.ndim, weights_TK.ndim) == (2, 3, 3, 2, 2)
    if shaped:
        (tokens, hidden), (num_experts, double, _) = x_TH.shape, gate_up_EFH.shape
        shaped = (
            gate_up_EFH.shape[2] == hidden
            and down_EHI.shape == (num_experts, hidden, double // 2)
            and double % 2 == 0
            and ids_TK.shape == weights_TK.shape
            and ids_TK.shape[0] == tokens
        )
    if not shaped:
        raise ValueError(
            "Shapes do not fit: expected x (T, H), gate_up (E, 2 * I, H), down (E, H, I), ids (T, K) and weights "
            f"(T, K); given {given}."
        )
    same_dtype = x_TH.dtype == gate_up_EFH.dtype == down_EHI.dtype
    if not same_dtype or x_TH.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x, gate_up and down must share one of bfloat16, float16 and float32; given {given}.")
    if ids_TK.dtype not in (torch.int32, torch.int64) or not weights_TK.is_floating_point():
        raise ValueError(f"ids must be int32 or int64 and weights floating point; given {given}.")
    if len({tensor.device for tensor in (x_TH, gate_up_EFH, down_EHI, ids_TK, weights_TK)}) > 1:
        raise ValueError(f"All tensors must be on one device; given {given}.")


@dataclass(slots=True)
class _Channel:
    """Carries the output's gradient from the second Function's backward to the first one's."""

    dout_TH: torch.Tensor | None = None
    routing: tuple[torch.Tensor, ...] = ()


class _Up(torch.autograd.Function):
    """The up-projection, which saves for both, and the gradient of everything."""

    @staticmethod
    def forward(ctx: Any, x_TH, gate_up_EFH, down_EHI, weights_TK, ids_TK, save: Save, channel: _Channel):
        act_RI, channel.routing = _up_and_save(ctx, x_TH, gate_up_EFH, down_EHI, weights_TK, ids_TK, save)
        ctx.channel = channel
        return act_RI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _):
        dout_TH, ctx.channel.dout_TH = ctx.channel.dout_TH, None
        return *_backward(ctx, dout_TH), None, None, None


class _Down(torch.autograd.Function):
    """The down-projection, which saves nothing."""

    @staticmethod
    def forward(ctx: Any, act_RI, down_EHI, weights_TK, channel: _Channel):
        ctx.channel, ctx.act_shape = channel, act_RI.shape
        routing, channel.routing = channel.routing, ()
        return _ops.down(act_RI, down_EHI, weights_TK, *routing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TH):
        ctx.channel.dout_TH = dout_TH
        return dout_TH.new_zeros(1).expand(ctx.act_shape), None, None, None  # a stand-in: what counts is in the channel


class _Experts(torch.autograd.Function):
    """Both in one."""

    @staticmethod
    def forward(ctx: Any, x_TH, gate_up_EFH, down_EHI, weights_TK, ids_TK, save: Save):
        act_RI, routing = _up_and_save(ctx, x_TH, gate_up_EFH, down_EHI, weights_TK, ids_TK, save)
        return _ops.down(act_RI, down_EHI, weights_TK, *routing)

    @staticmethod
    def backward(ctx: Any, dout_TH):
        return *_backward(ctx, dout_TH), None, None


def _up_and_save(ctx: Any, x_TH, gate_up_EFH, down_EHI, weights_TK, ids_TK, save: Save):
    act_RI, pre_RF, *routing = _ops.up(x_TH, gate_up_EFH, ids_TK, save != "x")
    saved_pre = _ops.to_fp8(pre_RF) if save == "fp8-pre" else (pre_RF,)
    ctx.save = save
    ctx.save_for_backward(x_TH, gate_up_EFH, down_EHI, weights_TK, *routing, *saved_pre)
    return act_RI, tuple(routing)


def _backward(ctx: Any, dout_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x_TH, gate_up_EFH, down_EHI, weights_TK, *routing_and_pre = ctx.saved_tensors
    routing, saved_pre = routing_and_pre[: len(Routing._fields)], routing_and_pre[len(Routing._fields) :]
    pre_RF = _ops.from_fp8(*saved_pre, x_TH.dtype) if ctx.save == "fp8-pre" else saved_pre[0]
    needed = list(ctx.needs_input_grad[:4])
    gradients = _ops.backward(
        dout_TH.contiguous(), x_TH, gate_up_EFH, down_EHI, weights_TK, pre_RF, *routing, needed
    )  # fmt: skip
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True))


class _ops:
    """The operators, under this copy's namespace. torch.compile sees each as one node, by its fake implementation."""

    up: Any
    down: Any
    backward: Any
    to_fp8: Any
    from_fp8: Any


def _operator(function):
    name = function.__name__.removeprefix("_op_")
    operator = torch.library.custom_op(f"{NAMESPACE}::experts_{name}", function, mutates_args=())
    setattr(_ops, name, staticmethod(operator))
    return operator


@_operator
def _op_up(
    x_TH: torch.Tensor, gate_up_EFH: torch.Tensor, ids_TK: torch.Tensor, save_pre: bool
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # act, pre, routing
    from . import experts_launch as launch

    routing = launch.route(ids_TK, gate_up_EFH.shape[0])
    act_RI, pre_RF = launch.up(launch.permute(x_TH, routing), gate_up_EFH, routing, save_pre)
    return act_RI, pre_RF, *routing


@_op_up.register_fake
def _(x_TH, gate_up_EFH, ids_TK, save_pre):
    num_experts, double, _ = gate_up_EFH.shape
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
) -> torch.Tensor:
    from . import experts_launch as launch

    y_RH = launch.rows_by_expert("down", act_RI, down_EHI, offsets_E, act_RI.shape[0], transposed=True)
    return launch.combine(y_RH, slots_TK, weights_TK)


@_op_down.register_fake
def _(act_RI, down_EHI, weights_TK, *routing):
    return act_RI.new_empty((weights_TK.shape[0], down_EHI.shape[1]))


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
    needed: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, gate_up, down and weights; empty where not `needed`. An empty `pre_RF` is computed anew."""
    from . import experts_launch as launch

    routing = Routing(order_R, slots_TK, padded_slots_TK, offsets_E, padded_offsets_E)
    needs_x, needs_gate_up, needs_down, needs_weights = needed
    if pre_RF.numel() == 0:
        _, pre_RF = launch.up(launch.permute(x_TH, routing), gate_up_EFH, routing, save_pre=True)
    dout_PH = launch.permute(dout_TH, routing, padded=True)
    dpre_PF, act_PI, dweight_R = launch.down_backward(dout_PH, down_EHI, pre_RF, weights_TK, routing)
    del pre_RF
    # One each: an operator's results may not share memory.
    dx_TH, dgate_up_EFH, ddown_EHI, dweights_TK = (x_TH.new_empty(0) for _ in needed)
    if needs_down:
        ddown_EHI = launch.weight_gradient(dout_PH, act_PI, routing)
    del dout_PH, act_PI
    if needs_gate_up:
        dgate_up_EFH = launch.weight_gradient(dpre_PF, launch.permute(x_TH, routing, padded=True), routing)
    if needs_x:
        rows = order_R.numel()
        dx_PH = launch.rows_by_expert("up_gradient", dpre_PF, gate_up_EFH, padded_offsets_E, rows, transposed=False)
        dx_TH = launch.combine(dx_PH, padded_slots_TK)
    if needs_weights:
        here_TK = slots_TK >= 0
        dweights_TK = torch.where(here_TK, dweight_R[slots_TK.clamp(min=0)], 0).to(weights_TK.dtype)
    return dx_TH, dgate_up_EFH, ddown_EHI, dweights_TK


@_op_backward.register_fake
def _(dout_TH, x_TH, gate_up_EFH, down_EHI, weights_TK, pre_RF, *routing_and_needed):
    inputs = (x_TH, gate_up_EFH, down_EHI, weights_TK)
    return tuple(
        torch.empty_like(tensor) if wanted else x_TH.new_empty(0)
        for tensor, wanted in zip(inputs, routing_and_needed[-1], strict=True)
    )


@_operator
def _op_to_fp8(pre_RF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from . import experts_launch as launch

    return launch.to_fp8(pre_RF)


@_op_to_fp8.register_fake
def _(pre_RF):
    groups = -(-pre_RF.shape[1] // FP8_GROUP)
    return pre_RF.new_empty(pre_RF.shape, dtype=torch.float8_e4m3fn), pre_RF.new_empty(
        (pre_RF.shape[0], groups), dtype=torch.int8
    )


@_operator
def _op_from_fp8(values_RF: torch.Tensor, exponents_RG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from . import experts_launch as launch

    return launch.from_fp8(values_RF, exponents_RG, dtype)


@_op_from_fp8.register_fake
def _(values_RF, exponents_RG, dtype):
    return values_RF.new_empty(values_RF.shape, dtype=dtype)
