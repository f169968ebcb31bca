# SPDX-License-Identifier: Apache-2.0
"""`jai tokenizer train`: text and a base tokenizer become a folder with the extended tokenizer."""

import hashlib
import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jai.files import new_folder, print_next, refuse_existing
from jai.tokenization.corpus import draw_sample, open_sources, sample_table
from jai.tokenization.loading import RECORD_FILE, load_tokenizer
from jai.tokenization.options import TrainTokenizerOptions
from jai.version import __version__

_RECORDED_OPTIONS = ("vocab_size", "max_token_chars", "script", "unit", "normalize_thai", "sample_bytes", "seed")


def train_tokenizer(options: TrainTokenizerOptions, console: Console | None = None) -> Path:
    """Extend a tokenizer by the pieces of a script and write it as a folder that AutoTokenizer loads.

    Beside it lies `tokenizer_training.json`: what was read and sampled, with hashes or commits, the options, the
    versions, and for each new id its string and its pieces under the base tokenizer.

    Args:
        options: what to learn from, and how. The base is a byte-fallback BPE, such as phi-3's.
        console: where the plan is printed; None is standard output.

    Returns:
        The folder that was written.

    Raises:
        UserError: for a base that does not fit or an output folder that exists, both before any text is read; for text
            that cannot be read or cannot fill the vocabulary. Nothing half-written is kept.
    """
    console = console or Console()
    base, out, script = options.base, options.out, options.script
    refuse_existing(out)
    sources = open_sources(options.text)
    if options.unit == "word":
        import_module("pythainlp.tokenize")  # of an extra: if it is missing, that is better said before the reading
    base_tokenizer = load_tokenizer(base)
    # Here, for it imports transformers: a second for whoever has mistyped a name.
    from jai.tokenization.extend import check_extension, extend_tokenizer, new_token_pieces

    check_extension(base_tokenizer, options.vocab_size, script)

    with new_folder(out) as folder:
        plan = Table("", "", title="Tokenizer", show_header=False)
        plan.add_row("base", f"{escape(base)} ({len(base_tokenizer):,} entries)")
        length = f"new pieces up to {options.max_token_chars} characters of {script}"
        plan.add_row("result", f"{options.vocab_size:,} entries, {length}")
        plan.add_row("unit", options.unit)
        for source in sources:
            plan.add_row("text", escape(source.describe()))
        limit = filesize.decimal(options.sample_bytes)
        plan.add_row("sample", f"all of it up to {limit}, then evenly by document (seed {options.seed})")
        plan.add_row("out", escape(str(out)))
        console.print(plan)
        sample = draw_sample(sources, options.sample_bytes, options.seed)
        console.print(sample_table(sources))
        extended = extend_tokenizer(
            base_tokenizer,
            sample,
            options.vocab_size,
            script=script,
            max_token_chars=options.max_token_chars,
            unit=options.unit,
            normalize_thai=options.normalize_thai,
        )
        pieces = new_token_pieces(base_tokenizer.backend_tokenizer, extended.backend_tokenizer)
        extended.save_pretrained(folder)
        state = base_tokenizer.backend_tokenizer.to_str().encode()
        record = {
            "jai": __version__,
            "versions": {package: version(package) for package in ("tokenizers", "transformers", "regex")},
            "base": {"name": base, "entries": len(base_tokenizer), "sha256": hashlib.sha256(state).hexdigest()},
            "texts": [part.record() for source in sources for part in source.parts],
            "options": {name: getattr(options, name) for name in _RECORDED_OPTIONS},
            "new_tokens": {
                i: {"surface": surface, "pieces": pieces[i]}
                for i, surface in zip(pieces, extended.convert_ids_to_tokens(list(pieces)))
            },
        }
        (folder / RECORD_FILE).write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")

    learned = sum(1 for ids in pieces.values() if ids)
    console.print(f"Learnt {learned:,} pieces.", highlight=False)
    console.print(f"[bold green]Tokenizer written to[/] {escape(str(out))}", soft_wrap=True)
    print_next(
        console,
        ["jai", "tokenizer", "report", out, "--text", "FILE"],
        ["jai", "convert", "BASE", "OUT", "--tokenizer", out],
    )
    return out
