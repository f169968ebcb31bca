# SPDX-License-Identifier: Apache-2.0
"""The command line. Each verb is the thin face of one function that can be imported."""

import sys
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape

from jai.errors import UserError
from jai.version import __version__

app = typer.Typer(
    name="jai",
    help="Grow phi-3 into a Thai-centric mixture of experts, fine-tune it with TRL, and publish it to the Hub.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="The usual order: tokenizer train → convert → inspect → sft → (upcycle, merge) → dpo → generate → publish. "
    "[bold]jai demo[/bold] runs all of it on tiny models.",
)
tokenizer_app = typer.Typer(help="Extend phi-3's vocabulary.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")

INTERRUPTED = 130  # typer's exit code for Ctrl-C

# Everything after the verb goes to TRL's own parser: its options are TRL's, and so is their help.
PASS_THROUGH: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "add_help_option": False,
}


class DuplicateInit(StrEnum):
    copy = "copy"
    identity = "identity"


class EmbeddingInit(StrEnum):
    mean = "mean"
    random = "random"
    mean_normed = "mean-normed"


class Method(StrEnum):
    dus_v2 = "dus-v2"
    dus_v1 = "dus-v1"


class ExpertInit(StrEnum):
    copy = "copy"
    noise = "noise"
    random = "random"


class UpcycledExpertInit(StrEnum):
    snapshots = "snapshots"
    copy = "copy"
    noise = "noise"
    random = "random"


class MergeMethod(StrEnum):
    linear = "linear"
    slerp = "slerp"
    task_arithmetic = "task-arithmetic"
    ties = "ties"
    dare_linear = "dare-linear"
    dare_ties = "dare-ties"


class ExportForm(StrEnum):
    mixtral = "mixtral"
    phi3 = "phi3"


class Unit(StrEnum):
    run = "run"
    word = "word"
    cluster = "cluster"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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


@tokenizer_app.command("train")
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
        Unit,
        typer.Option(
            help="Where merges are made. run: anywhere between characters of the script; word: inside Thai words; "
            "cluster: no token starts or ends inside a Thai character cluster."
        ),
    ] = Unit.run,
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
        unit=unit.value,
        sample_bytes=parse_size(sample_bytes),
        seed=seed,
    )


@tokenizer_app.command("report")
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


@tokenizer_app.command("ablate")
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


