# SPDX-License-Identifier: Apache-2.0
"""Text to learn from: files, folders and Hub datasets, read once; and a sample of it, drawn evenly by document."""

import codecs
import gzip
import heapq
import json
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from jai.errors import UserError
from jai.files import sha256
from jai.options import is_number

if TYPE_CHECKING:
    from datasets import IterableDataset

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
WHAT_TO_GIVE = f"Give files of text ({', '.join(SUFFIXES)}), a folder of them, or a Hub dataset (owner/name)"

_HALF_A_PAIR = re.compile(r"[\ud800-\udfff]")  # JSON can write it as an escape
_PIECE = 2**20  # characters: the most that is in memory of a .txt file


class Document(NamedTuple):
    """A text, and what its row says of it.

    Attributes:
        text: the text.
        source: where it comes from, if the row says so (a string in its field `source`).
        quality: its score, where a column of scores was asked for.
        translations: the texts of the other columns, where such were asked for.
    """

    text: str
    source: str | None = None
    quality: float | None = None
    translations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Which columns (fields of JSON) of a row are read.

    Attributes:
        text: holds the text.
        quality: holds a number, its score; None where none is read.
        translations: hold the same text in other languages.
    """

    text: str = "text"
    quality: str | None = None
    translations: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """All columns that must hold text."""
        return (self.text, *self.translations)

    @property
    def named(self) -> tuple[str, ...]:
        """All columns that must be there."""
        return (*self.texts, *([self.quality] if self.quality else []))


TEXT_COLUMN = Columns()


@dataclass
class Amount:
    """Documents, and the bytes of their text in UTF-8."""

    documents: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.documents:,} document{'s' * (self.documents != 1)}, {filesize.decimal(self.bytes)}"

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.documents + other.documents, self.bytes + other.bytes)

    def count(self, size: int) -> None:
        """Add one document of `size` bytes."""
        self.documents += 1
        self.bytes += size


@dataclass
class Figures:
    """What was found in a file or dataset, what of it is in the sample, and how much was too large for any sample."""

    found: Amount = field(default_factory=Amount)
    sampled: Amount = field(default_factory=Amount)
    too_large: Amount = field(default_factory=Amount)

    def __add__(self, other: "Figures") -> "Figures":
        return Figures(self.found + other.found, self.sampled + other.sampled, self.too_large + other.too_large)

    def record(self) -> dict[str, int]:
        """For a JSON record."""
        record = {"documents": self.found.documents, "bytes": self.found.bytes}
        record |= {"sampled_documents": self.sampled.documents, "sampled_bytes": self.sampled.bytes}
        return record | ({"too_large_documents": self.too_large.documents} if self.too_large.documents else {})


@dataclass
class TextFile:
    """A file of text: .txt (one document), .jsonl or .jsonl.gz (one a line, field `text`), .parquet (column `text`).

    Attributes:
        path: where it lies.
        name: how records name it: its path below the folder that was given.
        columns: what is read of a row; a .txt file has only text.
        figures: what was found and sampled, filled in while it is read.
        sha256: hash of the file, filled in when it has been read.
    """

    path: Path
    name: str
    columns: Columns = TEXT_COLUMN
    figures: Figures = field(default_factory=Figures)
    sha256: str | None = None

    def read(self) -> Iterator[Document]:
        """Its documents, exactly as they are but for a byte-order mark; of a large .txt file, pieces cut at line ends.

        Raises:
            UserError: if the file is damaged, is not UTF-8, or has a line or row without a text.
        """
        yield from self.read_once()
        try:
            self.sha256 = sha256(self.path)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}.") from error

    def read_once(self) -> Iterator[Document]:
        """As `read`, without reading the file a second time for its hash."""
        readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".parquet": _read_parquet}
        try:
            yield from readers[_suffix(self.path)](self.path, self.columns)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}.") from error

    def record(self) -> dict[str, Any]:
        """For a JSON record."""
        return {"path": self.name, "sha256": self.sha256, **self.figures.record()}


@dataclass
class HubDataset:
    """One split of a dataset on the Hub, streamed: column `text`, a document a row.

    Attributes:
        name: as given: `owner/name`, `owner/name:split` or `owner/name:config:split`.
        id: `owner/name`.
        config: its configuration; None is the only one, or the default.
        split: `train` if none was given.
        revision: the commit that is read.
        rows: the stream.
        columns: what is read of a row.
        figures: what was found and sampled, filled in while it is read.
    """

    name: str
    id: str
    config: str | None
    split: str
    revision: str | None
    rows: "IterableDataset"
    columns: Columns = TEXT_COLUMN
    figures: Figures = field(default_factory=Figures)

    def read(self) -> Iterator[Document]:
        """Its documents.

        Raises:
            UserError: if the Hub does not give a row, or a row has no text.
        """
        return self.read_from(0)

    def read_from(self, number: int) -> Iterator[Document]:
        """Its documents from the one of that number on, counted from 0; of Parquet, earlier files are not fetched.

        Raises:
            UserError: as `read`.
        """
        for place, row in self.numbered_rows(number):
            for column in self.columns.texts:
                if not isinstance(row.get(column), str):
                    raise UserError(
                        f"{self.name}, row {place} has no string `{column}` (columns: {', '.join(row)}). Give a "
                        f"dataset with a column `{column}`."
                    )
            yield _document(row, self.columns, f"{self.name}, row {place}")

    def numbered_rows(self, begin: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Its rows with all their columns, and their numbers from 1; from the one after the first `begin` on.

        Raises:
            UserError: if the Hub does not give a row.
        """
        rows, number = iter(self.rows.skip(begin) if begin else self.rows), begin
        while True:
            number += 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of many kinds: the network's, the file format's, the Hub's
                raise UserError(
                    f"{self.name} could not be read at row {number}: {_reason(error)}. Check the network, or give "
                    "another dataset."
                ) from error
            yield number, row

    def record(self) -> dict[str, Any]:
        """For a JSON record."""
        place = {"dataset": self.id, "config": self.config, "split": self.split, "revision": self.revision}
        return place | self.figures.record()


