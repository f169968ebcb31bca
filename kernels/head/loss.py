# SPDX-License-Identifier: Apache-2.0
"""The language-model head and its loss in one, a chunk of tokens at a time: logits never exist whole.

A chunk's logits come from cuBLAS into a buffer that every chunk uses again. One kernel turns them into the loss and, in
place, into the loss's gradient (softmax in fp32), and two more products turn that into the gradients of the hidden
states and of the weight. So `linear_cross_entropy` costs 6·T·H·V operations, forward and backward together, and its
backward pass has nothing to do. `linear_log_probs` cannot know how its results will be weighed, so its backward pass
computes the logits again: 8·T·H·V.

**Ignored tokens.** Kept tokens are sorted to the front on the device. On a GPU their number comes to the host while the
first chunk is being computed: the host waits for it, the GPU does not, and chunks without kept tokens are never
computed. While a CUDA graph is captured nobody may wait: then all chunks are computed, with the same result.

**Memory** beside inputs: the results, one chunk of logits with its hidden states, and for a 16-bit weight another 2
bytes a weight, since its gradient is summed in fp32 (the 16-bit result is written over half of that memory, the rest is
freed). At T = 16384, H = 5120, V = 64000 in bf16: weight gradient 1250 MiB (625 of them stay), hidden gradient 160,
logits 203 (1,664 tokens), hidden states of a chunk 16: 1.59 GiB.

In fp16 a logit's gradient below 6e-8 is lost, whatever a gradient scaler multiplies the loss by later; bf16 and fp32
have the range. `linear_log_probs` multiplies before it rounds.

Shape suffixes: T tokens, H hidden size, V vocabulary, N tokens of a chunk, F figures of a token.
"""

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Bytes of a chunk's logits. With V = 64000 in bf16 that is 1,664 tokens: 13 × 20 tiles of 128 × 256 in the product that
# gives the hidden gradient, 1.97 waves over an H100's 132 multiprocessors (1,792 tokens would need a third wave).
LOGITS_BYTES = 208 * 2**20
_TILE = 128

# Device types where PyTorch multiplies 16-bit matrices into an fp32 sum; elsewhere they are converted to fp32 first.
DEVICES_WITH_FP32_SUMS = ("cuda",)

# The figures of a token, in the order in which the kernels fill them.
FIGURES = ("loss", "lse", "entropy", "mean_logit", "log_sum_sq_prob", "is_top1")

