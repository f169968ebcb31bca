# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the linear cross-entropy: what happens to a chunk of logits between two matrix products.

Every kernel reads logits in their own dtype and computes in fp32. A chunk is a matrix of `n` rows; `index[row]` is the
token that a row belongs to, and per-token inputs and outputs are read and written at the token's place.
"""

import torch
import triton
import triton.language as tl

BLOCK_SIZE = 4096
BLOCK_SIZE_OF_ALL_FIGURES = 2048  # six sums a lane instead of two: at 4096 they need 168 registers on sm_90
WARPS = 8
# A finite stand-in for minus infinity: the difference of two infinities would be NaN.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit(do_not_specialize=["tokens"])
def loss_kernel(
    logits_ptr,
    row_stride,
    labels_ptr,
    index_ptr,
    scale_ptr,
    figures_ptr,
    tokens,
    vocab,
    ignore_index,
    inv_temperature,
    ALL_FIGURES: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: its loss, its log-sum-exp, the other figures if wanted, and if wanted the gradient in place.

    Each lane keeps the maximum and the sums of its own columns; lanes meet once, after the loop.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(index_ptr + row)
    label = tl.load(labels_ptr + token)
    row_ptr = logits_ptr + row * row_stride
    lanes = tl.arange(0, BLOCK)
    if label == ignore_index:
        if HAS_GRADIENT:
            for start in range(0, vocab, BLOCK):
                columns = start + lanes
                tl.store(row_ptr + columns, tl.zeros((BLOCK,), logits_ptr.dtype.element_ty), mask=columns < vocab)
        return

    # A label outside the vocabulary reads nothing that it must not, and makes the loss NaN.
    is_valid = (label >= 0) & (label < vocab)
    nan_if_invalid = tl.where(is_valid, 0.0, float("nan"))
    target = tl.where(is_valid, label, 0)
    target_z = tl.load(row_ptr + target).to(tl.float32) * inv_temperature + nan_if_invalid

    peak = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    plain_sum = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    peak_before = tl.full((BLOCK,), _LOWEST, tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + lanes
        mask = columns < vocab
        z = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32) * inv_temperature
        if ALL_FIGURES:
            plain_sum += tl.where(mask, z, 0.0)
        z = tl.where(mask, z, -float("inf"))
        # The larger of the two has weight 1, so that one exponential serves.
        is_new = z > peak
        e = tl.exp(-tl.abs(z - peak))
        if ALL_FIGURES:
            finite = tl.where(mask, z, 0.0)
            weighted = tl.where(is_new, weighted * e + finite, weighted + e * finite)
            squares = tl.where(is_new, squares * e * e + 1, squares + e * e)
            peak_before = tl.maximum(peak_before, tl.where(columns < target, z, -float("inf")))
        total = tl.where(is_new, total * e + 1, total + e)
        peak = tl.maximum(peak, z)

    highest = tl.max(peak, axis=0)
    share = tl.exp(peak - highest)
    sum_exp = tl.sum(total * share, axis=0)
    lse = highest + tl.log(sum_exp)
    tl.store(figures_ptr + token, lse - target_z)
    tl.store(figures_ptr + tokens + token, lse)
    if ALL_FIGURES:
        log_sum_squares = tl.log(tl.sum(squares * share * share, axis=0)) - 2 * tl.log(sum_exp)
        tl.store(figures_ptr + 2 * tokens + token, lse - tl.sum(weighted * share, axis=0) / sum_exp)
        tl.store(figures_ptr + 3 * tokens + token, tl.sum(plain_sum, axis=0) / vocab)
        tl.store(figures_ptr + 4 * tokens + token, log_sum_squares)
        # The first of equal maxima is the prediction, as in `argmax`.
        is_top1 = (target_z >= highest) & (target_z > tl.max(peak_before, axis=0))
        tl.store(figures_ptr + 5 * tokens + token, tl.where(is_top1, 1.0, 0.0))

    if HAS_GRADIENT:
        scale = (tl.load(scale_ptr) + nan_if_invalid) * inv_temperature
        for start in range(0, vocab, BLOCK):
            columns = start + lanes
            mask = columns < vocab
            z = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32) * inv_temperature
            gradient = (tl.exp(z - lse) - tl.where(columns == target, 1.0, 0.0)) * scale
            tl.store(row_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def log_prob_gradient_kernel(
    logits_ptr,
    row_stride,
    labels_ptr,
    index_ptr,
    lse_ptr,
    upstream_ptr,
    vocab,
    ignore_index,
    inv_temperature,
    BLOCK: tl.constexpr,
):
    """One program for a block of a row: logits become, in place, the gradient of upstream · log-probability."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(index_ptr + row)
    label = tl.load(labels_ptr + token)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocab
    pointers = logits_ptr + row * row_stride + columns
    if label == ignore_index:
        tl.store(pointers, tl.zeros((BLOCK,), logits_ptr.dtype.element_ty), mask=mask)
        return
    is_valid = (label >= 0) & (label < vocab)
    upstream = tl.load(upstream_ptr + token) + tl.where(is_valid, 0.0, float("nan"))
    z = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * inv_temperature
    gradient = tl.where(columns == label, 1.0, 0.0) - tl.exp(z - tl.load(lse_ptr + token))
    gradient *= upstream * inv_temperature
    tl.store(pointers, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, size, programs, BLOCK: tl.constexpr):
    """x *= factor, over without touching x where the factor is 1: few programs with many blocks each leave quickly."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK  # a weight's gradient may have more than 2³¹ elements
        for start in range(first, size, programs * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)
            tl.store(x_ptr + offsets, (x.to(tl.float32) * factor).to(x_ptr.dtype.element_ty), mask=offsets < size)


def loss_figures(
    logits: torch.Tensor,
    labels: torch.Tensor,
    index: torch.Tensor,
    scale: torch.Tensor,
    figures: torch.Tensor,
    *,
    ignore_index: int,
    inv_temperature: float,
    all_figures: bool,
    gradient: bool,
) -> None:
    """Fill `figures` (see `loss.FIGURES`) from a chunk of logits (n, V); make it scale · d loss / d logits."""
    vocab = logits.shape[1]
    loss_kernel[(logits.shape[0],)](
        logits,
        logits.stride(0),
        labels,
        index,
        scale,
        figures,
        figures.shape[1],
        vocab,
        ignore_index,
        inv_temperature,
        ALL_FIGURES=all_figures,
        HAS_GRADIENT=gradient,
        BLOCK=min(BLOCK_SIZE_OF_ALL_FIGURES if all_figures else BLOCK_SIZE, triton.next_power_of_2(vocab)),
        num_warps=WARPS,
    )


def log_prob_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    index: torch.Tensor,
    lse: torch.Tensor,
    upstream: torch.Tensor,
    *,
    ignore_index: int,
    inv_temperature: float,
) -> None:
    """Turn a chunk of logits (n, V) into upstream · d log-probability / d logits."""
    vocab = logits.shape[1]
    block = min(BLOCK_SIZE, triton.next_power_of_2(vocab))
    log_prob_gradient_kernel[(logits.shape[0], triton.cdiv(vocab, block))](
        logits,
        logits.stride(0),
        labels,
        index,
        lse,
        upstream,
        vocab,
        ignore_index,
        inv_temperature,
        BLOCK=block,
        num_warps=WARPS,
    )


def scale_(x: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply a contiguous tensor in place by a 0-d fp32 tensor on its device; returns at once where that is 1."""
    programs = min(1024, triton.cdiv(x.numel(), BLOCK_SIZE))
    if programs:
        scale_kernel[(programs,)](x, factor, x.numel(), programs, BLOCK=BLOCK_SIZE, num_warps=WARPS)
