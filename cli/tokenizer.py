# SPDX-License-Identifier: Apache-2.0
"""Verbs that extend phi-3's vocabulary."""

from pathlib import Path
from typing import Annotated

import typer

from jai.cli.verb import verb
from jai.errors import UserError
from jai.tokenization.options import ReportTokenizersOptions, TrainTokenizerOptions

app = typer.Typer(help="Extend phi-3's vocabulary.", no_args_is_help=True)


@verb(app, TrainTokenizerOptions, name="train", group=("tokenizer",))
def train(options: TrainTokenizerOptions) -> None:
    """Extend a phi-3 tokenizer with merges learnt from text.

    Text in other scripts keeps its ids."""
    from jai.tokenization.train import train_tokenizer

    train_tokenizer(options)


@verb(app, ReportTokenizersOptions, name="report", group=("tokenizer",))
def report(options: ReportTokenizersOptions) -> None:
    """Measure tokenizers on text, side by side.

    Tokens per character, word and byte, bytes in place of characters, round trips, unused tokens, speed."""
    from jai.tokenization.report import report_tokenizers

    report_tokenizers(options)


@app.command("ablate")
def tokenizer_ablate(
    config: Annotated[Path, typer.Option(help="YAML file, such as recipes/tokenizer_ablation.yaml.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer to extend.", show_default="the file's")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TEXT", help="Text of a language; may be repeated.", show_default="the file's"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write, or to go on in.")] = Path("runs/tokenizer-ablation"),
    workers: Annotated[int, typer.Option(help="Runs at a time.", min=1)] = 1,
) -> None:
    """Train a small phi-3 with each tokenizer and compare them."""
    from jai.tokenization.ablation.command import ablate
    from jai.tokenization.ablation.config import read_ablation_config

    texts: dict[str, list[str]] = {}
    for pair in text or ():
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise UserError(f"--text is {pair!r}. Give a language and its text, such as --text Thai=thai.jsonl.gz.")
        texts.setdefault(name, []).append(path)
    ablate(read_ablation_config(config, base, texts), out, workers)