@app.command()
def convert(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or Hub id of a Phi3ForCausalLM checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these options; the command line wins.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer that extends the base's.")] = None,
    init: Annotated[
        EmbeddingInit | None,
        typer.Option(
            help="Rows of new tokens. mean: of the pieces' rows, the paper's way; random: as the base's columns are "
            "spread; mean-normed: the mean, as long as the pieces' rows.",
            show_default="mean",
        ),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="dus-v2: blocks repeated in place, with skip alphas; dus-v1: the first and the last K layers, SOLAR's "
            "way.",
            show_default="dus-v2",
        ),
    ] = None,
    k: Annotated[int | None, typer.Option(help="Layers of each copy, for dus-v1.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="A plain stack by hand: the base's layers in order, such as 0-31,8-39.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Layers of a block.", show_default="4")] = None,
    block_repeats: Annotated[
        str | None,
        typer.Option(help="How often each block runs in place.", show_default="1,1,1,2,3,3,2,1,1,1"),
    ] = None,
    skip_alpha: Annotated[
        float | None, typer.Option(help="Start of the skip alphas.", show_default="0; with copy 0.1")
    ] = None,
    skip_alpha_normalize: Annotated[
        bool | None, typer.Option("--skip-alpha-normalize", help="Divide by 1 + alpha (ours, not the paper's).")
    ] = None,
    duplicate_init: Annotated[
        DuplicateInit | None,
        typer.Option(
            help="Later copies of a block. identity: keep the function; copy: the paper's way, which changes it.",
            show_default="identity; in a plain stack copy",
        ),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of a layer; 1 is dense.", show_default="4")] = None,
    expert_init: Annotated[
        ExpertInit | None, typer.Option(help="How experts 1 and up begin.", show_default="copy")
    ] = None,
    expert_noise: Annotated[float | None, typer.Option(help="Relative noise for `noise`.", show_default="0.01")] = None,
    rope_theta: Annotated[
        float | None, typer.Option(help="RoPE base; changes the function until trained.", show_default="the source's")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights.", show_default="the source's")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of routers and noise.", show_default="0")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest shard, such as 5GB.", show_default="5GB")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Shards to write at a time.", show_default="1")] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream", help="Fetch the base's shards from the Hub one by one, and delete each after use."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the plan; write nothing.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every byte with its source, then (but for --stream) logits.")
    ] = False,
    verify_text: Annotated[
        Path | None, typer.Option(help="Text for --verify.", show_default="a Thai-English one")
    ] = None,
) -> None:
    """Turn a phi-3 checkpoint into a JAI: vocabulary, depth, experts. Run again after a break, it goes on."""
    from jai.conversion.convert.command import convert as run
    from jai.conversion.convert.options import ConvertOptions
    from jai.conversion.convert.verify import DEFAULT_TEXT
    from jai.conversion.convert.verify import verify as run_verify

    if verify_text is not None and not verify_text.is_file():
        raise UserError(f"--verify-text {verify_text} is no file. Give a UTF-8 text file.")
    given = {
        "tokenizer": tokenizer,
        "init": init,
        "method": method,
        "k": k,
        "layers": _ranges("--layers", layers),
        "block_size": block_size,
        "block_repeats": _integers("--block-repeats", block_repeats),
        "skip_alpha": skip_alpha,
        "skip_alpha_normalize": skip_alpha_normalize,
        "duplicate_init": duplicate_init,
        "experts": experts,
        "expert_init": expert_init,
        "expert_noise": expert_noise,
        "rope_theta": rope_theta,
        "dtype": dtype,
        "seed": seed,
        "max_shard_size": max_shard_size,
        "workers": workers,
        "stream": stream,
    }
    values: dict[str, Any] = {"base": base, "out": out}
    values |= _read_yaml(config, ConvertOptions, beside=values.keys()) if config else {}
    values |= {key: value for key, value in given.items() if value is not None}
    run(ConvertOptions(**values), dry_run=dry_run, verify_bytes=verify)
    if verify and not dry_run and not stream:
        run_verify(base, out, verify_text or DEFAULT_TEXT)


@app.command()
def upcycle(
    dense: Annotated[
        str, typer.Argument(metavar="DENSE", help="Folder or Hub id of the dense JAI before its training (step 0).")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    # An option takes one value: those after the first of `--snapshots A B C` arrive here.
    more_snapshots: Annotated[list[str] | None, typer.Argument(metavar="SNAPSHOT", hidden=True)] = None,
    snapshots: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SNAPSHOT...",
            help="Checkpoints of its training, for experts 1 and up in this order: whole, or what jai snapshot wrote.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of these options; the command line wins.")
    ] = None,
    base_weights: Annotated[
        str | None,
        typer.Option(
            metavar="last|first|PATH",
            help="Where all but the experts comes from: the last snapshot, DENSE, or another checkpoint.",
            show_default="last",
        ),
    ] = None,
    expert_init: Annotated[
        UpcycledExpertInit | None,
        typer.Option(
            help="How experts 1 and up begin; all but snapshots are made from DENSE alone.", show_default="snapshots"
        ),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            help="Experts of a layer. Those beyond the snapshots are copies of the others, with noise.",
            show_default="one more than snapshots, or 4",
        ),
    ] = None,
    expert_noise: Annotated[
        float | None, typer.Option(help="Relative noise of copied experts; 0 for none.", show_default="0.01")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights.", show_default="that of DENSE")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of routers, noise and random experts.", show_default="0")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest shard, such as 5GB.", show_default="5GB")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Shards to write at a time.", show_default="1")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the plan; write nothing.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Then compare every byte with its source.")] = False,
) -> None:
    """Make experts of a dense JAI and snapshots of its training. Run again after a break, it goes on."""
    from jai.conversion.upcycle.command import UpcycleOptions
    from jai.conversion.upcycle.command import upcycle as run

    given = {
        "snapshots": [*(snapshots or ()), *(more_snapshots or ())] or None,
        "base_weights": base_weights,
        "expert_init": expert_init,
        "experts": experts,
        "expert_noise": expert_noise,
        "dtype": dtype,
        "seed": seed,
        "max_shard_size": max_shard_size,
        "workers": workers,
    }
    values: dict[str, Any] = {"dense": dense, "out": out}
    values |= _read_yaml(config, UpcycleOptions, beside=values.keys()) if config else {}
    values |= {key: value for key, value in given.items() if value is not None}
    run(UpcycleOptions(**values), dry_run=dry_run, verify_bytes=verify)


