# SPDX-License-Identifier: Apache-2.0
"""`jai tokenizer train`: files of text and a base tokenizer become a folder with the extended tokenizer."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jai.errors import UserError
from jai.files import new_folder, sha256
from jai.tokenization.extend import extend_tokenizer, new_token_pieces
from jai.version import __version__

RECORD_FILE = "tokenizer_training.json"
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")


@dataclass
class TextFile:
    """A file of text, and what was read from it.

    Attributes:
        path: a .txt file (one document), or .jsonl or .jsonl.gz (a document a line, in the field `text`).
        documents: documents read so far.
        characters: characters read so far.
    """

    path: Path
    documents: int = 0
    characters: int = 0

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise UserError(f"{self.path} is no file. Give files of text: {', '.join(_SUFFIXES)}.")
        if not self.path.name.endswith(_SUFFIXES):
            raise UserError(f"{self.path} has an unknown ending. Give files of text: {', '.join(_SUFFIXES)}.")

    def read(self) -> Iterator[str]:
        """Its documents.

        Raises:
            UserError: if the file is no UTF-8, no gzip, or has a line without a text.
        """
        try:
            for text in self._documents():
                self.documents += 1
                self.characters += len(text)
                yield text
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8: {error}. Convert it to UTF-8.") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self.path} is a damaged gzip file: {error}. Fetch it again.") from error

    def _documents(self) -> Iterator[str]:
        if self.path.suffix == ".txt":
            yield self.path.read_text(encoding="utf-8")
            return
        opener = gzip.open if self.path.suffix == ".gz" else open
        with opener(self.path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = json.loads(line)["text"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise UserError(
                        f"{self.path}, line {number}: not a JSON object with a string `text`. Mend the line."
                    )
                yield text


def train_tokenizer(
    texts: Sequence[Path],
    base: str,
    out: Path,
    vocab_size: int,
    max_token_chars: int = 16,
    script: str = "Thai",
    console: Console | None = None,
) -> Path:
    """Extend a tokenizer by the pieces of a script and write it as a folder that AutoTokenizer loads.

    Beside it lies `tokenizer_training.json`: the inputs with their hashes, the options, the versions, and for each new
    id its string and its pieces under the base tokenizer.

    Args:
        texts: files to learn from: .txt, .jsonl or .jsonl.gz (field `text`).
        base: folder or Hub id of a byte-fallback BPE, such as phi-3's.
        out: folder to write; it must not exist.
        vocab_size: entries of the result, special tokens included.
        max_token_chars: longest new piece, in characters.
        script: Unicode name of the script.
        console: where the plan is printed; None is standard output.

    Returns:
        `out`.

    Raises:
        UserError: for text that cannot be read or cannot fill the vocabulary, a base that does not fit, or an output
            folder that exists. Nothing half-written is kept.
    """
    console = console or Console()
    files = [TextFile(Path(path)) for path in texts]
    if not files:
        raise UserError(f"No text was given. Give files of text: {', '.join(_SUFFIXES)}.")
    base_tokenizer = _load_base(base)

    with new_folder(out) as folder:
        plan = Table("", "", title="Tokenizer", show_header=False)
        plan.add_row("base", f"{escape(base)} ({len(base_tokenizer):,} entries)")
        plan.add_row("result", f"{vocab_size:,} entries, new pieces up to {max_token_chars} characters of {script}")
        for file in files:
            plan.add_row("text", f"{escape(str(file.path))} ({filesize.decimal(file.path.stat().st_size)})")
        plan.add_row("out", escape(str(out)))
        console.print(plan)
        documents = (text for file in files for text in file.read())
        extended = extend_tokenizer(base_tokenizer, documents, vocab_size, script, max_token_chars)
        pieces = new_token_pieces(base_tokenizer, extended)
        extended.save_pretrained(folder)
        state = base_tokenizer.backend_tokenizer.to_str().encode()
        record = {
            "jai": __version__,
            "versions": {package: version(package) for package in ("tokenizers", "transformers", "regex")},
            "base": {"name": base, "entries": len(base_tokenizer), "sha256": hashlib.sha256(state).hexdigest()},
            "texts": [asdict(file) | {"path": file.path.name, "sha256": sha256(file.path)} for file in files],
            "options": {"vocab_size": vocab_size, "max_token_chars": max_token_chars, "script": script},
            "new_tokens": {
                i: {"surface": surface, "pieces": pieces[i]}
                for i, surface in zip(pieces, extended.convert_ids_to_tokens(list(pieces)))
            },
        }
        (folder / RECORD_FILE).write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")

    learned = sum(1 for ids in pieces.values() if ids)
    characters = sum(file.characters for file in files)
    console.print(f"Learnt {learned:,} pieces from {characters:,} characters.", highlight=False)
    console.print(f"[bold green]Tokenizer written to[/] {escape(str(out))}", soft_wrap=True)
    console.print(f"Next: jai convert BASE OUT --tokenizer {escape(str(out))}", soft_wrap=True, highlight=False)
    return Path(out)


def _load_base(base: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{base} has no tokenizer that can be loaded. Give a folder with tokenizer.json, or a Hub id. ({error})"
        ) from error
