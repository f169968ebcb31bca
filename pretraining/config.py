# SPDX-License-Identifier: Apache-2.0
"""What a corpus consists of and how much of each source is trained on: the YAML of `jai pack` and of a mixture.

One file serves both. `jai pack` reads what the text is; the numbers of the mixture (`weight`, `epochs`, `keep_best`,
`alpha`, `beta`, `when_dry`) only choose from what is packed, so they may be changed without packing anew.
"""

import math
import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from jai.errors import UserError
from jai.options import option, options_of, read_value, read_yaml, refuse_unknown

WhenDry = Literal["error", "renormalize"]


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """Text of one kind: where it lies, and how much of it is trained on."""

    name: str = option(help="Names its shards and reports: letters, digits, '-', '_' and '.'.")
    text: list[str] = option([], help="Files (.jsonl, .jsonl.gz, .parquet, .txt), folders, or Hub datasets.")
    revision: str | None = option(None, help="Commit, branch or tag, if the text is on the Hub.")
    language: str | None = option(None, help="Language of the text, such as th.")
    column: str = option("text", help="Column (field) that holds the text.")
    parallel: Any = option(
        None, help="Columns by language, such as {en: en, th: th}: the same text in several, kept side by side."
    )
    quality_column: str | None = option(None, help="Column that holds a score; more is better.")
    packed: str | None = option(
        None,
        help="In place of text: the source whose packed documents these are, chosen otherwise.",
    )
    keep_best: float = option(1.0, help="Share of the documents, the best by score, that is kept.", above=0, at_most=1)
    min_tokens: int = option(1, help="Documents of fewer tokens are left out.", at_least=1)
    max_tokens: int | None = option(None, help="Documents of more tokens are left out.", at_least=1)
    weight: float | None = option(None, help="Its share of the tokens, against the others' weights.", above=0)
    epochs: float = option(1.0, help="How often its tokens are used at most.", above=0)
    licence: str | None = option(None, help="Said by `jai pack`, and recorded.")

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages of a row's texts, in the order of the columns; of a choice of another source's, none of its own."""
        if self.packed is not None:
            return ()
        return tuple(self.parallel) if self.parallel else (str(self.language),)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a row's texts, in the order of the languages."""
        return tuple(self.parallel.values()) if self.parallel else (self.column,)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What the file holds; recipes/corpus_thai_public.yaml explains each key."""

    sources: list[CorpusSource] = option(help="What is read.")
    tokenizer: str | None = option(None, help="Folder or Hub id of the tokenizer.")
    alpha: float | None = option(
        None, help="Trillion-7B's equation 2: how much the size of a language counts.", at_least=0, at_most=1
    )
    beta: Any = option(None, help="Equation 2: shares by language that size does not decide; they sum to 1.")
    when_dry: WhenDry = option("error", help="What happens when a source is used up.")

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("The corpus has no sources. Give at least one.")
        names = [source.name.casefold() for source in self.sources]  # as some file systems read them
        if double := next((self.sources[n].name for n, name in enumerate(names) if name in names[:n]), None):
            raise UserError(f"The corpus has two sources of the name {double!r}. Give each its own.")
        for source in self.sources:
            _check_source(source)
        packed = {source.name: source for source in self.sources if source.packed is None}
        for source in self.sources:
            if source.packed is not None and source.packed not in packed:
                raise UserError(
                    f"The source {source.name} is a choice of {source.packed!r}; expected another source with text: "
                    f"{', '.join(packed) or 'there is none'}."
                )
        self._check_shares()

    @property
    def packed_sources(self) -> "list[CorpusSource]":
        """Those that have text of their own."""
        return [source for source in self.sources if source.packed is None]

    def _check_shares(self) -> None:
        weighted = [source.name for source in self.sources if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            lacking = next(source.name for source in self.sources if source.weight is None)
            raise UserError(
                f"The source {weighted[0]} has a weight and {lacking} has none. Give all of them one, or none: then "
                "shares are as the sizes are."
            )
        if (self.alpha is None) != (self.beta is None):
            given, missing = ("alpha", "beta") if self.beta is None else ("beta", "alpha")
            raise UserError(f"{given} is given without {missing}. Equation 2 needs both.")
        if self.beta is None:
            return
        if weighted:
            raise UserError("Both weights and alpha with beta are given, which decide the same. Give one of the two.")
        languages = sorted({language for source in self.sources for language in source.languages})
        if not isinstance(self.beta, dict) or not all(_is_share(value) for value in self.beta.values()):
            raise UserError(f"beta is {self.beta!r}; expected shares by language, such as {{en: 0.8, th: 0.2}}.")
        if sorted(map(str, self.beta)) != languages:
            raise UserError(
                f"beta has {', '.join(sorted(map(str, self.beta)))}; the sources' languages are "
                f"{', '.join(languages)}. Give a share for each of them."
            )
        if not math.isclose(total := sum(self.beta.values()), 1, abs_tol=1e-6):
            raise UserError(f"beta sums to {total:g}; it must sum to 1, or P(l) in equation 2 would not.")
        if any(len(source.languages) > 1 for source in self.sources):
            raise UserError(
                "Equation 2 gives each language its share, and a parallel source has several. Give weights instead."
            )


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _check_source(source: CorpusSource) -> None:
    if not re.fullmatch(r"\w[\w.-]*", source.name, re.ASCII):
        raise UserError(f"The source {source.name!r} names files. Use letters, digits, '-', '_' and '.'.")
    if source.max_tokens is not None and source.max_tokens < source.min_tokens:
        raise UserError(
            f"The source {source.name} takes documents from {source.min_tokens} to {source.max_tokens} tokens, which "
            "are none. Give a larger max_tokens."
        )
    if source.packed is not None:
        own = ("text", "revision", "language", "parallel", "quality_column", "licence")
        if named := [name for name in own if getattr(source, name)]:
            raise UserError(
                f"The source {source.name} is a choice of {source.packed}, which has its own {named[0]}. Leave it out."
            )
        return
    if (source.language is None) == (source.parallel is None):
        raise UserError(f"The source {source.name} needs either `language` or `parallel` (columns by language).")
    if source.parallel is not None:
        columns = source.parallel
        if (
            not isinstance(columns, dict)
            or len(columns) < 2
            or not all(isinstance(part, str) for pair in columns.items() for part in pair)
        ):
            raise UserError(
                f"`parallel` of the source {source.name} is {columns!r}; expected two or more columns by language, "
                "such as {en: en, th: th}."
            )
        if source.column != "text":
            raise UserError(f"The source {source.name} has both `column` and `parallel`. Give one of them.")
    if source.keep_best < 1 and source.quality_column is None:
        raise UserError(f"The source {source.name} keeps the best, but has no `quality_column`. Give one.")


def read_corpus_config(path: Path) -> CorpusConfig:
    """Parse the YAML of a corpus.

    Paths in it are taken from the current folder.

    Raises:
        UserError: for a file that cannot be read, unknown keys, or values that do not fit.
    """
    values = read_yaml(path)
    try:
        return corpus_config(values)
    except UserError as error:
        raise UserError(f"In {path}: {error}") from None


def corpus_config(values: dict[str, Any]) -> CorpusConfig:
    """A corpus from plain values, as YAML gives them.

    Raises:
        UserError: as `read_corpus_config`.
    """
    listed = values.get("sources")
    if not isinstance(listed, list):
        said = "is missing" if listed is None else f"is {listed!r}"
        raise UserError(f"`sources` {said}; expected a list of sources, as in recipes/corpus_thai_public.yaml.")
    sources = []
    for number, source in enumerate(listed, 1):
        if not isinstance(source, dict):
            raise UserError(f"Source {number} is {source!r}; expected options, such as `name: wiki`.")
        sources.append(CorpusSource(**_values(CorpusSource, source, f"source {source.get('name', number)}")))
    return CorpusConfig(**_values(CorpusConfig, values | {"sources": sources}, "the corpus"))


def _values(kind: type, given: dict[str, Any], where: str) -> dict[str, Any]:
    known = options_of(kind)
    refuse_unknown(given.keys(), known.keys(), where)
    lacking = next((name for name, each in known.items() if each.default is MISSING and name not in given), None)
    if lacking:
        raise UserError(f"{where} lacks `{lacking}`: {known[lacking].info.help}")
    read = {}
    for name, value in given.items():
        each = known[name]
        if name == "text" and isinstance(value, str):
            value = [value]
        try:
            # `Any` and the list of sources have checks of their own, above.
            own = name in ("sources", "parallel", "beta")
            read[name] = value if own else read_value(each, value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return read
