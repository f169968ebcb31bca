# SPDX-License-Identifier: Apache-2.0
"""Which of the rows that were read are trained on: gates of quality, the mixture, and the validation split."""

from collections import Counter
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import KTOConfig

from jai.errors import UserError
from jai.evaluation.language import ANSWER_LANGUAGES, language_fault
from jai.trainers.arguments import StageArguments, StageConfig, max_length_of
from jai.trainers.data import (
    CATEGORY,
    CHOOSING_COLUMNS,
    DIGEST,
    LANGUAGE,
    QUESTION,
    ROW,
    SCORE,
    SOURCE,
    TrainingData,
    hash_of_rows,
    is_empty,
)
from jai.trainers.data_files import AnyDataset
from jai.trainers.mixture import RowMixture, cut_validation, even_order, mix_rows
from jai.trainers.rows import CHAT_EXTRAS, REWARD_COLUMNS, DatasetType, answers_of
from jai.trainers.tokens import IGNORED, lengths_of, splits_rows, tokenize_rows

_SHOWN_ROWS = 3


def prepare_rows(data: TrainingData, arguments: StageArguments, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Leave out what must not be trained on, tokenise SFT's rows, choose the mixture, cut the validation split.

    Returns:
        The data with the columns that TRL reads, and category and language where they are known.

    Raises:
        UserError: if no row is left, rows do not fit the chat template, or the shares cannot be had.
    """
    options, training = arguments.data, arguments.training
    seed = training.seed if training.data_seed is None else training.data_seed
    if not isinstance(data.train, Dataset):
        data = tokenize_rows(data, tokenizer, training)
        return _drop_untaught_of_streams(_tidy(data))
    data = _take_rows_of_sources(data, seed)
    data = _gate_content(data, arguments)
    data = tokenize_rows(data, tokenizer, training, options.max_faulty_rows)
    data = _gate_tokens(data, arguments)
    if options.has_mixture:
        mixture = _mix(data, arguments, seed)
        data = replace(data, train=_rows(data.train).select(mixture.positions), mixture=mixture)
    if options.test_split_size is not None:
        rows = _rows(data.train)
        train, held_out = cut_validation(_column(rows, QUESTION), options.test_split_size, seed)
        data = replace(data, train=rows.select(train), evaluation=rows.select(held_out))
    elif data.evaluation is not None:
        _say_seen_in_training(data)
    if (
        getattr(training, "packing", False)
        and getattr(training, "packing_strategy", None) == "wrapped"
        and _has_groups(data)
    ):
        data.notes.append("No loss by category and language is logged: `wrapped` packing hides where documents end.")
    if isinstance(training, KTOConfig) and _has_groups(data):
        data.notes.append("No figures by category and language are logged: TRL's KTOTrainer keeps no such columns.")
    if getattr(training, "ld_alpha", None) is not None and _has_groups(data):
        data.notes.append("No figures by category and language are logged: `ld_alpha` weighs tokens by their places.")
    if options.has_mixture or any(source.rows is not None for source in data.sources):
        rows = _rows(data.train)
        numbers = zip(_column(rows, SOURCE).tolist(), _column(rows, ROW).tolist())
        data = replace(data, chosen_rows=hash_of_rows(numbers))
    content = sha256(_column(_rows(data.train), DIGEST).tobytes()).hexdigest()
    return _tidy(replace(data, counts=_count_rows(data), content=content))


def _has_groups(data: TrainingData) -> bool:
    return not all(is_empty(_rows(data.train), name) for name in (CATEGORY, LANGUAGE))


def _rows(rows: AnyDataset | None) -> Dataset:
    assert isinstance(rows, Dataset)
    return rows


def _column(rows: Dataset, name: str) -> np.ndarray:
    batches = [batch[name].to_numpy() for batch in rows.select_columns([name]).with_format("arrow").iter(10_000)]
    return np.concatenate(batches) if batches else np.zeros(0, dtype=np.int64)


def _texts(rows: Dataset, name: str) -> list[str | None]:
    return list(rows.select_columns([name]).to_dict()[name])


def _tidy(data: TrainingData) -> TrainingData:
    """Without the columns that rows were chosen by, and without those that hold nothing."""

    def tidied(rows: AnyDataset | None) -> AnyDataset | None:
        if rows is None or not isinstance(rows, Dataset):
            return rows.remove_columns(list(CHOOSING_COLUMNS)) if rows is not None else None
        perhaps = [name for name in (CATEGORY, LANGUAGE, *CHAT_EXTRAS, *REWARD_COLUMNS) if name in rows.column_names]
        empty = [name for name in perhaps if is_empty(rows, name)]
        rows = rows.remove_columns([*CHOOSING_COLUMNS, *empty])
        if "chat_template_kwargs" in rows.column_names:  # TRL unpacks them as a mapping
            rows = rows.map(lambda row: {"chat_template_kwargs": row["chat_template_kwargs"] or {}})
        return rows

    train = tidied(data.train)
    assert train is not None
    return replace(data, train=train, evaluation=tidied(data.evaluation))


def _take_rows_of_sources(data: TrainingData, seed: int) -> TrainingData:
    """As many rows of each source as it says, spread evenly over it."""
    if all(source.rows is None for source in data.sources):
        return data
    rows = _rows(data.train)
    source_of = _column(rows, SOURCE)
    taken = []
    for index, source in enumerate(data.sources):
        positions = np.flatnonzero(source_of == index)
        if source.rows is not None:
            if source.rows > len(positions):
                raise UserError(
                    f"`rows` of {source.path} is {source.rows:,}, and it has {len(positions):,} that can be trained "
                    "on. Give a smaller number, or leave it out for all of them."
                )
            positions = np.sort(positions[even_order(len(positions), seed)[: source.rows]])
        taken.append(positions)
    chosen = np.concatenate(taken)
    if len(data.sources) > 1:
        chosen = np.random.default_rng(seed).permutation(chosen)
    return replace(data, train=rows.select(chosen))


def _gate_content(data: TrainingData, arguments: StageArguments) -> TrainingData:
    """The gates that need no tokens: duplicates, scores, languages."""
    options = arguments.data
    digests = _column(_rows(data.train), DIGEST)
    is_first = np.zeros(len(digests), dtype=bool)
    is_first[np.unique(digests, return_index=True)[1]] = True
    if options.drop_duplicates:
        data = _keep(data, is_first, "they are the same as an earlier row")
    elif not is_first.all():
        rows = _rows(data.train)
        data.notes.append(
            f"{(~is_first).sum():,} of {len(rows):,} rows are the same as an earlier one ({_named(data, ~is_first)}), "
            "and stay: `drop_duplicates: true` leaves them out."
        )
    if options.score_above is not None:
        scores = _column(_rows(data.train), SCORE).astype(float)
        without = int(np.isnan(scores).sum())
        why = f"their score is not above {options.score_above:g}" + (f" ({without:,} have none)" if without else "")
        data = _keep(data, scores > options.score_above, why)
    if options.drop_wrong_language:
        data = _keep_language(data)
    return data


def _gate_tokens(data: TrainingData, arguments: StageArguments) -> TrainingData:
    """The gates on what is trained: rows without a label, rows that are cut off."""
    training = arguments.training
    if "input_ids" not in _rows(data.train).column_names:
        if arguments.data.drop_truncated:
            raise UserError("`drop_truncated` is for SFT. Leave it out; the plan says how much is cut off.")
        return data
    is_chat = "messages" in _rows(data.train).column_names or getattr(training, "assistant_only_loss", False)
    why = "they have no assistant's turn that is trained" if is_chat else "no loss is taken on them"
    data = _keep(data, _is_taught(data.train, None, training), why)
    limit = max_length_of(training)
    if limit is None or (getattr(training, "packing", False) and splits_rows(training)):
        if arguments.data.drop_truncated:
            why = "`max_length` is null" if limit is None else "packing continues a long row in another sequence"
            data.notes.append(f"`drop_truncated` leaves nothing out: no row is cut off, for {why}.")
        return _keep_taught_evaluation(data, None, training)
    if arguments.data.drop_truncated:
        data = _keep(data, lengths_of(_rows(data.train)) <= limit, f"they have more than {limit:,} tokens")
    mode = getattr(training, "truncation_mode", "keep_start")
    ends = "last" if mode == "keep_end" else "first"
    why = f"nothing that the loss is taken on lies in their {ends} {limit:,} tokens (raise `max_length`)"
    data = _keep(data, _is_taught(data.train, limit, training), why)
    return _keep_taught_evaluation(data, limit, training)


def _is_taught(rows: AnyDataset | None, limit: int | None, training: StageConfig) -> np.ndarray:
    """Whether a row has a label among the tokens that are left of it. Shape (rows,)."""
    keeps_end = getattr(training, "truncation_mode", "keep_start") == "keep_end" and not getattr(
        training, "packing", False
    )
    found = []
    for batch in _rows(rows).select_columns(["labels"]).with_format("arrow").iter(1000):
        for labels in batch["labels"]:
            values = labels.values.to_numpy()
            kept = values if limit is None else values[-limit:] if keeps_end else values[:limit]
            found.append(bool((kept != IGNORED).any()))
    return np.array(found, dtype=bool)


def _keep_taught_evaluation(data: TrainingData, limit: int | None, training: StageConfig) -> TrainingData:
    rows = data.evaluation
    if not isinstance(rows, Dataset):
        return data
    is_taught = _is_taught(rows, limit, training)
    if is_taught.all():
        return data
    if not is_taught.any():
        raise UserError(f"None of the rows to evaluate on in {data.name} has a token that the loss is taken on.")
    data.notes.append(
        f"Left out {(~is_taught).sum():,} of {len(rows):,} rows to evaluate on: no loss is taken on what is left of "
        "them."
    )
    return replace(data, evaluation=rows.select(np.flatnonzero(is_taught)))


def _drop_untaught_of_streams(data: TrainingData) -> TrainingData:
    if data.type not in (DatasetType.LANGUAGE_MODELING, DatasetType.PROMPT_COMPLETION):
        return data

    def is_taught(row: dict[str, Any]) -> bool:
        return any(label != IGNORED for label in row["labels"])

    data.notes.append("Rows are streamed: those that no loss is taken on are left out without being counted.")
    evaluation = None if data.evaluation is None else data.evaluation.filter(is_taught)
    return replace(data, train=data.train.filter(is_taught), evaluation=evaluation)


def _keep(data: TrainingData, keeps: np.ndarray, why: str) -> TrainingData:
    """The training rows for which `keeps` is true; how many go is said.

    Raises:
        UserError: if none is left.
    """
    rows = _rows(data.train)
    if not keeps.any():
        raise UserError(f"None of the examples in {data.name} can be trained on: {why}.")
    if keeps.all():
        return data
    dropped = int((~keeps).sum())
    data.notes.append(f"Left out {dropped:,} of {len(rows):,} examples: {why} ({_named(data, ~keeps)}).")
    return replace(data, train=rows.select(np.flatnonzero(keeps)))


def _named(data: TrainingData, which: np.ndarray) -> str:
    """Some of the rows, by source and number."""
    positions = np.flatnonzero(which)
    rows = _rows(data.train).select(positions[:_SHOWN_ROWS]).select_columns([ROW, SOURCE])
    names = [f"row {row[ROW]:,} of {data.sources[row[SOURCE]].path}" for row in rows]
    more = len(positions) - len(names)
    return ", ".join(names) + (f" and {more:,} more" if more else "")


def _mix(data: TrainingData, arguments: StageArguments, seed: int) -> RowMixture:
    options, rows = arguments.data, _rows(data.train)
    tokens = lengths_of(rows) if "input_ids" in rows.column_names else None
    if options.shares_of == "tokens" and tokens is None:
        raise UserError("`shares_of: tokens` is for SFT. Preference pairs have shares of examples.")
    groups: list[str | None]
    if options.shares:
        groups, shares = _texts(rows, CATEGORY), dict(options.shares)  # type: ignore[arg-type]
    else:
        names = _names_of_sources(data)
        groups = [names[index] for index in _column(rows, SOURCE)]
        shares = {name: float(source.fraction or 0) for name, source in zip(names, data.sources)}
        if not sum(shares.values()) > 0:
            raise UserError("The `fraction` of each of `datasets` is 0. Give at least one of them a share.")
    return mix_rows(
        groups,
        shares,
        tokens=tokens,
        of=options.shares_of,
        size=options.mixture_size,
        repeat=options.repeat_rows,
        seed=seed,
    )


def _names_of_sources(data: TrainingData) -> list[str]:
    """Paths; the same one twice gets its number."""
    paths = [source.path for source in data.sources]
    twice = {path for path, count in Counter(paths).items() if count > 1}
    return [f"{path} ({number})" if path in twice else path for number, path in enumerate(paths, 1)]


def _say_seen_in_training(data: TrainingData) -> None:
    evaluation = _column(_rows(data.evaluation), DIGEST)
    seen = int(np.isin(evaluation, _column(_rows(data.train), DIGEST)).sum())
    if seen:
        data.notes.append(f"{seen:,} of {len(evaluation):,} rows to evaluate on are among those to train on.")


def _count_rows(data: TrainingData) -> dict[tuple[str, str | None, str | None], int]:
    rows = _rows(data.train)
    keys = zip(_column(rows, SOURCE).tolist(), _texts(rows, CATEGORY), _texts(rows, LANGUAGE))
    return {(data.sources[source].path, *rest): count for (source, *rest), count in Counter(keys).items()}


def _keep_language(data: TrainingData) -> TrainingData:
    rows = _rows(data.train)
    keeps = np.ones(len(rows), dtype=bool)
    faults: Counter[str] = Counter()
    for position, row in enumerate(rows.select_columns([*data.columns, LANGUAGE])):
        if row[LANGUAGE] in ANSWER_LANGUAGES:
            found = [language_fault(text, row[LANGUAGE]) for text in answers_of(row, data.columns)]
            if first := next(filter(None, found), None):
                keeps[position] = False
                faults[first.value] += 1
    kinds = ", ".join(f"{kind}: {count:,}" for kind, count in faults.most_common())
    others = sorted({str(language) for language in _texts(rows, LANGUAGE)} - set(ANSWER_LANGUAGES))
    if others:
        data.notes.append(f"Not checked for their language: rows whose language is {', '.join(others)}.")
    return _keep(data, keeps, f"their answers are not in their language ({kinds})")