@app.command()
def snapshot(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CKPT", help="Folder or Hub id of a dense JAI, such as a Trainer's checkpoint-2000."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest shard, such as 5GB.")] = "5GB",
    workers: Annotated[int, typer.Option(help="Shards to write at a time.")] = 1,
) -> None:
    """Keep of a dense JAI's checkpoint only the FFN weights, for jai upcycle."""
    from jai.conversion.upcycle.snapshot import snapshot as run
    from jai.files import parse_size

    run(checkpoint, out, max_shard_bytes=parse_size(max_shard_size), workers=workers)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    # An option takes one value: those after the first of `--models A B` arrive here.
    more_models: Annotated[list[str] | None, typer.Argument(metavar="MODEL", hidden=True)] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL...",
            help="Folders or Hub ids of the checkpoints. The first gives configuration, tokenizer and dtype.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of these options, such as recipes/merge_m3.yaml; the command line wins. There, "
            "weights and t may depend on the layer."
        ),
    ] = None,
    method: Annotated[
        MergeMethod | None,
        typer.Option(
            help="linear: weighted mean; slerp: on the arc between two models; the others merge changes since --base: "
            "summed, trimmed with a sign elected (ties), or dropped at random (dare).",
            show_default="linear",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One for each model, such as 0.5,0.5.", show_default="all alike")
    ] = None,
    t: Annotated[
        float | None, typer.Option(help="slerp: from the first model (0) to the second (1).", show_default="0.5")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Checkpoint that the models were trained from.")] = None,
    density: Annotated[
        float | None, typer.Option(help="ties, dare: share of the changes that is kept.", show_default="0.5")
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize", help="Divide by the sum of the weights.", show_default="for linear and ties"
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of the merged change.", show_default="1")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights.", show_default="the first model's")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of what dare drops.", show_default="0")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest shard, such as 5GB.", show_default="5GB")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Shards to write at a time.", show_default="1")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the plan; write nothing.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Then compute every byte again and compare.")] = False,
) -> None:
    """Merge checkpoints of one architecture, with weights by layer. Run again after a break, it goes on."""
    from jai.conversion.merge.command import merge as run
    from jai.conversion.merge.options import MergeOptions

    given = {
        "models": [*(models or ()), *(more_models or ())] or None,
        "method": method and method.value,
        "weights": _numbers("--weights", weights),
        "t": t,
        "base": base,
        "density": density,
        "normalize": normalize,
        "scale": scale,
        "dtype": dtype and dtype.value,
        "seed": seed,
        "max_shard_size": max_shard_size,
        "workers": workers,
    }
    values: dict[str, Any] = {"models": [], "out": out}
    values |= _read_yaml(config, MergeOptions, beside={"out"}) if config else {}
    values |= {key: value for key, value in given.items() if value is not None}
    run(MergeOptions(**values), dry_run=dry_run, verify_bytes=verify)


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(metavar="CKPT", help="Folder or Hub id of a JAI whose skip alphas are all 0.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    to: Annotated[
        ExportForm, typer.Option(help="mixtral for a JAI with experts, phi3 for a dense one.")
    ] = ExportForm.mixtral,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest shard, such as 5GB.")] = "5GB",
    workers: Annotated[int, typer.Option(help="Shards to write at a time.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the plan; write nothing.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Then compare every byte with its source.")] = False,
) -> None:
    """Write a JAI without skips as a Mixtral or a Phi-3, for engines that do not have its code."""
    from jai.conversion.export import ExportOptions
    from jai.conversion.export import export as run

    options = ExportOptions(model=model, out=out, to=to.value, max_shard_size=max_shard_size, workers=workers)
    run(options, dry_run=dry_run, verify_bytes=verify)


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Folder or Hub id of a JAI, or jai-1 for the paper's, without weights."),
    ],
) -> None:
    """Show the layer plan, the parameters beside phi-3's, and the memory that it takes."""
    from jai.conversion.inspect_checkpoint import inspect as run

    run(path)


