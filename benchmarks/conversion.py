# SPDX-License-Identifier: Apache-2.0
"""`jai convert` on a Phi-3-shaped checkpoint of 1.2 GB: time and peak memory, beside `cp` of the same output.

    python benchmarks/conversion.py [--repeats 5] [--verify] [--tokenizer FOLDER] [--scratch FOLDER]

The base is written by transformers: 40 layers, hidden 1024, the paper's block plan, four experts; the output has 64
layers and 6 GB. Conversion moves bytes, so the limit is the copy of the output; memory should not grow with the model.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from provenance import append, provenance

PLAN = "1,1,1,2,3,3,2,1,1,1"


@dataclass(frozen=True)
class Run:
    """One process: wall and processor seconds, and peak resident memory in MB."""

    wall: float
    processor: float
    peak: float


def measure(command: list[str]) -> Run:
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} ended with {status}")
    return Run(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def median(runs: list[Run]) -> Run:
    return Run(*(statistics.median(getattr(run, name) for run in runs) for name in ("wall", "processor", "peak")))


def write_base(folder: Path, tokenizer: Path | None) -> None:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = Phi3Config(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=40,
        num_attention_heads=16,
        num_key_value_heads=4,
        sliding_window=2047,
        dtype=torch.bfloat16,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if tokenizer:
            shutil.copy(tokenizer / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--verify", action="store_true", help="also prove it: identity copies, one expert, in fp32")
    parser.add_argument("--tokenizer", type=Path, help="folder of the real Phi-3 tokenizer")
    parser.add_argument("--scratch", type=Path, help="folder with 15 GB free")
    arguments = parser.parse_args()

    jai = [sys.executable, "-m", "jai"]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        base, out, copy = (Path(scratch) / name for name in ("base", "jai", "copy"))
        # In a process of its own: a child's peak memory starts at its parent's.
        writer = multiprocessing.get_context("spawn").Process(target=write_base, args=(base, arguments.tokenizer))
        writer.start()
        writer.join()
        start = median([measure([*jai, "--version"]) for _ in range(arguments.repeats)])
        conversions, copies = [], []
        for _ in range(arguments.repeats):
            for folder in (out, copy):
                shutil.rmtree(folder, ignore_errors=True)
            conversions.append(measure([*jai, "convert", str(base), str(out), "--block-repeats", PLAN]))
            copies.append(measure(["cp", "-r", str(out), str(copy)]))
        size = sum(file.stat().st_size for file in out.iterdir())
        rows = [
            {
                "what": what,
                "bytes": str(size),
                "wall_s": f"{run.wall:.2f}",
                "processor_s": f"{run.processor:.2f}",
                "peak_mb": f"{run.peak:.0f}",
                "processor_ratio_to_cp": f"{run.processor / median(copies).processor:.2f}",
                **provenance(("torch", "transformers")),
            }
            for what, run in (
                ("jai convert", median(conversions)),
                ("jai --version (interpreter and imports)", start),
                ("cp of the output", median(copies)),
            )
        ]
        for row in rows:
            print(f"{row['what']:42} {row['wall_s']:>7} s  {row['processor_s']:>7} s cpu  {row['peak_mb']:>6} MB")
        print("appended to", append("conversion", rows))
        if arguments.verify:
            shutil.rmtree(out)
            shutil.rmtree(copy)
            options = ["--block-repeats", PLAN, "--experts", "1", "--duplicate-init", "identity", "--verify"]
            subprocess.run([*jai, "convert", str(base), str(out), *options], check=True)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            print(f"peak memory with --verify: {peak:.0f} MB")


if __name__ == "__main__":
    main()
