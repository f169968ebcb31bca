# SPDX-License-Identifier: Apache-2.0
"""Every tensor of a quantised checkpoint, planned: what bitsandbytes and `quantization_jai` read.

Of an expert stack these are the parameters of `JaiExperts4bit`; of a linear layer the parts of bitsandbytes'
`Linear4bit`. Blocks of 64 weights are quantised one by one, so a matrix goes through memory in chunks, and only its
scales are held.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from jai.configuration_jai import JaiConfig
from jai.conversion import names
from jai.conversion.inputs.jai import jai_shapes
from jai.conversion.inputs.parts import Computed
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.output.tensors import PlannedTensor
from jai.errors import UserError
from jai.quantization_jai import BLOCK, SCALE_BLOCK, compress_scales

QUANT_TYPE = "nf4"
# bitsandbytes' record of a matrix is JSON in a tensor. With double quantisation the mean of the scales is in it, whose
# text has more digits or fewer, and the header comes before the first scale: so the text is filled with blanks.
_RECORD_BYTES = 320
_RECORD = f"quant_state.bitsandbytes__{QUANT_TYPE}"
_CHUNK = 1 << 21  # weights at a time, a multiple of the block


@dataclass(frozen=True)
class QuantizedPlan:
    """Tensors of the output, and how many weights and bytes each part of the model has there.

    Attributes:
        tensors: in order.
        parts: part of the model -> its weights, its bytes, and whether it is quantised.
    """

    tensors: list[PlannedTensor]
    parts: dict[str, tuple[int, int, bool]]


def plan_quantized_tensors(
    reader: CheckpointReader, config: JaiConfig, dtype: torch.dtype, *, double: bool
) -> QuantizedPlan:
    """Every tensor of the output: experts and linear layers in NF4, all else in `dtype`.

    As in transformers, weights are rounded to `dtype` before they are quantised, and the head is left whole.

    Raises:
        UserError: if the experts have matrices whose columns are no multiple of 64.
    """
    tensors: list[PlannedTensor] = []
    parts: dict[str, tuple[int, int, bool]] = {}
    for name, shape in jai_shapes(config).items():
        if names.is_expert_stack(name):
            made, part = _expert_tensors(reader, name, shape, dtype, double), "experts"
        elif _is_linear(name):
            made = _linear_tensors(reader, name, shape, dtype, double)
            part = "attention" if "self_attn" in name else "MLPs"
        else:
            made = [PlannedTensor(name, shape, dtype, (reader.cast(name, dtype),))]
            part = "embeddings, head" if name in (names.EMBEDDINGS, names.LM_HEAD) else "norms, routers, …"
        tensors += made
        weights, size, _ = parts.get(part, (0, 0, False))
        made_bytes = sum(tensor.bytes for tensor in made)
        parts[part] = weights + math.prod(shape), size + made_bytes, len(made) > 1
    return QuantizedPlan(tensors, parts)


def _is_linear(name: str) -> bool:
    """Whether it is the weight of an `nn.Linear` other than the head."""
    return name.endswith("_proj.weight")


class _Matrix:
    """One matrix in NF4, made as it is written: its bytes in chunks, and its scales on the way.

    Args:
        reader: where its weights are.
        name: of the tensor that it is, or is a part of.
        start: the number of its first weight in the tensor.
        count: how many weights it has.
        dtype: what they are rounded to first.
        double: whether its scales are quantised too.
    """

    def __init__(
        self, reader: CheckpointReader, name: str, start: int, count: int, dtype: torch.dtype, *, double: bool
    ):
        self.count, self._dtype, self._double = count, dtype, double
        self._reader, self._name, self._start = reader, name, start
        self._statistics: list[torch.Tensor] | None = None

    def packed(self) -> Iterator[torch.Tensor]:
        """Two weights a byte."""
        from bitsandbytes.functional import quantize_4bit

        scales = []
        for at in range(0, self.count, _CHUNK):
            values = self._reader.values(self._name, self._start + at, min(_CHUNK, self.count - at))
            packed, state = quantize_4bit(values.to(self._dtype), blocksize=BLOCK, quant_type=QUANT_TYPE)
            scales.append(state.absmax)
            yield packed
        absmax = torch.cat(scales)
        self._statistics = compress_scales(absmax) if self._double else [absmax]

    def statistics(self) -> list[torch.Tensor]:
        """Its scales; with double quantisation their codes, the codes' scales, mean and map."""
        if self._statistics is None:  # an earlier run wrote the bytes, or another worker will
            for _ in self.packed():
                pass
        assert self._statistics is not None
        return self._statistics

    def release(self) -> None:
        """Hold the scales no longer: JAI-1 has 4.4 GB of them."""
        self._statistics = None

    def part(self, length: int, what: str, make: Callable[[], Iterable[torch.Tensor]]) -> Computed:
        """Bytes that are made of it."""
        return Computed(length, f"{what} of {self._name}", make, (self._reader.file_of(self._name),))

    def statistic(self, number: int, length: int, *, is_last: bool) -> Computed:
        """One of `statistics`."""

        def make() -> Iterator[torch.Tensor]:
            yield self.statistics()[number].reshape(-1)
            if is_last:
                self.release()

        return self.part(length, "scales", make)


