# SPDX-License-Identifier: Apache-2.0
"""Training data: every row of every source read into TRL's form and checked, before anything long begins."""

import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b, sha256
from itertools import islice
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Json, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from jai.errors import UserError
from jai.trainers import messages as messages_module
from jai.trainers import rows as rows_module
from jai.trainers.arguments import StageArguments
from jai.trainers.data_arguments import RowSource
from jai.trainers.data_files import AnyDataset, RawSplit, open_splits, unreadable
from jai.trainers.faults import FaultyRow, refuse_faults
from jai.trainers.first_look import check_data_name
from jai.trainers.messages import RowFault
from jai.trainers.mixture import RowMixture
from jai.trainers.rows import CHAT_EXTRAS, DatasetType, Row, RowForm, find_form, question_of, read_row
from jai.version import __version__

_EXAMPLES = 100  # first rows, by which the form is known
_SHOWN_FILES = 5

# Columns that rows have between reading and training: what they are chosen by.
ROW, SOURCE, DIGEST, QUESTION, SCORE = "jai_row", "jai_source", "jai_digest", "jai_question", "jai_score"
FAULT, FAULT_KIND = "jai_fault", "jai_fault_kind"
CATEGORY, LANGUAGE = "category", "language"
CHOOSING_COLUMNS = (ROW, SOURCE, DIGEST, QUESTION, SCORE, FAULT, FAULT_KIND)


@dataclass(frozen=True)
class TrainingData:
    """The rows of a stage.

    Attributes:
        name: file, folder or Hub id, as given; of several sources, all of them.
        type: what a row is.
        columns: the columns that hold it.
        conversational: whether they hold messages (with roles) rather than strings.
        train: the rows to train on.
        evaluation: the rows to evaluate on, or None.
        sources: where the rows come from.
        faulty: how many rows were left out because they are faulty.
        mixture: how the rows to train on were chosen, where shares were given.
        counts: the rows to train on by source, category and language.
        content: SHA-256 of the rows to train on, in their order; of a stream, where it comes from.
        chosen_rows: SHA-256 of which rows are trained on (`hash_of_rows`), where not all of them are.
        unread: names of columns that nothing reads.
        notes: what is to be said of the rows, before the plan.
    """

    name: str
    type: DatasetType
    columns: tuple[str, ...]
    conversational: bool
    train: AnyDataset
    evaluation: AnyDataset | None
    sources: tuple[RowSource, ...] = ()
    faulty: int = 0
    mixture: RowMixture | None = None
    counts: dict[tuple[str, str | None, str | None], int] = field(default_factory=dict)
    content: str | list[str | None] | None = None
    chosen_rows: str | None = None
    unread: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int | None:
        """Number of training rows; None where they are streamed."""
        return len(self.train) if isinstance(self.train, Dataset) else None

    @property
    def is_plain_text(self) -> bool:
        """Whether it is text to continue, as in pre-training."""
        return self.type is DatasetType.LANGUAGE_MODELING and not self.conversational

    def where(self, source: int, split: str) -> str:
        """A source and a split, as messages name them."""
        return f"{self.sources[source].path} (split {split})"


