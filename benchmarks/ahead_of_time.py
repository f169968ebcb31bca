# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for GPUs that need not be here, and compares what it takes with what it took before.

    python benchmarks/ahead_of_time.py            compare with results/ahead_of_time.csv
    python benchmarks/ahead_of_time.py --write    store it there

Each variant in `ahead_of_time_variants.py` is compiled. It is an error if one does not compile, if it needs more
shared memory than the GPU has (Triton finds out at launch only), if a hot one spills registers, or if the table
differs. Registers depend on Triton's version: under another than the table's, the table is not compared.
"""

import argparse
import contextlib
import csv
import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton
from ahead_of_time_variants import VARIANTS, KernelVariant
from records import RESULTS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jai.errors import UserError

TABLE = RESULTS / "ahead_of_time.csv"
# Bytes that a block can have, by compute capability: A100; H100 and H200; B200.
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Usage:
    """What one variant of a kernel takes on one generation of GPUs.

    Attributes:
        kernel: the variant's name.
        sm: compute capability, times ten.
        warps: of a block, with those that warp specialisation adds.
        registers: of a thread.
        shared: bytes of a block.
        tensor_memory: columns (Blackwell).
        stack: bytes of a thread. Triton keeps nothing there but spilled registers.
    """

    kernel: str
    sm: int
    warps: int
    registers: int
    shared: int
    tensor_memory: int
    stack: int

    def __str__(self) -> str:
        return (
            f"{self.kernel:60} sm_{self.sm:<4} {self.warps:5} {self.registers:9} {self.shared:7} "
            f"{self.tensor_memory:13} {self.stack:5}"
        )


HEADER = f"{'kernel':60} {'GPU':7} warps registers  shared tensor_memory stack"


def compile_variant(variant: KernelVariant, sm: int) -> Usage:
    """Compile for compute capability `sm / 10`, or take it from Triton's cache; no GPU is needed.

    Raises:
        UserError: if the declared arguments are not the kernel's.
        Exception: of many classes, from the compiler.
    """
    names = variant.kernel.arg_names
    if wrong := set(names) ^ (variant.signature.keys() | variant.constexprs.keys()):
        raise UserError(f"Arguments that only the kernel has, or only its declaration: {', '.join(sorted(wrong))}.")
    pointers = {name for name, type_name in variant.signature.items() if type_name.startswith("*")}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]] for name in sorted(pointers | set(variant.multiples_of_16))
    }
    signature = {**dict.fromkeys(names, "constexpr"), **variant.signature}
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, variant.constexprs, attributes),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    # One line of the report: "REG:154 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:584 TEXTURE:0 SURFACE:0 SAMPLER:0"
    counts = next(dict(part.split(":") for part in line.split()) for line in report.splitlines() if "REG:" in line)
    metadata = compiled.metadata
    return Usage(
        kernel=variant.name,
        sm=sm,
        warps=metadata.num_warps,
        registers=int(counts["REG"]),
        shared=metadata.shared,
        tensor_memory=metadata.tmem_size,
        stack=int(counts["STACK"]),
    )


@contextlib.contextmanager
def _captured_output() -> Iterator[io.BufferedRandom]:
    """Keep the compiler's own output off the screen: it dumps the whole program where a pass fails."""
    with tempfile.TemporaryFile() as log, contextlib.redirect_stdout(io.StringIO()):
        screen = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def _with_causes(error: BaseException | None) -> Iterator[str]:
    """The error and what it comes from: Triton says first where a function is called, and last what is wrong in it."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__


_variants: list[KernelVariant] = []  # of the running check: forked workers find them here, since kernels do not pickle


def _compile_quietly(position: int, sm: int) -> Usage:
    with _captured_output() as log:
        try:
            return compile_variant(_variants[position], sm)
        except Exception as error:  # of any class of the compiler's, some of which cannot be pickled either
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()
            hints = [line for line in lines if "error:" in line or "UNREACHABLE" in line or "Assertion" in line]
            raise RuntimeError("\n".join([*_with_causes(error), *hints[:5]])) from None


def check(variants: Sequence[KernelVariant] = VARIANTS, table: Path = TABLE, write: bool = False) -> list[str]:
    """Compile all variants, print what they take, and compare it with the table or store it there.

    Returns:
        What is wrong, one message each. Nothing is stored unless this is empty.

    Raises:
        UserError: under Triton's interpreter, which does not compile; for two variants of one name.
    """
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, so that nothing is compiled. Start again without it.")
    names = [variant.name for variant in variants]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"Several variants are called {', '.join(twice)}. Each needs a name of its own.")
    _variants[:] = variants
    jobs = [(i, sm) for i, variant in enumerate(_variants) for sm in variant.targets]
    problems, usages = [], []
    print(HEADER)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        futures: list[Future[Usage]] = [pool.submit(_compile_quietly, *job) for job in jobs]
        for (i, sm), future in zip(jobs, futures):
            variant = _variants[i]
            try:
                usage = future.result()
            except BrokenProcessPool:
                problems.append(
                    f"{variant.name} on sm_{sm}: the compiler's process died, here or at a kernel beside it."
                )
                continue
            except RuntimeError as error:
                problems.append(f"{variant.name} on sm_{sm} does not compile: {error}")
                continue
            print(usage, flush=True)
            usages.append(usage)
            if usage.shared > SHARED_MEMORY[sm]:
                problems.append(
                    f"{variant.name} on sm_{sm} needs {usage.shared:,} bytes of shared memory, and there are "
                    f"{SHARED_MEMORY[sm]:,}. Take smaller blocks or fewer stages."
                )
            if variant.hot and usage.stack:
                problems.append(f"{variant.name} on sm_{sm} is hot and spills {usage.stack:,} bytes a thread.")
    if write and not problems:
        _write_table(table, usages)
    elif not problems:
        problems += _differences(table, usages)
    return problems


def _write_table(table: Path, usages: Sequence[Usage]) -> None:
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["triton", *(field.name for field in fields(Usage))], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"triton": triton.__version__, **asdict(usage)} for usage in usages)
    print(f"Written to {table}")


def _differences(table: Path, usages: Sequence[Usage]) -> list[str]:
    hint = "If that is meant to be, store it with --write."
    if not table.exists():
        return [f"There is no table {table}. {hint}"]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    versions = {row.pop("triton") for row in rows}
    if versions != {triton.__version__}:
        print(f"Not compared: {table.name} is of Triton {', '.join(versions)}, and this is {triton.__version__}.")
        return []
    stored = {(row["kernel"], row["sm"]): row for row in rows}
    found = {(row["kernel"], row["sm"]): row for row in ({k: str(v) for k, v in asdict(u).items()} for u in usages)}
    problems = []
    for key in sorted(stored.keys() | found.keys()):
        name = f"{key[0]} on sm_{key[1]}"
        if key not in found:
            problems.append(f"{name} is in {table.name} and no longer among the kernels. {hint}")
        elif key not in stored:
            problems.append(f"{name} is not in {table.name}. {hint}")
        elif changes := [f"{k} {v} → {found[key][k]}" for k, v in stored[key].items() if v != found[key][k]]:
            problems.append(f"{name} has changed: {', '.join(changes)}. {hint}")
    return problems


def main(argv: Sequence[str]) -> int:
    """0, or 1 with the reasons on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"store the results in {TABLE.name}")
    try:
        problems = check(write=parser.parse_args(argv).write)
    except UserError as error:
        problems = [str(error)]
    for problem in problems:
        print(f"Error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