def _expert_tensors(
    reader: CheckpointReader, name: str, shape: tuple[int, ...], dtype: torch.dtype, double: bool
) -> list[PlannedTensor]:
    """The parameters of `JaiExperts4bit` for one matrix of all experts."""
    experts, rows, columns = shape
    if columns % BLOCK:
        size = "intermediate_size" if name.endswith("down_proj") else "hidden_size"
        raise UserError(
            f"{size} of {reader.name} is {columns}, and experts are quantised in blocks of {BLOCK} weights: it must be "
            f"a multiple of {BLOCK}. Keep this model in 16 bits."
        )
    count = rows * columns
    blocks = count // BLOCK
    matrices = [_Matrix(reader, name, expert * count, count, dtype, double=double) for expert in range(experts)]

    def tensor(part: str, shape: tuple[int, ...], dtype: torch.dtype, number: int, is_last: bool) -> PlannedTensor:
        length = math.prod(shape) * dtype.itemsize // experts
        made = tuple(matrix.statistic(number, length, is_last=is_last) for matrix in matrices)
        return PlannedTensor(f"{name.removesuffix('_proj')}_{part}", shape, dtype, made, holds=0)

    packed = tuple(matrix.part(count // 2, "four bits", matrix.packed) for matrix in matrices)
    made = [
        PlannedTensor(name, (experts, count // 2), torch.uint8, packed, holds=math.prod(shape)),
        tensor("absmax", (experts, blocks), torch.uint8 if double else torch.float, 0, is_last=not double),
    ]
    if double:
        nested = (experts, math.ceil(blocks / SCALE_BLOCK))
        made += [
            tensor("nested_absmax", nested, torch.float, 1, is_last=False),
            tensor("nested_offset", (experts,), torch.float, 2, is_last=True),
            _constant(f"{name.removesuffix('_proj')}_nested_quant_map", 256, _dynamic_map),
        ]
    return made


def _linear_tensors(
    reader: CheckpointReader, name: str, shape: tuple[int, ...], dtype: torch.dtype, double: bool
) -> list[PlannedTensor]:
    """The parts of bitsandbytes' `Linear4bit`."""
    count = math.prod(shape)
    blocks = math.ceil(count / BLOCK)
    matrix = _Matrix(reader, name, 0, count, dtype, double=double)
    packed = math.ceil(count / 2)
    scale = torch.uint8 if double else torch.float
    absmax = (matrix.statistic(0, blocks * scale.itemsize, is_last=False),)
    four_bits = (matrix.part(packed, "four bits", matrix.packed),)
    made = [
        PlannedTensor(name, (packed, 1), torch.uint8, four_bits, holds=count),
        PlannedTensor(f"{name}.absmax", (blocks,), scale, absmax, holds=0),
        _constant(f"{name}.quant_map", 16, _nf4_map),
    ]
    if double:
        nested = math.ceil(blocks / SCALE_BLOCK)
        part = matrix.statistic(1, nested * torch.float.itemsize, is_last=False)
        made += [
            PlannedTensor(f"{name}.nested_absmax", (nested,), torch.float, (part,), holds=0),
            _constant(f"{name}.nested_quant_map", 256, _dynamic_map),
        ]

    def record() -> Iterator[torch.Tensor]:
        yield _record(shape, dtype, matrix.statistics()[2] if double else None)
        matrix.release()

    part = matrix.part(_RECORD_BYTES, "record", record)
    return [*made, PlannedTensor(f"{name}.{_RECORD}", (_RECORD_BYTES,), torch.uint8, (part,), holds=0)]


def _record(shape: tuple[int, ...], dtype: torch.dtype, nested_offset: torch.Tensor | None) -> torch.Tensor:
    """What bitsandbytes stores of a matrix beside its tensors: JSON, here with blanks behind it."""
    record: dict[str, Any] = {
        "quant_type": QUANT_TYPE,
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if nested_offset is not None:
        nested = {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": nested_offset.item()}
        record |= nested
    return torch.frombuffer(bytearray(json.dumps(record).encode().ljust(_RECORD_BYTES)), dtype=torch.uint8)


def _constant(name: str, size: int, make: Callable[[], torch.Tensor]) -> PlannedTensor:
    def values() -> Iterator[torch.Tensor]:
        yield make()

    part = Computed(size * torch.float.itemsize, name, values)
    return PlannedTensor(name, (size,), torch.float, (part,), holds=0)


def _nf4_map() -> torch.Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(QUANT_TYPE, device="cpu")


def _dynamic_map() -> torch.Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map()
