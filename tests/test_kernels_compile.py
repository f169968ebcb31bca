# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for A100, H100 and B200, hot ones without spills, and takes what it took before.

All of it in processes of their own: under TRITON_INTERPRET, which the other tests set, nothing is compiled.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=500
    )


def test_every_variant_of_every_kernel():
    finished = run(str(ROOT / "benchmarks" / "ahead_of_time.py"))
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_every_kernel_is_declared(results):
    """Kernels that are launched have a name that ends in `_kernel`; the other functions are their parts."""
    written = {
        node.name
        for file in (ROOT / "kernels").rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }
    assert set(results["declared"]) == written


def test_the_interpreter_is_refused(results):
    assert "TRITON_INTERPRET is set" in results["interpreter"]


# --- What the check finds

OWN_KERNELS = """
import os

import triton
import triton.language as tl

from ahead_of_time_variants import KernelVariant


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def sums_kernel(x, y, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(n):
        total += tl.load(x + i + r[:, None] * COLUMNS + c[None, :])
    tl.store(y + r[:, None] * COLUMNS + c[None, :], total)


@triton.jit
def product_kernel(a, b, c, k, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE), tl.arange(0, 64)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(k):
        left = tl.load(a + i[:, None] * 64 + j[None, :] + step * 64 * SIZE)
        right = tl.load(b + j[:, None] * SIZE + i[None, :] + step * 64 * SIZE)
        total = tl.dot(left, right, total)
    tl.store(c + i[:, None] * SIZE + i[None, :], total)


@triton.jit
def wrong_kernel(x, y, n):
    tl.store(y, tl.load(x) + tl.arange(0, n))


def variant(name, kernel, signature, hot=True, stages=3, targets=(90,), multiples_of_16=(), **constants):
    return KernelVariant(
        name, kernel, signature, constants, num_warps=4, num_stages=stages, hot=hot, targets=targets,
        multiples_of_16=multiples_of_16,
    )


class Crash:
    @property
    def arg_names(self):  # takes the compiler's process down
        os._exit(1)


COPY = {"x": "*bf16", "y": "*bf16", "n": "i32"}
PRODUCT = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "k": "i32"}
ALL = {
    "small": variant("small", copy_kernel, COPY, BLOCK=1024, targets=(80, 90, 100)),
    "changed": variant("small", copy_kernel, COPY, BLOCK=8192, targets=(80, 90, 100)),
    "masked": variant("masked", copy_kernel, COPY, BLOCK=1024),
    "known": variant("known", copy_kernel, COPY, BLOCK=1024, multiples_of_16=("n",)),
    "spills": variant("spills", sums_kernel, {"x": "*fp32", "y": "*fp32", "n": "i32"}, ROWS=128, COLUMNS=256),
    "cold": variant("cold", sums_kernel, {"x": "*fp32", "y": "*fp32", "n": "i32"}, hot=False, ROWS=128, COLUMNS=256),
    "fits": variant("fits", product_kernel, PRODUCT, SIZE=128),
    "too much": variant("too much", product_kernel, PRODUCT, stages=9, SIZE=128),
    "wrong": variant("wrong", wrong_kernel, COPY),
    "undeclared": variant("undeclared", copy_kernel, COPY),
    "crash": variant("crash", Crash(), COPY),
}
"""

CASES = """
import csv, json, sys
from pathlib import Path
import ahead_of_time
import own_kernels
import triton
from jai.errors import UserError

table, results = Path("table.csv"), {}
results["declared"] = [v.kernel.__name__ for v in ahead_of_time.VARIANTS]

def case(name, *variants, write=False):
    results[name] = ahead_of_time.check([own_kernels.ALL[variant] for variant in variants], table, write)

case("no table", "small")
case("spill", "small", "spills", write=True)
case("shared", "too much", write=True)
case("wrong", "wrong", "small", write=True)
case("undeclared", "undeclared", write=True)
case("crash", "crash", write=True)
results["written"] = table.exists()
case("cold", "small", "cold", "fits", write=True)
results["rows"] = list(csv.DictReader(table.open()))
case("same", "small", "cold", "fits")
case("gone", "small", "cold")
case("new", "small", "cold", "fits", "masked")
case("changed", "changed", "cold", "fits")
table.write_text(table.read_text().replace(results["rows"][0]["triton"], "3.0.0"))
case("another Triton", "changed", "cold")
case("another Triton, spill", "spills")
alignments = [own_kernels.ALL["masked"], own_kernels.ALL["known"]]
ahead_of_time.check(alignments, Path("aligned.csv"), write=True)
try:
    ahead_of_time.check(alignments * 2, Path("aligned.csv"))
except UserError as error:
    results["twice"] = str(error)
triton.knobs.runtime.interpret = True
try:
    ahead_of_time.check(alignments, Path("aligned.csv"))
except UserError as error:
    results["interpreter"] = str(error)
Path("results.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compile")
    (folder / "own_kernels.py").write_text(OWN_KERNELS)
    (folder / "cases.py").write_text(CASES)
    finished = run("cases.py", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_what_cannot_run_well_is_an_error_and_is_not_stored(results):
    (spill,) = results["spill"]
    assert spill.startswith("spills on sm_90 is hot and spills ")
    (shared,) = results["shared"]
    assert shared.startswith("too much on sm_90 needs ")
    assert "and there are 232,448" in shared
    (wrong,) = results["wrong"]
    assert wrong.startswith("wrong on sm_90 does not compile: CompilationError")
    assert "arange" in wrong
    (undeclared,) = results["undeclared"]
    assert "only its declaration: BLOCK" in undeclared
    (crash,) = results["crash"]
    assert crash.startswith("crash on sm_90: the compiler's process died")
    assert not results["written"]


def test_the_table(results):
    (missing,) = results["no table"]
    assert missing.startswith("There is no table table.csv")
    assert results["cold"] == results["same"] == []
    assert [(row["kernel"], row["sm"]) for row in results["rows"]] == [
        ("small", "80"), ("small", "90"), ("small", "100"), ("cold", "90"), ("fits", "90"),
    ]  # fmt: skip
    small, *_, cold, fits = results["rows"]
    assert small["stack"] == fits["stack"] == small["shared"] == "0"
    assert int(cold["stack"]) > 0
    # Three stages, two operands of 128 x 64 in bf16.
    assert int(fits["shared"]) == 3 * 2 * 128 * 64 * 2
    assert all(8 <= int(row["registers"]) <= 255 and row["warps"] == "4" for row in results["rows"])


def test_differences_from_the_table(results):
    (gone,) = results["gone"]
    assert gone.startswith("fits on sm_90 is in table.csv and no longer")
    (new,) = results["new"]
    assert new.startswith("masked on sm_90 is not in table.csv")
    assert len(results["changed"]) == 3
    assert all("has changed: registers " in message and "--write" in message for message in results["changed"])
    assert results["another Triton"] == []
    (spill,) = results["another Triton, spill"]
    assert "is hot and spills" in spill
    assert results["twice"] == "Several variants are called known, masked. Each needs a name of its own."


def test_multiples_of_16_reach_the_compiler(folder):
    """A mask whose end is one lets eight bf16 be read at once, with fewer registers for addresses and predicates."""
    masked, known = (folder / "aligned.csv").read_text().splitlines()[1:]
    registers = [int(row.split(",")[4]) for row in (masked, known)]
    assert registers[1] < registers[0]