@dataclass
class Source:
    """What one argument names: a file, the files of a folder, or a Hub dataset.

    Attributes:
        name: as it was given.
        parts: what it consists of.
        left_out: files of the folder that are hidden or have another ending, and links to folders.
    """

    name: str
    parts: Sequence[TextFile | HubDataset]
    left_out: int = 0

    @property
    def figures(self) -> Figures:
        """What was found and sampled, over all parts."""
        return sum((part.figures for part in self.parts), Figures())

    def describe(self) -> str:
        """What is known of it before it is read."""
        files = [part for part in self.parts if isinstance(part, TextFile)]
        if not files:
            return f"{self.name} (Hub dataset, streamed)"
        size = filesize.decimal(sum(file.path.stat().st_size for file in files))
        if files[0].path == Path(self.name):
            return f"{self.name} ({size})"
        left_out = f"; {self.left_out:,} hidden, with other endings or links to folders left out"
        left_out = left_out if self.left_out else ""
        return f"{self.name} ({len(files):,} file{'s' * (len(files) != 1)}, {size}{left_out})"


def open_sources(
    texts: Iterable[str | Path], columns: Columns = TEXT_COLUMN, revision: str | None = None
) -> list[Source]:
    """Find what arguments name. A path that exists wins over a Hub dataset of that name.

    Args:
        texts: files, folders, or Hub datasets as `owner/name`, `owner/name:split` or `owner/name:config:split`.
        columns: what is read of a row.
        revision: commit, branch or tag of Hub datasets; None is the default branch.

    Raises:
        UserError: if one does not exist, has an unknown ending or no `text`, is given twice, or is refused by the Hub.
    """
    sources = [_open_source(str(text), columns, revision) for text in texts]
    if not sources:
        raise UserError(f"No text was given. {WHAT_TO_GIVE}.")
    seen = set()
    for part in (part for source in sources for part in source.parts):
        place = part.path.absolute() if isinstance(part, TextFile) else (part.id, part.config, part.split)
        if place in seen:
            raise UserError(f"{part.path if isinstance(part, TextFile) else part.name} is given twice. Give it once.")
        seen.add(place)
    return sources


