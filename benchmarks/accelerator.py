# SPDX-License-Identifier: Apache-2.0
"""Time and memory of work on a GPU (or, to try a benchmark out, on a CPU), and what the machine is."""

import contextlib
import ctypes
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata

import psutil
import torch


def milliseconds(run: Callable[[], object], device: str) -> float:
    """One run, by CUDA events; on a CPU by the clock."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1000
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended)


@contextlib.contextmanager
def peak_mebibytes(device: str) -> Iterator[list[float]]:
    """The most memory beside what is there before; on a CPU sampled every millisecond."""
    peak = [0.0]
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peak
        torch.cuda.synchronize()
        peak[0] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else the next contender lives on what the last one freed
    process, ended = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def sample() -> None:
        while not ended.wait(0.001):
            peak[0] = max(peak[0], (process.memory_info().rss - before) / 2**20)

    sampler = threading.Thread(target=sample)
    sampler.start()
    yield peak
    ended.set()
    sampler.join()


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def describe(device: str) -> dict[str, str]:
    """Columns that say which device it is."""
    if device == "cpu":
        return {"device": "cpu", "threads": str(torch.get_num_threads()), "driver": "", "cuda": ""}
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return {
        "device": torch.cuda.get_device_name(),
        "threads": "",
        "driver": driver.stdout.split("\n")[0].strip(),
        "cuda": str(torch.version.cuda),
    }
