# SPDX-License-Identifier: Apache-2.0
"""What `jai eval` takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jai.errors import UserError
from jai.evaluation.judged.options import JudgeOptions
from jai.files import check_is_file, refuse_existing
from jai.options import argument, check_values, option
from jai.tokenization.loading import whole_checkpoint

_PICTURES = (".png", ".svg", ".pdf")


def check_backend(backend: str, base_url: str | None, ignored: Mapping[str, bool]) -> None:
    """Refuse what does not go together with a backend.

    Args:
        backend: that runs the model.
        base_url: of a server, None where none is given.
        ignored: whether an option is given that this backend does nothing with, by its flag.

    Raises:
        UserError: naming the option.
    """
    if backend == "openai" and not base_url:
        raise UserError("--backend openai needs --base-url, such as http://127.0.0.1:8000/v1.")
    if base_url and backend != "openai":
        raise UserError(f"--base-url is for --backend openai; the backend is {backend}.")
    for flag in (flag for flag, is_ignored in ignored.items() if is_ignored):
        raise UserError(f"{flag} does nothing with --backend {backend}. Leave it out.")


@dataclass(kw_only=True)
class EvalOptions(JudgeOptions):
    """What `jai eval CKPT` takes."""

    model: str = argument("CKPT", help="Folder or Hub id of a checkpoint; with --backend openai, the server's model.")
    suite: list[str] = option(
        [],
        help="Suites to run: names, or paths of suite files. Without this option, list the suites.",
        metavar="NAME",
        spread=True,
    )
    out: Path | None = option(
        None,
        help="Output folder. If it exists, the run resumes.",
        metavar="DIR",
        shown_default="eval/NAME, with the checkpoint's name",
    )
    limit: int | None = option(
        None,
        help="Use only the first N questions of each task (and of each length in long-context tasks).",
        at_least=1,
        metavar="N",
    )
    data: Path | None = option(
        None,
        help="Folder with the datasets as JSON Lines, instead of the Hub (docs/evaluation.md lists the file names).",
        metavar="DIR",
    )
    backend: Literal["hf", "vllm", "openai"] = option(
        "hf", help="What runs the model: transformers (hf), vLLM, or an OpenAI-compatible server."
    )
    base_url: str | None = option(
        None, help="With --backend openai: URL of the API, such as http://127.0.0.1:8000/v1.", metavar="URL"
    )
    tokenizer: str | None = option(
        None, help="With --backend openai: folder or Hub id of the tokenizer to count tokens with.", metavar="TOKENIZER"
    )
    batch_size: int = option(
        8,
        help="Sequences per batch; with --backend openai, requests at a time. vLLM decides by itself.",
        at_least=1,
    )
    device: str | None = option(None, help="Device, such as cuda:1 or cpu.", shown_default="a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="Data type of the weights; auto is the checkpoint's own."
    )
    parallelize: bool = option(False, help="Spread the model over all GPUs.")
    max_length: int | None = option(
        None,
        help="Longest input in tokens; longer ones are cut at the beginning.",
        at_least=2,
        shown_default="the model's limit",
    )
    max_new_tokens: int = option(
        1024, help="Longest answer in judged suites, in tokens (1024 in MT-Bench).", at_least=1
    )
    seed: int = option(
        0, help="Random seed for sampling and for the confidence intervals.", at_least=0, at_most=2**32 - 1
    )
    include_path: Path | None = option(None, help="Folder with additional lm-eval tasks.", metavar="DIR")
    allow_code_execution: bool = option(
        False, help="Run programs written by the model on this machine; the suites code and livecodebench need it."
    )
    card: bool = option(False, help="Also write the results to evaluation.json in the checkpoint, for its model card.")
    trust_remote_code: bool = option(
        False, help="Run the model code in the checkpoint instead of the installed package's."
    )

    def __post_init__(self) -> None:
        check_values(self)

    def check(self) -> None:
        """Refuse what cannot be run, before anything heavy is imported.

        Raises:
            UserError: for folders that are not there, options that do not go together, and a checkpoint that is not
                whole.
        """
        ignored = {
            "--tokenizer": self.tokenizer is not None and self.backend != "openai",
            "--device": self.device is not None and self.backend != "hf",
            "--parallelize": self.parallelize and self.backend == "openai",
            "--dtype": self.dtype != "auto" and self.backend == "openai",
        }
        check_backend(self.backend, self.base_url, ignored)
        if self.parallelize and self.device is not None:
            raise UserError(f"--parallelize takes all GPUs, and --device {self.device} is one. Leave one of them out.")
        if self.card and not Path(self.model).is_dir():
            raise UserError(f"--card writes into the checkpoint's folder, and {self.model} is none. Give a folder.")
        for flag, folder in (("--data", self.data), ("--include-path", self.include_path)):
            if folder is not None and not folder.is_dir():
                raise UserError(f"{flag} {folder} is not a folder. Give one that exists.")
        if self.backend != "openai":
            whole_checkpoint(self.model, weights=False)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.out or Path("eval") / self.model.strip("/").replace("/", "--")


@dataclass(kw_only=True)
class LanguageOptions:
    """What `jai eval language` takes."""

    files: list[str] = argument("FILE...", help="Files of replies: .jsonl or .jsonl.gz.")
    language: Literal["th", "en"] = option("th", help="Language that the answers should be in.")
    field: str | None = option(
        None,
        help="Key of the reply in each row: a text, a list of texts, or messages that end with the reply.",
        metavar="NAME",
        shown_default="a usual one, such as response, completion or messages",
    )
    out: Path | None = option(
        None, help="Folder to write the results of one file to, for `jai eval compare`.", metavar="DIR"
    )

    def __post_init__(self) -> None:
        check_values(self)

    def check(self) -> None:
        """Refuse what cannot be done, before anything heavy is imported.

        Raises:
            UserError: for files that are not there, and a run of several files.
        """
        if self.out is not None and len(self.files) > 1:
            raise UserError(
                f"--out {self.out} takes the figures of one file, and {len(self.files)} are given. Give each file a "
                "run of its own."
            )
        for path in self.files:
            check_is_file(Path(path), "Give a file of JSON Lines.")


@dataclass(kw_only=True)
class CompareOptions:
    """What `jai eval compare` takes."""

    runs: list[str] = argument("RUN...", help="Output folders of `jai eval`; each is tested against the first.")
    paper: bool = option(False, help="Also show the papers' published results, with their sources.")
    figure: Path | None = option(
        None, help="Save bar and radar charts to this file (.png, .svg or .pdf).", metavar="FILE"
    )
    markdown: Path | None = option(None, help="Save the tables to this Markdown file.", metavar="FILE")

    def __post_init__(self) -> None:
        check_values(self)

    def check(self) -> None:
        """Refuse what cannot be compared, before anything heavy is imported.

        Raises:
            UserError: for runs that are no folders, and a picture of an unknown form.
        """
        for run in self.runs:
            if not Path(run).is_dir():
                raise UserError(f"The run {run} is not a folder. Give the folder of a run of `jai eval`.")
        if self.figure is not None and self.figure.suffix not in _PICTURES:
            raise UserError(f"--figure {self.figure} has an unknown ending; expected {', '.join(_PICTURES)}.")


@dataclass(kw_only=True)
class ContaminationOptions:
    """What `jai eval contamination` takes."""

    texts: list[str] = argument(
        "TEXT...", help="Training data: files (.txt, .jsonl, .jsonl.gz, .parquet), folders of them, or Hub datasets."
    )
    suite: list[str] = option(help="Suite whose questions to look for. Repeat the option for several.", metavar="NAME")
    data: Path | None = option(None, help="Folder with the suites' datasets, as in `jai eval`.", metavar="DIR")
    ngram: int = option(13, help="Length of an n-gram in words; five Thai characters count as a word.", at_least=8)
    run: Path | None = option(
        None,
        help="Output folder of `jai eval`; also show its results without the contaminated questions.",
        metavar="DIR",
    )
    out: Path | None = option(None, help="Folder to write the report to, with a line per question.", metavar="DIR")

    def __post_init__(self) -> None:
        check_values(self)

    def check(self) -> None:
        """Refuse what is not there, before anything heavy is imported.

        Raises:
            UserError: for folders that do not exist, and an output that does.
        """
        if not self.suite:
            raise UserError("No suite is given. Name one with --suite; `jai eval CKPT` lists them.")
        for flag, folder in (("--data", self.data), ("--run", self.run)):
            if folder is not None and not folder.is_dir():
                raise UserError(f"{flag} {folder} is not a folder. Give one that exists.")
        if self.out is not None:
            refuse_existing(self.out)
