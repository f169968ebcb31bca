# SPDX-License-Identifier: Apache-2.0
"""Chooses the experts' tiles for the GPU at hand, and writes them to kernels/experts/tiles_by_gpu/GPU_NAME.json.

    python benchmarks/tune_experts.py            # JAI-1's size in bf16; minutes
    python benchmarks/tune_experts.py --dry-run  # prints what it would write

For every product and number of rows it times each candidate of the generation's file, the tiles that the file has, and
torch's grouped_mm where that is one kernel, in turn, and takes the fastest. The whole layer is what counts: check with
benchmarks/experts.py.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from datetime import UTC, datetime

import torch
from accelerator import describe, milliseconds, version
from records import provenance

from jai.kernels.experts import launch
from jai.kernels.experts.routing import route_reference
from jai.kernels.experts.tiles import FOLDER, PRODUCTS, Tile, tile_file

LIMITS = (16, 64, 256, None)  # average rows of an expert, up to which an entry serves; None: any number
ROWS = (2, 64, 256, 8192)  # at which each is timed


def workloads(arguments: argparse.Namespace, rows_each: int) -> dict[str, object]:
    """A call for each product, with `rows_each` rows an expert."""
    experts, hidden, inner = arguments.experts, arguments.hidden, arguments.intermediate
    ids_TK = torch.arange(experts, device="cuda").repeat_interleave(rows_each)[:, None]
    routing = route_reference(ids_TK, experts)
    rows = ids_TK.numel()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x_RH, act_RI = normal(rows, hidden), normal(rows, inner)
    gate_up, down = normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)
    x_PH = launch.permute(x_RH, routing, padded=True)
    pre_PF = normal(x_PH.shape[0], 2 * inner)
    ends, padded_ends = routing.offsets_E, routing.padded_offsets_E
    return {
        "up": lambda: launch.up(x_RH, gate_up, routing, True),
        "down": lambda: launch.rows_by_expert("down", act_RI, down, ends, rows, True),
        "up_gradient": lambda: launch.rows_by_expert("up_gradient", pre_PF, gate_up, padded_ends, rows, False),
        "down_gradient": lambda: launch.rows_by_expert("down_gradient", x_PH, down, padded_ends, rows, False),
        "weight_gradient": lambda: launch.weight_gradient(pre_PF, x_PH, routing),
    }


def fastest(call, tiles: list[Tile | None], repeats: int) -> tuple[Tile | None, dict[str, float]]:
    """The tile with the smallest median, and all medians in milliseconds."""
    times: dict[Tile | None, list[float]] = {}
    chosen = launch.choose_tile
    try:
        for tile in tiles:
            launch.choose_tile = lambda *_, tile=tile: tile
            try:
                call()
                torch.cuda.synchronize()
                times[tile] = []
            except Exception as reason:  # a tile that does not fit this GPU
                print(f"    {tile}: {str(reason).splitlines()[0][:100]}")
        for _ in range(repeats):
            for tile, taken in times.items():
                launch.choose_tile = lambda *_, tile=tile: tile
                taken.append(milliseconds(call, "cuda"))
    finally:
        launch.choose_tile = chosen
    medians = {tile: statistics.median(taken) for tile, taken in times.items()}
    best = min(medians, key=medians.__getitem__)
    return best, {("grouped_mm" if tile is None else str(asdict(tile))): time for tile, time in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--intermediate", type=int, default=17920)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("No GPU here: tiles are chosen by time.")
    generation = tile_file("", torch.cuda.get_device_capability())
    known = json.loads(generation.read_text())
    found: dict[str, list[dict[str, object]]] = {product: [] for product in PRODUCTS}
    for limit, rows_each in zip(LIMITS, ROWS, strict=True):
        calls = workloads(arguments, rows_each)
        for product in PRODUCTS:
            stored = [entry["tile"] for entry in known["products"][product]] + known["candidates"][product]
            tiles = list(dict.fromkeys(Tile(**tile) for tile in stored if tile))
            if launch.has_grouped_mm(torch.device("cuda")):
                tiles.append(None)
            best, medians = fastest(calls[product], tiles, arguments.repeats)
            print(f"{product}, {rows_each} rows an expert:")
            for name, time in sorted(medians.items(), key=lambda item: item[1]):
                print(f"    {time:9.3f} ms  {name}")
            found[product].append({"rows": limit, "tile": asdict(best) if best else None})
        del calls
        torch.cuda.empty_cache()
    measured = provenance(("torch",)) | describe("cuda") | {"triton": version("triton")}
    measured["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
    major, minor = torch.cuda.get_device_capability()
    tiles_of_this_gpu = {
        "measured": measured,
        "targets": [10 * major + minor],
        "note": f"hidden {arguments.hidden}, intermediate {arguments.intermediate}, {arguments.experts} experts, bf16",
        "products": found,
        "candidates": known["candidates"],
    }
    path = FOLDER / f"{torch.cuda.get_device_name().replace(' ', '_')}.json"
    if arguments.dry_run:
        print(json.dumps(tiles_of_this_gpu, indent=1))
        return
    path.write_text(json.dumps(tiles_of_this_gpu, indent=1) + "\n")
    print(f"Written to {path}. Compile it ahead of time too: python benchmarks/ahead_of_time.py --write")


if __name__ == "__main__":
    main()
