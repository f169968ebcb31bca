# SPDX-License-Identifier: Apache-2.0
"""The rows of `embed_tokens` and `lm_head` for a tokenizer that extends the base's (paper, section 3.1.1)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from jai.conversion.convert.options import EmbeddingInit
from jai.conversion.inputs.parts import Computed, Part
from jai.conversion.inputs.reader import CheckpointReader
from jai.conversion.output.drawn import normal
from jai.errors import UserError
from jai.tokenization.extend import new_token_pieces
from jai.tokenization.loading import RECORD_FILE as TOKENIZER_RECORD_FILE
from jai.tokenization.loading import has_tokenizer, load_backend_tokenizer

INIT_TEXTS: dict[EmbeddingInit, str] = {
    "mean": "mean of their pieces' rows",
    "random": "random, with the mean and standard deviation of the base's columns",
    "mean-normed": "mean of their pieces' rows, as long as those are",
}
_ROWS_CHUNK = 256  # rows made at a time: 256 x 5120 in fp32 is 5 MB
_ROWS_KEPT = 2048  # of the pieces, which are few: 2048 x 5120 in bf16 is 21 MB


@dataclass(frozen=True)
class Vocabulary:
    """How the output's vocabulary follows from the base's.

    Attributes:
        size: rows of the output's embeddings.
        pieces: ids of the base's pieces for each new row.
        without_pieces: id and string of the new rows that no piece explains; these are drawn at random.
    """

    size: int
    pieces: dict[int, list[int]]
    without_pieces: dict[int, str]

    @property
    def new_rows(self) -> int:
        return len(self.pieces) + len(self.without_pieces)


def load_vocabulary(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, or None where it has no tokenizer files. Runs no code from the folder."""
    return load_backend_tokenizer(folder) if has_tokenizer(folder) else None


def plan_vocabulary(
    base_size: int,
    base: Tokenizer | None,
    extended: Tokenizer | None,
    extended_folder: Path | None = None,
) -> Vocabulary:
    """Find the rows to add for an extended tokenizer (paper, section 3.1.1).

    Args:
        base_size: rows of the base model's embeddings.
        base: the base's tokenizer.
        extended: the tokenizer of the output; None keeps the base's vocabulary.
        extended_folder: where `extended` was read from. If its training is recorded there, the pieces must be those
            of the record.

    Raises:
        UserError: if `extended` is smaller than `base`, gives one of its tokens another id, or was trained from
            another base than this.
    """
    if extended is None:
        return Vocabulary(base_size, {}, {})
    if base is None:
        raise UserError(
            "--tokenizer was given, but BASE has no tokenizer files, so the pieces of new tokens cannot be found. Put "
            "the base's tokenizer.json and tokenizer_config.json into its folder."
        )
    size, base_entries = extended.get_vocab_size(), base.get_vocab_size()
    if size < base_entries:
        raise UserError(
            f"The tokenizer has {size:,} entries, fewer than the base's {base_entries:,}. Give one that extends the "
            "base's (jai tokenizer train)."
        )
    pieces = new_token_pieces(base, extended)
    surfaces = {id_: extended.id_to_token(id_) or "" for id_ in pieces}
    if extended_folder and (extended_folder / TOKENIZER_RECORD_FILE).exists():
        _check_tokenizer_record(extended_folder / TOKENIZER_RECORD_FILE, pieces, surfaces)
    # Entries without pieces are reserved strings; the base has rows for some of them (phi-3: 32011 to 32063).
    return Vocabulary(
        size=max(size, base_size),
        pieces={id_: ids for id_, ids in pieces.items() if ids},
        without_pieces={id_: surfaces[id_] for id_, ids in pieces.items() if not ids and id_ >= base_size},
    )


