# SPDX-License-Identifier: Apache-2.0
"""Verbs that use a checkpoint: generate, serve; and the demo, which uses all."""

from pathlib import Path
from typing import Annotated

import typer

from jai.cli.verb import PASS_THROUGH, verb
from jai.errors import UserError
from jai.generate import GenerateOptions

app = typer.Typer()


@verb(app, GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Generate text, streamed as it is made."""
    from jai.generate import generate

    generate(options)


@app.command(**PASS_THROUGH)
def serve(context: typer.Context) -> None:
    """Serve a model over HTTP, as OpenAI does.

    It is transformers' server: MODEL, then any of its options."""
    try:
        from jai.serve import main as run
    except ImportError as error:
        raise UserError(
            f"The server cannot be imported ({error}). Install its packages: pip install 'transformers[serving]'."
        ) from error
    run(context.args)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write; it must not exist.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Train a few steps only: every part runs, nothing is learnt.")
    ] = False,
) -> None:
    """See it all on tiny models in a few minutes, without a GPU.

    Base, convert, sft, dpo, Hub, report."""
    from jai.demo.run import run_demo

    run_demo(out, seed=seed, quick=quick)
