# SPDX-License-Identifier: Apache-2.0
"""`jai tokenizer train`: text and a base tokenizer become a folder with the extended tokenizer."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jai.files import new_folder
from jai.tokenization.corpus import draw_sample, open_sources, sample_table
from jai.tokenization.extend import extend_tokenizer, new_token_pieces
from jai.tokenization.loading import RECORD_FILE, load_tokenizer
from jai.tokenization.units import Unit
from jai.version import __version__

# The learner's memory grows with the text: 64,000 entries took 1.8 GB from 44 MB of Thai and 3.1 GB from 88 MB, so this
# much takes some 6 GB.
SAMPLE_BYTES = 200_000_000


def train_tokenizer(
    texts: Sequence[str | Path],
    base: str,
    out: Path,
    vocab_size: int,
    max_token_chars: int = 16,
    script: str = "Thai",
    unit: Unit = "run",
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 0,
    console: Console | None = None,
) -> Path:
    """Extend a tokenizer by the pieces of a script and write it as a folder that AutoTokenizer loads.

    Beside it lies `tokenizer_training.json`: what was read and sampled, with hashes or commits, the options, the
    versions, and for each new id its string and its pieces under the base tokenizer.

    Args:
        texts: what to learn from: files, folders, Hub datasets (see `jai.tokenization.corpus.open_sources`).
        base: folder or Hub id of a byte-fallback BPE, such as phi-3's.
        out: folder to write; it must not exist.
        vocab_size: entries of the result, special tokens included.
        max_token_chars: longest new piece, in characters.
        script: Unicode name of the script, in any case.
        unit: where merges are made: anywhere in a run of the script, inside words, or between character clusters.
        sample_bytes: learn from at most so much text (bytes in UTF-8), sampled evenly by document.
        seed: seed of the sample.
        console: where the plan is printed; None is standard output.

    Returns:
        `out`.

    Raises:
        UserError: for text that cannot be read or cannot fill the vocabulary, a base that does not fit, or an output
            folder that exists. Nothing half-written is kept.
    """
    console = console or Console()
    script = script.title()
    sources = open_sources(texts)
    base_tokenizer = load_tokenizer(base)

    with new_folder(out) as folder:
        plan = Table("", "", title="Tokenizer", show_header=False)
        plan.add_row("base", f"{escape(base)} ({len(base_tokenizer):,} entries)")
        plan.add_row("result", f"{vocab_size:,} entries, new pieces up to {max_token_chars} characters of {script}")
        plan.add_row("unit", unit)
        for source in sources:
            plan.add_row("text", escape(source.describe()))
        limit = filesize.decimal(sample_bytes)
        plan.add_row("sample", f"all of it up to {limit}, then evenly by document (seed {seed})")
        plan.add_row("out", escape(str(out)))
        console.print(plan)
        sample = draw_sample(sources, sample_bytes, seed)
        console.print(sample_table(sources))
        extended = extend_tokenizer(
            base_tokenizer, sample, vocab_size, script=script, max_token_chars=max_token_chars, unit=unit
        )
        pieces = new_token_pieces(base_tokenizer.backend_tokenizer, extended.backend_tokenizer)
        extended.save_pretrained(folder)
        state = base_tokenizer.backend_tokenizer.to_str().encode()
        record = {
            "jai": __version__,
            "versions": {package: version(package) for package in ("tokenizers", "transformers", "regex")},
            "base": {"name": base, "entries": len(base_tokenizer), "sha256": hashlib.sha256(state).hexdigest()},
            "texts": [part.record() for source in sources for part in source.parts],
            "options": {
                "vocab_size": vocab_size,
                "max_token_chars": max_token_chars,
                "script": script,
                "unit": unit,
                "sample_bytes": sample_bytes,
                "seed": seed,
            },
            "new_tokens": {
                i: {"surface": surface, "pieces": pieces[i]}
                for i, surface in zip(pieces, extended.convert_ids_to_tokens(list(pieces)))
            },
        }
        (folder / RECORD_FILE).write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")

    learned = sum(1 for ids in pieces.values() if ids)
    console.print(f"Learnt {learned:,} pieces.", highlight=False)
    console.print(f"[bold green]Tokenizer written to[/] {escape(str(out))}", soft_wrap=True)
    for command in (f"jai tokenizer report {out} --text FILE", f"jai convert BASE OUT --tokenizer {out}"):
        console.print(f"Next: {escape(command)}", soft_wrap=True, highlight=False)
    return Path(out)
