# SPDX-License-Identifier: Apache-2.0
"""`jai tokenizer report`: tokenizers side by side on text, as tables, JSON, Markdown and a picture.

What measures and draws is imported when the text and the tokenizers are there: it takes two seconds.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table
from tokenizers import Tokenizer

from jai.errors import UserError
from jai.files import new_folder, refuse_existing
from jai.reports import GREY, MUTED, RULE, ReportTable, figure_style, series_color
from jai.tokenization.corpus import Source, open_sources
from jai.tokenization.loading import RECORD_FILE, backend_of, load_tokenizer, tokenizer_folder
from jai.tokenization.options import ReportTokenizersOptions
from jai.version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from jai.tokenization.measure import TextFigures, TokenizerFigures

JSON_FILE, MARKDOWN_FILE, PICTURE_FILE = "report.json", "report.md", "report.png"
_PACKAGES = ("tokenizers", "transformers", "pythainlp", "fonttools", "regex")
_SMALL_SCRIPT = 0.001  # of the characters: scripts with less are left out of tables, and are in the JSON
_MEASURES = {
    "per_character": "Tokens per character",
    "per_word": "Tokens per word",
    "per_byte": "Tokens per byte",
}


@dataclass(frozen=True)
class Subject:
    """A tokenizer that the report is about.

    Attributes:
        name: short name, which tables show.
        origin: folder or Hub id, as it was given.
        tokenizer: what encodes; it neither truncates nor pads.
        sha256: hash of the tokenizer's serialisation.
        new_ids: the tokens that it has over its base; reserved and special ones are left out.
        base_entries: the size of that base, where it is known.
    """

    name: str
    origin: str
    tokenizer: Tokenizer
    sha256: str
    new_ids: frozenset[int]
    base_entries: int | None


@dataclass(frozen=True)
class Sheet:
    """A table of the report; the first column is text, the others are figures. `note` says how to read it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What was measured: the text, and each tokenizer's figures by its short name; `base` is one of these names."""

    command: str
    base: str | None
    subjects: dict[str, Subject]
    sources: list[Source]
    text: TextFigures
    figures: dict[str, TokenizerFigures]

    def record(self) -> dict:
        """Everything, for JSON."""
        from jai.tokenization.measure import machine

        return {
            "jai": __version__,
            "versions": {package: version(package) for package in _PACKAGES},
            "machine": machine(),
            "command": self.command,
            "base": self.base,
            "texts": [part.record() for source in self.sources for part in source.parts],
            "text": asdict(self.text),
            "tokenizers": {
                name: {
                    "origin": subject.origin,
                    "sha256": subject.sha256,
                    "base_entries": subject.base_entries,
                    **asdict(self.figures[name]),
                }
                for name, subject in self.subjects.items()
            },
        }


