# SPDX-License-Identifier: Apache-2.0
"""The verb that makes text ready for pre-training."""

import typer

from jai.cli.verb import verb
from jai.files import refuse_existing
from jai.pretraining.config import read_corpus_config
from jai.pretraining.options import PackOptions

app = typer.Typer()


@verb(app, PackOptions)
def pack(options: PackOptions) -> None:
    """Tokenise text once, into shards for pre-training.

    If it is interrupted, the same command resumes it."""
    refuse_existing(options.out)
    read_corpus_config(options.config)  # before the tokenizer's libraries are imported, which takes seconds
    from jai.pretraining.pack import pack_corpus

    pack_corpus(options)
