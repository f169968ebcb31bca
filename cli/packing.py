# SPDX-License-Identifier: Apache-2.0
"""The verb that makes text ready for pre-training."""

import typer

from jai.cli.verb import verb
from jai.files import refuse_existing
from jai.pretraining.config import read_corpus_config
from jai.pretraining.options import PackOptions

app = typer.Typer()


@verb(
    app,
    PackOptions,
    examples=("jai pack packed --config recipes/corpus_thai_public.yaml --tokenizer tokenizer",),
)
def pack(options: PackOptions) -> None:
    """Tokenize text into shards for pre-training.

    If interrupted, run the same command again to resume."""
    refuse_existing(options.out)
    read_corpus_config(options.config)  # before the tokenizer's libraries are imported, which takes seconds
    from jai.pretraining.pack import pack_corpus

    pack_corpus(options)
