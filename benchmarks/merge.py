# SPDX-License-Identifier: Apache-2.0
"""`jai merge` of two Phi-3-shaped checkpoints of 1.2 GB, beside mergekit: processor time and memory, linear and slerp.

    python benchmarks/merge.py --mergekit VENV/bin/mergekit-yaml [--repeats 5] [--scratch FOLDER]

mergekit needs an environment of its own (`pip install -c constraints.txt mergekit==0.1.5`) with the same torch. Both
tools merge the same two models in turn, each with its own number of threads; time is the processor's, less that of
starting Python with the tool's imports; memory is the peak of what is not backed by files, children included. The
results are compared with a float64 reference: 1 half step is what rounding to bf16 alone may cost.
"""

import argparse
import contextlib
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from measuring import Run, measure, median
from records import append, provenance

LAYERS = 40
WEIGHTS = (0.7, 0.3)
T_POINTS = (0.2, 0.8)  # slerp's t at the first and at the last layer


def write_model(folder: Path, seed: int) -> None:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    config = Phi3Config(
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        sliding_window=2047,
        dtype=torch.bfloat16,
    )
    model = Phi3ForCausalLM(config)
    for norm in (parameter for parameter in model.parameters() if parameter.dim() == 1):
        norm.data.normal_(1.0, 0.1)  # else all ones, and the same in both
    model.save_pretrained(folder)


def largest_error(models: list[Path], out: Path, method: str, queue: "multiprocessing.Queue[float]") -> None:
    """Largest distance from the float64 reference over all tensors of layers, in half steps of bf16."""
    import math

    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        tensors = {
            folder: {
                name: file
                for path in sorted(folder.glob("*.safetensors"))
                for file in [stack.enter_context(safe_open(path, "pt"))]
                for name in file.keys()  # noqa: SIM118
            }
            for folder in (*models, out)
        }
        largest = 0.0
        for name in tensors[models[0]]:
            if ".layers." not in name:
                continue  # mergekit reads its own way which t those have
            first, second = (tensors[model][name].get_tensor(name).double() for model in models)
            weights = WEIGHTS
            if method == "slerp":
                t = T_POINTS[0] + (T_POINTS[1] - T_POINTS[0]) * int(name.split(".")[2]) / (LAYERS - 1)
                cosine = ((first * second).sum() / (first.norm() * second.norm())).item()
                angle = math.acos(cosine)
                weights = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
                if abs(cosine) > 0.9995:
                    weights = (1 - t, t)
            expected = weights[0] * first + weights[1] * second
            error = (tensors[out][name].get_tensor(name).double() - expected).abs()
            # Where the terms cancel, what counts is their own rounding to fp32, not the small rest.
            error -= 2**-22 * (weights[0] * first.abs() + weights[1] * second.abs())
            error /= torch.ldexp(torch.ones_like(expected), torch.frexp(expected).exponent - 9)
            largest = max(largest, error.max().item())
    queue.put(largest)


def in_process(function, *arguments) -> None:
    """In a process of its own: a child's memory starts at its parent's."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def configs(models: list[Path], scratch: Path) -> dict[tuple[str, str], Path]:
    """YAML files of both tools for both methods."""
    names = [str(model) for model in models]
    sources = [{"model": name, "layer_range": [0, LAYERS]} for name in names]
    contents = {
        ("jai", "linear"): {"models": names, "weights": list(WEIGHTS)},
        ("jai", "slerp"): {
            "models": names,
            "method": "slerp",
            "t": [{"at": 0, "value": T_POINTS[0]}, {"at": 1, "value": T_POINTS[1]}],
        },
        ("mergekit", "linear"): {
            "merge_method": "linear",
            "models": [{"model": name, "parameters": {"weight": weight}} for name, weight in zip(names, WEIGHTS)],
            "dtype": "bfloat16",
        },
        ("mergekit", "slerp"): {
            "merge_method": "slerp",
            "base_model": names[0],
            "slices": [{"sources": sources}],
            "parameters": {"t": list(T_POINTS)},
            "dtype": "bfloat16",
        },
    }
    paths = {}
    for (tool, method), content in contents.items():
        paths[tool, method] = scratch / f"{tool}-{method}.yaml"
        paths[tool, method].write_text(yaml.safe_dump(content))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True, help="mergekit-yaml of an environment that has it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder with 6 GB free")
    arguments = parser.parse_args()

    jai = [sys.executable, "-m", "jai"]
    mergekit = [str(arguments.mergekit)]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        models, out = [Path(scratch) / "first", Path(scratch) / "second"], Path(scratch) / "out"
        for seed, model in enumerate(models):
            in_process(write_model, model, seed)
        yamls = configs(models, Path(scratch))
        commands = {
            ("jai", "start"): [
                sys.executable,
                "-c",
                "import jai.cli, jai.conversion.merge.command",
            ],  # --help imports less
            ("mergekit", "start"): [*mergekit, "--help"],
            **{
                (tool, method): (
                    [*jai, "merge", str(out), "--config", str(path)]
                    if tool == "jai"
                    else [*mergekit, str(path), str(out)]
                )
                for (tool, method), path in yamls.items()
            },
        }
        runs: dict[tuple[str, str], list[Run]] = {key: [] for key in commands}
        errors: dict[tuple[str, str], float] = {}
        queue: multiprocessing.Queue[float] = multiprocessing.get_context("spawn").Queue()
        for repeat in range(arguments.repeats):
            for (tool, method), command in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                runs[tool, method].append(measure(command, {"HF_HUB_OFFLINE": "1"}))
                print(repeat, tool, method, runs[tool, method][-1], flush=True)
                if method != "start" and repeat == 0:
                    in_process(largest_error, models, out, method, queue)
                    errors[tool, method] = queue.get()
    write_rows(runs, errors, arguments.mergekit)


def write_rows(runs: dict[tuple[str, str], list[Run]], errors: dict[tuple[str, str], float], mergekit: Path) -> None:
    medians = {key: median(measured) for key, measured in runs.items()}

    def work(tool: str, method: str) -> float:
        return medians[tool, method].processor - medians[tool, "start"].processor

    version = "from importlib.metadata import version; print(version('mergekit'), version('torch'))"
    found = subprocess.run(
        [str(mergekit.with_name("python")), "-c", version], capture_output=True, text=True, check=True
    )
    mergekit_version, its_torch = found.stdout.split()
    rows = []
    for tool, method in errors:
        rows.append(
            {
                "tool": tool,
                "method": method,
                "repeats": str(len(runs[tool, method])),
                "wall_s": f"{medians[tool, method].wall:.2f}",
                "processor_s": f"{work(tool, method):.2f}",
                "start_processor_s": f"{medians[tool, 'start'].processor:.2f}",
                "processor_against_mergekit": f"{work(tool, method) / work('mergekit', method):.3f}",
                "anonymous_mb": f"{medians[tool, method].anonymous:.0f}",
                "start_anonymous_mb": f"{medians[tool, 'start'].anonymous:.0f}",
                "largest_error_half_steps": f"{errors[tool, method]:.4f}",
                "mergekit": mergekit_version,
                "mergekit_torch": its_torch,
                **provenance(("torch", "transformers")),
            }
        )
        print(*list(rows[-1].items())[:10])
    print("appended to", append("merge", rows))


if __name__ == "__main__":
    main()
