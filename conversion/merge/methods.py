# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of merging, in fp32 and in chunks; no files here.

Each method takes one tensor of several models as `passes`: a function that starts a new pass over the tensor and
yields, chunk after chunk, the fp32 values of each model. A method may overwrite what a pass yields. It yields the
merged chunks in the same order, each valid until the next is asked for. Where a method must know the whole tensor
first, it makes more passes instead of holding it.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from jai.errors import UserError

Passes = Callable[[], Iterable[list[torch.Tensor]]]

PARALLEL = 0.9995  # cosine beyond which slerp is lerp: sin(angle) is too small to divide by
_HIGH_BINS, _LOW_BITS = 1 << 16, 15  # of the 31 bits of a magnitude in fp32
_COUNTED = 1 << 16  # at a time: bincount makes 64-bit numbers of them, 20 MB of a process with whole chunks


def linear(passes: Passes, weights: Sequence[float]) -> Iterator[torch.Tensor]:
    """The weighted sum: sum of w_i x_i (model soups, arXiv 2203.05482, with equal weights)."""
    for values in passes():
        yield _weighted_sum(values, weights)


def task_arithmetic(passes: Passes, weights: Sequence[float]) -> Iterator[torch.Tensor]:
    """base + sum of w_i (x_i - base), the base first (task arithmetic, arXiv 2212.04089)."""
    return linear(passes, [1.0 - math.fsum(weights), *weights])


def slerp(passes: Passes, t: float, name: str) -> Iterator[torch.Tensor]:
    """Spherical interpolation from the first tensor (`t` 0) to the second (`t` 1) (Shoemake, SIGGRAPH 1985).

    The angle is that between the two whole tensors as vectors; their lengths are kept, not normalised. Where they are
    nearly parallel, one is zero, or there is only one value, this is linear interpolation.

    Raises:
        UserError: if they point in nearly opposite directions: no way round is the shortest, and the line between them
            goes through zero. `name` says which tensor it is.
    """
    dot, first_norm, second_norm, count = _products(passes, torch.float32)
    if not (math.isfinite(dot) and 0 < first_norm < math.inf and 0 < second_norm < math.inf):
        # Squares leave the range of fp32 where values are beyond 1e19 or below 1e-19.
        dot, first_norm, second_norm, count = _products(passes, torch.float64)
    lengths = first_norm * second_norm
    if lengths and dot / lengths < -PARALLEL and count > 1:
        raise UserError(
            f"{name} points in opposite directions in the two models (cosine {dot / lengths:.6f}), so slerp knows no "
            "way from one to the other. Are both trained from one checkpoint? --method linear merges them, though "
            "there the two cancel out."
        )
    return linear(passes, slerp_weights(dot, first_norm, second_norm, t))


def _products(passes: Passes, dtype: torch.dtype) -> tuple[float, float, float, int]:
    """Of two tensors: their product, their norms, and how many values each has."""
    dot = first_square = second_square = 0.0
    count = 0
    for first, second in passes():
        first, second = first.to(dtype), second.to(dtype)
        dot += torch.dot(first, second).item()
        first_square += torch.dot(first, first).item()
        second_square += torch.dot(second, second).item()
        count += first.numel()
    return dot, math.sqrt(first_square), math.sqrt(second_square), count


def slerp_weights(dot: float, first_norm: float, second_norm: float, t: float) -> tuple[float, float]:
    """The weights of the two tensors, from their product and their norms."""
    lengths = first_norm * second_norm
    if not lengths or abs(dot / lengths) > PARALLEL:
        return 1.0 - t, t
    angle = math.acos(dot / lengths)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def ties(
    passes: Passes, weights: Sequence[float], *, density: float, normalize: bool, scale: float
) -> Iterator[torch.Tensor]:
    """TIES: trim each model's change, elect a sign, merge what agrees with it (arXiv 2306.01708, section 3).

    Args:
        passes: the base first, then the models.
        weights: of the models.
        density: share of a model's changes that is kept, the largest. All that are as large as the last kept one are
            kept too, so that the result does not depend on an order.
        normalize: divide by the weights that agree (the paper's disjoint mean); else add up.
        scale: factor of the merged change (the paper's lambda).
    """
    thresholds = _trim_thresholds(passes, len(weights), density) if density < 1 else [0.0] * len(weights)
    for base, *models in passes():
        for model, threshold in zip(models, thresholds):
            change = model.sub_(base)
            if threshold:
                change.masked_fill_(change.abs() < threshold, 0.0)
        yield base.add_(_agreeing(models, weights, normalize=normalize), alpha=scale)


