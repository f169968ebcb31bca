# SPDX-License-Identifier: Apache-2.0
"""The options of `jai pack`."""

from dataclasses import dataclass
from pathlib import Path

from jai.options import argument, check_values, option


@dataclass(kw_only=True)
class PackOptions:
    """What `jai pack` takes, beside what is in its file."""

    out: Path = argument("OUT", help="Folder to write, or to resume in.")
    config: Path = option(
        help="YAML file with the sources of text, such as recipes/corpus_thai_public.yaml.", metavar="FILE"
    )
    tokenizer: str | None = option(
        None, help="Folder or Hub id of the tokenizer.", shown_default="the file's", metavar="TOKENIZER"
    )
    workers: int | None = option(
        None, help="Tokenizing processes.", shown_default="one per processor", at_least=1, at_most=1024
    )
    # 250 million tokens are 500 MB as uint16, and what an interruption loses at most.
    shard_tokens: int = option(250_000_000, help="Tokens per shard, to within a document.", at_least=1)

    def __post_init__(self) -> None:
        check_values(self)
