# SPDX-License-Identifier: Apache-2.0
"""Text to token ids, in a pool of processes that import neither PyTorch nor transformers."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from jai.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_IN_FLIGHT = 3  # batches for each process: one in work, one that waits, one that is being fetched


@dataclass(frozen=True)
class PackingTokenizer:
    """What a tokenizer is to packed shards.

    Attributes:
        name: folder or Hub id.
        sha256: of all that decides ids (`tokenizer_hash`).
        vocabulary: one more than the highest id.
        eos_token_id: ends every document.
        definition: the tokenizers library's JSON.
    """

    name: str
    sha256: str
    vocabulary: int
    eos_token_id: int
    definition: str

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integers that hold its ids, little-endian."""
        return np.dtype("<u2" if self.vocabulary <= 2**16 else "<u4")


def packing_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> PackingTokenizer:
    """Describe a tokenizer for packing.

    Raises:
        UserError: if it has no fast implementation, or no end-of-sequence token to put between documents.
    """
    from jai.tokenization.loading import backend_of

    backend = backend_of(name, tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer {name} has no eos_token, which ends every document. Set one and save it.")
    definition = _definition(backend)
    vocabulary = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return PackingTokenizer(name, tokenizer_hash(tokenizer), vocabulary, tokenizer.eos_token_id, definition)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides the ids of a document: pieces, merges, normalisation, special tokens, end of sequence.

    Padding and truncation, which calls of a tokenizer leave in it, do not count.
    """
    backend = tokenizer.backend_tokenizer
    return hashlib.sha256(f"{_definition(backend)} {tokenizer.eos_token_id}".encode()).hexdigest()


def _definition(backend: Tokenizer) -> str:
    definition = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return json.dumps(definition, sort_keys=True, ensure_ascii=False)


class TextBatch(Protocol):
    """Anything with texts to encode."""

    @property
    def texts(self) -> list[str]:
        """The texts, in order."""


Batch = TypeVar("Batch", bound=TextBatch)


def encode_batches(
    batches: Iterable[Batch], tokenizer: PackingTokenizer, workers: int
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Encode texts in several processes; results come in the order of the batches.

    No more than a few batches for each process are in memory. Text that spells a special token stays text. Each
    document ends with the end-of-sequence token.

    Args:
        batches: what is encoded.
        tokenizer: encodes it.
        workers: processes.

    Yields:
        Each batch, the ids of its texts one after another `(sum of lengths,)`, and the lengths `(texts,)`.

    Raises:
        UserError: if a process is killed, as the system does where memory runs out.
    """
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),  # threads of the parent, which fork would copy, may hold locks
        initializer=_start_process,
        initargs=(tokenizer.definition, tokenizer.eos_token_id, tokenizer.dtype.str),
    )
    waiting: deque[tuple[Batch, Future]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch.texts)))
            if len(waiting) >= workers * _IN_FLIGHT:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    except BrokenProcessPool as error:
        raise UserError(
            "A process that tokenised text was killed, probably because memory ran out. Give fewer `--workers`, or "
            "more memory; the same command goes on from there. (A script that packs needs `if __name__ == "
            "'__main__':` around it, for each of these processes imports it.)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(batch: Batch, result: Future) -> tuple[Batch, np.ndarray, np.ndarray]:
    ids, lengths = result.result()
    return batch, ids, lengths


_tokenizer: Tokenizer
_eos: int
_dtype: np.dtype


def _start_process(definition: str, eos: int, dtype: str) -> None:
    global _tokenizer, _eos, _dtype
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    from tokenizers import Tokenizer

    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = Tokenizer.from_str(definition)
    _tokenizer.encode_special_tokens = True  # "</s>" in a web page is text, not the end of a document
    _eos, _dtype = eos, np.dtype(dtype)


def _end_with_parent() -> None:
    """A pool's processes outlive a parent that is killed, waiting for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    documents = [np.zeros(0, _dtype)]
    for encoding in _tokenizer.encode_batch_fast(texts):
        ids = encoding.ids
        if not ids or ids[-1] != _eos:
            ids.append(_eos)
        documents.append(np.array(ids, _dtype))
    return np.concatenate(documents), np.array([len(document) for document in documents[1:]], np.int64)