# Two copies of this folder in one process (a package and a Hub kernel) must not register one operator twice.
NAMESPACE = re.sub(r"\W", "_", __package__ or __name__)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T`, without the logits; gradients are computed in the forward pass.

    Args:
        hidden: `(..., H)`, bf16, fp16, fp32 or (slow, for tests) fp64; under autocast in its dtype.
        weight: `(V, H)`, of hidden's dtype unless autocast is on.
        labels: `(...)`, integers, already shifted. A label outside the vocabulary that is not `ignore_index` makes the
            loss and all gradients NaN: checking would have to wait for the device.
        ignore_index: the label of tokens that count for nothing.
        num_items_in_batch: what the sum is divided by instead of the number of kept tokens (an int or a 0-d tensor).

    Returns:
        The mean loss, fp32 (fp64 for fp64), 0-d. Over no tokens (or 0 items) it is 0, where torch's is NaN.

    Raises:
        TypeError, ValueError: for shapes, dtypes and devices that do not fit.
    """
    settings = _Settings.checked(hidden, weight, labels, ignore_index, temperature=1.0)
    device, dtype = hidden.device, settings.sum_dtype
    if isinstance(num_items_in_batch, torch.Tensor):
        scale = num_items_in_batch.to(device, dtype).reshape(()).clamp(min=1).reciprocal()
    elif num_items_in_batch is not None:
        scale = torch.full((), 1 / max(num_items_in_batch, 1), dtype=dtype, device=device)
    else:
        scale = (labels != ignore_index).sum().clamp(min=1).to(dtype).reciprocal()
    return _LinearCrossEntropy.apply(hidden, weight, labels, scale, settings, *_wanted(hidden, weight))


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The log-probability of each label under `softmax(hidden @ weight.T / temperature)`, without the logits.

    For losses that weigh tokens unequally (DPO, GRPO). The backward pass computes the logits again.

    Args:
        hidden, weight, labels, ignore_index: as in `linear_cross_entropy`.
        temperature: logits are divided by it.

    Returns:
        Log-probabilities `(...)`, fp32 (fp64 for fp64), 0 where ignored.

    Raises:
        TypeError, ValueError: for shapes, dtypes, devices and a temperature that do not fit.
    """
    settings = _Settings.checked(hidden, weight, labels, ignore_index, temperature)
    return _LinearLogProbs.apply(hidden, weight, labels, settings, False, False, *_wanted(hidden, weight))[0]


class TokenFigures(NamedTuple):
    """Figures of each token, in the labels' shape, 0 where ignored. Only `log_probs` has a gradient."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    log_sum_sq_probs: torch.Tensor
    is_top1: torch.Tensor


def linear_token_figures(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    expect_equal_weights: bool = False,
) -> TokenFigures:
    """`linear_log_probs`, with the figures that TRL's trainers log, from the same pass over the logits.

    Args:
        expect_equal_weights: compute gradients in the forward pass, for a loss in which every kept token has the same
            weight (a mean or a sum). The backward pass asks the device whether that is so, which is one host
            synchronisation, and computes the gradients again where it is not.

    Raises:
        TypeError, ValueError: for shapes, dtypes, devices and a temperature that do not fit.
    """
    settings = _Settings.checked(hidden, weight, labels, ignore_index, temperature)
    log_probs, entropy, mean_logits, log_sum_sq_probs, is_top1 = _LinearLogProbs.apply(
        hidden, weight, labels, settings, expect_equal_weights, True, *_wanted(hidden, weight)
    )
    return TokenFigures(log_probs, entropy, mean_logits, log_sum_sq_probs, is_top1.bool())


class _Settings(NamedTuple):
    """What is known before the tensors are touched."""

    compute_dtype: torch.dtype
    sum_dtype: torch.dtype
    ignore_index: int
    inv_temperature: float

    @staticmethod
    def checked(
        hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, temperature: float
    ) -> "_Settings":
        _check_tensors(hidden, weight, labels)
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; expected a number above 0.")
        device_type, dtype = hidden.device.type, hidden.dtype
        has_autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
        if has_autocast and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        elif weight.dtype != dtype:
            raise TypeError(
                f"hidden is {dtype} and weight {weight.dtype}; expected one dtype. Convert one, or turn autocast on."
            )
        return _Settings(dtype, _sum_dtype(dtype), ignore_index, 1 / temperature)


_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_tensors(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    for name, tensor in {"hidden": hidden, "weight": weight, "labels": labels}.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor.")
        allowed = _INTEGERS if name == "labels" else _FLOATS
        if tensor.dtype not in allowed:
            expected = "integers (int64)" if name == "labels" else "bf16, fp16, fp32 or fp64"
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {expected}.")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}; move them to one device.")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}; expected (..., H) and (V, H) "
            "with the same H, and V above 0 (the weight of an nn.Linear is laid out so)."
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected {tuple(hidden.shape[:-1])}, one for a row of hidden. "
            "Shift them first: hidden[:, :-1] predicts labels[:, 1:]."
        )


def _wanted(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[bool, bool]:
    """Whose gradients to compute. Asked here: inside a Function's forward gradients are off and all look wanted."""
    if not torch.is_grad_enabled():
        return False, False
    return hidden.requires_grad, weight.requires_grad


# --- autograd ---------------------------------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, settings, wants_hidden, wants_weight):
        figures_FT, *gradients = forward_op(hidden, weight, labels, scale, *settings, False, wants_hidden, wants_weight)
        # Saved as other tensors are: after the pass nothing else holds them, and .grad takes them as they are.
        ctx.save_for_backward(*(g if w else None for g, w in zip(gradients, (wants_hidden, wants_weight))))
        return figures_FT[0].sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *_scaled(ctx.saved_tensors, upstream), None, None, None, None, None


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, settings, early, all_figures, wants_hidden, wants_weight):
        wants = (wants_hidden, wants_weight)
        early = early and any(wants)
        scale = torch.full((), -1.0, dtype=settings.sum_dtype, device=hidden.device)
        figures_FT, *gradients = forward_op(
            hidden, weight, labels, scale, *settings, all_figures, *(early and w for w in wants)
        )
        log_probs, _, *others = (figure.reshape(labels.shape).clone() for figure in figures_FT)
        ctx.settings, ctx.early, ctx.wants = settings, early, wants
        kept = (g if early and w else None for g, w in zip(gradients, wants))
        ctx.save_for_backward(hidden, weight, labels, figures_FT[1].clone(), *kept)
        ctx.mark_non_differentiable(*others)
        return log_probs.neg_(), *others

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        hidden, weight, labels, lse, *early = ctx.saved_tensors
        nothing = (None,) * 6
        if ctx.early and labels.numel():
            kept = labels != ctx.settings.ignore_index
            high = upstream.masked_fill(~kept, -torch.inf).amax()
            low = upstream.masked_fill(~kept, torch.inf).amin()
            if bool(high <= low):  # no kept token: high is below low
                return *_scaled(early, torch.where(high == low, high, 0)), *nothing
        gradients = log_prob_gradients_op(hidden, weight, labels, lse, upstream.contiguous(), *ctx.settings, *ctx.wants)
        return *(g if wants else None for g, wants in zip(gradients, ctx.wants)), *nothing


def _scaled(gradients: tuple[torch.Tensor | None, ...], factor: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients times a 0-d tensor; in place, and for nothing where it is 1, if no second pass can want them."""
    keeps_graph = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
    if keeps_graph:
        return [None if g is None else (g * factor).to(g.dtype) for g in gradients]
    for g in gradients:
        if g is None:
            continue
        if why_not_triton(g.device, g.dtype) is None:
            with torch.cuda.device_of(g):
                _triton().scale_(g, factor.to(torch.float32))
        else:
            g.mul_(factor)
    return list(gradients)


# --- operators --------------------------------------------------------------------------------------------------------
# Whole loops, not single kernels: how many chunks there are depends on the data, which torch.compile need not know.


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy_forward", mutates_args=())
def forward_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor,
    compute_dtype: torch.dtype,
    sum_dtype: torch.dtype,
    ignore_index: int,
    inv_temperature: float,
    all_figures: bool,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Figures (len(FIGURES) or 2, T), and the gradients of scale · the summed loss (empty where not wanted)."""
    kernels = kernels_for(hidden.device, compute_dtype)
    compute_dtype = _dtype_of_products(kernels, hidden.device, compute_dtype)
    labels_T = labels.reshape(-1).to(torch.int64)
    figures_FT = hidden.new_zeros((len(FIGURES) if all_figures else 2, labels_T.numel()), dtype=sum_dtype)

    def to_gradient(logits_NV: torch.Tensor, index_N: torch.Tensor) -> None:
        kernels.loss_figures(
            logits_NV,
            labels_T,
            index_N,
            scale,
            figures_FT,
            ignore_index=ignore_index,
            inv_temperature=inv_temperature,
            all_figures=all_figures,
            gradient=wants_hidden or wants_weight,
        )

    gradients = _chunked(hidden, weight, labels_T, compute_dtype, ignore_index, to_gradient, wants_hidden, wants_weight)
    return figures_FT, *gradients


@forward_op.register_fake
def _(
    hidden,
    weight,
    labels,
    scale,
    compute_dtype,
    sum_dtype,
    ignore_index,
    inv_temperature,
    all_figures,
    wants_hidden,
    wants_weight,
):
    figures = hidden.new_empty((len(FIGURES) if all_figures else 2, labels.numel()), dtype=sum_dtype)
    return figures, *_empty_gradients(hidden, weight, wants_hidden, wants_weight)


@torch.library.custom_op(f"{NAMESPACE}::linear_log_prob_gradients", mutates_args=())
def log_prob_gradients_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    upstream: torch.Tensor,
    compute_dtype: torch.dtype,
    sum_dtype: torch.dtype,
    ignore_index: int,
    inv_temperature: float,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the sum of upstream · log-probability (empty where not wanted)."""
    kernels = kernels_for(hidden.device, compute_dtype)
    compute_dtype = _dtype_of_products(kernels, hidden.device, compute_dtype)
    labels_T = labels.reshape(-1).to(torch.int64)
    upstream_T = upstream.reshape(-1).to(sum_dtype)

    def to_gradient(logits_NV: torch.Tensor, index_N: torch.Tensor) -> None:
        kernels.log_prob_gradient(
            logits_NV,
            labels_T,
            index_N,
            lse,
            upstream_T,
            ignore_index=ignore_index,
            inv_temperature=inv_temperature,
        )

    return _chunked(hidden, weight, labels_T, compute_dtype, ignore_index, to_gradient, wants_hidden, wants_weight)


@log_prob_gradients_op.register_fake
def _(
    hidden,
    weight,
    labels,
    lse,
    upstream,
    compute_dtype,
    sum_dtype,
    ignore_index,
    inv_temperature,
    wants_hidden,
    wants_weight,
):
    return _empty_gradients(hidden, weight, wants_hidden, wants_weight)


def _empty_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, wants_hidden: bool, wants_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
    )


# --- the loop over chunks ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels_T: torch.Tensor,
    compute_dtype: torch.dtype,
    ignore_index: int,
    to_gradient: Callable[[torch.Tensor, torch.Tensor], None],
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute each chunk's logits, let `to_gradient` work on them, and turn what it leaves there into gradients."""
    tokens, vocab = labels_T.numel(), weight.shape[0]
    x_TH = hidden.reshape(tokens, hidden.shape[-1])
    w_VH = weight.to(compute_dtype)
    if 1 not in w_VH.stride():
        w_VH = w_VH.contiguous()  # once, where cuBLAS would do it for every chunk

    hidden_gradient, weight_gradient = _empty_gradients(hidden, weight, False, False)
    if wants_hidden:
        hidden_gradient = hidden.new_zeros(hidden.shape)
    if wants_weight:
        weight_sum = WeightSum(weight)

    is_ignored_T = labels_T == ignore_index
    kept_first_T = torch.argsort(is_ignored_T.to(torch.uint8), stable=True)
    size = chunk_size(tokens, vocab, compute_dtype.itemsize)
    logits_buffer = w_VH.new_empty((size, vocab))
    x_buffer = x_TH.new_empty((size, x_TH.shape[1]))
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(hidden):
        for start, stop in chunks(tokens - is_ignored_T.sum(), tokens, size):
            index_N = kept_first_T[start:stop]
            logits_NV = logits_buffer[: stop - start]
            x_NH = torch.index_select(x_TH, 0, index_N, out=x_buffer[: stop - start]).to(compute_dtype)
            torch.mm(x_NH, w_VH.t(), out=logits_NV)
            to_gradient(logits_NV, index_N)
            if wants_weight:
                weight_sum.add(logits_NV, x_NH)
            if wants_hidden:
                torch.mm(logits_NV, w_VH, out=x_NH)  # the chunk's hidden states have served
                hidden_gradient.view(x_TH.shape).index_copy_(0, index_N, x_NH.to(hidden.dtype))
    if wants_weight:
        weight_gradient = weight_sum.result()
    return hidden_gradient, weight_gradient


def chunk_size(tokens: int, vocab: int, element_size: int) -> int:
    """Tokens of a chunk: at most what `LOGITS_BYTES` hold, in whole tiles where there is room, alike in all chunks."""
    most = max(1, LOGITS_BYTES // (vocab * element_size))
    if most >= tokens:
        return max(1, tokens)
    if most < _TILE:
        return most
    most = most // _TILE * _TILE
    chunks = -(-tokens // most)
    return -(-tokens // (chunks * _TILE)) * _TILE


def chunks(kept: torch.Tensor, tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """Bounds of the chunks that hold kept tokens; `kept` is their number, on the device."""
    start, end = 0, tokens
    is_cuda = kept.device.type == "cuda"
    if not is_cuda:
        end = int(kept)
    waits = is_cuda and tokens > size and not torch.cuda.is_current_stream_capturing()
    if waits:
        on_host = torch.empty((), dtype=kept.dtype, pin_memory=True).copy_(kept, non_blocking=True)
        has_arrived = torch.cuda.current_stream(kept.device).record_event()
    while start < end:
        stop = min(start + size, end)
        yield start, stop
        if waits and start == 0:
            # The first chunk's work is queued behind the copy, so that the GPU is busy while the host waits.
            has_arrived.synchronize()
            end = int(on_host)
        start = stop


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class WeightSum:
    """The weight's gradient, summed over chunks in fp32 (fp64 for fp64).

    The rows are in two halves, each in a buffer of its own: the result in 16 bits takes as much memory as one half in
    fp32, and is written over the first. So no third buffer is needed, and what stays is no larger than the result.
    """

    def __init__(self, weight: torch.Tensor):
        self.weight = weight
        rows, dtype = weight.shape[0], _sum_dtype(weight.dtype)
        first = min(rows, -(-rows // 128) * 64) if dtype.itemsize > weight.dtype.itemsize else rows
        self.parts = [weight.new_empty((n, weight.shape[1]), dtype=dtype) for n in (first, rows - first) if n]
        self.is_empty = True

    def add(self, gradient_NV: torch.Tensor, x_NH: torch.Tensor) -> None:
        """Add gradientᵀ · x."""
        for part, gradient_NP in zip(self.parts, gradient_NV.split(self.parts[0].shape[0], dim=1)):
            _add_product(part, gradient_NP.t(), x_NH, overwrite=self.is_empty)
        self.is_empty = False

    def result(self) -> torch.Tensor:
        """The sum in the weight's dtype and shape. The sum itself is gone then."""
        if self.is_empty:
            return torch.zeros_like(self.weight, memory_format=torch.contiguous_format)
        first, dtype, size = self.parts[0].view(-1), self.weight.dtype, self.weight.numel()
        if first.dtype == dtype:
            return self.parts[0]
        half = first.numel()
        result = first.view(dtype)[:size]
        # Twice as many elements each time: a range and the place that it goes to, at half the address, never overlap.
        done = min(half, 2**16)
        result[:done] = first[:done].to(dtype)
        while done < half:
            stop = min(2 * done, half)
            result[done:stop].copy_(first[done:stop])
            done = stop
        if len(self.parts) > 1:
            result[half:].copy_(self.parts[1].view(-1))
        return result.view(self.weight.shape)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, overwrite: bool) -> None:
    """total += a @ b, or total = a @ b, never rounded to 16 bits in between."""
    if a.dtype.itemsize == 2 and total.dtype == torch.float32 and total.device.type in DEVICES_WITH_FP32_SUMS:
        if overwrite:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif overwrite:
        torch.mm(a.to(total.dtype), b.to(total.dtype), out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


# --- Triton, or plain PyTorch -----------------------------------------------------------------------------------------


class _Plain:
    """The kernels of `triton_kernels.py` in plain PyTorch, for one chunk."""

    @staticmethod
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
        z_NV = logits.to(figures.dtype).mul_(inv_temperature)
        target_N1, is_ignored_N, nan_N = _Plain.targets(labels[index], ignore_index, z_NV)
        lse_N = z_NV.logsumexp(1)
        found = [lse_N - z_NV.gather(1, target_N1)[:, 0] - nan_N, lse_N]
        if all_figures:
            p_NV = (z_NV - lse_N[:, None]).exp_()
            is_top1_N = (z_NV.argmax(1) == target_N1[:, 0]) & ~nan_N.isnan()
            found += [lse_N - (p_NV * z_NV).sum(1), z_NV.mean(1), p_NV.square_().sum(1).log(), is_top1_N]
        for figure_T, figure_N in zip(figures, found):
            figure_T.index_copy_(0, index, figure_N.to(figures.dtype).masked_fill(is_ignored_N, 0))
        if gradient:
            p_NV = z_NV.sub_(lse_N[:, None]).exp_()
            p_NV.scatter_add_(1, target_N1, p_NV.new_full(target_N1.shape, -1))
            p_NV *= ((scale + nan_N) * inv_temperature)[:, None]
            logits.copy_(p_NV.masked_fill_(is_ignored_N[:, None], 0))

    @staticmethod
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
        z_NV = logits.to(lse.dtype).mul_(inv_temperature)
        target_N1, is_ignored_N, nan_N = _Plain.targets(labels[index], ignore_index, z_NV)
        p_NV = z_NV.sub_(lse[index][:, None]).exp_()
        p_NV.scatter_add_(1, target_N1, p_NV.new_full(target_N1.shape, -1))
        p_NV *= ((nan_N - upstream[index]) * inv_temperature)[:, None]
        logits.copy_(p_NV.masked_fill_(is_ignored_N[:, None], 0))

    @staticmethod
    def targets(
        labels_N: torch.Tensor, ignore_index: int, z_NV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Labels that can be read at (N, 1), which are ignored (N), and NaN where a label is out of range (N)."""
        is_ignored_N = labels_N == ignore_index
        is_valid_N = (labels_N >= 0) & (labels_N < z_NV.shape[1])
        nan_N = z_NV.new_zeros(labels_N.shape).masked_fill_(~is_valid_N, torch.nan)
        return labels_N.where(is_valid_N, 0)[:, None], is_ignored_N, nan_N


@functools.cache
def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why plain PyTorch must serve, or None."""
    if dtype == torch.float64:
        return "the Triton kernels compute in fp32, and the tensors are fp64"
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"the Triton kernels need CUDA, and the tensors are on {device.type}"
    return None


def kernels_for(device: torch.device, dtype: torch.dtype):
    """The module with the kernels, or their plain counterpart, with one warning that says why."""
    reason = why_not_triton(device, dtype)
    if reason is None:
        return _triton()
    warn_once(reason)
    return _Plain


def _dtype_of_products(kernels, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """fp32 for 16 bits in plain PyTorch on a CPU, whose own products of 16 bits took 15 times as long (2 cores)."""
    is_slow = kernels is _Plain and dtype.itemsize == 2 and device.type not in DEVICES_WITH_FP32_SUMS
    return torch.float32 if is_slow else dtype


@functools.cache
def warn_once(reason: str) -> None:
    warnings.warn(f"The linear cross-entropy runs in plain PyTorch, a chunk at a time: {reason}.", stacklevel=2)


def _triton():
    from . import triton_kernels

    return triton_kernels


# --- references -------------------------------------------------------------------------------------------------------


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """What `linear_cross_entropy` computes, with whole logits and PyTorch's own gradients; in fp64, what is right."""
    logits = _reference_logits(hidden, weight).reshape(-1, weight.shape[0])
    total = functional.cross_entropy(logits, labels.reshape(-1).long(), ignore_index=ignore_index, reduction="sum")
    return total / ((labels != ignore_index).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def linear_log_probs_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """What `linear_log_probs` computes, with whole logits and PyTorch's own gradients; in fp64, what is right."""
    is_ignored = labels == ignore_index
    log_probs = torch.log_softmax(_reference_logits(hidden, weight) / temperature, dim=-1)
    chosen = log_probs.gather(-1, labels.long().masked_fill(is_ignored, 0)[..., None])[..., 0]
    return chosen.masked_fill(is_ignored, 0)


def _reference_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = functional.linear(hidden, weight)
    return logits if logits.dtype == torch.float64 else logits.float()