def draw_sample(sources: Sequence[Source], limit: int, seed: int = 0) -> Iterator[str]:
    """Read everything once and keep at most `limit` bytes of it, evenly by document.

    Documents are ranked by a hash of the seed and their text, and kept in that order up to the limit: every document
    has the same chance, and the same documents make the same sample in whatever order and files they come. No more
    than the sample is ever in memory. It is read when this is called (with progress on a terminal's standard error),
    and given up document by document as the result is iterated, in the order of the hash. The figures of the sources
    are then filled in.

    Args:
        sources: from `open_sources`, not read yet.
        limit: bytes of text in UTF-8.
        seed: another seed draws another sample.

    Raises:
        UserError: if something cannot be read, or there is no text, or no document as small as the limit.
    """
    if limit < 1:
        raise UserError(f"sample_bytes is {limit}, which leaves nothing to learn from. Give 1 or more.")
    parts = [part for source in sources for part in source.parts]
    key = str(seed).encode()
    heap: list[tuple[int, int, bytes]] = []  # (-rank, index of the part, document): the highest rank goes first
    kept_bytes, cutoff = 0, 2**64
    for index, document in _with_progress(parts):
        part = parts[index]
        size = len(document)
        part.figures.found.count(size)
        rank = int.from_bytes(blake2b(document, digest_size=8, key=key).digest())
        if size > limit:
            part.figures.too_large.count(size)
        elif rank < cutoff:
            heapq.heappush(heap, (-rank, index, document))
            kept_bytes += size
            while kept_bytes > limit:
                dropped_rank, _, dropped = heapq.heappop(heap)
                cutoff = -dropped_rank
                kept_bytes -= len(dropped)
    for _, index, document in heap:
        parts[index].figures.sampled.count(len(document))
    if not kept_bytes:
        total = sum((part.figures for part in parts), Figures())
        names = ", ".join(source.name for source in sources)
        if total.too_large.documents:
            raise UserError(
                f"No document of {names} is as small as the sample, {filesize.decimal(limit)}. Give a larger one."
            )
        raise UserError(f"There is no text in {names}: {total.found}. {WHAT_TO_GIVE} that are not empty.")
    heap.sort()
    return _give_up(heap)


def sample_table(sources: Sequence[Source]) -> Table:
    """What was found in each source and what was sampled of it, as a table to print."""
    table = Table(Column("text", overflow="fold"), "found", "sampled", "share", title="Sample")
    rows = [(source.name, source.figures) for source in sources]
    if len(rows) > 1:
        rows.append(("all", sum((figures for _, figures in rows), Figures())))
    for name, figures in rows:
        share = figures.sampled.bytes / max(figures.found.bytes, 1)
        left_out = f"; {figures.too_large} too large for the sample" if figures.too_large.documents else ""
        table.add_row(escape(name), f"{figures.found}{left_out}", str(figures.sampled), f"{share:.2%}")
    return table


def _give_up(documents: list[tuple[int, int, bytes]]) -> Iterator[str]:
    while documents:
        yield documents.pop()[2].decode()


