# SPDX-License-Identifier: Apache-2.0
"""Best-fit packing against TRL's, and the loader alone against what eight H100s train.

    python benchmarks/packing.py --tokenizer TOKENIZER --text th=THAI.jsonl.gz --text en=ENGLISH.jsonl.gz [--repeats 5]

The text is packed once by `jai pack`. TRL packs the same ids, as `SFTTrainer` does (`pack_dataset`, bfd_split, 1,000
documents at a time) and all at once, which fills better; then also with its rows read as tensors, of the ids alone.
Ours is timed for the plan alone, and for the plan and every sequence as the tensors that a model takes. In turn, one
process, processor time, medians.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml
from datasets import Dataset
from datasets.utils import disable_progress_bars
from records import append, provenance
from rich.console import Console
from torch.utils.data import DataLoader
from trl import pack_dataset

from jai.pretraining.dataset import PackedSequences
from jai.pretraining.options import PackOptions
from jai.pretraining.pack import pack_corpus
from jai.pretraining.plan import SequencePlan
from jai.pretraining.shards import PackedCorpus

# Tokens/s of eight H100s that train JAI-1: 989 TFLOP/s each in bf16, 40 % of it used, 6 FLOPs a token for each of the
# 40.1 billion parameters that a token uses.
TRAINED = 8 * 989e12 * 0.4 / (6 * 40.1e9)


def packed_text(scratch: Path, tokenizer: str, texts: list[str]) -> PackedCorpus:
    sources = []
    for number, text in enumerate(texts):
        language, _, path = text.partition("=")
        sources.append({"name": f"{language}-{number}", "language": language, "text": [path]})
    config = scratch / "corpus.yaml"
    config.write_text(yaml.safe_dump({"tokenizer": tokenizer, "sources": sources}))
    return PackedCorpus.open(pack_corpus(PackOptions(out=scratch / "packed", config=config), Console(quiet=True)))


def as_rows(corpus: PackedCorpus) -> Dataset:
    """The same ids, one document a row, in memory."""
    ids = np.concatenate([source.read(number) for source in corpus.sources for number in range(source.documents)])
    lengths = np.concatenate([source.lengths(0, source.documents) for source in corpus.sources])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    rows = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(ids.astype(np.int64)))
    return Dataset(pa.table({"input_ids": rows}))


def seconds_of(work: Callable[[], object]) -> tuple[float, object]:
    """Processor time of a call, and its result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def plan_all(corpus: PackedCorpus, context: int, read: bool) -> SequencePlan:
    plan = SequencePlan(corpus, context)
    dataset = PackedSequences(plan)
    for number in range(len(plan)):
        if read:
            dataset[number]
        else:
            plan.pieces(number)
    return plan


def cut_documents(plan: SequencePlan) -> int:
    """Pieces beyond those that documents longer than the context need."""
    pieces = sum(int(np.count_nonzero(plan.pieces(number).source >= 0)) for number in range(len(plan)))
    lengths = (source.lengths(0, source.documents) for source in plan.sources)
    return pieces - sum(int((-(-each // plan.context)).sum()) for each in lengths)


def compare(corpus: PackedCorpus, dataset: Dataset, context: int, repeats: int) -> list[dict[str, str]]:
    """Documents a second and fill, ours and TRL's."""
    documents, tokens = dataset.num_rows, sum(source.tokens for source in corpus.sources)
    ways: dict[str, Callable[[], object]] = {
        "trl bfd_split": lambda: pack_dataset(dataset, context, "bfd_split"),
        "trl bfd_split, at once": lambda: pack_dataset(dataset, context, "bfd_split", {"batch_size": documents}),
        "trl bfd_split, and tensors": lambda: list(pack_dataset(dataset, context, "bfd_split").with_format("torch")),
        "jai, plan": lambda: plan_all(corpus, context, read=False),
        "jai, plan and tensors": lambda: plan_all(corpus, context, read=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sequences: dict[str, int] = {}
    for _ in range(repeats):
        for name, work in ways.items():
            took, result = seconds_of(work)
            seconds[name].append(took)
            sequences[name] = len(result)  # type: ignore[arg-type]
    cut = cut_documents(SequencePlan(corpus, context))
    print(f"context {context:,}: {documents:,} documents, {tokens:,} tokens; jai cuts {cut:,}")
    rows = []
    for name in ways:
        speed = documents / statistics.median(seconds[name])
        ratio = statistics.median(seconds["trl bfd_split"]) / statistics.median(seconds[name])
        fill = tokens / (sequences[name] * context)
        print(f"  {name:26} {speed:10,.0f} documents/s  x{ratio:5.2f}  fill {fill:.4%}")
        figures = {"unit": "documents", "per_second": f"{speed:.0f}", "fill": f"{fill:.6f}", "against": f"{ratio:.2f}"}
        rows.append({"context": str(context), "what": name} | figures)
    return rows


def loader(corpus: PackedCorpus, context: int, strategy: str) -> dict[str, str]:
    """Tokens/s of a DataLoader of batches of eight in one process, with nothing behind it."""
    plan = SequencePlan(corpus, context, strategy=strategy)
    seconds, _ = seconds_of(lambda: [None for _ in DataLoader(PackedSequences(plan), 8)])
    speed = len(plan) * context / seconds
    print(f"loader, {strategy}: {speed:,.0f} tokens/s, {speed / TRAINED:,.0f} x what eight H100s train")
    figures = {"unit": "tokens", "per_second": f"{speed:.0f}", "fill": "", "against": f"{speed / TRAINED:.0f}"}
    return {"context": str(context), "what": f"loader, {strategy}"} | figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="LANGUAGE=FILE")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = packed_text(Path(scratch), arguments.tokenizer, arguments.text)
        dataset = as_rows(corpus)
        rows = [row for context in arguments.contexts for row in compare(corpus, dataset, context, arguments.repeats)]
        strategies = ["isolated", "concatenated", *(["xlda"] if len(corpus.languages) > 1 else [])]
        print(f"eight H100s train {TRAINED:,.0f} tokens/s")
        rows += [loader(corpus, arguments.contexts[0], strategy) for strategy in strategies]
    origin = provenance(("torch", "trl", "datasets", "numpy"))
    print("appended to", append("packing", [row | origin for row in rows]))


if __name__ == "__main__":
    main()
