# SPDX-License-Identifier: Apache-2.0
"""Verbs that extend phi-3's vocabulary."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jai.errors import UserError

app = typer.Typer(help="Extend phi-3's vocabulary.", no_args_is_help=True)


@app.command("train")
def tokenizer_train(
    text: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="Text to learn from: .txt, .jsonl or .jsonl.gz (field `text`), .parquet (column `text`), a folder of "
            "such files, or a Hub dataset: owner/name, owner/name:split or owner/name:config:split.",
        ),
    ],
    base: Annotated[str, typer.Option(help="Folder or Hub id of the tokenizer to extend.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    vocab_size: Annotated[int, typer.Option(help="Entries of the result, special tokens included.")] = 64000,
    max_token_chars: Annotated[
        int, typer.Option(help="Longest new token, in characters, the space before it included.")
    ] = 16,
    unit: Annotated[
        Literal["run", "word", "cluster"],
        typer.Option(
            help="Where merges are made. run: anywhere between characters of the script; word: inside Thai words; "
            "cluster: no token starts or ends inside a Thai character cluster."
        ),
    ] = "run",
    script: Annotated[str, typer.Option(help="Unicode name of the script to learn, in any case.")] = "thai",
    sample_bytes: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Learn from at most so much text, such as 500MB, 2GiB or a number of bytes; of more text, a sample "
            "even by document. Learning takes some 30 times as much memory.",
        ),
    ] = "200MB",
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
) -> None:
    """Extend a phi-3 tokenizer with merges learnt from text. Ids of other scripts do not change."""
    from jai.files import parse_size
    from jai.tokenization.train import train_tokenizer

    train_tokenizer(
        text,
        base,
        out,
        vocab_size,
        max_token_chars=max_token_chars,
        script=script,
        unit=unit,
        sample_bytes=parse_size(sample_bytes),
        seed=seed,
    )


@app.command("report")
def tokenizer_report(
    tokenizer: Annotated[
        list[str], typer.Argument(metavar="TOKENIZER...", help="Folders or Hub ids of tokenizers to compare.")
    ],
    text: Annotated[
        list[str],
        typer.Option(
            help="Text to measure on, better none that was trained on: a file (.txt, .jsonl, .jsonl.gz, .parquet), a "
            "folder of such files, or a Hub dataset. May be given several times."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="Tokenizer that the others are compared with.", show_default="the first of several"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write report.json, report.md and report.png to; it must not exist.")
    ] = None,
) -> None:
    """Measure tokenizers on text: tokens per character, bytes, round trips, unused tokens, speed."""
    from jai.tokenization.report import report_tokenizers

    report_tokenizers(tokenizer, text, base=base, out=out)


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
    workers: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
) -> None:
    """Train the same small phi-3 with each tokenizer, and compare bits per character."""
    from jai.tokenization.ablate import ablate, read_config

    texts: dict[str, list[str]] = {}
    for pair in text or ():
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise UserError(f"--text is {pair!r}. Give a language and its text, such as --text Thai=thai.jsonl.gz.")
        texts.setdefault(name, []).append(path)
    ablate(read_config(config, base, texts), out, workers)
