# SPDX-License-Identifier: Apache-2.0
"""Packed shards: token ids and document borders as files that are mapped into memory, and the index of a folder.

packed.json                 the index: tokenizer, dtype, sources with their shards, hashes
SOURCE-00000.tokens         ids, one document after another, uint16 or uint32 (little-endian)
SOURCE-00000.ends           int64 for each document: where it ends in .tokens
SOURCE-00000.quality        float32 for each document, where the source has scores
SOURCE-00000.json           which rows of which files the shard was made of
"""

import bisect
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from jai.errors import UserError
from jai.files import from_json, read_json, sha256
from jai.pretraining.shares import Shares

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX_FILE = "packed.json"
FORMAT = 1
ENDS_DTYPE, QUALITY_DTYPE = np.dtype("<i8"), np.dtype("<f4")
_REMEDY = "Pack the corpus again, or fetch the folder again."


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the index.

    Attributes:
        name: of its files, without their endings.
        documents: how many it has.
        tokens: how many, ends of sequence included.
        sha256: of its files by ending.
    """

    name: str
    documents: int = 0
    tokens: int = 0
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass
class PackedSourceEntry:
    """A source in the index.

    Attributes:
        name: of the source.
        languages: of its documents, in turn: several where the source is parallel.
        has_quality: whether each document has a score.
        documents, tokens: of all its shards.
        bytes: of its text in UTF-8.
        empty: rows without text, which were left out.
        shards: in order.
        licence: of the text, if the configuration named one.
    """

    name: str
    languages: list[str]
    has_quality: bool
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    shards: list[ShardEntry] = field(default_factory=list)
    licence: str | None = None


class ShardWriter:
    """Writes one shard; what it holds goes to the disk at once.

    Args:
        folder: where its files go.
        name: of its files.
        has_quality: whether it has scores.
    """

    def __init__(self, folder: Path, name: str, has_quality: bool):
        self.name = name
        self.documents = self.tokens = 0
        endings = ["tokens", "ends", *(["quality"] if has_quality else [])]
        self._files: dict[str, BinaryIO] = {ending: (folder / f"{name}.{ending}").open("wb") for ending in endings}
        self._hashes = {ending: hashlib.sha256() for ending in endings}

    def write(self, ids: np.ndarray, lengths: np.ndarray, quality: np.ndarray | None) -> None:
        """Append documents.

        Args:
            ids: `(sum of lengths,)` in the corpus' dtype.
            lengths: `(documents,)`.
            quality: `(documents,)`, None where there are no scores.
        """
        self._append("tokens", ids)
        self._append("ends", (self.tokens + np.cumsum(lengths)).astype(ENDS_DTYPE))
        if quality is not None:
            self._append("quality", quality.astype(QUALITY_DTYPE))
        self.documents += len(lengths)
        self.tokens += len(ids)

    def close(self) -> ShardEntry:
        """Close the files, and describe them."""
        for file in self._files.values():
            file.close()
        hashes = {ending: each.hexdigest() for ending, each in self._hashes.items()}
        return ShardEntry(self.name, self.documents, self.tokens, hashes)

    def _append(self, ending: str, values: np.ndarray) -> None:
        self._files[ending].write(values.data)
        self._hashes[ending].update(values.data)


class PackedSource:
    """The documents of a source, numbered over all its shards. Files are mapped when they are first used."""

    def __init__(self, folder: Path, entry: PackedSourceEntry, dtype: np.dtype):
        self.folder, self.entry, self.dtype = folder, entry, dtype
        self._first_document = [0, *accumulate(shard.documents for shard in entry.shards)]
        self._first_token = [0, *accumulate(shard.tokens for shard in entry.shards)]
        self._maps: dict[tuple[int, str], np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A memory map is pickled as all that it maps; another process maps it anew.
        return self.__dict__ | {"_maps": {}}

    def named(self, name: str) -> "PackedSource":
        """The same documents as a source of another name."""
        return PackedSource(self.folder, replace(self.entry, name=name), self.dtype)

    @property
    def name(self) -> str:
        """Of the source."""
        return self.entry.name

    @property
    def documents(self) -> int:
        """How many documents it has."""
        return self.entry.documents

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return self.entry.tokens

    def lengths(self, first: int, last: int) -> np.ndarray:
        """Tokens of the documents from `first` until before `last`, as int64."""
        parts = [np.zeros(0, np.int64)]
        for number, start, stop in self._parts(first, last):
            ends = self._map(number, "ends")
            parts.append(np.diff(ends[start:stop], prepend=ends[start - 1] if start else 0))
        return np.concatenate(parts)

    def tokens_before(self, document: int) -> int:
        """Tokens of all documents before this one."""
        number = bisect.bisect_right(self._first_document, document) - 1
        if number == len(self.entry.shards):
            return self.tokens
        index = document - self._first_document[number]
        ends = self._map(number, "ends")
        return self._first_token[number] + (int(ends[index - 1]) if index else 0)

    def quality(self, first: int, last: int) -> np.ndarray:
        """Scores of the documents from `first` until before `last`, as float32."""
        parts = [self._map(number, "quality")[start:stop] for number, start, stop in self._parts(first, last)]
        return np.concatenate([np.zeros(0, QUALITY_DTYPE), *parts])

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Ids of a document, or of its tokens from `start` until before `stop`: a view of the file."""
        number = bisect.bisect_right(self._first_document, document) - 1
        ends, index = self._map(number, "ends"), document - self._first_document[number]
        begin = int(ends[index - 1]) if index else 0
        end = int(ends[index]) if stop is None else begin + stop
        return self._map(number, "tokens")[begin + start : end]

    def file_of(self, document: int) -> Path:
        """The file of ids that a document is in."""
        number = bisect.bisect_right(self._first_document, document) - 1
        return self.folder / f"{self.entry.shards[number].name}.tokens"

    def _parts(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """The shards that hold these documents, by number, and which of theirs these are."""
        number = bisect.bisect_right(self._first_document, first) - 1
        while first < last:
            begin, end = self._first_document[number : number + 2]
            if first < end:
                yield number, first - begin, min(last, end) - begin
                first = min(last, end)
            number += 1

    def _map(self, number: int, ending: str) -> np.ndarray:
        found = self._maps.get((number, ending))
        if found is None:
            found = self._maps[number, ending] = self._open(number, ending)
        return found

    def _open(self, number: int, ending: str) -> np.ndarray:
        shard = self.entry.shards[number]
        path = self.folder / f"{shard.name}.{ending}"
        dtype = {"tokens": self.dtype, "ends": ENDS_DTYPE, "quality": QUALITY_DTYPE}[ending]
        expected = shard.tokens if ending == "tokens" else shard.documents
        try:
            # As a plain array: slices of a memmap are five times as slow.
            values = np.asarray(np.memmap(path, dtype, "r"))
        except (OSError, ValueError) as error:
            raise UserError(f"The shard {path} cannot be read: {error}. {_REMEDY}") from error
        if len(values) != expected:  # since the corpus was opened
            raise UserError(f"The shard {path} has {len(values):,} entries; expected {expected:,}. {_REMEDY}")
        if ending == "ends" and not (values[-1] == shard.tokens and (np.diff(values, prepend=0) > 0).all()):
            raise UserError(f"The shard {path} is damaged: its borders do not divide {shard.tokens:,} ids. {_REMEDY}")
        return values


@dataclass
class PackedCorpus:
    """A folder that `jai pack` wrote.

    Attributes:
        folder: where it lies.
        dtype: of the token ids.
        tokenizer: name, sha256, vocabulary and eos_token_id of the tokenizer.
        sources: in the order of the configuration.
        content_sha256: of all tokens and borders: the same for the same text and tokenizer.
        shares: how much of each source the configuration said is used.
    """

    folder: Path
    dtype: np.dtype
    tokenizer: dict[str, Any]
    sources: list[PackedSource]
    content_sha256: str
    shares: Shares

    @property
    def eos_token_id(self) -> int:
        """The token that ends every document."""
        return self.tokenizer["eos_token_id"]

    @property
    def languages(self) -> list[str]:
        """All languages, sorted; `language_ids` of sequences count in this list."""
        return sorted({language for source in self.sources for language in source.entry.languages})

    @classmethod
    def open(cls, folder: str | Path) -> "PackedCorpus":
        """Open a folder of packed shards; every file's size is checked, its content is not (`verify`).

        Raises:
            UserError: if it is no such folder, of another version's format, or a shard is missing or cut short.
        """
        folder = Path(folder)
        if not (folder / INDEX_FILE).exists():
            raise UserError(
                f"{folder} is not a folder of packed text: it has no {INDEX_FILE}. Make one with `jai pack`."
            )
        index = read_json(folder / INDEX_FILE, _REMEDY)
        if index.get("format") != FORMAT:
            raise UserError(
                f"{folder / INDEX_FILE} has the format {index.get('format')!r}; this version of JAI reads {FORMAT}. "
                "Pack the corpus again."
            )
        try:
            dtype = np.dtype(index["dtype"])
            entries = [from_json(PackedSourceEntry, entry) for entry in index["sources"]]
            for entry in entries:
                if entry.documents != (found := sum(shard.documents for shard in entry.shards)):
                    raise TypeError(f"the shards of {entry.name} have {found:,} documents, not {entry.documents:,}")
            sources = [PackedSource(folder, entry, dtype) for entry in entries]
            shares = from_json(Shares, index["shares"])
            corpus = cls(folder, dtype, index["tokenizer"], sources, index["content_sha256"], shares)
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / INDEX_FILE} is not an index of packed text ({error}). {_REMEDY}") from error
        for path, size in corpus._sizes():
            try:
                with path.open("rb") as file:  # it must be there, and may be read
                    found = os.fstat(file.fileno()).st_size
            except OSError as error:
                raise UserError(f"The shard {path} cannot be read: {error.strerror}. {_REMEDY}") from error
            if found != size:
                raise UserError(f"The shard {path} has {found:,} bytes; expected {size:,}. {_REMEDY}")
        return corpus

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read every file and compare its hash.

        Args:
            part, parts: of the shards, only every so many-th one from this one on: for processes that share the work.

        Raises:
            UserError: naming the first that differs or cannot be read.
        """
        shards = [shard for source in self.sources for shard in source.entry.shards]
        for shard in shards[part::parts]:
            for ending, expected in shard.sha256.items():
                path = self.folder / f"{shard.name}.{ending}"
                try:
                    found = sha256(path)
                except OSError as error:
                    raise UserError(f"The shard {path} cannot be read: {error.strerror}. {_REMEDY}") from error
                if found != expected:
                    raise UserError(f"The shard {path} is damaged: its SHA-256 is not the index's. {_REMEDY}")

    def check_tokenizer(self, name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Refuse a tokenizer that gives other ids than the shards hold.

        Raises:
            UserError: naming both.
        """
        from jai.pretraining.tokens import tokenizer_hash

        if tokenizer_hash(tokenizer) != self.tokenizer["sha256"]:
            raise UserError(
                f"The text in {self.folder} was packed with the tokenizer {self.tokenizer['name']} "
                f"({self.tokenizer['vocabulary']:,} ids), which is not that of {name}: their ids mean other text. Pack "
                f"the corpus again with --tokenizer {name}."
            )

    def _sizes(self) -> Iterator[tuple[Path, int]]:
        for source in self.sources:
            for shard in source.entry.shards:
                sizes = {
                    "tokens": shard.tokens * self.dtype.itemsize,
                    "ends": shard.documents * ENDS_DTYPE.itemsize,
                    "quality": shard.documents * QUALITY_DTYPE.itemsize,
                }
                for ending in shard.sha256:
                    yield self.folder / f"{shard.name}.{ending}", sizes[ending]


def write_index(
    folder: Path,
    dtype: np.dtype,
    tokenizer: dict[str, Any],
    sources: Sequence[PackedSourceEntry],
    shares: Shares,
    versions: dict[str, str],
) -> None:
    """Write `packed.json`, which makes a folder of shards one corpus."""
    hashes = [(source.name, [shard.sha256 for shard in source.shards]) for source in sources]
    index = {
        "format": FORMAT,
        "dtype": dtype.str,
        "tokenizer": tokenizer,
        "content_sha256": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest(),
        "shares": asdict(shares),
        "sources": [asdict(source) for source in sources],
        "versions": versions,
    }
    text = json.dumps(index, indent=1, ensure_ascii=False)
    (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
