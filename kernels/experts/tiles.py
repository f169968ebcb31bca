# SPDX-License-Identifier: Apache-2.0
"""Tile sizes by device, from `tiles_by_gpu/`: measured ones by the GPU's name, else its generation's, else safe ones.

A file has a list for each product. The first entry is taken whose `rows` (the average rows of an expert) is not below
the actual number, or null. `tile` is one of our Triton kernel, or null: torch's grouped_mm, with our kernels around it.
`measured` says when and with what the file was made; null: chosen to compile without spills, not by time. `targets` are
the compute capabilities (times ten) that it is compiled for ahead of time, `candidates` the tiles that tuning tries.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("tiles_by_gpu")
# Matrix products of the forward and the backward pass.
PRODUCTS = ("up", "down", "up_gradient", "down_gradient", "weight_gradient")


@dataclass(frozen=True)
class Tile:
    """How the kernel of a product cuts its work. `persistent`: as many programs as multiprocessors, else one a tile."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    persistent: bool
    tma: bool


# For LoRA's matrices, on any device: those products are bound by reading and writing the wide side.
NARROW_TILE = Tile(64, 32, 64, 8, num_warps=4, num_stages=3, persistent=False, tma=False)
# For matrices in four bits, on any device: chosen without a clock, to compile without spills. Decoding one to eight
# tokens, of two experts each, is a single tile of rows, so that each chosen expert is read once.
FOUR_BIT_TILE = Tile(64, 64, 64, 8, num_warps=4, num_stages=3, persistent=False, tma=False)
FOUR_BIT_DECODING_TILE = Tile(16, 32, 128, 8, num_warps=4, num_stages=3, persistent=False, tma=False)
# For what the configured tiles do not serve, on any device: they were chosen for 16 bits.
FALLBACK_TILE = Tile(64, 64, 32, 8, num_warps=4, num_stages=3, persistent=False, tma=False)
# One program costs 0.1 ms and one step of its loop 2 to 6 ms there.
INTERPRETER_TILE = Tile(64, 64, 64, 2, num_warps=4, num_stages=1, persistent=False, tma=True)


def tile_file(device_name: str, capability: tuple[int, int]) -> Path:
    """The file for a GPU: `NVIDIA_H100_80GB_HBM3.json` if that was measured, `sm_90.json`, or `other.json`."""
    major, minor = capability
    candidates = (device_name.replace(" ", "_"), f"sm_{major}{minor}", "other")
    return next(path for name in candidates if (path := FOLDER / f"{name}.json").exists())


@functools.cache
def read_tiles(path: Path) -> dict[str, list[tuple[int | None, Tile | None]]]:
    """A file's entries by product: the most rows an expert that each is for (None: any), and its tile."""
    entries = json.loads(path.read_text())["products"]
    return {
        product: [(entry["rows"], Tile(**entry["tile"]) if entry["tile"] else None) for entry in entries[product]]
        for product in PRODUCTS
    }


@functools.cache
def _tiles_of(device: torch.device) -> dict[str, list[tuple[int | None, Tile | None]]]:
    return read_tiles(tile_file(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)))


def choose_tile(product: str, device: torch.device, rows: int, num_experts: int) -> Tile | None:
    """The tile for `rows` rows spread over `num_experts`; None means torch's grouped_mm."""
    if device.type != "cuda":  # Triton's interpreter
        return INTERPRETER_TILE
    average = -(-rows // num_experts)
    return next(tile for most, tile in _tiles_of(device)[product] if most is None or average <= most)


def four_bit_tile(device: torch.device, rows: int, transposed: bool) -> Tile:
    """The tile for matrices in four bits: one holds all rows where they are few, but in the backward pass."""
    if device.type != "cuda":
        return INTERPRETER_TILE
    return FOUR_BIT_DECODING_TILE if transposed and rows <= FOUR_BIT_DECODING_TILE.block_m else FOUR_BIT_TILE
