# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that want a GPU run here too, at toy sizes: so that the one command works where there is one."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy without results, so that the repository's are left alone."""
    return Path(shutil.copytree(BENCHMARKS, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results")))


def run(script: Path, *arguments: str) -> list[dict[str, str]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LIGER_FUSED_MOE_AUTOTUNE": "0"}
    command = [sys.executable, str(script), "--device", "cpu", "--dtype", "float32", "--repeats", "1", *arguments]
    finished = subprocess.run(command, env=environment, cwd=script.parent.parent, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    with (script.parent / "results" / f"{script.stem}.csv").open() as file:
        return list(csv.DictReader(file))


OURS = ("jai_fused", "jai_fused_x", "jai_fused_fp8")
PEERS = ("grouped_mm", "eager", "cuBLAS loop", "liger")


# In Triton's interpreter a token's routing takes Liger seconds: all contenders are slow.
@pytest.mark.parametrize(
    ("lora", "contenders"),
    [
        ("4", ("jai_fused", "grouped_mm", "cuBLAS loop")),
        pytest.param("0", (*OURS, *PEERS), marks=pytest.mark.slow),
        pytest.param("4", (*OURS, *PEERS), marks=pytest.mark.slow),
    ],
    ids=["some", "all", "all with LoRA"],
)
def test_experts(folder, lora, contenders):
    sizes = ("--tokens", "4", "--hidden", "16", "--intermediate", "24", "--passes", "forward", "training")
    asked = (*sizes, "--lora", lora, "--contenders", *contenders)
    rows = run(folder / "experts.py", *asked, "--plot", str(folder / "plot.png"))
    by_name = {(row["contender"], row["pass"]): row for row in rows}
    assert {name for name, _ in by_name} == {*contenders, "ceiling: cuBLAS products"}
    for name in contenders:
        assert float(by_name[name, "forward"]["error"]) < 1e-5, name
        assert float(by_name[name, "training"]["kept_kib_a_token"]) > 0
    assert float(by_name["jai_fused", "training"]["against_ours"]) == 1
    assert (folder / "plot.png").stat().st_size > 1000


def test_cross_entropy(folder):
    rows = run(folder / "cross_entropy.py", "--tokens", "32", "--hidden", "16", "--vocab", "200")
    errors = {row["contender"]: row["weight_gradient_error"] for row in rows if row["weight_gradient_error"]}
    assert {"jai linear_cross_entropy", "jai linear_log_probs", "TRL chunked", "whole logits"} <= set(errors)
    assert all(float(error) < 1e-5 for error in errors.values())


@pytest.mark.slow
def test_what_few_bits_cost(folder, tiny_checkpoint, tmp_path, sentences):
    """Every form of a tiny JAI by language; rounding to bf16 costs less than rounding to four bits."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = {"hidden_size": 128, "intermediate_size": 128}
    models = [tiny_checkpoint(tmp_path / str(seed), seed=seed, **sizes) for seed in (0, 1)]
    (tmp_path / "text.txt").write_text("\n\n".join(sentences), encoding="utf-8")
    script = folder / "four_bits.py"
    command = [sys.executable, script, "measure", *models, "--heldout", f"Both={tmp_path / 'text.txt'}"]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    with (folder / "results" / "four_bits.csv").open() as file:
        rows = {row["form"]: row for row in csv.DictReader(file)}
    assert len(rows) == 7
    cost = {form: abs(float(row["cost_percent"])) for form, row in rows.items()}
    assert cost["float32"] == 0
    assert cost["bf16"] <= cost["NF4"]
    assert len({rows[form]["bits_per_character"] for form in ("NF4", "NF4, double quantisation", "FP8", "int8")}) == 4


@pytest.mark.slow
def test_lora_on_experts(folder):
    """The three ways compute the same, which the script sees to itself; four bits take fewer bytes than the weights."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = ("--hidden-size", "64", "--intermediate-size", "128", "--tokens", "8", "--rank", "2", "--repeats", "1")
    finished = subprocess.run([sys.executable, folder / "expert_lora.py", *sizes], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    with (folder / "results" / "expert_lora.csv").open() as file:
        rows = {(row["arm"], row["implementation"]): row for row in csv.DictReader(file)}
    ours, peft = ("ours", "grouped_mm"), ("PEFT", "grouped_mm")
    assert rows.keys() == {ours, ("ours", "eager"), peft, ("parametrised", "grouped_mm")}
    assert float(rows[ours]["weights_mb"]) < 0.5 * float(rows[peft]["weights_mb"])
    assert all(float(row["peak_beside_mb"]) > 0 for row in rows.values())