def dare(
    passes: Passes,
    weights: Sequence[float],
    *,
    density: float,
    streams: Sequence[str],
    elect_sign: bool,
    normalize: bool,
    scale: float,
) -> Iterator[torch.Tensor]:
    """DARE: drop each model's changes at random, rescale the rest, merge (arXiv 2311.03099, section 3.2).

    Args:
        passes: the base first, then the models.
        weights: of the models; of a plain sum they are used as they are.
        density: share of the changes that is kept; the kept ones are divided by it.
        streams: of each model, a name that its random numbers follow from, with the number of the chunk.
        elect_sign: merge as TIES does, without its trimming; else add up.
        normalize: as in `ties`.
        scale: factor of the merged change.
    """
    for number, (base, *models) in enumerate(passes()):
        for model, stream in zip(models, streams):
            kept = uniform(f"{stream}[{number}]", model.numel()).lt_(density)
            model.sub_(base).mul_(kept).div_(density)
        if elect_sign:
            change = _agreeing(models, weights, normalize=normalize)
        else:
            change = _weighted_sum(models, weights)
        yield base.add_(change, alpha=scale)


def uniform(name: str, count: int) -> torch.Tensor:
    """`count` numbers from [0, 1) in fp32, the same for the same name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # it reads only the low 32 bits of a seed
    return torch.rand(count, generator=generator)


def _weighted_sum(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """In the place of the first."""
    total = values[0].mul_(weights[0])
    for value, weight in zip(values[1:], weights[1:]):
        total.add_(value, alpha=weight)
    return total


def _agreeing(changes: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """Sum or weighted mean of the changes that have the sign of the sum of all; 0 where that is 0. In their place."""
    for change, weight in zip(changes, weights):
        change.mul_(weight)
    sign = changes[0].clone()
    for change in changes[1:]:
        sign.add_(change)
    sign.sign_()
    for change in changes:
        change.mul_(sign).clamp_min_(0.0)  # its size where it agrees, 0 elsewhere
    if normalize:
        agreeing = torch.zeros_like(sign)
        for change, weight in zip(changes, weights):
            agreeing.add_(change > 0, alpha=weight)
        agreeing.add_(agreeing == 0)
        sign.div_(agreeing)
    merged = changes[0]
    for change in changes[1:]:
        merged.add_(change)
    return merged.mul_(sign)


def _trim_thresholds(passes: Passes, models: int, density: float) -> list[float]:
    """For each model the size of its k-th largest change, k being `density` of their number.

    Sizes in fp32 are ordered as their bits are as whole numbers. One pass counts the high bits, which finds the bin of
    the k-th largest; a second counts the low bits within that bin. It is exact, and no values are held.
    """
    high = [torch.zeros(_HIGH_BINS, dtype=torch.int64) for _ in range(models)]
    low = [torch.zeros(1 << _LOW_BITS, dtype=torch.int64) for _ in range(models)]
    count = 0
    for base, *values in passes():
        count += base.numel()
        for value, bins in zip(values, high):
            for bits in _size_bits(value, base).split(_COUNTED):
                bins += torch.bincount(bits >> _LOW_BITS, minlength=_HIGH_BINS)
    found = [_bin_of(bins, max(1, round(density * count))) for bins in high]
    for base, *values in passes():
        for value, bins, (high_bits, _) in zip(values, low, found):
            for bits in _size_bits(value, base).split(_COUNTED):
                inside = bits[bits >> _LOW_BITS == high_bits] & ((1 << _LOW_BITS) - 1)
                bins += torch.bincount(inside, minlength=1 << _LOW_BITS)
    bits_of = [(high_bits << _LOW_BITS) + _bin_of(bins, left)[0] for bins, (high_bits, left) in zip(low, found)]
    return torch.tensor(bits_of, dtype=torch.int32).view(torch.float32).tolist()


def _size_bits(model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return model.sub_(base).abs_().view(torch.int32)


def _bin_of(bins: torch.Tensor, kept: int) -> tuple[int, int]:
    """The bin that holds the `kept`-th largest, and its place in that bin from above, counted from 1."""
    from_above = bins.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, kept))
    before = int(from_above[place - 1]) if place else 0
    return len(bins) - 1 - place, kept - before
