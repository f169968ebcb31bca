# SPDX-License-Identifier: Apache-2.0
"""Every tensor of a merged checkpoint: copied, replaced by the adapter's, or W + scale * B @ A, some rows at a time.

PEFT's order: the first factor of an expert stack, `lora_A`, is `(E * rank, in)` with the experts slowest; the second,
`lora_B`, `(out, rank * E)` with the experts fastest. Where both stacks of a layer are adapted, the wrapper of the
first is inside that of the second, and has `.base_layer` in its name.
"""

import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch

from jai.conversion import names
from jai.conversion.adapter.files import AdapterConfig
from jai.conversion.inputs.parts import Computed, Part
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.output.tensors import PlannedTensor
from jai.errors import UserError

SCORE = "score.weight"  # the head of a reward model, which its base has not
_IN_PEFT = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"
_CHUNK = 1 << 21  # values at a time, 8 MB in fp32
_STACKS = ("gate_up_proj", "down_proj")  # in the order in which PEFT finds them in a module
_NAMED = 3


def shapes_with_adapter(
    shapes: dict[str, tuple[int, ...]], adapter: CheckpointReader, hidden_size: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of the output: the base's, and of a reward model its head in place of the head for words.

    Raises:
        UserError: if that head was trained on a model of another width.
    """
    score = adapter.shapes.get(_IN_PEFT + SCORE)
    if score is None:
        return shapes
    _take({SCORE: score}, SCORE, (score[0], hidden_size), "the last layer's norm")
    return {name: shape for name, shape in shapes.items() if name != names.LM_HEAD} | {SCORE: score}


def plan_adapted_tensors(
    base: CheckpointReader, adapter: CheckpointReader, config: AdapterConfig, shapes: dict[str, tuple[int, ...]]
) -> tuple[list[PlannedTensor], Counter[str]]:
    """Every tensor of the output, and how many are adapted by LoRA, replaced, or have new rows.

    Args:
        base: the model's weights.
        adapter: the adapter's.
        config: the adapter's configuration.
        shapes: of the tensors to write, by name.

    Raises:
        UserError: if something in the adapter fits no weight of the model.
    """
    left = dict(adapter.shapes)
    tensors, counts = [], Counter[str]()
    for name, shape in shapes.items():
        dtype = base.dtypes[name if name in base.dtypes else names.FINAL_NORM]
        parts: tuple[Part, ...] = (base.copied(name),) if name in base.dtypes else ()
        if (whole := _IN_PEFT + name) in left:
            _take(left, whole, shape, name)
            parts, counts["replaced"] = (adapter.cast(whole, dtype),), counts["replaced"] + 1
        elif factors := _factors(left, name, config):
            parts = (_with_lora(base, adapter, name, shape, factors, config, left),)
            counts["adapted"] += 1
        elif (rows := _IN_PEFT + name.removesuffix(".weight") + _ROWS) in left:
            ids = _row_ids(name, config)
            _take(left, rows, (len(ids), *shape[1:]), name)
            if max(ids, default=0) >= shape[0]:
                raise UserError(f"{adapter.name} has row {max(ids)} of {name}, and {base.name} has {shape[0]} rows.")
            parts = tuple(_with_rows(base, adapter, name, rows, ids))
            counts["with new rows"] += 1
        tensors.append(PlannedTensor(name, shape, dtype, parts))
    if left:
        first = sorted(left)[:_NAMED]
        raise UserError(
            f"{adapter.name} holds what {base.name} has no place for: {', '.join(first)} ({len(left)} in all). It was "
            "trained on a model of another plan: give that one with --base."
        )
    return tensors, counts


def _take(left: dict[str, tuple[int, ...]], key: str, expected: tuple[int, ...], name: str) -> None:
    """Count something of the adapter as used.

    Raises:
        UserError: if it has another shape than the model needs.
    """
    if left[key] != expected:
        raise UserError(
            f"The adapter's {key} is {left[key]}, and {name} of the model needs {expected}: it was trained on a model "
            "of another size or number of experts. Give that one with --base."
        )
    del left[key]


def _factors(left: dict[str, tuple[int, ...]], name: str, config: AdapterConfig) -> tuple[str, str] | None:
    """Names of both factors of a weight, None where it has none."""
    module = name.removesuffix(".weight")
    if names.is_expert_stack(name):
        module, _, stack = name.rpartition(".")
        adapted = [each for each in _STACKS if _is_target(f"{module}.{each}", config)]
        if stack not in adapted:
            return None
        module += ".base_layer" * (len(adapted) - 1 - adapted.index(stack))
    a, b = (f"{_IN_PEFT}{module}.lora_{factor}.weight" for factor in "AB")
    if a in left and b in left:
        return a, b
    return None


def _is_target(name: str, config: AdapterConfig) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in config.parameters)


def _with_lora(
    base: CheckpointReader,
    adapter: CheckpointReader,
    name: str,
    shape: tuple[int, ...],
    factors: tuple[str, str],
    config: AdapterConfig,
    left: dict[str, tuple[int, ...]],
) -> Computed:
    experts = shape[0] if len(shape) == 3 else 1
    rows, columns = shape[-2:]
    a, b = factors
    _take(left, a, (experts * config.rank, columns), name)
    _take(left, b, (rows, config.rank * experts), name)

    def make() -> Iterator[torch.Tensor]:
        a_EKC = adapter.rows(a).float().view(experts, config.rank, columns)
        b_RKE = adapter.rows(b).float().view(rows, config.rank, experts)
        step = max(1, _CHUNK // columns)
        for expert in range(experts):
            for start in range(0, rows, step):
                count = min(step, rows - start)
                values = base.values(name, (expert * rows + start) * columns, count * columns)
                change = b_RKE[start : start + count, :, expert] @ a_EKC[expert]
                yield values.float().view(count, columns) + config.scale * change

    size = math.prod(shape) * base.dtypes[name].itemsize
    reads = (base.file_of(name), adapter.file_of(a))
    return Computed(size, f"{name} + {config.scale:g} * LoRA", make, reads)


def _row_ids(name: str, config: AdapterConfig) -> list[int]:
    module = name.removesuffix(".weight")
    return next((ids for ending, ids in config.rows.items() if f".{module}".endswith(f".{ending}")), [])


def _with_rows(
    base: CheckpointReader, adapter: CheckpointReader, name: str, rows: str, ids: list[int]
) -> Iterator[Part]:
    """The embeddings in runs: of the base as they are, and of the adapter."""
    place_of = {id_: place for place, id_ in enumerate(ids)}
    total, width = base.shapes[name]
    dtype = base.dtypes[name]
    for start, stop, is_new in _runs(sorted(place_of), total):
        if not is_new:
            yield base.copied(name, start, stop)
            continue
        places = [place_of[id_] for id_ in range(start, stop)]
        size = (stop - start) * width * dtype.itemsize
        make = partial(_chosen_rows, adapter, rows, places)
        yield Computed(size, f"{name}[{start}:{stop}] of the adapter", make, (adapter.file_of(rows),))


def _chosen_rows(adapter: CheckpointReader, name: str, places: list[int]) -> Iterator[torch.Tensor]:
    for place in places:
        yield adapter.rows(name, place, place + 1)


def _runs(new: list[int], total: int) -> Iterator[tuple[int, int, bool]]:
    """Runs of rows, each all new or all old; `new` is sorted."""
    bounds = [0, total]
    for id_, before in zip(new, [-2, *new]):
        if id_ != before + 1:
            bounds += [id_] if before < 0 else [before + 1, id_]
    if new:
        bounds.append(new[-1] + 1)
    is_new = set(new)
    for start, stop in pairwise(sorted(set(bounds))):
        yield start, stop, start in is_new
