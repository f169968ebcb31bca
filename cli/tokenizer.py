# SPDX-License-Identifier: Apache-2.0
"""Verbs that extend phi-3's vocabulary."""

import typer

from jai.cli.verb import PlainGroup, verb
from jai.tokenization.options import AblateOptions, ReportTokenizersOptions, TrainTokenizerOptions

app = typer.Typer(cls=PlainGroup, help="Extend phi-3's vocabulary.", no_args_is_help=True)


@verb(
    app,
    TrainTokenizerOptions,
    name="train",
    group=("tokenizer",),
    examples=("jai tokenizer train corpus.jsonl.gz --out tokenizer \\\n    --base microsoft/Phi-3-medium-4k-instruct",),
)
def train(options: TrainTokenizerOptions) -> None:
    """Extend a phi-3 tokenizer with merges learned from text.

    Text in other scripts keeps its token ids."""
    from jai.tokenization.train import train_tokenizer

    train_tokenizer(options)


@verb(
    app,
    ReportTokenizersOptions,
    name="report",
    group=("tokenizer",),
    examples=("jai tokenizer report phi3 tokenizer --text held-out.txt --out report",),
)
def report(options: ReportTokenizersOptions) -> None:
    """Measure tokenizers on text, side by side.

    Reports tokens per character, word and byte, byte fallback, round trips, unused tokens and speed."""
    from jai.tokenization.report import report_tokenizers

    report_tokenizers(options)


@verb(
    app,
    AblateOptions,
    name="ablate",
    group=("tokenizer",),
    examples=("jai tokenizer ablate --config recipes/tokenizer_ablation.yaml --base phi3",),
)
def ablate(options: AblateOptions) -> None:
    """Train a small phi-3 with each tokenizer and compare them.

    They are compared by bits per character of held-out text. If interrupted, run the same command again to resume."""
    from jai.tokenization.ablation.config import read_ablation_config

    config = read_ablation_config(options.config, options.base, options.texts)
    from jai.tokenization.ablation.command import ablate  # PyTorch, which takes seconds

    ablate(config, options.out, options.workers)
