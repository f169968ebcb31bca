# SPDX-License-Identifier: Apache-2.0
"""The program `jai`: its verbs, its version, and how errors end."""

import sys
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer

from jai.cli import conversion, evaluation, hub, packing, preferences, tokenizer, training, use
from jai.cli.verb import PlainGroup
from jai.errors import UserError
from jai.files import full_disk
from jai.logs import ignore_unused_kernel
from jai.version import __version__

INTERRUPTED = 130  # typer's exit code for Ctrl-C
# Packages that `pip install jai-llm` does not bring, and the extra that does.
EXTRA_OF = {
    "bitsandbytes": "gpu",
    "datasets": "train",
    "fastapi": "serving",
    "fontTools": "tokenizer",
    "langdetect": "eval",
    "lm_eval": "eval",
    "math_verify": "eval",
    "matplotlib": "tokenizer",
    "nltk": "eval",
    "openai": "serving",
    "peft": "train",
    "pyarrow": "train",
    "pythainlp": "tokenizer",
    "sacrebleu": "eval",
    "trl": "train",
    "uvicorn": "serving",
}
_EXTRA_OF_VERB = {
    "demo": "demo",
    "eval": "eval",
    "tokenizer": "tokenizer",
    "pairs": "eval",
    "difficulty": "eval",
    "score": "train",
}

SECTIONS = {
    "Make a JAI": ("tokenizer", "convert", "inspect"),
    "Train": ("pack", "pretrain", "sft", "reward", "dpo", "kto", "cpo", "orpo", "grpo", "report"),
    "Make data with a model": ("pairs", "score", "difficulty"),
    "Rework checkpoints": ("snapshot", "upcycle", "merge", "merge-adapter", "quantize", "export"),
    "Use a model": ("eval", "generate", "serve", "publish"),
    "See it all": ("demo",),
}


class _Program(PlainGroup):
    """The program, whose help has the verbs in sections."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for names in SECTIONS.values() for name in names]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.list_commands(ctx)))
        for title, names in SECTIONS.items():
            with formatter.section(title):
                helps = [self.commands[name].get_short_help_str(formatter.width - width - 6) for name in names]
                formatter.write_dl([(name.ljust(width), text) for name, text in zip(names, helps, strict=True)])


app = typer.Typer(
    name="jai",
    cls=_Program,
    help="Grow phi-3 into a Thai-centric mixture of experts, fine-tune it with TRL, and publish it to the Hub.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables cut option names short at 80 columns
    pretty_exceptions_enable=False,
    epilog="Usual order: tokenizer train → convert → inspect → pack → pretrain → sft → dpo → eval → publish. "
    "`jai COMMAND --help` shows options and an example.",
)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(evaluation.app, name="eval")
for group in (conversion, packing, training, preferences, use, hub):
    app.add_typer(group.app)


def _fail(message: str) -> NoReturn:
    typer.echo(f"{typer.style('Error:', fg='red', bold=True)} {message}", err=True)
    sys.exit(1)


def _version(show: bool) -> None:
    if show:
        print(f"jai {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: an error that the user can fix is one message and exit code 1, Ctrl-C is 130."""
    if isinstance(sys.stdout, TextIOWrapper):  # names of files may be no UTF-8, and terminals may know little of it
        sys.stdout.reconfigure(errors="backslashreplace")
    ignore_unused_kernel()
    try:
        app(prog_name="jai")
    except UserError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in EXTRA_OF:
            raise
        extra = _EXTRA_OF_VERB.get(sys.argv[1], EXTRA_OF[package])
        _fail(f"This needs the package {package}, which is not installed. Install it: pip install 'jai-llm[{extra}]'")
    except OSError as error:  # of what no verb foresees: names that are too long, what nobody may read
        if error.filename is None:
            if problem := full_disk(error):
                _fail(f"The output could not be written: {problem}. Free some space or choose another disk.")
            raise
        _fail(f"{error.filename}: {error.strerror}. Give another path, or fix this one.")
    except SystemExit as exit_:
        if exit_.code == INTERRUPTED:
            typer.echo("Interrupted.", err=True)
        raise
