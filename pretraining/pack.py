# SPDX-License-Identifier: Apache-2.0
"""`jai pack`: text to memory-mapped shards of token ids, once, whatever is trained on them later.

The work is a stream: rows are read in this process, tokenised in others, and written as they come, so memory does not
grow with the corpus. A shard that is finished stays: a run that was killed goes on behind it, after reading, without
tokenising, the rows before it in the file where it stopped, to see that they are the same.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from jai.errors import UserError
from jai.files import UnfinishedFolder, from_json, print_next, read_json, resumable_folder, work_folder
from jai.pretraining.config import CorpusSource, read_corpus_config
from jai.pretraining.options import PackOptions
from jai.pretraining.shards import PackedSourceEntry, ShardEntry, ShardWriter, write_index
from jai.pretraining.shares import Shares
from jai.pretraining.tokens import PackingTokenizer, encode_batches, packing_tokenizer
from jai.provenance import versions
from jai.tokenization.corpus import Columns, Document, HubDataset, Source, TextFile, open_sources
from jai.tokenization.loading import load_tokenizer

_BATCH_CHARACTERS, _BATCH_ROWS = 500_000, 1000


@dataclass(frozen=True)
class OpenedSource:
    """A source of the configuration, with the files and datasets that its text is in."""

    config: CorpusSource
    texts: list[Source]

    @property
    def parts(self) -> list[TextFile | HubDataset]:
        """Files and datasets, in the order in which they are read."""
        return [part for text in self.texts for part in text.parts]


@dataclass(frozen=True)
class Cursor:
    """How far a source is read.

    Attributes:
        part: index of the file or dataset that is being read.
        row: number of the next row there, from 0.
        rows_hash: of the rows before it there; None for a dataset on the Hub, whose revision pins them.
        ended: whether the part has no more rows.
    """

    part: int = 0
    row: int = 0
    rows_hash: str | None = None
    ended: bool = False


@dataclass(frozen=True)
class RowBatch:
    """Rows of one part that are tokenised together; shards end where a batch ends.

    Attributes:
        rows: those that have text.
        empty: how many have none, and are left out.
        after: where the source is read on.
    """

    rows: list[Document]
    empty: int
    after: Cursor

    @property
    def texts(self) -> list[str]:
        """What is tokenised."""
        return [text for row in self.rows for text in _texts(row)]


@dataclass
class ShardRecord:
    """What a shard's own JSON file says.

    Attributes:
        shard: its entry in the index.
        empty: rows without text, which were left out.
        bytes: of its text in UTF-8.
        after: where the source is read on.
        files: size and time of change of the files that were read to their end, by index.
    """

    shard: ShardEntry
    after: Cursor
    empty: int = 0
    bytes: int = 0
    files: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "ShardRecord":
        """Read it.

        Raises:
            UserError: if it is damaged.
        """
        try:
            return from_json(cls, read_json(path))
        except TypeError as error:
            raise UserError(
                f"{path} is not a record of a shard ({error}). Remove {path.parent.parent} and pack again."
            ) from None


def pack_corpus(options: PackOptions, console: Console | None = None) -> Path:
    """Pack the text that a configuration names.

    Args:
        options: of the verb.
        console: where the plan and the result are printed; None is standard output.

    Returns:
        The folder, which `PackedCorpus.open` opens.

    Raises:
        UserError: for a configuration, tokenizer or text that cannot be used, naming file and line; what is finished
            stays, and the same command goes on from there.
    """
    console = console or Console()
    config = read_corpus_config(options.config)
    name = options.tokenizer or config.tokenizer
    if name is None:
        raise UserError(f"No tokenizer is given. Give --tokenizer, or `tokenizer` in {options.config}.")
    sources = [_open(source) for source in config.packed_sources]
    tokenizer = packing_tokenizer(name, load_tokenizer(name))
    workers = options.workers or _processors()
    _print_plan(console, options, sources, tokenizer, workers)
    for line in _packed_twice(sources):
        console.print(f"[yellow]{escape(line)}[/]")
    with resumable_folder(options.out, _identity(options, sources, tokenizer)) as job:
        entries = [_SourcePacker(source, tokenizer, job, options.shard_tokens).pack(workers) for source in sources]
        description = {
            "name": name,
            "sha256": tokenizer.sha256,
            "vocabulary": tokenizer.vocabulary,
            "eos_token_id": tokenizer.eos_token_id,
        }
        shares = Shares.configured(config)
        write_index(job.folder, tokenizer.dtype, description, entries, shares, versions("tokenizers", "transformers"))
    _print_result(console, options.out, entries)
    return options.out


class _SourcePacker:
    """Packs one source into its shards, behind those that an earlier run finished."""

    def __init__(self, source: OpenedSource, tokenizer: PackingTokenizer, job: UnfinishedFolder, shard_tokens: int):
        self.source, self.tokenizer, self.job, self.shard_tokens = source, tokenizer, job, shard_tokens
        config = source.config
        self.entry = PackedSourceEntry(
            config.name,
            list(config.languages),
            config.quality_column is not None,
            licence=config.licence,
        )

    def pack(self, workers: int) -> PackedSourceEntry:
        """Pack what is not packed yet, and describe the whole.

        Raises:
            UserError: if there is no text, it cannot be read, or it is not what an earlier run read.
        """
        cursor = self._take_finished()
        with _progress(self.entry) as advance:
            self._pack_from(cursor, workers, advance)
        if not self.entry.documents:
            raise UserError(
                f"The source {self.entry.name} has no text: {self.entry.empty:,} rows, all of them empty, in "
                f"{', '.join(self.source.config.text)}. Give text, or leave the source out."
            )
        return self.entry

    def _take_finished(self) -> Cursor:
        """Count the shards of an earlier run, and see that what they were made of is the same."""
        cursor, number = Cursor(), 0
        while (name := f"{self._name(number)}.json") in self.job.finished:
            record = ShardRecord.read(self.job.folder / name)
            for index, state in record.files.items():
                part = self.source.parts[int(index)]
                if isinstance(part, TextFile) and _state(part.path) != state:
                    raise UserError(self._changed(part.path))
            self._count(record)
            cursor, number = record.after, number + 1
        return cursor

    def _pack_from(self, cursor: Cursor, workers: int, advance: Any) -> None:
        writer, record = self._new_shard()
        for batch, ids, lengths in encode_batches(self._batches(cursor), self.tokenizer, workers):
            if len(ids):
                width = len(self.entry.languages)
                scores = np.array([row.quality for row in batch.rows], np.float64).repeat(width)
                writer.write(ids, lengths, scores if self.entry.has_quality else None)
            record.empty += batch.empty
            record.bytes += sum(len(text.encode()) for text in batch.texts)
            record.after = batch.after
            part = self.source.parts[batch.after.part]
            if batch.after.ended and isinstance(part, TextFile):
                record.files[str(batch.after.part)] = _state(part.path)
            if writer.tokens >= self.shard_tokens:
                self._finish(writer, record)
                writer, record = self._new_shard()
            advance(part.name, writer)
        self._finish(writer, record)

    def _batches(self, cursor: Cursor) -> Iterator[RowBatch]:
        for index in range(cursor.part, len(self.source.parts)):
            at = cursor if index == cursor.part else Cursor(index)
            if not at.ended:
                yield from self._batches_of_part(at)

    def _batches_of_part(self, cursor: Cursor) -> Iterator[RowBatch]:
        part = self.source.parts[cursor.part]
        limit = min(_BATCH_CHARACTERS, self.shard_tokens)
        rows_hash = hashlib.blake2b(digest_size=16)
        if isinstance(part, HubDataset):
            documents = part.read_from(cursor.row)
        else:
            documents = part.read_once()
            for done in islice(documents, cursor.row):
                _hash_row(rows_hash, done)
            if cursor.row and rows_hash.hexdigest() != cursor.rows_hash:
                raise UserError(self._changed(part.path))
        number = cursor.row
        while True:
            rows: list[Document] = []
            empty = characters = 0
            while characters < limit and len(rows) < _BATCH_ROWS:
                row = next(documents, None)
                if row is None:
                    break
                number += 1
                _hash_row(rows_hash, row)
                # Parallel texts are packed together or not at all.
                if all(text.strip() for text in _texts(row)):
                    rows.append(row)
                    characters += sum(map(len, _texts(row)))
                else:
                    empty += 1
            ended = characters < limit and len(rows) < _BATCH_ROWS
            is_file = isinstance(part, TextFile)
            yield RowBatch(rows, empty, Cursor(cursor.part, number, rows_hash.hexdigest() if is_file else None, ended))
            if ended:
                return

    def _new_shard(self) -> tuple[ShardWriter, ShardRecord]:
        name = self._name(len(self.entry.shards))
        return ShardWriter(self.job.folder, name, self.entry.has_quality), ShardRecord(ShardEntry(name), Cursor())

    def _finish(self, writer: ShardWriter, record: ShardRecord) -> None:
        """Finish a shard; its record last, for what has a record is whole."""
        record.shard = writer.close()
        if not record.shard.documents:
            for ending in record.shard.sha256:
                (self.job.folder / f"{writer.name}.{ending}").unlink()
            self.entry.empty += record.empty
            return
        path = self.job.folder / f"{writer.name}.json"
        path.write_text(json.dumps(asdict(record), ensure_ascii=False) + "\n", encoding="utf-8")
        for ending in (*record.shard.sha256, "json"):
            self.job.finish(f"{writer.name}.{ending}")
        self._count(record)

    def _count(self, record: ShardRecord) -> None:
        self.entry.shards.append(record.shard)
        self.entry.documents += record.shard.documents
        self.entry.tokens += record.shard.tokens
        self.entry.bytes += record.bytes
        self.entry.empty += record.empty

    def _name(self, number: int) -> str:
        return f"{self.entry.name}-{number:05}"

    def _changed(self, path: Path) -> str:
        return (
            f"{path} is not what it was when a part of it was packed. Put the old file back to go on, or remove "
            f"{work_folder(self.job.out)} to start anew."
        )


def _open(source: CorpusSource) -> OpenedSource:
    columns = Columns(source.columns[0], source.quality_column, source.columns[1:])
    try:
        return OpenedSource(source, open_sources(source.text, columns, source.revision))
    except UserError as error:
        raise UserError(f"The source {source.name}: {error}") from error


def _identity(options: PackOptions, sources: list[OpenedSource], tokenizer: PackingTokenizer) -> dict[str, Any]:
    """What decides the bytes of the shards; the files' own states are in the shards' records."""
    return {
        "tokenizer": tokenizer.sha256,
        "shard_tokens": options.shard_tokens,
        "sources": {
            source.config.name: {
                "columns": dict(zip(source.config.languages, source.config.columns)),
                "quality_column": source.config.quality_column,
                "parts": [
                    str(part.path)
                    if isinstance(part, TextFile)
                    else f"{part.id}:{part.config}:{part.split}@{part.revision}"
                    for part in source.parts
                ],
            }
            for source in sources
        },
    }


def _texts(row: Document) -> tuple[str, ...]:
    return (row.text, *row.translations)


def _hash_row(rows_hash: Any, row: Document) -> None:
    for text in _texts(row):
        rows_hash.update(text.encode() + b"\xff")  # which no UTF-8 text holds
    rows_hash.update(repr(row.quality).encode())


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _progress(entry: PackedSourceEntry) -> Iterator[Any]:
    """Gives a function that shows how far a source is, at most ten times a second."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = 0.0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"Packing {escape(entry.name)}")

        def advance(part: str, writer: ShardWriter) -> None:
            nonlocal shown
            if time.monotonic() - shown > 0.1:
                tokens, documents = entry.tokens + writer.tokens, entry.documents + writer.documents
                done = f"{documents:,} documents, {tokens:,} tokens, {len(entry.shards)} shards finished"
                progress.update(task, description=f"Packing {escape(entry.name)} ({escape(part)}): {done}")
                shown = time.monotonic()

        yield advance


