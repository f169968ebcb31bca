# SPDX-License-Identifier: Apache-2.0
"""The rows of `embed_tokens` and `lm_head`: those of the base, and new ones made from them (paper, section 3.1.1)."""

from collections.abc import Iterator
from functools import cache, lru_cache

import torch
import torch.nn.functional as F

from jai.conversion.convert.options import EmbeddingInit
from jai.conversion.convert.vocabulary import Vocabulary
from jai.conversion.inputs.parts import Computed, Part
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.output.drawn import normal

_ROWS_CHUNK = 256  # rows made at a time: 256 x 5120 in fp32 is 5 MB
_ROWS_KEPT = 2048  # of the pieces, which are few: 2048 x 5120 in bf16 is 21 MB


def embedding_parts(
    reader: CheckpointReader,
    name: str,
    vocabulary: Vocabulary,
    init: EmbeddingInit,
    seed: int,
    dtype: torch.dtype,
) -> tuple[Part, ...]:
    """What `embed_tokens` or `lm_head` is made of: rows of the base as they are, and new rows between or after them."""
    parts: list[Part] = []
    kept = 0  # the first row that may be the base's
    for ids in vocabulary.new_runs():
        if kept < ids.start:
            parts.append(reader.cast(name, dtype, kept, ids.start))
        parts.append(_new_rows(reader, name, ids, vocabulary, init, seed, dtype))
        kept = ids.stop
    if kept < vocabulary.size:
        parts.append(reader.cast(name, dtype, kept, vocabulary.size))
    return tuple(parts)


def _new_rows(
    reader: CheckpointReader,
    name: str,
    ids: range,
    vocabulary: Vocabulary,
    init: EmbeddingInit,
    seed: int,
    dtype: torch.dtype,
) -> Computed:
    width = reader.shapes[name][1]

    @cache
    def moments() -> tuple[torch.Tensor, torch.Tensor]:
        return _column_moments(reader, name, vocabulary.base_rows)

    def make() -> Iterator[torch.Tensor]:
        base_row = lru_cache(_ROWS_KEPT)(lambda id_: reader.rows(name, id_, id_ + 1))

        def new_row(id_: int) -> torch.Tensor:
            pieces = vocabulary.pieces.get(id_)
            if pieces and init != "random":
                return _merged_row(torch.cat([base_row(piece) for piece in pieces]).float(), init)
            mean, std = moments()
            return mean + std * normal(f"{name}.{id_}", width, seed)

        for at in range(ids.start, ids.stop, _ROWS_CHUNK):
            yield torch.stack([new_row(id_) for id_ in range(at, min(at + _ROWS_CHUNK, ids.stop))])

    formula = f"{name}[{ids.start}:{ids.stop}]: {init} of {name} (seed {seed})"
    return Computed(len(ids) * width * dtype.itemsize, formula, make, (reader.file_of(name),))


def _column_moments(reader: CheckpointReader, name: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each column over the base's rows, in fp32."""
    total = squares = torch.zeros(reader.shapes[name][1], dtype=torch.float64)
    for chunk in reader.chunks(name, 0, rows):
        values = chunk.double()
        total = total + values.sum(dim=0)
        squares = squares + values.square_().sum(dim=0)  # in place: a chunk in fp64 is 32 MB
    variance = (squares - total.square() / rows).clamp(min=0) / max(rows - 1, 1)
    return (total / rows).float(), variance.sqrt().float()


def _merged_row(pieces: torch.Tensor, init: EmbeddingInit) -> torch.Tensor:
    """Mean of the pieces' rows; `mean-normed` has their mean norm, for averaging n unlike rows takes a root of n."""
    mean = pieces.mean(dim=0)
    return F.normalize(mean, dim=0) * pieces.norm(dim=1).mean() if init == "mean-normed" else mean
