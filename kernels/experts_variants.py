# SPDX-License-Identifier: Apache-2.0
"""The variants of the experts' kernels to compile ahead of time: JAI-1's shape in bf16, with every shipped tile."""

import json
from typing import Any

from . import experts_triton as kernels
from .ahead_of_time_spec import AheadOfTime
from .configs import FOLDER, KERNELS, NARROW_TILE, Tile
from .routing import ALIGNMENT, FP8_GROUP

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 5120, 17920, 2
EVERY = (80, 90, 100)
_INDICES = ("order_R", "offsets_E", "padded_offsets_E")
_SMALL: dict[str, tuple[Any, dict[str, str], dict[str, object]]] = {
    "count": (
        kernels.count_kernel,
        {"ids_R": "*i64", "counts_BE": "*i32", "rows": "i32"},
        {"E": EXPERTS, "E_PAD": EXPERTS, "BLOCK": 1024},
    ),
    "place": (
        kernels.place_kernel,
        {
            "ids_R": "*i64",
            **dict.fromkeys(
                ("running_BE", "order_R", "slots_R", "padded_slots_R", "offsets_E", "padded_offsets_E"), "*i32"
            ),
            "rows": "i32",
            "blocks": "i32",
        },
        {"E": EXPERTS, "E_PAD": EXPERTS, "BLOCK": 1024, "ALIGNMENT": ALIGNMENT, "ONE_BLOCK": False},
    ),
    "permute": (
        kernels.permute_kernel,
        {"x_TH": "*bf16", **dict.fromkeys(_INDICES, "*i32"), "out": "*bf16", "stride_x": "i32", "H": "i32"},
        {"TOP_K": TOP_K, "E": EXPERTS, "E_PAD": EXPERTS, "BLOCK_R": 8, "BLOCK_H": 512, "PADDED": True},
    ),
    "combine": (
        kernels.combine_kernel,
        {"rows_RH": "*bf16", "slots_TK": "*i32", "weights_TK": "*fp32", "out_TH": "*bf16", "tokens": "i32", "H": "i32"},
        {"TOP_K": TOP_K, "WEIGHTED": True, "BLOCK_T": 8, "BLOCK_H": 512},
    ),
    "swiglu": (
        kernels.swiglu_kernel,
        {"pre_RF": "*bf16", "act_RI": "*bf16", "offsets_E": "*i32", "I": "i32"},
        {"E": EXPERTS, "BLOCK_R": 8, "BLOCK_I": 512},
    ),
    "swiglu_backward": (
        kernels.swiglu_backward_kernel,
        {
            "dact_PI": "*bf16",
            "pre_RF": "*bf16",
            "weights_R": "*fp32",
            "order_R": "*i32",
            "dpre_PF": "*bf16",
            "dweight_R": "*fp32",
            "offsets_E": "*i32",
            "padded_offsets_E": "*i32",
            "I": "i32",
        },
        {"E": EXPERTS, "E_PAD": EXPERTS, "BLOCK_R": 8, "BLOCK_I": 512},
    ),
}
_FP8 = {
    "to_fp8": (kernels.to_fp8_kernel, {"x_RC": "*bf16", "out_RC": "*fp8e4nv"}),
    "from_fp8": (kernels.from_fp8_kernel, {"x_RC": "*fp8e4nv", "out_RC": "*bf16"}),
}
_SIZES = ("H", "I", "K", "M", "N", "columns", "stride_x", "stride_w", "stride_a", "stride_b")


def _matrix(tile: Tile, *block: int) -> str:
    return f"tensordesc<bf16[{block[0]},{block[1]}]>" if tile.tma else "*bf16"