@dataclass(frozen=True)
class _SourceSplit:
    """A split that is to be read.

    Attributes:
        source: what is known of its rows.
        index: of the source, among all.
        split: its name.
        raw: its rows as they stand.
        form: of its rows.
        columns: of its first rows.
    """

    source: RowSource
    index: int
    split: str
    raw: RawSplit
    form: RowForm
    columns: tuple[str, ...]

    def read(self) -> Iterator[Row]:
        """All rows, the faulty ones too, each with the columns that it is chosen by."""
        for number, row in enumerate(self.raw.rows()):
            yield self.read_row(row, number)

    def read_row(self, row: Any, index: int) -> Row:
        """A row in TRL's form with the columns that it is chosen by; a faulty one has nothing but its fault."""
        read: Row = dict.fromkeys(self.features())
        read |= {ROW: index + 1, SOURCE: self.index}
        try:
            if isinstance(row, RowFault):
                raise row
            content = read_row(row, self.form)
            digests = {DIGEST: _digest(content), QUESTION: _digest(question_of(content, self.form))}
        except RowFault as fault:
            return read | {FAULT_KIND: fault.kind, FAULT: _as_unicode(fault.text)}
        source = self.source
        return {
            **read,
            **content,
            **digests,
            CATEGORY: _label(row, source.category_column, source.category),
            LANGUAGE: _label(row, source.language_column, source.language),
            SCORE: _score(row, source.score_column),
        }

    def unread(self) -> list[str]:
        """Names of the columns that nothing reads."""
        source = self.source
        labels = (source.category_column, source.language_column, source.score_column)
        return [column for column in self.columns if column not in (*self.form.read_columns, *labels)]

    def features(self) -> Features:
        """The columns' types: messages may hold anything, and Arrow wants one type of all calls' arguments."""
        kind = Json() if self.form.conversational else Value("string")
        kinds = {"label": Value("bool"), "solution": Value("string")}
        columns = {name: kinds.get(name, kind) for name in self.form.columns}
        extras = dict.fromkeys(CHAT_EXTRAS, Json()) if self.form.conversational else {}
        numbers = dict.fromkeys((ROW, SOURCE, DIGEST, QUESTION), Value("int64"))
        texts = dict.fromkeys((CATEGORY, LANGUAGE, FAULT_KIND, FAULT), Value("string"))
        return Features({**columns, **extras, **numbers, **texts, SCORE: Value("float64")})

    def fingerprint(self) -> str:
        """Of what decides the rows that come out: the same files, read by the same code, are read once."""
        files = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.raw.files]
        code = [inspect.getsource(module) for module in (messages_module, rows_module)]
        return str(Hasher.hash([files, code, __version__, self.source, self.index, self.form]))


def load_training_data(arguments: StageArguments, dataset_types: Sequence[DatasetType]) -> TrainingData:
    """Load a stage's data: Hub ids, .jsonl(.gz), .json(.gz), .parquet or .csv files, or folders of such files.

    Rows come out in TRL's form, whichever of the forms in `jai.trainers.rows` they had, with the columns that rows are
    chosen by.

    Args:
        arguments: the run's; they name the data, its splits and its column of plain text.
        dataset_types: what the stage can train on.

    Raises:
        UserError: if the data cannot be found or read, lacks a split, has no rows, has other columns, or has more
            faulty rows than are allowed.
    """
    script, options = arguments.script, arguments.data
    if options.datasets is None:
        check_data_name(script.dataset_name)
    elif script.dataset_name:
        raise UserError("Both `dataset_name` and `datasets` are given. Leave out one of the two.")
    sources = options.sources(str(script.dataset_name), script.dataset_config, script.dataset_train_split)
    streaming = script.dataset_streaming
    if streaming and (names := _options_of_whole_data(arguments, sources)):
        raise UserError(f"`dataset_streaming` is on, and {names[0]} needs all rows at once. Leave out one of the two.")
    if options.test_split_size is not None and arguments.training.eval_strategy == "no":
        raise UserError("`test_split_size` is set, and `eval_strategy` is no: nothing would evaluate. Set both.")
    opened = [
        open_splits(source.path, source.name, revision=source.revision, streaming=streaming) for source in sources
    ]

    def find(index: int, split: str, option: str) -> _SourceSplit:
        name = sources[index].path
        raw = _split(opened[index], split, name, option)
        text_column = getattr(arguments.training, "dataset_text_field", "text")
        where = f"{name} (split {split})"
        examples = _examples(raw, where)
        form = find_form(examples, dataset_types, where, text_column)
        columns = tuple(dict.fromkeys(column for row in examples for column in row))
        return _SourceSplit(sources[index], index, split, raw, form, columns)

    train = [find(index, source.split, "dataset_train_split") for index, source in enumerate(sources)]
    evaluation = []
    if arguments.training.eval_strategy != "no" and options.test_split_size is None:
        if len(sources) > 1:
            raise UserError(
                "`eval_strategy` is on, and there are several `datasets`. Set `test_split_size` to cut a validation "
                "split from their mixture, or `eval_strategy: no`."
            )
        evaluation = [find(0, script.dataset_test_split, "dataset_test_split")]
    form = _common_form([*train, *evaluation])
    data = TrainingData(
        " + ".join(source.path for source in sources),
        form.type,
        form.columns,
        form.conversational,
        Dataset.from_dict({}),
        None,
        tuple(sources),
        notes=[
            f"Files of data in {first.name} that are not read: {_listed([file.name for file in first.left_out])}."
            for first in (next(iter(each.values())) for each in opened)
            if first.left_out
        ],
        unread=tuple(dict.fromkeys(column for split in train for column in split.unread())),
    )
    limit = options.max_faulty_rows
    return _read_all(data, train, evaluation, limit, arguments)


