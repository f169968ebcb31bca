# SPDX-License-Identifier: Apache-2.0
"""The order in which a source's documents come: shuffled anew in each epoch, found at any token without a search.

Documents are shuffled in two steps, so that neither memory nor the disk's head has to hold all of them at once. Chunks
of 1,024 neighbours are shuffled over the whole source; then the documents of 64 chunks that follow each other in this
order are shuffled among each other. A source of up to 65,536 documents is thus shuffled evenly; a document of a larger
one comes among 65,535 others from 64 places. Parallel documents stay beside each other.
"""

import itertools
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from jai.pretraining.shards import PackedSource
from jai.pretraining.shares import DocumentChoice

CHUNK_ROWS, GROUP_CHUNKS = 1024, 64
_Value = TypeVar("_Value")


def random_bits(*key: int) -> np.random.PCG64:
    """Random bits that are the same for the same key, in every version of NumPy.

    `Generator`'s methods may draw otherwise in the next version; a bit generator's stream is guaranteed.
    """
    return np.random.PCG64(np.random.SeedSequence(key))


def shuffled(count: int, *key: int) -> np.ndarray:
    """The numbers below `count` in an order that the key decides, as int64."""
    return np.argsort(random_bits(*key).random_raw(count), kind="stable")


class Recent(Generic[_Value]):
    """The last few values of a function that is slow.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int):
        self.size = size
        self._values: OrderedDict[object, _Value] = OrderedDict()

    def get(self, key: object, make: Callable[[], _Value]) -> _Value:
        """The value of a key, made where it is not at hand."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self.size:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        return self._values[key]


@dataclass(frozen=True)
class Pieces:
    """Parts of documents, as columns of int64.

    Attributes:
        source: index of the source; -1 is padding.
        document: number in the source.
        start, stop: its tokens from `start` until before `stop`.
        language: index of the document's language in the plan's `languages`; -1 is padding.
    """

    source: np.ndarray
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    language: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return self.stop - self.start

    def __getitem__(self, which: slice | np.ndarray) -> "Pieces":
        return Pieces(
            self.source[which], self.document[which], self.start[which], self.stop[which], self.language[which]
        )


@dataclass(frozen=True)
class _Epoch:
    """Chunks in the order of one epoch, and the token at which each group of them begins (and the last one ends)."""

    chunks: np.ndarray
    group_starts: np.ndarray


@dataclass(frozen=True)
class _Group:
    """The documents of a group in their order, and the token of the epoch at which each begins (and the last ends)."""

    documents: np.ndarray
    starts: np.ndarray


class SourceOrder:
    """A source as one stream of tokens, epoch after epoch.

    Args:
        source: the packed source.
        seed: another seed gives another order.
        choice: of its documents. Of parallel ones, all are kept whose first is.

    Attributes:
        documents: how many are kept.
        tokens: of an epoch.
    """

    def __init__(self, source: PackedSource, seed: int, choice: DocumentChoice):
        self.source, self.seed, self.choice = source, seed, choice
        # The name, not the place in the configuration: an added source leaves the others' order as it is. With another
        # choice, the order is another, so that annealing does not see again what came first.
        self._key = zlib.crc32(f"{source.name} {choice.keep_best} {choice.min_tokens} {choice.max_tokens}".encode())
        self._width = len(source.entry.languages)
        self._chunk_documents = CHUNK_ROWS * self._width
        self._threshold = _threshold(source, choice.keep_best) if choice.keep_best < 1 else None
        self._chunk_tokens, self.documents = self._count()
        self.tokens = int(self._chunk_tokens.sum())
        self._epochs: Recent[_Epoch] = Recent(2)
        self._groups: Recent[_Group] = Recent(2)

    def pieces(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents that hold the stream's tokens from `start` until before `stop`.

        Returns:
            document, start and stop of each piece, `(pieces,)` each. Only the first may begin inside of its document,
            and only the last may end there.
        """
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64),) * 3]
        while start < stop:
            epoch, at = divmod(start, self.tokens)
            table = self._epochs.get(epoch, lambda: self._epoch(epoch))  # noqa: B023  # called here
            number = int(np.searchsorted(table.group_starts, at, "right")) - 1
            group = self._groups.get((epoch, number), lambda: self._group(epoch, number, table))  # noqa: B023
            end = min(int(group.starts[-1]), at + stop - start)
            first = int(np.searchsorted(group.starts, at, "right")) - 1
            last = int(np.searchsorted(group.starts, end, "left"))
            starts = group.starts[first:last]
            found.append(
                (
                    group.documents[first:last],
                    np.maximum(at - starts, 0),
                    np.minimum(group.starts[first + 1 : last + 1], end) - starts,
                )
            )
            start += end - at
        documents, starts, stops = map(np.concatenate, zip(*found))
        return documents, starts, stops

    def longest(self) -> int:
        """Tokens of the longest document that is kept; it reads the borders of all."""
        step = GROUP_CHUNKS * self._chunk_documents
        firsts = range(0, self.source.documents, step)
        return max(
            int(self._chosen(first, min(first + step, self.source.documents))[1].max(initial=0)) for first in firsts
        )

    def _count(self) -> tuple[np.ndarray, int]:
        """Tokens that are kept of each chunk, and documents of all of them."""
        borders = [*range(0, self.source.documents, self._chunk_documents), self.source.documents]
        if self.choice.is_all:
            return np.diff([self.source.tokens_before(border) for border in borders]), self.source.documents
        tokens, documents = [], 0
        for first, last in itertools.pairwise(borders):
            lengths = self._chosen(first, last)[1]
            tokens.append(int(lengths.sum()))
            documents += len(lengths)
        return np.array(tokens), documents

    def _chosen(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents from `first` until before `last` that are used, and their lengths."""
        documents, lengths = np.arange(first, last), self.source.lengths(first, last)
        if self.choice.is_all:
            return documents, lengths
        kept = lengths >= self.choice.min_tokens
        if self.choice.max_tokens is not None:
            kept &= lengths <= self.choice.max_tokens
        if self._threshold is not None:
            kept &= self.source.quality(first, last) >= self._threshold
        kept = np.repeat(kept[:: self._width], self._width)  # chunks begin with a row
        return documents[kept], lengths[kept]

    def _epoch(self, epoch: int) -> _Epoch:
        chunks = shuffled(len(self._chunk_tokens), self.seed, self._key, epoch)
        tokens = np.concatenate([[0], np.cumsum(self._chunk_tokens[chunks])])
        return _Epoch(chunks, np.append(tokens[:-1:GROUP_CHUNKS], tokens[-1]))

    def _group(self, epoch: int, number: int, table: _Epoch) -> _Group:
        chunks = table.chunks[number * GROUP_CHUNKS : (number + 1) * GROUP_CHUNKS]
        parts, lengths = [], []
        for first in (chunks * self._chunk_documents).tolist():
            chunk, of_chunk = self._chosen(first, min(first + self._chunk_documents, self.source.documents))
            parts.append(chunk)
            lengths.append(of_chunk)
        documents = np.concatenate(parts).reshape(-1, self._width)
        order = shuffled(len(documents), self.seed, self._key, epoch, number)
        ends = np.cumsum(np.concatenate(lengths).reshape(-1, self._width)[order])
        return _Group(documents[order].reshape(-1), table.group_starts[number] + np.concatenate([[0], ends]))


def _threshold(source: PackedSource, keep_best: float) -> np.float32:
    """The lowest score among the best."""
    scores = source.quality(0, source.documents)
    kept = max(1, round(keep_best * len(scores)))
    return np.partition(scores, len(scores) - kept)[len(scores) - kept]
