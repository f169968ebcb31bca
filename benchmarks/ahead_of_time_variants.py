# SPDX-License-Identifier: Apache-2.0
"""The variants of our kernels to compile ahead of time: JAI-1's shape in bf16 with every shipped tile; the head in all
dtypes.
"""

import json
from dataclasses import dataclass
from typing import Any

from jai.kernels.experts import triton_kernels as experts_kernels
from jai.kernels.experts.four_bits import NESTED, SCALED
from jai.kernels.experts.routing import ALIGNMENT, FP8_GROUP
from jai.kernels.experts.tiles import FOLDER, FOUR_BIT_DECODING_TILE, FOUR_BIT_TILE, NARROW_TILE, PRODUCTS, Tile
from jai.kernels.head import triton_kernels as head_kernels


@dataclass(frozen=True)
class KernelVariant:
    """One variant of a Triton kernel, and what a compiler needs to know of it.

    Attributes:
        name: unique over all variants; the key of the stored table of registers, shared memory and spills.
        kernel: the `@triton.jit` function.
        signature: Triton type of each argument that is not a `constexpr`: "*bf16", "i32", "fp32",
            "tensordesc<bf16[128,64]>". Pointers are taken to be aligned to 16 bytes.
        constexprs: value of each `tl.constexpr` argument.
        num_warps, num_stages: launch options.
        hot: a spill in this variant is an error.
        targets: compute capabilities, times ten, of the GPUs that it is meant for.
        multiples_of_16: integer arguments that are, as Triton sees by itself at launch; without it accesses are narrow.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    hot: bool
    targets: tuple[int, ...] = (80, 90, 100)
    multiples_of_16: tuple[str, ...] = ()


EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 4, 5120, 17920, 2
EVERY = (80, 90, 100)
_INDICES = ("order_R", "offsets_E", "padded_offsets_E")
_SMALL: dict[str, tuple[Any, dict[str, str], dict[str, object]]] = {
    "count": (
        experts_kernels.count_kernel,
        {"ids_R": "*i64", "counts_BE": "*i32", "rows": "i32"},
        {"E": EXPERTS, "E_PAD": EXPERTS, "BLOCK": 1024},
    ),
    "place": (
        experts_kernels.place_kernel,
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
        experts_kernels.permute_kernel,
        {"x_TH": "*bf16", **dict.fromkeys(_INDICES, "*i32"), "out": "*bf16", "stride_x": "i32", "H": "i32"},
        {"TOP_K": TOP_K, "E": EXPERTS, "E_PAD": EXPERTS, "BLOCK_R": 8, "BLOCK_H": 512, "PADDED": True},
    ),
    "combine": (
        experts_kernels.combine_kernel,
        {"rows_RH": "*bf16", "slots_TK": "*i32", "weights_TK": "*fp32", "out_TH": "*bf16", "tokens": "i32", "H": "i32"},
        {"TOP_K": TOP_K, "WEIGHTED": True, "BLOCK_T": 8, "BLOCK_H": 512},
    ),
    "swiglu": (
        experts_kernels.swiglu_kernel,
        {"pre_RF": "*bf16", "act_RI": "*bf16", "offsets_E": "*i32", "I": "i32"},
        {"E": EXPERTS, "BLOCK_R": 8, "BLOCK_I": 512},
    ),
    "swiglu_backward": (
        experts_kernels.swiglu_backward_kernel,
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
    "to_fp8": (experts_kernels.to_fp8_kernel, {"x_RC": "*bf16", "out_RC": "*fp8e4nv"}),
    "from_fp8": (experts_kernels.from_fp8_kernel, {"x_RC": "*fp8e4nv", "out_RC": "*bf16"}),
}
_SIZES = ("H", "I", "K", "M", "N", "columns", "stride_x", "stride_w", "stride_a", "stride_b")


def _matrix(tile: Tile, *block: int) -> str:
    return f"tensordesc<bf16[{block[0]},{block[1]}]>" if tile.tma else "*bf16"


def _product(product: str, tile: Tile) -> tuple[Any, dict[str, str], dict[str, object]]:
    """The kernel's function, the types of its arguments and its constants, as `kernels/experts/launch.py` starts it."""
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    constants: dict[str, object] = {"E": EXPERTS, "PRECISION": "ieee", "TMA": tile.tma}
    constants |= {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": tile.group_m}
    by_expert = constants | {"E_PAD": EXPERTS, "EVEN_K": True}
    strides = {"stride_a": "i32", "stride_b": "i32"}
    if product == "up":
        types = {"x_RH": _matrix(tile, m, k), "gate_up_FH": _matrix(tile, n, k), "pre_RF": "*bf16", "act_RI": "*bf16"}
        types |= {"offsets_E": "*i32", **dict.fromkeys(("rows", "H", "I", "stride_x", "stride_w"), "i32")}
        return experts_kernels.up_kernel, types, by_expert | {"SAVE_PRE": True}
    if product == "weight_gradient":
        types = {"a_PM": _matrix(tile, k, m), "b_PN": _matrix(tile, k, n), "out_EMN": "*bf16"}
        types |= {"padded_offsets_E": "*i32", "M": "i32", "N": "i32", "rows": "i32", **strides}
        return experts_kernels.weight_gradient_kernel, types, constants
    transposed = product == "down"
    b_block = (n, k) if transposed else (k, n)
    types = {"a_RK": _matrix(tile, m, k), "b": _matrix(tile, *b_block), "out_RN": "*bf16", "offsets_E": "*i32"}
    types |= {"rows": "i32", "K": "i32", "N": "i32", **strides, "scale": "fp32"}
    return experts_kernels.rows_kernel, types, by_expert | {"NN": not transposed, "ADD": False}


def _four_bits(tile: Tile, double: bool, transposed: bool) -> tuple[dict[str, str], dict[str, object]]:
    types = {"a_RK": "*bf16", "packed": "*u8", "absmax": "*u8" if double else "*fp32", "out_RN": "*bf16"}
    types |= dict.fromkeys(("nested_absmax", "nested_offset", "nested_code", "code"), "*fp32")
    types |= {"offsets_E": "*i32", **dict.fromkeys(("rows", "K", "N", "stride_a"), "i32")}
    constants: dict[str, object] = {"E": EXPERTS, "E_PAD": EXPERTS, "NN": not transposed, "DOUBLE": double}
    constants |= {"SCALED": SCALED, "NESTED": NESTED, "PRECISION": "ieee", "BLOCK_M": tile.block_m}
    constants |= {"BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}
    return types, constants


def _variant(
    name: str, function: Any, types: dict[str, str], constants: dict[str, object], warps: int, stages: int, targets
) -> KernelVariant:
    multiples = tuple(size for size in _SIZES if size in types)
    return KernelVariant(
        name, function, types, constants, warps, stages, hot=True, multiples_of_16=multiples, targets=targets
    )


def experts_variants() -> list[KernelVariant]:
    found: dict[str, KernelVariant] = {}
    for path in sorted(FOLDER.glob("*.json")):
        stored = json.loads(path.read_text())
        for product in PRODUCTS:
            tiles = [entry["tile"] for entry in stored["products"][product]] + stored["candidates"][product]
            for tile in (Tile(**tile) for tile in tiles if tile):
                shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
                name = f"experts.{product}.{shape}.w{tile.num_warps}.s{tile.num_stages}.{'tma' if tile.tma else 'ptr'}"
                earlier = found[name].targets if name in found else ()
                targets_of_all = tuple(sorted({*earlier, *stored["targets"]}))
                found[name] = _variant(name, *_product(product, tile), tile.num_warps, tile.num_stages, targets_of_all)
    for transposed in (True, False):
        name = f"experts.lora.{'nt' if transposed else 'nn'}"
        function, types, constants = _product("down" if transposed else "up_gradient", NARROW_TILE)
        constants |= {"ADD": True, "EVEN_K": False}
        found[name] = _variant(name, function, types, constants, NARROW_TILE.num_warps, NARROW_TILE.num_stages, EVERY)
    function, types, constants = _product("weight_gradient", NARROW_TILE)
    name = "experts.lora.weight_gradient"
    found[name] = _variant(name, function, types, constants, NARROW_TILE.num_warps, NARROW_TILE.num_stages, EVERY)
    for tile, name, transposed in (
        (FOUR_BIT_DECODING_TILE, "decode", True),
        (FOUR_BIT_TILE, "nt", True),
        (FOUR_BIT_TILE, "nn", False),
    ):
        for double in (False, True):
            full_name = f"experts.four_bits.{name}{'.double' if double else ''}"
            types, constants = _four_bits(tile, double, transposed)
            function = experts_kernels.rows_of_four_bits_kernel
            found[full_name] = _variant(full_name, function, types, constants, tile.num_warps, tile.num_stages, EVERY)
    for name, (function, types, constants) in _SMALL.items():
        warps = 8 if name == "swiglu_backward" else 4
        found[name] = _variant(f"experts.{name}", function, types, constants, warps, 3, EVERY)
    for name, (function, types) in _FP8.items():
        types = {**types, "exponents_RG": "*i8", "columns": "i32", "rows": "i32"}
        constants = {"GROUP": FP8_GROUP, "BLOCK_R": 32}
        found[name] = _variant(f"experts.{name}", function, types, constants, 4, 3, (90, 100))
    return list(found.values())


def head_variants() -> list[KernelVariant]:
    """Every kernel of the head in every dtype."""
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        chunk = {"logits_ptr": f"*{dtype}", "row_stride": "i32", "labels_ptr": "*i64", "index_ptr": "*i64"}
        settings = {"vocab": "i32", "ignore_index": "i32", "inv_temperature": "fp32"}
        outputs = {"scale_ptr": "*fp32", "figures_ptr": "*fp32", "tokens": "i32"}
        for all_figures in (False, True):
            for gradient in (False, True):
                size = head_kernels.BLOCK_SIZE_OF_ALL_FIGURES if all_figures else head_kernels.BLOCK_SIZE
                constants = {"ALL_FIGURES": all_figures, "HAS_GRADIENT": gradient, "BLOCK": size}
                name = f"head.loss.{'figures' if all_figures else 'loss'}{'.gradient' if gradient else ''}.{dtype}"
                found.append(_head_variant(name, head_kernels.loss_kernel, chunk | outputs | settings, constants))
        types = chunk | {"lse_ptr": "*fp32", "upstream_ptr": "*fp32"} | settings
        block: dict[str, object] = {"BLOCK": head_kernels.BLOCK_SIZE}
        name = f"head.log_prob_gradient.{dtype}"
        found.append(_head_variant(name, head_kernels.log_prob_gradient_kernel, types, block))
        types = {"x_ptr": f"*{dtype}", "factor_ptr": "*fp32", "size": "i32", "programs": "i32"}
        found.append(_head_variant(f"head.scale.{dtype}", head_kernels.scale_kernel, types, block))
    return found


def _head_variant(name: str, function: Any, types: dict[str, str], constants: dict[str, object]) -> KernelVariant:
    multiples = tuple(size for size in ("row_stride", "vocab", "size") if size in types)
    return KernelVariant(name, function, types, constants, head_kernels.WARPS, 3, hot=True, multiples_of_16=multiples)


VARIANTS = [*head_variants(), *experts_variants()]