def _read_all(
    data: TrainingData,
    train: list[_SourceSplit],
    evaluation: list[_SourceSplit],
    limit: float,
    arguments: StageArguments,
) -> TrainingData:
    if arguments.script.dataset_streaming:
        streams = [_stream(split, limit) for split in (train[0], *evaluation)]
        source = train[0].source
        places = [source.path, source.name, source.revision, source.split]
        return replace(data, train=streams[0], evaluation=streams[1] if evaluation else None, content=places)
    processes = getattr(arguments.training, "dataset_num_proc", None)
    read = [_read(split, processes) for split in (*train, *evaluation)]
    faulty = [fault for split, rows in zip([*train, *evaluation], read) for fault in faults_in(rows, data, split.split)]
    total = sum(map(len, read))
    notes = refuse_faults(faulty, total, limit)
    whole = [without_faults(rows) for rows in read]
    rows = whole[0] if len(train) == 1 else concatenate_datasets(whole[: len(train)])
    if not len(rows):
        raise UserError(f"The data {data.name} has no rows that can be trained on: all {total:,} are faulty.")
    _check_labels(rows, data)
    return replace(
        data, train=rows, evaluation=whole[-1] if evaluation else None, faulty=len(faulty), notes=[*data.notes, *notes]
    )


def _check_labels(rows: Dataset, data: TrainingData) -> None:
    """See that a column of categories or languages that is named is there: a misspelt one would label no row."""
    for label in (CATEGORY, LANGUAGE):
        named = {getattr(source, f"{label}_column") for source in data.sources} - {None}
        if named and is_empty(rows, label):
            raise UserError(
                f"`{label}_column` is {', '.join(sorted(named))}, which no row of {data.name} has. Give the name of a "
                "column, or leave it out."
            )


def is_empty(rows: Dataset, name: str) -> bool:
    """Whether a column holds nothing but nulls."""
    batches = rows.select_columns([name]).with_format("arrow").iter(10_000)
    return all(batch[name].null_count == len(batch) for batch in batches)


def _options_of_whole_data(arguments: StageArguments, sources: Sequence[RowSource]) -> list[str]:
    options = arguments.data
    given = {
        "`datasets`": options.datasets is not None,
        "`shares`": bool(options.shares),
        "`test_split_size`": options.test_split_size is not None,
        "`drop_duplicates`": options.drop_duplicates,
        "`score_above`": options.score_above is not None,
        "`drop_wrong_language`": options.drop_wrong_language,
        "`drop_truncated`": options.drop_truncated,
        "`category_column`": options.category_column is not None,
        "`language_column`": options.language_column is not None,
        "`max_faulty_rows` as a share": 0 < options.max_faulty_rows < 1,
    }
    return [name for name, is_given in given.items() if is_given]


def _split(splits: dict[str, RawSplit], split: str, name: str, option: str) -> RawSplit:
    if split not in splits:
        raise UserError(
            f"The data {name} has no split {split!r}; it has {', '.join(map(repr, splits))}. Set `{option}`"
            + (
                ", `test_split_size` to cut one from the training data, or `eval_strategy: no` to train without "
                "evaluation."
                if option == "dataset_test_split"
                else "."
            )
        )
    return splits[split]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_FILES:,} more" if len(names) > _SHOWN_FILES else ""
    return ", ".join(names[:_SHOWN_FILES]) + more