def report_tokenizers(options: ReportTokenizersOptions, console: Console | None = None) -> Report:
    """Measure tokenizers on text and print what was found; with `out`, write it as JSON, Markdown and a picture.

    What is measured, and how, says `jai.tokenization.measure`. The new tokens of a tokenizer are those of its
    `tokenizer_training.json`; without one, those that the base lacks.

    Args:
        options: what to measure, and on what.
        console: where the tables are printed; None is standard output.

    Raises:
        UserError: for a tokenizer that cannot be loaded or has no fast implementation, text that cannot be read or has
            nothing in it, or an output folder that exists.
    """
    console = console or Console()
    base, out = options.base, options.out
    if out:
        refuse_existing(out)
    sources = open_sources(options.text)
    origins = list(dict.fromkeys([*([base] if base else []), *options.tokenizer]))
    for origin in origins:
        tokenizer_folder(origin)
    from jai.tokenization.measure import measure

    subjects = load_subjects(origins)
    base_name = next(iter(subjects)) if len(subjects) > 1 or base else None
    command = shlex.join(
        ["jai", "tokenizer", "report", *options.tokenizer]
        + [word for text in options.text for word in ("--text", text)]
        + (["--base", base] if base else [])
        + (["--out", str(out)] if out else [])
    )
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(out)) if out else None
        plan = Table("", "", title="Tokenizer report", show_header=False)
        for name, subject in subjects.items():
            entries = f"{subject.tokenizer.get_vocab_size():,} entries"
            role = "base" if name == base_name else "tokenizer"
            plan.add_row(role, f"{escape(subject.origin)} ({entries})")
        for source in sources:
            plan.add_row("text", escape(source.describe()))
        if out:
            plan.add_row("out", escape(str(out)))
        console.print(plan)
        with console.status("Reading") as status:
            text, figures = measure(
                _documents(sources, status),
                {name: subject.tokenizer for name, subject in subjects.items()},
                {name: subject.new_ids for name, subject in subjects.items()},
                base_name,
            )
        report = Report(command, base_name, subjects, sources, text, figures)
        for sheet in sheets(report, sources_shown=6):
            console.print(_terminal_table(sheet))
            if sheet.note:
                console.print(escape(sheet.note), style="dim", highlight=False)
        if folder:
            (folder / JSON_FILE).write_text(
                json.dumps(report.record(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
            )
            (folder / MARKDOWN_FILE).write_text(_markdown(report), encoding="utf-8")
            with figure_style():
                draw(report).savefig(folder / PICTURE_FILE, dpi=160, metadata={"Software": None})
    if out:
        console.print(f"[bold green]Report written to[/] {escape(str(out))}", soft_wrap=True)
    return report


def load_subjects(origins: Sequence[str]) -> dict[str, Subject]:
    """Load tokenizers; the first is the base of those that do not name one.

    Raises:
        UserError: if one cannot be loaded, has no fast implementation, or contradicts its training record.
    """
    from jai.tokenization.extend import RESERVED_TOKEN

    loaded = [_load(origin) for origin in origins]
    names = [Path(origin.rstrip("/")).name for origin in origins]
    base_vocab = loaded[0].get_vocab()
    subjects = {}
    for origin, name, tokenizer in zip(origins, names, loaded):
        if names.count(name) > 1:
            name = origin
        new_ids, base_entries = _recorded_new_ids(Path(origin) / RECORD_FILE, tokenizer)
        if new_ids is None:
            left_out = {token.content for token in tokenizer.added_tokens_decoder.values()} | base_vocab.keys()
            new_ids = frozenset(
                i
                for token, i in tokenizer.get_vocab().items()
                if token not in left_out and token != RESERVED_TOKEN.format(i)
            )
            base_entries = len(base_vocab) if origin != origins[0] else None
        state = tokenizer.backend_tokenizer.to_str()
        backend = Tokenizer.from_str(state)
        backend.no_truncation()
        backend.no_padding()
        digest = hashlib.sha256(state.encode()).hexdigest()
        subjects[name] = Subject(name, origin, backend, digest, new_ids, base_entries)
    return subjects


def _load(origin: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(origin)
    backend_of(origin, tokenizer)
    return tokenizer


def _recorded_new_ids(record: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int] | None, int | None]:
    """The new ids and the size of the base by the record of the training, or None and None if there is no record."""
    if not record.is_file():
        return None, None
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        surfaces = {int(i): token["surface"] for i, token in content["new_tokens"].items() if token["pieces"]}
        base_entries = int(content["base"]["entries"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{record} is not a record of `jai tokenizer train` ({error!r}). Fix or remove it.") from error
    for i, surface in surfaces.items():
        if (found := tokenizer.convert_ids_to_tokens(i)) != surface:
            raise UserError(
                f"{record} says that token {i} is {surface!r}, but in the tokenizer beside it, it is {found!r}. Give "
                "the folder as `jai tokenizer train` wrote it, or remove the record."
            )
    return frozenset(surfaces), base_entries


def _documents(sources: Sequence[Source], status: Status) -> Iterator[tuple[str, str]]:
    documents, size = 0, 0
    for source in sources:
        for part in source.parts:
            for row in part.read():
                documents, size = documents + 1, size + len(row.text)
                part.figures.found.count(len(row.text.encode()))
                part.figures.sampled.count(len(row.text.encode()))
                if documents % 200 == 0:
                    status.update(f"Measured {documents:,} documents, {size / 1e6:.1f} million characters")
                yield row.source or part.name, row.text
    status.update("Measuring speed")


# Tables


def sheets(report: Report, sources_shown: int) -> list[Sheet]:
    """The tables of the report, with the largest sources by name and the others left to the JSON."""
    return [
        *(_rates(report, measure, title, sources_shown) for measure, title in _MEASURES.items()),
        _properties(report),
        *filter(None, (_tokens(report), _fallback(report), _differences(report))),
    ]


def _rates(report: Report, measure: str, title: str, sources_shown: int) -> Sheet:
    text, figures = report.text, report.figures
    total = text.whole.characters
    scripts = _scripts_shown(text)
    sources = list(text.by_source)[:sources_shown]
    groups = [
        ("all text", text.whole, [found.whole for found in figures.values()]),
        *(
            (f"script {name}", text.by_script[name], [found.by_script[name] for found in figures.values()])
            for name in scripts
        ),
        *(
            (f"source {name}", text.by_source[name], [found.by_source[name] for found in figures.values()])
            for name in sources
        ),
    ]
    rows = [
        [label, f"{size.characters / total:.1%}", *(_number(getattr(rate, measure)) for rate in rates)]
        for label, size, rates in groups
    ]
    notes = []
    if measure == "per_word":
        notes.append("Words of Thai by PyThaiNLP (newmm), elsewhere runs of letters and digits.")
        if text.words_counted_in < total:
            notes.append(f"Counted in {text.words_counted_in:,} characters and scaled up by source.")
    if (missing := len(text.by_source) - len(sources)) and measure == "per_character":
        notes.append(f"{missing} smaller sources are not shown.")
    return Sheet(title, ["", "share of text", *figures], rows, " ".join(notes))


def _properties(report: Report) -> Sheet:
    figures = list(report.figures.values())
    new = [found.new for found in figures]
    rows = [
        ["entries", *(f"{found.entries:,}" for found in figures)],
        ["new tokens", *(f"{found.tokens:,}" if found else "–" for found in new)],
        ["  of the text's tokens", *(_share(found.share_of_text) if found else "–" for found in new)],
        ["  never used", *(f"{found.unused:,} ({_share(found.unused_share)})" if found else "–" for found in new)],
        ["tokens that begin with a mark", *(f"{found.marks_first.tokens:,}" for found in figures)],
        ["  new ones", *(f"{found.marks_first.new:,}" for found in figures)],
        ["  of the text's tokens", *(_share(found.marks_first.share_of_text) for found in figures)],
        ["tokens that are one mark", *(f"{found.marks_alone.tokens:,}" for found in figures)],
        ["  of the text's tokens", *(_share(found.marks_alone.share_of_text) for found in figures)],
        ["characters in bytes", *(_share(found.byte_fallback.share) for found in figures)],
        *(
            [f"  of {name}", *(_share(found.byte_fallback.share_by_script[name]) for found in figures)]
            for name in _scripts_shown(report.text)
        ),
        ["tokens for unknown text", *(f"{found.unknown:,}" for found in figures)],
        ["documents changed", *(f"{found.round_trip.failures:,}" for found in figures)],
        [
            "  apart, with special tokens",
            *(
                f"{found.failures_with_special_tokens:,} of {found.documents_with_special_tokens:,}"
                for found in (found.round_trip for found in figures)
            ),
        ],
        ["speed in batches, to the base's", *(_number(found.speed.batched_ratio, 2) for found in figures)],
        ["speed one by one, to the base's", *(_number(found.speed.single_ratio, 2) for found in figures)],
    ]
    note = (
        f"{report.text.documents:,} documents, {report.text.whole.characters:,} characters. Marks are combining marks; "
        "tokens that begin with one and go on are counted apart from those that are one. Documents changed are those "
        "that encoding and decoding does not give back as they are in NFC; apart are those whose text has the string "
        "of a special token, which is read as that token."
    )
    return Sheet("Tokenizers", ["", *report.figures], rows, note)


def _scripts_shown(text: TextFigures) -> list[str]:
    return [name for name, size in text.by_script.items() if size.characters >= _SMALL_SCRIPT * text.whole.characters]


def _tokens(report: Report) -> Sheet | None:
    rows = []
    for name, found in report.figures.items():
        lists = {"begin with a mark": found.marks_first.most_used}
        if found.new:
            lists = {
                "new, most used": found.new.most_used,
                "new, longest": found.new.longest,
                "new, never used": found.new.unused_examples,
            } | lists
        for label, uses in lists.items():
            if uses:
                rows.append([name, label, " · ".join(f"{use.text} {use.count:,}" for use in uses)])
    return Sheet("Tokens, with their counts", ["", "", "tokens"], rows) if rows else None


def _fallback(report: Report) -> Sheet | None:
    rows = [
        [name, " · ".join(f"{_character(character)} {count:,}" for character, count in found.byte_fallback.most)]
        for name, found in report.figures.items()
        if found.byte_fallback.most
    ]
    return Sheet("Characters that most often fall back to bytes", ["", "characters"], rows) if rows else None


def _differences(report: Report) -> Sheet | None:
    rows = [
        [
            name,
            f"{found.documents:,}",
            f"{found.source}, document {found.document}, character {found.character}",
            repr(found.expected),
            repr(found.got),
        ]
        for name, figures in report.figures.items()
        for found in figures.round_trip.differences
    ]
    note = "Where the text and what came back first differ; of each kind the number of documents and the first one."
    return Sheet("Round trips that fail", ["", "documents", "first", "text", "came back"], rows, note) if rows else None


def _character(character: str) -> str:
    code = f"U+{ord(character):04X}"
    return f"{character} {code}" if character.isprintable() and not character.isspace() else code


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _share(value: float) -> str:
    return f"{value:.2%}"


def _terminal_table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left")
    figures = sheet.title in _MEASURES.values() or sheet.title == "Tokenizers"
    for i, name in enumerate(sheet.header):
        table.add_column(escape(name), justify="right" if i and figures else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*map(escape, row))
    return table


def _markdown(report: Report) -> str:
    lines = ["# Tokenizer report", "", f"`{report.command}`", "", f"![Tokens per character]({PICTURE_FILE})"]
    for sheet in sheets(report, sources_shown=len(report.text.by_source)):
        lines += ["", f"## {sheet.title}", ""]
        lines.append(ReportTable(sheet.header, sheet.rows).markdown())
        if sheet.note:
            lines += ["", sheet.note]
    return "\n".join(lines) + "\n"


# Picture


_LONGEST_DRAWN = 20
_SOURCES_DRAWN = 10


def draw(report: Report) -> Figure:
    """Tokens per character by script and source, and how long the tokens of the text are."""
    from matplotlib.figure import Figure

    text = report.text
    scripts = _scripts_shown(text)
    sources = list(text.by_source)[:_SOURCES_DRAWN] if len(text.by_source) > 1 else []
    height = (0.12 + 0.15 * len(report.figures)) * (1 + len(scripts) + len(sources)) + 0.4
    figure = Figure(figsize=(9.2, height + 2.9), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[height, 2.2])
    _draw_rates(above, report, scripts, sources)
    _draw_lengths(below, report)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def _draw_rates(axes: Axes, report: Report, scripts: list[str], sources: list[str]) -> None:
    rows = ["all text", *scripts, *(f"{name[:39]}…" if len(name) > 40 else name for name in sources)]
    width = 0.78 / len(report.figures)
    for number, (name, found) in enumerate(report.figures.items()):
        values = [
            found.whole.per_character,
            *(found.by_script[script].per_character for script in scripts),
            *(found.by_source[source].per_character for source in sources),
        ]
        places = [row + (number - (len(report.figures) - 1) / 2) * width for row in range(len(rows))]
        bars = axes.barh(places, values, height=0.9 * width, color=_color(number), label=name)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8, color=MUTED)
    for last in {0, len(scripts)} - {len(rows) - 1}:
        axes.axhline(last + 0.5, color=RULE, linewidth=0.8)
    axes.set_title("Tokens per character: all text, by script, by source" if sources else "Tokens per character")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.07)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


def _draw_lengths(axes: Axes, report: Report) -> None:
    from matplotlib.ticker import PercentFormatter

    for number, found in enumerate(report.figures.values()):
        axes.plot(*_length_shares(found), "o-", markersize=3.5, linewidth=1.4, color=_color(number))
    axes.set_title("Share of the text's tokens, by the characters that a token stands for")
    lengths = range(1, _LONGEST_DRAWN)
    axes.set_xticks(range(_LONGEST_DRAWN + 1), ["part", *map(str, lengths), f"{_LONGEST_DRAWN}+"])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")


def _color(number: int) -> str:
    """The first tokenizer is that with which the others are compared."""
    return GREY if number == 0 else series_color(number - 1)


def _length_shares(found: TokenizerFigures) -> tuple[list[int], list[float]]:
    total = sum(found.by_length.values())
    shares = [0.0] * (_LONGEST_DRAWN + 1)
    for length, count in found.by_length.items():
        shares[min(length, _LONGEST_DRAWN)] += count / total
    longest = min(max(found.by_length, default=0), _LONGEST_DRAWN)
    return list(range(longest + 1)), shares[: longest + 1]
