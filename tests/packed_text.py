# SPDX-License-Identifier: Apache-2.0
"""Packed corpora whose tokens say where they come from, for tests of plans."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jai.pretraining.shards import PackedCorpus, PackedSourceEntry, ShardWriter, write_index
from jai.pretraining.shares import Shares, SourceShare

EOS = 0


def packed_corpus(
    folder: Path,
    documents: Mapping[str, Sequence[int]],
    *,
    languages: Mapping[str, Sequence[str]] | None = None,
    quality: Mapping[str, Sequence[float]] | None = None,
    mixture: Mapping[str, dict] | None = None,
    shard_documents: int = 7,
    when_dry: str = "error",
) -> PackedCorpus:
    """A corpus of documents with these lengths by source; no two tokens of it are the same.

    Token t of document d of source s has the id 1 + (tokens before it in the corpus).
    """
    folder.mkdir(parents=True)
    entries, token = [], 1
    for name, lengths in documents.items():
        entry = PackedSourceEntry(name, list((languages or {}).get(name, [name])), name in (quality or {}))
        for number, first in enumerate(range(0, len(lengths), shard_documents)):
            part = np.array(lengths[first : first + shard_documents], np.int64)
            writer = ShardWriter(folder, f"{name}-{number:05}", entry.has_quality)
            scores = np.array((quality or {}).get(name, [])[first : first + shard_documents])
            ids = np.arange(token, token + part.sum(), dtype="<u4")
            writer.write(ids, part, scores if entry.has_quality else None)
            token += int(part.sum())
            entry.shards.append(writer.close())
        entry.documents, entry.tokens = len(lengths), int(sum(lengths))
        entries.append(entry)
    tokenizer = {"name": "none", "sha256": "0", "vocabulary": token, "eos_token_id": EOS}
    shares = Shares({name: SourceShare(**(mixture or {}).get(name, {})) for name in documents}, when_dry=when_dry)
    write_index(folder, np.dtype("<u4"), tokenizer, entries, shares, {})
    return PackedCorpus.open(folder)