def _examples(raw: RawSplit, where: str) -> list[Row]:
    first = list(islice(raw.rows(), _EXAMPLES))
    if not first:
        raise UserError(f"The data {where} has no rows. Give a dataset with at least one example.")
    examples = [row for row in first if isinstance(row, dict)]
    if not examples:
        fault = first[0].text if isinstance(first[0], RowFault) else f"it is {messages_module.shortened(first[0])}"
        raise unreadable(raw.name, ValueError(f"of row 1, {fault}"))
    return examples


def _common_form(splits: list[_SourceSplit]) -> RowForm:
    first, *others = splits
    for other in others:
        if (other.form.type, other.form.columns, other.form.conversational) != (
            first.form.type,
            first.form.columns,
            first.form.conversational,
        ):
            raise UserError(
                f"{first.source.path} (split {first.split}) has {_described(first.form)}, and {other.source.path} "
                f"(split {other.split}) has {_described(other.form)}. All must be of one form."
            )
    return first.form


def _described(form: RowForm) -> str:
    return f"{'messages' if form.conversational else 'strings'} in {', '.join(form.columns)}"


def _read(split: _SourceSplit, num_proc: int | None) -> Dataset:
    """All rows of a split, on disk, in the cache of `datasets`."""
    with PartialState().local_main_process_first():
        if isinstance(split.raw.dataset, Dataset):
            return split.raw.dataset.map(
                split.read_row,
                with_indices=True,
                remove_columns=split.raw.dataset.column_names,
                features=split.features(),
                num_proc=num_proc,
                desc=f"Reading {split.source.path}",
            )
        try:
            return Dataset.from_generator(split.read, features=split.features(), fingerprint=split.fingerprint())
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise unreadable(split.source.path, error.__cause__ or error) from error


def _stream(split: _SourceSplit, limit: float) -> IterableDataset:
    def read() -> Iterator[Row]:
        faulty: list[FaultyRow] = []
        where = f"{split.source.path} (split {split.split})"
        for row in split.read():
            if row[FAULT] is None:
                yield {key: value for key, value in row.items() if key not in CHAT_EXTRAS or value is not None}
            else:
                faulty.append(FaultyRow(where, row[ROW], row[FAULT_KIND], row[FAULT]))
                refuse_faults(faulty, row[ROW], limit)

    return IterableDataset.from_generator(read)


def faults_in(rows: Dataset, data: TrainingData, split: str) -> list[FaultyRow]:
    """The faulty ones among rows that have the columns of choosing."""
    found = []
    for batch in rows.select_columns([ROW, SOURCE, FAULT_KIND, FAULT]).with_format("arrow").iter(10_000):
        if batch[FAULT].null_count < len(batch):
            for row in batch.filter(batch[FAULT].is_valid()).to_pylist():
                found.append(FaultyRow(data.where(row[SOURCE], split), row[ROW], row[FAULT_KIND], row[FAULT]))
    return found


def without_faults(rows: Dataset) -> Dataset:
    """The rows that are not faulty."""
    is_faulty = np.concatenate(
        [batch[FAULT].is_valid().to_numpy() for batch in rows.select_columns([FAULT]).with_format("arrow").iter(10_000)]
    )
    return rows.select(np.flatnonzero(~is_faulty)) if is_faulty.any() else rows


def hash_of_rows(rows: Iterable[tuple[int, int]]) -> str:
    """SHA-256 of which rows of which sources these are, in any order.

    Args:
        rows: the place of each one's source among `datasets`, from 0, and its number there, from 1.
    """
    return sha256("".join(f"{source}\t{row}\n" for source, row in sorted(rows)).encode()).hexdigest()


def _digest(content: Any) -> int:
    try:
        text = json.dumps(content, ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError as error:
        raise RowFault("not text", "it holds half of a surrogate pair, which is not valid Unicode") from error
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big", signed=True)


def _label(row: Any, column: str | None, fixed: str | None) -> str | None:
    value = row.get(column) if column is not None else None
    return fixed if value is None else _as_unicode(str(value))


def _as_unicode(text: str) -> str:
    """Halves of surrogate pairs, which JSON may have and Arrow may not, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _score(row: Any, column: str | None) -> float | None:
    try:
        return float(row[column]) if column is not None else None
    except (KeyError, TypeError, ValueError):
        return None
