# SPDX-License-Identifier: Apache-2.0
"""Verbs that use a checkpoint: generate, serve; and the demo, which uses all."""

from pathlib import Path
from typing import Annotated

import typer

from jai.cli.verb import PASS_THROUGH
from jai.errors import UserError

app = typer.Typer()


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a checkpoint.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to say to it.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to make.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text instead of answering as in a chat.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code in the checkpoint, not the installed one.")
    ] = False,
) -> None:
    """Generate text, streamed."""
    from jai.generate import GenerateOptions
    from jai.generate import generate as run

    options = GenerateOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        raw=raw,
        trust_remote_code=trust_remote_code,
    )
    run(model, prompt, options)


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