def _product(kernel: str, tile: Tile) -> tuple[Any, dict[str, str], dict[str, object]]:
    """The kernel's function, the types of its arguments and its constants, as `experts_launch.py` starts it."""
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    constants: dict[str, object] = {"E": EXPERTS, "PRECISION": "ieee", "TMA": tile.tma}
    constants |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": tile.group_m}
    by_expert = constants | {"E_PAD": EXPERTS, "EVEN_K": True}
    strides = {"stride_a": "i32", "stride_b": "i32"}
    if kernel == "up":
        types = {"x_RH": _matrix(tile, m, k), "gate_up_FH": _matrix(tile, n, k), "pre_RF": "*bf16", "act_RI": "*bf16"}
        types |= {"offsets_E": "*i32", **dict.fromkeys(("rows", "H", "I", "stride_x", "stride_w"), "i32")}
        return kernels.up_kernel, types, by_expert | {"SAVE_PRE": True}
    if kernel == "weight_gradient":
        types = {"a_PM": _matrix(tile, k, m), "b_PN": _matrix(tile, k, n), "out_EMN": "*bf16"}
        types |= {"padded_offsets_E": "*i32", "M": "i32", "N": "i32", "rows": "i32", **strides}
        return kernels.weight_gradient_kernel, types, constants
    transposed = kernel == "down"
    b_block = (n, k) if transposed else (k, n)
    types = {"a_RK": _matrix(tile, m, k), "b": _matrix(tile, *b_block), "out_RN": "*bf16", "offsets_E": "*i32"}
    types |= {"rows": "i32", "K": "i32", "N": "i32", **strides, "scale": "fp32"}
    return kernels.rows_kernel, types, by_expert | {"NN": not transposed, "ADD": False}


def _variant(
    name: str, function: Any, types: dict[str, str], constants: dict[str, object], warps: int, stages: int, targets
) -> AheadOfTime:
    multiples = tuple(size for size in _SIZES if size in types)
    return AheadOfTime(
        name, function, types, constants, warps, stages, hot=True, multiples_of_16=multiples, targets=targets
    )


def _variants() -> list[AheadOfTime]:
    found: dict[str, AheadOfTime] = {}
    for path in sorted(FOLDER.glob("*.json")):
        config = json.loads(path.read_text())
        for kernel in KERNELS:
            tiles = [entry["tile"] for entry in config["kernels"][kernel]] + config["candidates"][kernel]
            for tile in (Tile(**tile) for tile in tiles if tile):
                shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
                name = f"experts.{kernel}.{shape}.w{tile.num_warps}.s{tile.num_stages}.{'tma' if tile.tma else 'ptr'}"
                earlier = found[name].targets if name in found else ()
                targets_of_all = tuple(sorted({*earlier, *config["targets"]}))
                found[name] = _variant(name, *_product(kernel, tile), tile.num_warps, tile.num_stages, targets_of_all)
    for transposed in (True, False):
        name = f"experts.lora.{'nt' if transposed else 'nn'}"
        function, types, constants = _product("down" if transposed else "up_gradient", NARROW_TILE)
        constants |= {"ADD": True, "EVEN_K": False}
        found[name] = _variant(name, function, types, constants, NARROW_TILE.num_warps, NARROW_TILE.num_stages, EVERY)
    function, types, constants = _product("weight_gradient", NARROW_TILE)
    name = "experts.lora.weight_gradient"
    found[name] = _variant(name, function, types, constants, NARROW_TILE.num_warps, NARROW_TILE.num_stages, EVERY)
    for name, (function, types, constants) in _SMALL.items():
        warps = 8 if name == "swiglu_backward" else 4
        found[name] = _variant(f"experts.{name}", function, types, constants, warps, 3, EVERY)
    for name, (function, types) in _FP8.items():
        types = {**types, "exponents_RG": "*i8", "columns": "i32", "rows": "i32"}
        constants = {"GROUP": FP8_GROUP, "BLOCK_R": 32}
        found[name] = _variant(f"experts.{name}", function, types, constants, 4, 3, (90, 100))
    return list(found.values())


AHEAD_OF_TIME = _variants()
