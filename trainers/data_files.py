# SPDX-License-Identifier: Apache-2.0
"""Where the rows of training data come from: files, folders, datasets on disk and on the Hub.

JSON and CSV files are read here, row by row, and not by pyarrow: it wants one type in a column, takes "NA" for nothing,
and ends the process at a row that is `null` (26.0), where a row number is what helps.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pyarrow.lib import ArrowException

from jai.errors import UserError
from jai.trainers.first_look import DATA_BUILDERS, check_data_name, data_suffix
from jai.trainers.messages import RowFault

AnyDataset: TypeAlias = Dataset | IterableDataset

_READ_HERE = (".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class RawSplit:
    """The rows of one split as they stand in their source: files that are read here, or else a dataset.

    Attributes:
        name: of the source, as given.
        files: in their order.
        dataset: where it is not files.
        left_out: files of data in its folder that belong to no split.
    """

    name: str
    files: tuple[Path, ...] = ()
    dataset: AnyDataset | None = None
    left_out: tuple[Path, ...] = ()

    def rows(self) -> Iterator[Any]:
        """The rows, each a mapping of columns to values; a `RowFault` stands for a line that holds none.

        Raises:
            UserError: if the source cannot be read.
        """
        if self.dataset is not None:
            try:
                yield from self.dataset
            except ArrowException as error:  # of a stream, which is read here first
                raise unreadable(self.name, error) from error
        for file in self.files:
            yield from _read_file(file)


def open_splits(
    name: str, config: str | None, *, revision: str | None = None, streaming: bool = False
) -> dict[str, RawSplit]:
    """The splits of a file, a folder or a Hub dataset, by name.

    Args:
        name: of the data.
        config: of a Hub dataset.
        revision: of a Hub dataset.
        streaming: whether its rows are read as they are used.

    Raises:
        UserError: if the data cannot be found or read, or a configuration or a revision is given of what has none.
    """
    path = check_data_name(name)
    if revision is not None and path.exists():
        raise UserError(f"`revision` is {revision}, and {name} is not a dataset on the Hub. Leave it out.")
    is_saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()  # by `save_to_disk`
    if config is not None and (path.is_file() or is_saved):
        raise UserError(
            f"The configuration {config} of {name} is asked for, and only a folder or a dataset on the Hub "
            "has some. Leave it out."
        )
    suffix = data_suffix(path)
    left_out: tuple[Path, ...] = ()
    if path.is_file() and suffix in _READ_HERE:
        return {"train": RawSplit(name, files=(path,))}
    try:
        if (path / "dataset_dict.json").exists():
            return {str(split): RawSplit(name, dataset=rows) for split, rows in load_from_disk(name).items()}
        if (path / "state.json").exists():
            return {"train": RawSplit(name, dataset=cast(Dataset, load_from_disk(name)))}
        if path.is_dir():
            files = load_dataset_builder(name, config).config.data_files or {}
            left_out = _other_files(path, [file for group in files.values() for file in group])
            if all(data_suffix(Path(file)) in _READ_HERE for group in files.values() for file in group):
                return {
                    str(split): RawSplit(name, files=tuple(Path(file) for file in group), left_out=left_out)
                    for split, group in files.items()
                }
        if path.is_file():
            splits = load_dataset(DATA_BUILDERS[suffix], data_files=name, streaming=streaming)
        else:
            splits = load_dataset(name, config, revision=revision, streaming=streaming)
    except DatasetGenerationError as error:
        raise unreadable(name, error.__cause__ or error) from error
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"The data {name} was not found: {error} Give an existing file or folder, or a Hub id."
        ) from error
    except StopIteration:  # for an empty file
        return {"train": RawSplit(name)}
    except (ConnectionError, ValueError, OSError, ArrowException) as error:
        said = str(error).rstrip(".")
        raise UserError(
            f"The data {name} cannot be loaded: {said}. Check the name, or give a file or folder."
        ) from error
    return {str(split): RawSplit(name, dataset=rows, left_out=left_out) for split, rows in splits.items()}


def _other_files(folder: Path, used: Sequence[str]) -> tuple[Path, ...]:
    """Files of data that `datasets` passes over: of another format than most, or outside of what is named as splits."""
    known = {Path(file).resolve() for file in used}
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and data_suffix(file) in DATA_BUILDERS]

    def is_hidden(file: Path) -> bool:
        return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)

    return tuple(file for file in files if file.resolve() not in known and not is_hidden(file))


def unreadable(name: str, error: BaseException) -> UserError:
    """What is said of data that breaks off or is no data at all."""
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"The data {name} cannot be read: it is not UTF-8 text ({error}). Save it as UTF-8.")
    return UserError(
        f"The data {name} cannot be read: {error}. Every line must be one JSON object, and a column must have the same "
        "type in all of them."
    )


def _read_file(path: Path) -> Iterator[Any]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from _READERS[data_suffix(path)](cast(BinaryIO, file))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(str(path), error) from error


def _read_json_lines(file: BinaryIO) -> Iterator[Any]:
    for number, line in enumerate(file):
        if line := (line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line).strip():
            try:
                yield json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield RowFault("no JSON", f"it is not valid JSON ({error})")


def _read_json(file: BinaryIO) -> Iterator[Any]:
    """A list of rows, one row that goes over many lines, or lines as in .jsonl."""
    content = file.read()
    try:
        whole = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        yield from _read_json_lines(io.BytesIO(content))
        return
    yield from whole if isinstance(whole, list) else [whole]


def _read_csv(file: BinaryIO) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)
    for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline="")):
        if None in row:
            yield RowFault("no row", "it has more cells than the header")
        else:
            yield {column: cell or None for column, cell in row.items()}


_READERS = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv}
