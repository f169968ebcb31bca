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
    base: str = option(help="Folder or Hub id of the tokenizer to extend.", metavar="TOKENIZER")
    out: Path = option(help="Folder to write; it must not exist.")
    vocab_size: int = option(64000, help="Size of the new vocabulary, special tokens included.", at_least=1)
    max_token_chars: int = option(16, help="Longest new token in characters, counting a leading space.", at_least=2)
    unit: Unit = option(
        "run",
        help="Where merges may happen. run: anywhere within a run of the script's characters; word: within Thai "
        "words; cluster: at Thai character cluster boundaries only.",
    )
    script: str = option("Thai", help="Unicode name of the script to learn (case does not matter).")
    normalize_thai: bool = option(
        True,
        help="Encode look-alike Thai spellings the same way: double sara e as sara ae, nikhahit with sara aa as "
        "sara am, and marks in any order. Other scripts are unaffected.",
    )
    # The learner's memory grows with the text: 64,000 entries took 1.8 GB from 44 MB of Thai and 3.1 GB from 88 MB, so
    # this much takes some 6 GB.
    sample_bytes: Size = option(
        Size(200_000_000),
        help="Learn from at most this much text, sampled evenly by document. Memory use is about 30 times as much.",
        shown_default="200MB",
        metavar="SIZE",
    )
    seed: int = option(0, help="Random seed for the sample.")

    def __post_init__(self) -> None:
        check_values(self)
        self.script = self.script.title()
        check_script(self.script, self.unit)


@dataclass(kw_only=True)
class ReportTokenizersOptions:
    """What `jai tokenizer report` takes."""

    tokenizer: list[str] = argument("TOKENIZER...", help="Folders or Hub ids of tokenizers to compare.")
    text: list[str] = option(
        help="Text to measure on, preferably not the training text: a file (.txt, .jsonl, .jsonl.gz, .parquet), a "
        "folder of such files, or a Hub dataset. Repeat the option for several.",
        metavar="TEXT",
    )
    base: str | None = option(
        None, help="Tokenizer to compare the others with.", shown_default="the first of several", metavar="TOKENIZER"
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
        help="YAML file with what to compare, such as recipes/tokenizer_ablation.yaml.", metavar="FILE"
    )
    base: str | None = option(
        None, help="Folder or Hub id of the tokenizer to extend.", shown_default="the file's", metavar="TOKENIZER"
    )
    text: list[str] = option(
        [],
        help="Text for a language of the file, such as Thai=thai.jsonl.gz. Repeat the option for several.",
        metavar="LANGUAGE=TEXT",
        shown_default="the file's",
    )
    out: Path = option(Path("runs/tokenizer-ablation"), help="Output folder. If it exists, the run resumes.")
    workers: int = option(1, help="Models to train in parallel.", at_least=1)

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