def _with_progress(parts: Sequence[TextFile | HubDataset]) -> Iterator[tuple[int, bytes]]:
    """The documents of all parts in UTF-8, with the index of their part."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    documents, size, shown = 0, 0, 0.0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Reading")
        for index, part in enumerate(parts):
            for row in part.read():
                document = row.text.encode()
                documents, size = documents + 1, size + len(document)
                if time.monotonic() - shown > 0.1:
                    done = f"Reading {escape(part.name)}: {documents:,} documents, {filesize.decimal(size)} in all"
                    progress.update(task, description=done)
                    shown = time.monotonic()
                yield index, document


def _open_source(name: str, columns: Columns, revision: str | None) -> Source:
    path = Path(name)
    if path.is_dir():
        return _open_folder(name, path, columns)
    if path.is_file():
        if _suffix(path) not in SUFFIXES:
            raise UserError(f"{name} has an unknown ending. {WHAT_TO_GIVE}.")
        return Source(name, [TextFile(path, path.name, columns)])
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::([^:]+))?(?::([^:]+))?", name, re.ASCII)
    if _suffix(path) in SUFFIXES or not hub:
        raise UserError(f"{name} does not exist: there is no such file or folder. {WHAT_TO_GIVE}.")
    repo_id, first, second = hub.groups()
    config, split = (first, second) if second else (None, first or "train")
    return Source(name, [_open_dataset(name, repo_id, config, split, columns, revision)])


def _open_folder(name: str, folder: Path, columns: Columns) -> Source:
    # It does not go into folders that are linked to.
    below = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    files = [
        TextFile(path, str(Path(folder.absolute().name, path.relative_to(folder))), columns)
        for path in below
        if _suffix(path) in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise UserError(f"The folder {name} has no file of text ({', '.join(SUFFIXES)}) in it. {WHAT_TO_GIVE}.")
    return Source(name, files, left_out=len(below) - len(files))


def _open_dataset(
    name: str, repo_id: str, config: str | None, split: str, columns: Columns, revision: str | None
) -> HubDataset:
    from datasets import load_dataset  # it takes a second, and files do not need it
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        revision = HfApi().dataset_info(repo_id, revision=revision).sha
        rows = load_dataset(repo_id, config, split=split, streaming=True, revision=revision)
    except Exception as error:  # of many kinds: the client's, the file format's, the split's
        reason = _reason(error)
        if isinstance(error, RepositoryNotFoundError):
            gated = isinstance(error, GatedRepoError)
            reason = "access to it must be asked for" if gated else "it has none that you may see"
        raise UserError(
            f"{name} is neither a file nor a folder, and the Hub did not give a dataset of that name: {reason}. Check "
            "the name (owner/name, owner/name:split or owner/name:config:split), the network, and `hf auth login` if "
            "the dataset is private or gated."
        ) from error
    if rows.features is not None:
        present = ", ".join(f"{column} ({getattr(kind, 'dtype', kind)})" for column, kind in rows.features.items())
        for column in columns.texts:
            if getattr(rows.features.get(column), "dtype", None) not in ("string", "large_string"):
                raise UserError(f"{name} has no string column `{column}`, but: {present}. Give a dataset that has one.")
        if columns.quality is not None and columns.quality not in rows.features:
            raise UserError(f"{name} has no column `{columns.quality}`, but: {present}. Give one that has a score.")
        rows = rows.select_columns(list(columns.named))
    return HubDataset(name, repo_id, config, split, revision, rows, columns)


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), path.suffix)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _document(row: dict[str, Any], columns: Columns, where: str) -> Document:
    """A document of a row whose texts are strings.

    Raises:
        UserError: if its score is no number, or a text is none that UTF-8 can write; `where` says which row it is.
    """
    texts = [row[column] for column in columns.texts]
    for text in texts:
        if half := _HALF_A_PAIR.search(text):
            raise UserError(
                f"{where} holds {half[0]!r}, half of a surrogate pair, which no UTF-8 text can. Fix or drop the line."
            )
    quality = row.get(columns.quality) if columns.quality else None
    if columns.quality and not is_number(quality):
        raise UserError(f"{where}: `{columns.quality}` is {quality!r}; expected a number. Fix or drop the row.")
    return Document(texts[0], _string(row.get("source")), quality, tuple(texts[1:]))


def _read_txt(path: Path, columns: Columns) -> Iterator[Document]:
    if columns != TEXT_COLUMN:
        raise UserError(
            f"{path} is plain text, which has no columns, but {', '.join(columns.named)} were asked for. Give .jsonl, "
            ".jsonl.gz or .parquet."
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            carried = ""
            while block := file.read(_PIECE):
                text = carried + block
                last = len(block) < _PIECE
                end = len(text) if last else text.rfind("\n") + 1 or text.rfind(" ") + 1 or len(text)
                yield Document(text[:end])
                carried = text[end:]
            if carried:
                yield Document(carried)
    except UnicodeDecodeError as error:
        with path.open("rb") as lines:
            number = next(number for number, line in enumerate(lines, 1) if not _is_utf8(line))
        raise UserError(f"{path}, line {number} is not UTF-8: {error.reason}. Convert the file to UTF-8.") from error


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Document]:
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield _json_document(path, number, line, columns)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file after line {number}: {error}. Fetch it again.") from error


def _json_document(path: Path, number: int, line: bytes, columns: Columns) -> Document:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number} is not UTF-8: {error.reason}. Convert the file to UTF-8.") from error
    except (ValueError, RecursionError):
        value = None
    for column in columns.texts:
        if not isinstance(value, dict) or not isinstance(value.get(column), str):
            keys = f"; it has {', '.join(map(str, value))}" if isinstance(value, dict) and column not in value else ""
            raise UserError(
                f"{path}, line {number}: not a JSON object with a string `{column}`{keys}. Give one document per line, "
                f'as {{"{column}": "…"}}.'
            )
    return _document(value, columns, f"{path}, line {number}")


def _read_parquet(path: Path, columns: Columns) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        # Buffered, because a row group may be as large as the file.
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            for column in columns.texts:
                kind = file.schema_arrow.field(column).type if names.count(column) == 1 else None
                if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    found = f"its `{column}` is {kind}" if kind else f"its columns are: {', '.join(names)}"
                    raise UserError(f"{path} has no string column `{column}`; {found}. Give a file that has one.")
            if columns.quality is not None and names.count(columns.quality) != 1:
                raise UserError(f"{path} has no column `{columns.quality}`; its columns are: {', '.join(names)}.")
            read = [
                *columns.named,
                *(["source"] if names.count("source") == 1 and "source" not in columns.named else []),
            ]
            for batch in file.iter_batches(batch_size=1024, columns=read):
                for cells in zip(*(batch.column(name) for name in read)):
                    number += 1
                    row = {name: cell.as_py() for name, cell in zip(read, cells)}
                    for column in columns.texts:
                        if row[column] is None:
                            raise UserError(f"{path}, row {number} has no `{column}`. Fix or drop the row.")
                    yield _document(row, columns, f"{path}, row {number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {number} is not UTF-8: {error.reason}. Convert the text to UTF-8.") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is a damaged parquet file after row {number}: {_reason(error)}. Fetch it again."
        ) from error