def _print_plan(
    console: Console, options: PackOptions, sources: list[OpenedSource], tokenizer: PackingTokenizer, workers: int
) -> None:
    console.print(
        f"[bold]Packing[/] with {escape(tokenizer.name)}: {tokenizer.vocabulary:,} ids, {tokenizer.dtype.itemsize} "
        f"bytes each, {workers} process{'es' * (workers > 1)}, shards of {options.shard_tokens:,} tokens"
    )
    table = Table(Column("source", overflow="fold"), "language", Column("text", overflow="fold"), "licence")
    for source in sources:
        texts = "\n".join(text.describe() for text in source.texts)
        config = source.config
        table.add_row(escape(config.name), ", ".join(config.languages), escape(texts), escape(config.licence or "–"))
    console.print(table)


def _packed_twice(sources: list[OpenedSource]) -> Iterator[str]:
    """Columns that two sources read of one file or dataset."""
    readers: dict[tuple[str, str], list[str]] = {}
    for source in sources:
        for part in source.parts:
            place = os.path.realpath(part.path) if isinstance(part, TextFile) else part.name
            for column in source.config.columns:
                readers.setdefault((place, column), []).append(source.config.name)
    for (place, column), names in readers.items():
        if len(names) > 1:
            yield f"The sources {' and '.join(names)} both have `{column}` of {place}: its text is packed twice."


def _print_result(console: Console, out: Path, entries: list[PackedSourceEntry]) -> None:
    table = Table(
        Column("source", overflow="fold"), "documents", "tokens", "share", "text", "bytes a token", "empty rows"
    )
    total = sum(entry.tokens for entry in entries)
    for entry in entries:
        cells = [f"{entry.documents:,}", f"{entry.tokens:,}", f"{entry.tokens / total:.1%}"]
        cells += [filesize.decimal(entry.bytes), f"{entry.bytes / entry.tokens:.2f}", f"{entry.empty:,}"]
        table.add_row(escape(entry.name), *cells)
    console.print(table)
    console.print(f"[bold green]{total:,} tokens packed in[/] {escape(str(out))}")
    print_next(console, ["jai", "pretrain", "--packed", out])
