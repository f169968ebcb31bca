# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes for transformers' parallel tests, whose sdist leaves the module of this name out.

Only what the tensor-, expert- and FSDP-parallel suites call, on CPU.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    """Nothing to set: both ranks are on the CPU."""


def _start_rank_processes(function: Callable[..., None], args: tuple, nprocs: int) -> None:
    mp.spawn(function, args=args, nprocs=nprocs)


def _run_rank(rank: int, world_size: int, store: str, function: Callable[..., None], args: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(rank, *args)
    dist.destroy_process_group()


def run_distributed(world_size: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`run_distributed(2)(function)(*args)` calls `function(rank, *args)` in two processes, and raises their errors."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args) -> None:
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(_run_rank, (world_size, str(Path(folder) / "store"), function, args), nprocs=world_size)

        return run

    return decorate