@app.command(**PASS_THROUGH)
def sft(context: typer.Context) -> None:
    """Fine-tune on chats or plain text with TRL's SFTTrainer: --config X.yaml, then any of TRL's options."""
    from jai.trainers.sft import main as run

    run(context.args)


@app.command(**PASS_THROUGH)
def dpo(context: typer.Context) -> None:
    """Align with preference pairs with TRL's DPOTrainer: --config X.yaml, then any of TRL's options."""
    from jai.trainers.dpo import main as run

    run(context.args)


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
    """Serve a model over HTTP as OpenAI does, with transformers' server: MODEL, then any of its options."""
    from jai.errors import UserError

    try:
        from jai.serve import main as run
    except ImportError as error:
        raise UserError(
            f"The server cannot be imported ({error}). Install its packages: pip install 'transformers[serving]'."
        ) from error
    run(context.args)


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a JAI checkpoint, or of an adapter.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="owner/name on the Hub; made if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.", show_default="main")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of changing the branch.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="An adapter's base model on the Hub, if it names a folder.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the plan; upload nothing.")] = False,
    no_forward: Annotated[
        bool, typer.Option("--no-forward", help="Check names and shapes only, for models larger than memory.")
    ] = False,
) -> None:
    """Check a checkpoint or an adapter in a clean process, write its model card, and upload it in one commit."""
    from jai.hub_card.publish import publish as run

    run(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        base=base,
        commit_message=message,
        dry_run=dry_run,
        forward=not no_forward,
    )


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
    """See it all on tiny models in a few minutes, without a GPU: base, convert, sft, dpo, Hub, report."""
    from jai.demo.run import run_demo

    run_demo(out, seed=seed, quick=quick)


def _integers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is {text!r}; give whole numbers with commas between, such as 1,2,1.") from None


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} is {text!r}; give numbers with commas between, such as 0.7,0.3.") from None


def _ranges(option: str, text: str | None) -> list[int] | None:
    """Whole numbers and ranges with both ends: "0-3,2-5" is [0, 1, 2, 3, 2, 3, 4, 5]."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            numbers += range(int(first), int(last or first) + 1)
        except ValueError:
            raise UserError(f"{option} is {text!r}; give layers and ranges of them, such as 0-31,8-39.") from None
    return numbers


def _read_yaml(path: Path, options: type, beside: Collection[str]) -> dict[str, Any]:
    """Values for the fields of `options`, but for those that are given `beside` the file."""
    import dataclasses

    if not path.is_file():
        raise UserError(f"--config {path} is no file. Give a YAML file of options.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    known = {field.name for field in dataclasses.fields(options)} - set(beside)
    if not isinstance(values, dict) or values.keys() - known:
        unknown = sorted(values.keys() - known) if isinstance(values, dict) else [str(values)]
        raise UserError(f"{path} has unknown options: {', '.join(unknown)}. Known are: {', '.join(sorted(known))}.")
    return values


def main() -> None:
    """Entry point: an error that the user can mend is one message and exit code 1, Ctrl-C is 130."""
    try:
        app(prog_name="jai")
    except UserError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as exit_:
        if exit_.code == INTERRUPTED:
            Console(stderr=True).print("Interrupted; nothing half-written was kept.")
        raise
