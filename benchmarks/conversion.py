# SPDX-License-Identifier: Apache-2.0
"""`jai convert` of a Phi-3-shaped checkpoint of 1.2 GB, beside `cp` of the same output and mergekit's passthrough.

    python benchmarks/conversion.py [--repeats 5] [--mergekit PATH] [--large] [--scratch FOLDER]

The base has 40 layers of width 1024; the paper's plan makes 64 of them, with four experts (6.1 GB) or one (1.9 GB, what
mergekit's passthrough makes too). Conversion moves bytes, so the limit is the copy of the output; memory must not grow
with the model: `--large` converts a base eight times as large as well. The time that the interpreter and the imports
take is measured by itself and taken off where "net" is said.

mergekit is a peer, installed by itself: `python -m venv V && V/bin/pip install mergekit==0.1.5`, then `--mergekit
V/bin/mergekit-yaml`.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from measuring import Run, measure, median
from records import append, provenance
from transformers import Phi3Config

from jai.configuration_jai import JaiConfig, plan_layers
from jai.conversion import names
from jai.conversion.convert.options import PAPER_BLOCK_REPEATS
from jai.conversion.inputs.parts import Computed
from jai.conversion.output.shards import write_shards
from jai.conversion.output.tensors import PlannedTensor
from jai.files import resumable_folder

PLAN = ",".join(map(str, PAPER_BLOCK_REPEATS))


def write_base(folder: Path, *, width: int, layers: int) -> None:
    """A phi-3 checkpoint, whose weights are slices of the same random numbers."""
    shape = {
        "hidden_size": width,
        "intermediate_size": width * 7 // 2,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "vocab_size": 32064,
    }
    shapes = names.source_shapes(JaiConfig(**shape), shape["vocab_size"], layers)
    values = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def repeated(count: int) -> Iterator[torch.Tensor]:
        for at in range(0, count, len(values)):
            yield values[: count - at]

    tensors = []
    for name, form in shapes.items():
        count = torch.Size(form).numel()
        part = Computed(2 * count, "the same random numbers", lambda count=count: repeated(count))
        tensors.append(PlannedTensor(name, form, torch.bfloat16, (part,)))
    with resumable_folder(folder, {}) as job:
        write_shards(job, tensors, 5_000_000_000)
        Phi3Config(
            **shape, num_hidden_layers=layers, sliding_window=2047, dtype="bfloat16", architectures=["Phi3ForCausalLM"]
        ).save_pretrained(job.folder)


def write_passthrough(path: Path, base: Path) -> None:
    """The same plan in mergekit's words: one slice for each run of neighbouring layers."""
    origins = [planned.origin for planned in plan_layers(4, PAPER_BLOCK_REPEATS)]
    slices = []
    for origin in origins:
        if slices and slices[-1][1] == origin:
            slices[-1][1] += 1
        else:
            slices.append([origin, origin + 1])
    config = {
        "slices": [{"sources": [{"model": str(base), "layer_range": ends}]} for ends in slices],
        "merge_method": "passthrough",
        "dtype": "bfloat16",
    }
    path.write_text(yaml.safe_dump(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of a virtual environment")
    parser.add_argument("--large", action="store_true", help="also a base of 9 GB; needs 30 GB more")
    parser.add_argument("--scratch", type=Path, help="folder with 20 GB free")
    arguments = parser.parse_args()

    jai = [sys.executable, "-m", "jai"]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        base, large, out, copy = (Path(scratch) / name for name in ("base", "large", "out", "copy"))
        write_base(base, width=1024, layers=40)
        write_passthrough(Path(scratch) / "passthrough.yaml", base)
        commands = {
            "jai convert, 4 experts": [*jai, "convert", base, out, "--block-repeats", PLAN, "--duplicate-init", "copy"],
            "jai convert, 1 expert": [
                *jai,
                "convert",
                base,
                out,
                "--block-repeats",
                PLAN,
                "--duplicate-init",
                "copy",
                "--experts",
                "1",
            ],
        }
        if arguments.mergekit:
            commands["mergekit passthrough"] = [arguments.mergekit, Path(scratch) / "passthrough.yaml", out]
        start = {
            "jai": median([measure([sys.executable, "-c", "import jai.conversion.convert.command"]) for _ in range(5)]),
            "mergekit": median([measure([arguments.mergekit, "--help"]) for _ in range(5)])
            if arguments.mergekit
            else Run(0, 0, 0),
        }
        runs: dict[str, list[Run]] = {}
        sizes: dict[str, int] = {}
        for _ in range(arguments.repeats):  # in turn, so that what else the machine does falls on all
            for what, command in commands.items():
                runs.setdefault(what, []).append(measure(command))
                sizes[what] = sum(file.stat().st_size for file in out.iterdir())
                if what.startswith("jai"):
                    runs.setdefault(f"cp: {what}", []).append(measure(["cp", "-r", out, copy]))
                    sizes[f"cp: {what}"] = sizes[what]
                for folder in (out, copy):
                    shutil.rmtree(folder, ignore_errors=True)
        if arguments.large:
            write_base(large, width=2048, layers=80)
            for size, source in (("1×", base), ("8×", large)):
                block = "4" if source == base else "8"
                command = [
                    *jai,
                    "convert",
                    source,
                    out,
                    "--block-repeats",
                    PLAN,
                    "--block-size",
                    block,
                    "--experts",
                    "1",
                ]
                runs[f"memory, {size} base"] = [measure(command)]
                sizes[f"memory, {size} base"] = sum(file.stat().st_size for file in out.iterdir())
                shutil.rmtree(out)
    rows = []
    for what, several in runs.items():
        run = median(several)
        imports = start["mergekit" if "mergekit" in what else "jai"].processor * (not what.startswith("cp"))
        copied = median(runs.get(f"cp: {what}", runs["cp: jai convert, 1 expert"]))
        rows.append(
            {
                "what": what,
                "bytes": str(sizes[what]),
                "wall_s": f"{run.wall:.2f}",
                "processor_s": f"{run.processor:.2f}",
                "net_processor_s": f"{run.processor - imports:.2f}",
                "net_ratio_to_cp": f"{(run.processor - imports) / copied.processor:.2f}",
                "anonymous_mb": f"{run.anonymous:.0f}",
                "repeats": str(len(several)),
                **provenance(("torch", "transformers")),
            }
        )
        row = rows[-1]
        print(
            f"{what:28} {run.wall:7.2f} s {run.processor:7.2f} s cpu, net {row['net_processor_s']:>6} "
            f"= {row['net_ratio_to_cp']:>5} of cp's {row['anonymous_mb']:>6} MB anonymous"
        )
    print("appended to", append("conversion", rows))


if __name__ == "__main__":
    main()
