# SPDX-License-Identifier: Apache-2.0
"""The options of `jai tokenizer train`, `report` and `ablate`."""

from dataclasses import dataclass
from pathlib import Path

from jai.errors import UserError
from jai.options import Size, argument, check_values, option
from jai.tokenization.units import Unit, check_script


@dataclass(kw_only=True)
class TrainTokenizerOptions:
    """What `jai tokenizer train` takes."""

    text: list[str] = argument(
        "TEXT...",
        help="Text to learn from: .txt, .jsonl or .jsonl.gz (field `text`), .parquet (column `text`), a folder of such "
        "files, or a Hub dataset: owner/name, owner/name:split or owner/name:config:split.",
    )
    base: str = option(help="Folder or Hub id of the tokenizer to extend.")
    out: Path = option(help="Folder to write; it must not exist.")
    vocab_size: int = option(64000, help="Entries of the result, including special tokens.", at_least=1)
    max_token_chars: int = option(16, help="Longest new token in characters, including a space before it.", at_least=2)
    unit: Unit = option(
        "run",
        help="Where merges are made. run: anywhere between characters of the script; word: inside Thai words; cluster: "
        "no token starts or ends inside a Thai character cluster.",
    )
    script: str = option("Thai", help="Unicode name of the script to learn, in any case.")
    normalize_thai: bool = option(
        True,
        help="Give Thai that looks the same one encoding: two sara e and sara ae, nikhahit with sara aa and sara am, "
        "marks in any order. No effect on other scripts.",
    )
    # The learner's memory grows with the text: 64,000 entries took 1.8 GB from 44 MB of Thai and 3.1 GB from 88 MB, so
    # this much takes some 6 GB.
    sample_bytes: Size = option(
        Size(200_000_000),
        help="Learn from at most this much text; of more, from a sample drawn evenly by document. Learning takes some "
        "30 times as much memory.",
        shown_default="200MB",
        metavar="SIZE",
    )
    seed: int = option(0, help="Seed of the sample.")

    def __post_init__(self) -> None:
        check_values(self)
        self.script = self.script.title()
        check_script(self.script, self.unit)


@dataclass(kw_only=True)
class ReportTokenizersOptions:
    """What `jai tokenizer report` takes."""

    tokenizer: list[str] = argument("TOKENIZER...", help="Folders or Hub ids of tokenizers to compare.")
    text: list[str] = option(
        help="Text to measure on, preferably not what the tokenizers were trained on: a file (.txt, .jsonl, .jsonl.gz, "
        ".parquet), a folder of such files, or a Hub dataset. Repeat the option for several.",
        metavar="TEXT",
    )
    base: str | None = option(
        None, help="Tokenizer that the others are compared with.", shown_default="the first of several"
    )
    out: Path | None = option(None, help="Folder to write report.json, report.md and report.png to; it must not exist.")

    def __post_init__(self) -> None:
        check_values(self)
        if not self.tokenizer:
            raise UserError("No tokenizer was given. Give folders or Hub ids of tokenizers.")


@dataclass(kw_only=True)
class AblateOptions:
    """What `jai tokenizer ablate` takes, beside what is in its file."""

    config: Path = option(
        help="YAML file that says what is compared, such as recipes/tokenizer_ablation.yaml.", metavar="FILE"
    )
    base: str | None = option(
        None, help="Folder or Hub id of the tokenizer to extend.", shown_default="the one in the file"
    )
    text: list[str] = option(
        [],
        help="Text of a language in the file, such as Thai=thai.jsonl.gz. Repeat the option for several.",
        metavar="NAME=TEXT",
        shown_default="those in the file",
    )
    out: Path = option(Path("runs/tokenizer-ablation"), help="Folder to write, or to resume in.")
    workers: int = option(1, help="Runs at a time.", at_least=1)

    def __post_init__(self) -> None:
        check_values(self)
        for pair in self.text:
            if not all(pair.partition("=")):
                raise UserError(f"--text is {pair!r}. Give a language and its text, such as --text Thai=thai.jsonl.gz.")

    @property
    def texts(self) -> dict[str, list[str]]:
        """The texts by language."""
        by_language: dict[str, list[str]] = {}
        for pair in self.text:
            name, _, text = pair.partition("=")
            by_language.setdefault(name, []).append(text)
        return by_language
