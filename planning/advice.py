# SPDX-License-Identifier: Apache-2.0
"""The smallest change with which a training fits."""

from collections.abc import Iterator
from dataclasses import replace

from jai.configuration_jai import JaiConfig
from jai.planning.memory import Setup, peak_memory

MARGIN = 0.92  # of a card, for CUDA's context, the allocator's gaps and the communication library
_MOST_GPUS = 4096


def fits(config: JaiConfig, setup: Setup, memory: float) -> bool:
    """Whether the peak leaves a twelfth of a GPU's memory for what is not counted."""
    return peak_memory(config, setup).total <= MARGIN * memory


def what_would_fit(config: JaiConfig, setup: Setup, memory: float) -> tuple[str, float] | None:
    """The first change that fits, in words, and its peak in bytes; None where none of them does."""
    for words, changed in _changes(setup):
        if fits(config, changed, memory):
            return words, peak_memory(config, changed).total
    return None


def _changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    now, words = setup, []
    for text, changes in (
        ("gradient checkpointing", {"checkpointing": True}),
        ("the loss in chunks", {"loss": "chunked"}),
        ("one sequence a micro-batch", {"batch": 1}),
        ("full sharding", {"sharding": "fsdp"}),
    ):
        changed = replace(now, **changes)
        if changed != now and not (changes.get("sharding") and setup.gpus == 1):
            words.append(text)
            now = changed
            yield " and ".join(words), now
    gpus = now.gpus
    if now.sharding != "none" or now.gpus == 1:
        while gpus < _MOST_GPUS:
            gpus *= 2
            yield " and ".join([*words, f"{gpus} GPUs with full sharding"]), replace(now, gpus=gpus, sharding="fsdp")
