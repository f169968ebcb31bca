# SPDX-License-Identifier: Apache-2.0
"""What a training stage is told of its data beside TRL's `dataset_name`: sources, shares, what is left out."""

from dataclasses import dataclass, field, fields
from typing import Any

from jai.errors import UserError
from jai.options import is_number, refuse_unknown

SHARES_OF = ("examples", "tokens")


@dataclass(frozen=True)
class RowSource:
    """One of several sources of a mixture.

    Attributes:
        path: a Hub id, a folder or a file.
        name: the configuration of a Hub dataset.
        revision: commit, branch or tag of a Hub dataset; None is its default branch.
        split: which split is trained on.
        rows: how many of its rows to take, spread evenly over it; None is all of them.
        fraction: its share of the mixture.
        category: of all its rows: chat, task, …
        language: of all its rows, as a code: th, en.
        category_column, language_column, score_column: where each row has its own.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    rows: int | None = None
    fraction: float | None = None
    category: str | None = None
    language: str | None = None
    category_column: str | None = None
    language_column: str | None = None
    score_column: str | None = None

    def __post_init__(self) -> None:
        columns = ("category_column", "language_column", "score_column")
        for name in ("path", "name", "revision", "split", "category", "language", *columns):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name not in ("path", "split")):
                raise UserError(f"`{name}` in `datasets` is {value!r}; expected text. Write words like no in quotes.")
        if self.rows is not None and (type(self.rows) is not int or self.rows < 1):
            raise UserError(f"`rows` in `datasets` is {self.rows!r}; expected a whole number, 1 or more.")
        if self.fraction is not None and not (is_number(self.fraction) and self.fraction >= 0):
            raise UserError(f"`fraction` in `datasets` is {self.fraction!r}; expected a number, 0 or more.")


@dataclass
class DataArguments:
    """Options of JAI's training stages on their data."""

    _argument_group_name = "JAI's options for data"

    datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "In a YAML file, instead of `dataset_name`: the sources of a mixture, each with `path` and "
            "optionally `name`, `revision`, `split`, `rows`, `fraction`, `category`, `language`, `category_column`, "
            "`language_column`, `score_column`. A part of a source is sampled evenly over its rows."
        },
    )
    shares: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Share of each category in the mixture, such as `{chat: 10.15, task: 24.72}`. They need not add up "
            "to 100."
        },
    )
    shares_of: str = field(
        default="examples",
        metadata={"help": "Unit of the shares: `examples`, or `tokens` (SFT only).", "choices": list(SHARES_OF)},
    )
    mixture_size: int | None = field(
        default=None,
        metadata={"help": "Size of the mixture in the unit of `shares_of`. Default: the largest that repeats no row."},
    )
    repeat_rows: bool = field(
        default=False, metadata={"help": "Repeat rows of a source that has too few for `mixture_size`."}
    )
    category_column: str | None = field(
        default=None,
        metadata={"help": "Column with each row's category. SFT logs the loss of each category."},
    )
    language_column: str | None = field(
        default=None,
        metadata={"help": "Column with each row's language code, such as th. SFT logs the loss of each language."},
    )
    score_column: str | None = field(
        default=None, metadata={"help": "Column with each row's score, such as a judge's; see `score_above`."}
    )
    score_above: float | None = field(
        default=None,
        metadata={"help": "Drop rows with this score or less. Trillion-7B keeps scores above 3 of 5."},
    )
    max_faulty_rows: float = field(
        default=0.0,
        metadata={
            "help": "Faulty rows to tolerate: a number of rows, or a fraction if below 1. Faulty rows are counted, "
            "shown and never trained on; with more, training does not start."
        },
    )
    drop_duplicates: bool = field(
        default=False,
        metadata={"help": "Drop duplicate rows. Without this option they are counted and kept."},
    )
    drop_truncated: bool = field(
        default=False, metadata={"help": "Drop rows longer than `max_length` instead of truncating them."}
    )
    drop_wrong_language: bool = field(
        default=False,
        metadata={"help": "Drop rows whose answers are not in the language of their source or row."},
    )
    test_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Validation split to take from the training data: a number of rows, or a fraction if below 1. The "
            "split is deterministic and keeps rows with the same prompt together."
        },
    )
    preview: int = field(
        default=0,
        metadata={"help": "Show the first N rows as tokens with their labels, then exit without loading the model."},
    )

    def __post_init__(self) -> None:
        for name in ("max_faulty_rows", "test_split_size", "mixture_size", "preview"):
            value, above = getattr(self, name), name in ("test_split_size", "mixture_size")
            if value is not None and not (is_number(value) and (value > 0 if above else value >= 0)):
                raise UserError(f"`{name}` is {value}; expected {'more than 0' if above else '0 or more'}.")
        if self.shares is not None:
            self.shares = _read_shares(self.shares)
        if self.shares and self.datasets is None and self.category_column is None:
            raise UserError("`shares` are of categories. Give `datasets` with a `category` each, or `category_column`.")
        without = [name for name in ("mixture_size", "repeat_rows") if getattr(self, name)]
        without += ["shares_of"] if self.shares_of != "examples" else []
        if without and not self.has_mixture:
            raise UserError(f"`{without[0]}` is of a mixture by shares. Give `shares`, or each source a `fraction`.")
        if self.repeat_rows and self.mixture_size is None:
            raise UserError("`repeat_rows` needs to know how far. Give `mixture_size`.")
        if self.score_above is not None and not self._has("score_column"):
            raise UserError("`score_above` needs scores. Set `score_column` to the column that has them.")
        if self.drop_wrong_language and not (self._has("language_column") or self._has("language")):
            raise UserError(
                "`drop_wrong_language` needs to know the right one. Give each of `datasets` a `language`, or set "
                "`language_column`."
            )

    def _has(self, name: str) -> bool:
        return bool(getattr(self, name, None)) or any(source.get(name) for source in self.datasets or [])

    @property
    def has_mixture(self) -> bool:
        """Whether rows are chosen by shares."""
        return bool(self.shares) or any("fraction" in source for source in self.datasets or [])

    def sources(self, name: str, config: str | None, split: str) -> list[RowSource]:
        """The sources of the training data: `datasets`, or the one that TRL's options name.

        Raises:
            UserError: for `datasets` that name no source, or keys that are not known.
        """
        columns = ("category_column", "language_column", "score_column")
        shared = {column: getattr(self, column) for column in columns}
        if self.datasets is None:
            return [RowSource(name, config, split=split, **shared)]
        if not self.datasets:
            raise UserError("`datasets` is empty. Give at least one source, each with a `path`.")
        known = [each.name for each in fields(RowSource)]
        for source in self.datasets:
            refuse_unknown(source, known, "A source in `datasets`")
            if "path" not in source:
                raise UserError(f"A source in `datasets` has no `path`: {source}.")
        sources = [RowSource(**{**shared, **source}) for source in self.datasets]
        with_fraction = [source for source in sources if source.fraction is not None]
        if with_fraction and (len(with_fraction) < len(sources) or self.shares):
            raise UserError(
                "`fraction` must be set for all of `datasets` or for none, and not beside `shares` of categories."
            )
        return sources


def _read_shares(shares: Any) -> dict[str, float]:
    if not isinstance(shares, dict) or not all(isinstance(name, str) for name in shares):
        raise UserError(f"`shares` is {shares!r}; expected a share for each category, such as {{chat: 10.15}}.")
    for name, share in shares.items():
        if not (is_number(share) and share >= 0):
            raise UserError(f"The share of {name} in `shares` is {share!r}; expected a number, 0 or more.")
    if not sum(shares.values()) > 0:
        raise UserError("`shares` are all 0. Give at least one category a share.")
    return {name: float(share) for name, share in shares.items()}
