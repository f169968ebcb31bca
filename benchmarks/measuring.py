# SPDX-License-Identifier: Apache-2.0
"""What a command costs: wall and processor time, and the anonymous memory that it holds at its peak."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Event, Thread


@dataclass(frozen=True)
class Run:
    """One process: wall and processor seconds, and peak anonymous memory in MB.

    Anonymous memory is what a process has for itself; pages of files, which the kernel may drop, are not in it.
    """

    wall: float
    processor: float
    anonymous: float


def measure(command: Sequence[str | os.PathLike], environment: dict[str, str] | None = None) -> Run:
    """Run a command and measure it with its children; its output goes nowhere.

    Anonymous memory is sampled every few milliseconds, so a shorter peak may be missed.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | (environment or {})
    )
    peak, ended = [0.0], Event()
    sampler = Thread(target=_sample, args=(process.pid, peak, ended))
    sampler.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    ended.set()
    sampler.join()
    if status:
        sys.exit(f"{' '.join(map(str, command))} ended with {status}:\n{errors.decode()[-2000:]}")
    return Run(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, peak[0])


def median(runs: Sequence[Run]) -> Run:
    """The median of each figure by itself."""
    return Run(*(statistics.median(getattr(run, field.name) for run in runs) for field in fields(Run)))


def _sample(pid: int, peak: list[float], ended: Event) -> None:
    while not ended.wait(0.005):
        peak[0] = max(peak[0], sum(map(_anonymous, [pid, *_children(pid)])))


def _anonymous(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:  # it has ended
        pass
    return 0.0


def _children(pid: int) -> list[int]:
    try:
        threads = [*Path(f"/proc/{pid}/task").iterdir()]
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return []
    return children + [grandchild for child in children for grandchild in _children(child)]