def _check_tokenizer_record(path: Path, pieces: dict[int, list[int]], surfaces: dict[int, str]) -> None:
    try:
        recorded = {
            int(id_): (entry["surface"], entry["pieces"])
            for id_, entry in json.loads(path.read_text(encoding="utf-8"))["new_tokens"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is no record of a tokenizer's training. Remove it, or train the tokenizer again "
            "(jai tokenizer train)."
        ) from None
    found = {id_: (surfaces[id_], ids) for id_, ids in pieces.items()}
    differing = sorted(id_ for id_ in found.keys() | recorded.keys() if found.get(id_) != recorded.get(id_))
    if differing:
        first = differing[0]
        raise UserError(
            f"The tokenizer is not the one that {path} records, or BASE is not its base: {len(differing):,} of the new "
            f"tokens differ, first {first}, which is {_token_text(recorded.get(first))} in the record and "
            f"{_token_text(found.get(first))} by the two tokenizers. Give the base that the tokenizer was trained from "
            "and the folder as `jai tokenizer train` wrote it, or train it again."
        )


def _token_text(token: tuple[str, list[int]] | None) -> str:
    return f"{token[0]!r} of the pieces {token[1]}" if token else "missing"


def embedding_parts(
    reader: CheckpointReader,
    name: str,
    base_rows: int,
    vocabulary: Vocabulary,
    init: EmbeddingInit,
    seed: int,
    dtype: torch.dtype,
) -> tuple[Part, ...]:
    """What `embed_tokens` or `lm_head` is made of: rows of the base as they are, and new rows between or after them."""

    def is_new(id_: int) -> bool:
        return id_ >= base_rows or id_ in vocabulary.pieces or id_ in vocabulary.without_pieces

    parts = []
    for new, group in groupby(range(vocabulary.size), key=is_new):
        ids = list(group)
        start, stop = ids[0], ids[-1] + 1
        if not new:
            parts.append(reader.cast(name, dtype, start, stop))
            continue
        parts.append(_new_rows(reader, name, base_rows, range(start, stop), vocabulary, init, seed, dtype))
    return tuple(parts)


def _new_rows(
    reader: CheckpointReader,
    name: str,
    base_rows: int,
    ids: range,
    vocabulary: Vocabulary,
    init: EmbeddingInit,
    seed: int,
    dtype: torch.dtype,
) -> Computed:
    width = reader.shapes[name][1]

    @cache
    def moments() -> tuple[torch.Tensor, torch.Tensor]:
        return _column_moments(reader, name, base_rows)

    def make() -> Iterator[torch.Tensor]:
        base_row = lru_cache(_ROWS_KEPT)(lambda id_: reader.rows(name, id_, id_ + 1))
        for at in range(ids.start, ids.stop, _ROWS_CHUNK):
            rows = torch.zeros(min(_ROWS_CHUNK, ids.stop - at), width)
            for i, row in enumerate(rows):
                id_ = at + i
                pieces = vocabulary.pieces.get(id_, ())
                if pieces and init != "random":
                    row.copy_(_merged_row(torch.cat([base_row(piece) for piece in pieces]).float(), init))
                elif pieces or id_ in vocabulary.without_pieces:
                    mean, std = moments()
                    row.copy_(mean + std * normal(f"{name}.{id_}", width, seed))
            yield rows

    formula = f"{name}[{ids.start}:{ids.stop}]: {init} of {name} (seed {seed})"
    return Computed(len(ids) * width * dtype.itemsize, formula, make, (reader.read_shard(name),))


def _column_moments(reader: CheckpointReader, name: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each column over the base's rows, in fp32."""
    total = squares = torch.zeros(reader.shapes[name][1], dtype=torch.float64)
    for chunk in reader.chunks(name, 0, rows):
        values = chunk.double()
        total, squares = total + values.sum(dim=0), squares + values.square().sum(dim=0)
    variance = (squares - total.square() / rows).clamp(min=0) / max(rows - 1, 1)
    return (total / rows).float(), variance.sqrt().float()


def _merged_row(pieces: torch.Tensor, init: EmbeddingInit) -> torch.Tensor:
    """Mean of the pieces' rows; `mean-normed` has their mean norm, for averaging n unlike rows takes a root of n."""
    mean = pieces.mean(dim=0)
    return F.normalize(mean, dim=0) * pieces.norm(dim=1).mean() if init == "mean-normed" else mean
