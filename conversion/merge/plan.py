# SPDX-License-Identifier: Apache-2.0
"""Every tensor of a merged checkpoint as a formula over the tensors of its inputs, computed when it is written."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import FileIO

import torch

from jai.conversion.inputs.parts import Computed, Copied, Part
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.merge import methods as merge_methods
from jai.conversion.merge.curves import layer_of, value_for
from jai.conversion.merge.methods import Passes
from jai.conversion.merge.options import MergeOptions
from jai.conversion.names import EMBEDDINGS, LM_HEAD
from jai.conversion.output.tensors import PlannedTensor
from jai.errors import UnfinishableError, UserError

# Values of a tensor at a time, 0.5 MB in fp32: those of a few models, and what TIES makes of them, stay small.
_CHUNK = 1 << 17
# Of methods whose result depends on it: what DARE drops, and the last digits of the sums of slerp.
FIXED_CHUNK = 1 << 19
_SMALLEST_SUM = 1e-6


def plan_merged_tensors(
    options: MergeOptions, readers: list[CheckpointReader], places: Sequence[int], *, ties_head: bool = False
) -> list[PlannedTensor]:
    """Every tensor of the output, in the order of the first model.

    Args:
        options: the merge.
        readers: the models' weights, before them the base's where the method has one.
        places: where each layer lies on the curves.
        ties_head: whether the configuration says that the head is the embeddings. Where all have a copy of them as
            their head, it is merged as they are, though it has another name and another place in the depth.

    Raises:
        UserError: if at some layer all weights are 0 or cannot be normalised, or if they depend on the layer and no
            tensor belongs to one.
    """
    first = readers[1 if options.has_base else 0]
    if not places and not all(curve.is_constant for curve in options.curves):
        raise UserError(
            f"The weights depend on the layer, but no tensor of {first.name} is named after one ('layers.N.'). Give "
            "constant weights."
        )
    ties_head = ties_head and EMBEDDINGS in first.shapes and not any(reader.has_untied_head for reader in readers)
    tensors = []
    for name, shape in first.shapes.items():
        dtype = getattr(torch, options.dtype) if options.dtype else first.dtypes[name]
        source = EMBEDDINGS if ties_head and name == LM_HEAD else name
        values = [value_for(curve, source, places) for curve in options.curves]
        part = _formula(options, readers, source, values).part(source, dtype)
        tensors.append(PlannedTensor(name, shape, dtype, (part,)))
    return tensors


def count_layers(reader: CheckpointReader) -> int:
    """Layers of a checkpoint, by the names of its tensors."""
    return max((layer + 1 for name in reader.shapes if (layer := layer_of(name)) is not None), default=0)


@dataclass(frozen=True)
class _Formula:
    """How a tensor is merged.

    Attributes:
        text: for people.
        sources: the weights that are read, those of weight 0 left out.
        run: the method, with its numbers; None takes the only source as it is.
        chunk: values at a time.
    """

    text: str
    sources: list[CheckpointReader]
    run: Callable[[Passes], Iterator[torch.Tensor]] | None = None
    chunk: int = _CHUNK

    def part(self, name: str, dtype: torch.dtype) -> Part:
        """The bytes of tensor `name` in `dtype`."""
        shape = self.sources[0].shapes[name]
        rows = shape[0] if shape else 1
        run = self.run
        if run is None:
            return self.sources[0].cast(name, dtype, 0, rows)
        ranges = [(source.copied(name, 0, rows), source.dtypes[name]) for source in self.sources]
        count = math.prod(shape)

        reads = tuple(dict.fromkeys(source.file_of(name) for source in self.sources))
        passes = partial(_chunks, ranges, count, self.chunk)
        return Computed(count * dtype.itemsize, f"{self.text} of {name}", partial(run, passes), reads)


def _formula(options: MergeOptions, readers: list[CheckpointReader], name: str, values: list[float]) -> _Formula:
    """How tensor `name` is merged, with the values that the curves have for it."""
    method = options.method
    if method == "slerp":
        (t,) = values
        if t in (0.0, 1.0):
            return _Formula("copy", [readers[int(t)]])
        return _Formula(f"slerp, t {t:.6g},", readers, partial(merge_methods.slerp, t=t, name=name), FIXED_CHUNK)

    if options.normalizes and method not in ("ties", "dare-ties"):
        values = _normalized(values, name)
    base, models = (readers[:1], readers[1:]) if options.has_base else ([], readers)
    live = [number for number, value in enumerate(values) if value]
    weights = [values[number] for number in live]
    sources = [*base, *(models[number] for number in live)]
    terms = " + ".join(f"{weight:.6g} x model {number + 1}" for number, weight in zip(live, weights))
    if method == "linear":
        if not live:
            raise UserError(f"All weights are 0 for {name}. Give at least one model a weight for each layer.")
        if weights == [1.0]:
            return _Formula("copy", sources)
        return _Formula(f"linear, {terms},", sources, partial(merge_methods.linear, weights=weights))

    if not live or not options.factor:
        return _Formula("copy", base)
    text = f"{method}, {terms}, scale {options.factor:g},"
    if method == "task-arithmetic":
        scaled = [weight * options.factor for weight in weights]
        return _Formula(text, sources, partial(merge_methods.task_arithmetic, weights=scaled))
    text = f"{text} density {options.kept:g},"
    if method == "ties":
        ties = partial(
            merge_methods.ties,
            weights=weights,
            density=options.kept,
            normalize=options.normalizes,
            scale=options.factor,
        )
        return _Formula(text, sources, ties)
    dare = partial(
        merge_methods.dare,
        weights=weights,
        density=options.kept,
        streams=[f"{options.drawn_with}:{number}:{name}" for number in live],
        elect_sign=method == "dare-ties",
        normalize=options.normalizes,
        scale=options.factor,
    )
    return _Formula(f"{text} seed {options.drawn_with},", sources, dare, FIXED_CHUNK)


def _normalized(values: list[float], name: str) -> list[float]:
    total = math.fsum(values)
    if abs(total) < _SMALLEST_SUM:
        raise UserError(
            f"The weights for {name} add up to {total:g} and cannot be normalised. Change them, or give --no-normalize."
        )
    return [value / total for value in values]


def _chunks(ranges: Sequence[tuple[Copied, torch.dtype]], count: int, chunk: int) -> Iterator[list[torch.Tensor]]:
    """The `count` values of each range in fp32, `chunk` at a time, in buffers that are used again."""
    size = min(chunk, count)
    values = [torch.empty(size) for _ in ranges]
    raw = [
        value if dtype == torch.float32 else torch.empty(size, dtype=dtype) for value, (_, dtype) in zip(values, ranges)
    ]
    with ExitStack() as stack:
        files = [stack.enter_context(source.files.path(source.file).open("rb", buffering=0)) for source, _ in ranges]
        for at in range(0, count, chunk):
            length = min(chunk, count - at)
            for file, (source, dtype), buffer, value in zip(files, ranges, raw, values):
                _read_into(file, source.start + at * dtype.itemsize, buffer[:length])
                if buffer is not value:
                    value[:length].copy_(buffer[:length])
            yield [value[:length] for value in values]


def _read_into(file: FileIO, start: int, buffer: torch.Tensor) -> None:
    view = buffer.view(torch.uint8).numpy().data
    while view:
        size = os.preadv(file.fileno(), [view], start)
        if not size:
            raise UnfinishableError(
                f"{file.name} is shorter than it was. Let nothing write to the inputs; fetch it and start again."
            )
        view, start = view[size:], start + size
