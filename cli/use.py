# SPDX-License-Identifier: Apache-2.0
"""Verbs that use a checkpoint: generate, serve; and the demo, which uses all."""

import os
from importlib.util import find_spec
from pathlib import Path

import typer

from jai.cli.verb import PASS_THROUGH, verb
from jai.demo.options import DemoOptions
from jai.generate import GenerateOptions
from jai.tokenization.loading import whole_checkpoint

app = typer.Typer()
_SERVER_PACKAGES = ("fastapi", "openai", "uvicorn")


@verb(
    app,
    GenerateOptions,
    examples=(
        'jai generate dpo "เมืองหลวงของไทยคืออะไร"',
        'jai generate converted "Bangkok is" --raw --temperature 0',
    ),
)
def generate(options: GenerateOptions) -> None:
    """Generate text from a prompt and stream it."""
    from jai.generate import generate

    generate(options)


@app.command(**PASS_THROUGH)
def serve(context: typer.Context) -> None:
    """Serve a model over HTTP with an OpenAI-compatible API.

    This is the server of transformers: give CKPT, then any of its options."""
    for package in _SERVER_PACKAGES:  # transformers looks when it has loaded PyTorch, and ends with a traceback
        if find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    model = context.args[0] if context.args else ""
    if model and not model.startswith("-"):
        # MODEL@REVISION is how transformers' server takes both.
        whole_checkpoint(model if Path(model).is_dir() else model.partition("@")[0], weights=False)
    from jai.serve import main as run

    run(context.args)


@verb(
    app,
    DemoOptions,
    examples=(
        "jai demo",
        "jai demo out --quick",
    ),
)
def demo(options: DemoOptions) -> None:
    """Run everything on tiny models in minutes, without a GPU.

    Trains a base, converts it, fine-tunes and aligns it, pushes it to a local Hub and writes a report."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read at import; lm-eval shows a bar for each of its tasks
    from jai.demo.run import run_demo

    run_demo(options)
