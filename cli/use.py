# SPDX-License-Identifier: Apache-2.0
"""Verbs that use a checkpoint: generate, serve; and the demo, which uses all."""

import typer

from jai.cli.verb import PASS_THROUGH, verb
from jai.demo.options import DemoOptions
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


@verb(app, DemoOptions)
def demo(options: DemoOptions) -> None:
    """See it all on tiny models in a few minutes, without a GPU.

    Base, convert, sft, dpo, Hub, report."""
    from jai.demo.run import run_demo

    run_demo(options)
