# SPDX-License-Identifier: Apache-2.0
"""Starts the experts' kernels: checks, buffers, grids, tiles. No autograd, and no question to the device (CUDA graphs).

Shape suffixes as in `routing.py` and `triton_kernels.py`; F = 2 * I, P = rows of a padded buffer.
"""

import functools

import torch
import triton
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from . import triton_kernels as kernels
from .four_bits import NESTED, SCALED, Packed
from .routing import ALIGNMENT, FP8_GROUP, Routing, padded_rows
from .tiles import FALLBACK_TILE, NARROW_TILE, Tile, choose_tile, four_bit_tile

BLOCK_ROWS = 8  # of the kernels that only move and weigh rows; divides ALIGNMENT, so a block has one expert


def _power_of_two(number: int) -> int:
    return max(triton.next_power_of_2(number), 2)


def route(ids_TK: torch.Tensor, num_experts: int) -> Routing:
    """`route_reference` in one kernel for few rows, in three for many."""
    rows, device = ids_TK.numel(), ids_TK.device
    order_R = torch.zeros(rows, dtype=torch.int32, device=device)
    slots_TK = torch.empty(ids_TK.shape, dtype=torch.int32, device=device)
    padded_slots_TK = torch.empty_like(slots_TK)
    offsets_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    padded_offsets_E = torch.empty_like(offsets_E)
    e_pad = _power_of_two(num_experts)
    block = max(16, 4096 // e_pad)
    if rows <= 64:
        block = min(block, 64)  # for decoding; any other size would be compiled anew
    blocks = triton.cdiv(rows, block)
    running_BE = offsets_E  # not read where there is one block
    if blocks > 1:
        counts_BE = torch.empty((blocks, num_experts), dtype=torch.int32, device=device)
        kernels.count_kernel[(blocks,)](ids_TK, counts_BE, rows, num_experts, e_pad, block)
        running_BE = counts_BE.cumsum(0, dtype=torch.int32)
    kernels.place_kernel[(blocks,)](
        ids_TK, running_BE, order_R, slots_TK, padded_slots_TK, offsets_E, padded_offsets_E, rows, blocks,
        E=num_experts, E_PAD=e_pad, BLOCK=block, ALIGNMENT=ALIGNMENT, ONE_BLOCK=blocks == 1,
    )  # fmt: skip
    return Routing(order_R, slots_TK, padded_slots_TK, offsets_E, padded_offsets_E)


def permute(x_TH: torch.Tensor, routing: Routing, padded: bool = False) -> torch.Tensor:
    """`permute_reference`; rows of no expert here, and those behind the last padded one, stay unwritten."""
    hidden, num_experts = x_TH.shape[1], routing.offsets_E.numel()
    rows = routing.order_R.numel()
    out = x_TH.new_empty((padded_rows(rows, num_experts) if padded else rows, hidden))
    block = min(_power_of_two(hidden), 512)
    kernels.permute_kernel[(triton.cdiv(out.shape[0], BLOCK_ROWS), triton.cdiv(hidden, block))](
        x_TH, routing.order_R, routing.offsets_E, routing.padded_offsets_E, out, x_TH.stride(0), hidden,
        TOP_K=routing.slots_TK.shape[1], E=num_experts, E_PAD=_power_of_two(num_experts),
        BLOCK_R=BLOCK_ROWS, BLOCK_H=block, PADDED=padded,
    )  # fmt: skip
    return out


def combine(rows_RH: torch.Tensor, slots_TK: torch.Tensor, weights_TK: torch.Tensor | None = None) -> torch.Tensor:
    """`combine_reference`."""
    (tokens, top_k), hidden = slots_TK.shape, rows_RH.shape[1]
    out_TH = rows_RH.new_empty((tokens, hidden))
    block = min(_power_of_two(hidden), 512)
    kernels.combine_kernel[(triton.cdiv(tokens, BLOCK_ROWS), triton.cdiv(hidden, block))](
        rows_RH, slots_TK, slots_TK if weights_TK is None else weights_TK, out_TH, tokens, hidden,
        TOP_K=top_k, WEIGHTED=weights_TK is not None, BLOCK_T=BLOCK_ROWS, BLOCK_H=block,
    )  # fmt: skip
    return out_TH


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _programs(tile: Tile, tiles: int, device: torch.device) -> tuple[int]:
    return (min(tiles, _multiprocessors(device)) if tile.persistent else tiles,)


def _row_tiles(rows: int, num_experts: int, block_m: int) -> int:
    """The most tiles that `rows` rows can make: each expert that has rows may end in a tile of its own."""
    return rows // block_m + min(num_experts, rows)


def _has_descriptors(*matrices: torch.Tensor) -> bool:
    """Whether TMA can read these 2-D matrices: 16-byte alignment of the base and of every row."""
    return all(
        matrix.numel() > 0
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and (matrix.device.type != "cuda" or torch.cuda.get_device_capability(matrix.device) >= (9, 0))
        for matrix in matrices
    )


def _blocks_of(matrix: torch.Tensor, block: tuple[int, int], tma: bool) -> torch.Tensor | TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, list(block)) if tma else matrix


def _precision(dtype: torch.dtype) -> str:
    # Not `allow_tf32`: reading that raises once transformers' `tf32=True` has set `fp32_precision`.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.cache
def has_grouped_mm(device: torch.device) -> bool:
    """Whether torch's grouped_mm is one kernel there; elsewhere it reads the offsets and loops over the experts."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _grouped_mm_serves(*operands: torch.Tensor) -> bool:
    """What grouped_mm's kernel takes: bf16, and 16-byte alignment of every matrix and every row."""
    return has_grouped_mm(operands[0].device) and all(
        operand.dtype == torch.bfloat16
        and operand.data_ptr() % 16 == 0
        and all(size % 8 == 0 for size in operand.shape[1:])
        for operand in operands
    )


def _tile(product: str, rows: int, num_experts: int, *operands: torch.Tensor) -> Tile | None:
    tile = choose_tile(product, operands[0].device, rows, num_experts)
    if tile is None:
        return None if _grouped_mm_serves(*operands) else FALLBACK_TILE
    is_wide = operands[0].element_size() > 2 and operands[0].device.type == "cuda"
    return FALLBACK_TILE if is_wide else tile


def up(
    x_RH: torch.Tensor, gate_up_EFH: torch.Tensor, routing: Routing, save_pre: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU of the up-projection: act `(R, I)`, and with `save_pre` the products before it `(R, 2 I)` (else empty)."""
    (rows, hidden), (num_experts, double, _) = x_RH.shape, gate_up_EFH.shape
    intermediate = double // 2
    tile = _tile("up", rows, num_experts, x_RH, gate_up_EFH)
    if tile is None:
        pre_RF = functional.grouped_mm(x_RH, gate_up_EFH.transpose(1, 2), offs=routing.offsets_E)
        return swiglu(pre_RF, routing), pre_RF if save_pre else pre_RF.new_empty(0)
    act_RI = x_RH.new_empty((rows, intermediate))
    pre_RF = x_RH.new_empty((rows, double) if save_pre else 0)
    gate_up_2d = gate_up_EFH.view(-1, hidden)
    tma = tile.tma and _has_descriptors(x_RH, gate_up_2d)
    tiles = _row_tiles(rows, num_experts, tile.block_m) * triton.cdiv(intermediate, tile.block_n)
    kernels.up_kernel[_programs(tile, tiles, x_RH.device)](
        _blocks_of(x_RH, (tile.block_m, tile.block_k), tma),
        _blocks_of(gate_up_2d, (tile.block_n, tile.block_k), tma),
        pre_RF, act_RI, routing.offsets_E, rows, hidden, intermediate, x_RH.stride(0), gate_up_2d.stride(0),
        SAVE_PRE=save_pre, **_constants(tile, num_experts, hidden, x_RH.dtype, tma), **_launch(tile),
    )  # fmt: skip
    return act_RI, pre_RF


def swiglu(pre_RF: torch.Tensor, routing: Routing) -> torch.Tensor:
    """silu(gate) * up of the products `(R, 2 I)`: `(R, I)`."""
    rows, intermediate = pre_RF.shape[0], pre_RF.shape[1] // 2
    act_RI = pre_RF.new_empty((rows, intermediate))
    block = min(_power_of_two(intermediate), 512)
    kernels.swiglu_kernel[(triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(intermediate, block))](
        pre_RF, act_RI, routing.offsets_E, intermediate,
        E=routing.offsets_E.numel(), BLOCK_R=BLOCK_ROWS, BLOCK_I=block,
    )  # fmt: skip
    return act_RI


def _constants(tile: Tile, num_experts: int, depth: int, dtype: torch.dtype, tma: bool) -> dict[str, object]:
    return {
        "E": num_experts,
        "E_PAD": _power_of_two(num_experts),
        "PRECISION": _precision(dtype),
        "EVEN_K": depth % tile.block_k == 0,
        "TMA": tma,
        **_blocks(tile),
    }


def _blocks(tile: Tile) -> dict[str, object]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}


def _launch(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def rows_by_expert(
    product: str, a_RK: torch.Tensor, b: torch.Tensor | Packed, offsets_E: torch.Tensor, rows: int, transposed: bool
) -> torch.Tensor:
    """`a @ b[expert].T` for `b` `(E, N, K)`, or, not `transposed`, `a @ b[expert]` for `(E, K, N)`.

    The result has the rows of `a`, padded or not, whose ends are `offsets_E`; `rows` is how many of them are real.
    """
    if isinstance(b, Packed):
        return _rows_of_four_bits(a_RK, b, offsets_E, rows, transposed)
    tile = _tile(product, rows, b.shape[0], a_RK, b)
    if tile is None:
        return functional.grouped_mm(a_RK, b.transpose(1, 2) if transposed else b, offs=offsets_E)
    out_RN = a_RK.new_empty((a_RK.shape[0], b.shape[1] if transposed else b.shape[2]))
    _rows_by_expert(tile, a_RK, b, offsets_E, transposed, out_RN)
    return out_RN


def _rows_of_four_bits(
    a_RK: torch.Tensor, b: Packed, offsets_E: torch.Tensor, rows: int, transposed: bool
) -> torch.Tensor:
    num_experts, depth = b.packed_EB.shape[0], a_RK.shape[1]
    columns = b.other_side(depth)
    out_RN = a_RK.new_empty((a_RK.shape[0], columns))
    tile = four_bit_tile(a_RK.device, rows, transposed)
    absmax, *nested = b.scales
    tiles = _row_tiles(a_RK.shape[0], num_experts, tile.block_m) * triton.cdiv(columns, tile.block_n)
    kernels.rows_of_four_bits_kernel[_programs(tile, tiles, a_RK.device)](
        a_RK, b.packed_EB, absmax, *(nested or [absmax] * 3), b.code, out_RN, offsets_E,
        a_RK.shape[0], depth, columns, a_RK.stride(0),
        E=num_experts, E_PAD=_power_of_two(num_experts), NN=not transposed, DOUBLE=bool(nested), SCALED=SCALED,
        NESTED=NESTED, PRECISION=_precision(a_RK.dtype), **_blocks(tile), **_launch(tile),
    )  # fmt: skip
    return out_RN


def narrow_rows_by_expert(
    a_RK: torch.Tensor, b: torch.Tensor, offsets_E: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """`rows_by_expert` where `b` is one of LoRA's matrices: narrow on one side."""
    out_RN = a_RK.new_empty((a_RK.shape[0], b.shape[1] if transposed else b.shape[2]))
    _rows_by_expert(NARROW_TILE, a_RK, b, offsets_E, transposed, out_RN)
    return out_RN


def add_rows_by_expert(
    out_RN: torch.Tensor, a_RK: torch.Tensor, b: torch.Tensor, offsets_E: torch.Tensor, transposed: bool, scale: float
) -> None:
    """Add `scale` times the product of `rows_by_expert` to `out`, in place: only `out` is read and written whole."""
    _rows_by_expert(NARROW_TILE, a_RK, b, offsets_E, transposed, out_RN, add=True, scale=scale)


def _rows_by_expert(
    tile: Tile,
    a_RK: torch.Tensor,
    b: torch.Tensor,
    offsets_E: torch.Tensor,
    transposed: bool,
    out_RN: torch.Tensor,
    add: bool = False,
    scale: float = 1.0,
) -> None:
    num_experts, (rows, depth), columns = b.shape[0], a_RK.shape, out_RN.shape[1]
    b_2d = b.view(-1, b.shape[2])
    tma = tile.tma and _has_descriptors(a_RK, b_2d)
    b_block = (tile.block_n, tile.block_k) if transposed else (tile.block_k, tile.block_n)
    tiles = _row_tiles(rows, num_experts, tile.block_m) * triton.cdiv(columns, tile.block_n)
    kernels.rows_kernel[_programs(tile, tiles, a_RK.device)](
        _blocks_of(a_RK, (tile.block_m, tile.block_k), tma),
        _blocks_of(b_2d, b_block, tma),
        out_RN, offsets_E, rows, depth, columns, a_RK.stride(0), b_2d.stride(0), scale,
        NN=not transposed, ADD=add, **_constants(tile, num_experts, depth, a_RK.dtype, tma), **_launch(tile),
    )  # fmt: skip


def swiglu_backward(
    dact_PI: torch.Tensor, pre_RF: torch.Tensor, weights_TK: torch.Tensor, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Through the router's weight and SwiGLU.

    Args:
        dact_PI: the output's gradient times the down-projection, padded; overwritten.

    Returns:
        The gradient of the up-projection's products `(P, 2 I)` and the weighted activations `(P, I)`, both padded, and
        the gradient of the router's weights in the order of the sorted rows, `(R,)` in fp32.
    """
    (padded, intermediate), num_experts = dact_PI.shape, routing.offsets_E.numel()
    dpre_PF = dact_PI.new_empty((padded, 2 * intermediate))
    dweight_R = torch.zeros(pre_RF.shape[0], dtype=torch.float32, device=dact_PI.device)
    kernels.swiglu_backward_kernel[(triton.cdiv(padded, BLOCK_ROWS),)](
        dact_PI, pre_RF, weights_TK, routing.order_R, dpre_PF, dweight_R, routing.offsets_E, routing.padded_offsets_E,
        intermediate, E=num_experts, E_PAD=_power_of_two(num_experts),
        BLOCK_R=BLOCK_ROWS, BLOCK_I=min(_power_of_two(intermediate), 512), num_warps=8,
    )  # fmt: skip
    return dpre_PF, dact_PI, dweight_R


def weight_gradient(a_PM: torch.Tensor, b_PN: torch.Tensor, routing: Routing, narrow: bool = False) -> torch.Tensor:
    """`a[rows of the expert].T @ b[rows of the expert]` for every expert: `(E, M, N)`; both padded.

    `narrow`: M or N is LoRA's rank.
    """
    num_experts, rows = routing.offsets_E.numel(), routing.order_R.numel()
    tile = NARROW_TILE if narrow else _tile("weight_gradient", rows, num_experts, a_PM, b_PN)
    if tile is None:
        return functional.grouped_mm(a_PM.t(), b_PN, offs=routing.padded_offsets_E)
    (padded, M), N = a_PM.shape, b_PN.shape[1]
    out_EMN = a_PM.new_empty((num_experts, M, N))
    tma = tile.tma and _has_descriptors(a_PM, b_PN)
    tiles = num_experts * triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    kernels.weight_gradient_kernel[_programs(tile, tiles, a_PM.device)](
        _blocks_of(a_PM, (tile.block_k, tile.block_m), tma),
        _blocks_of(b_PN, (tile.block_k, tile.block_n), tma),
        out_EMN, routing.padded_offsets_E, M, N, padded, a_PM.stride(0), b_PN.stride(0),
        E=num_experts, PRECISION=_precision(a_PM.dtype), TMA=tma, **_blocks(tile), **_launch(tile),
    )  # fmt: skip
    return out_EMN


def to_fp8(x_RC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values `(R, C)` and exponents of two `(R, C / FP8_GROUP)`, int8: the value is `values * 2 ** exponents`."""
    rows, columns = x_RC.shape
    values_RC = torch.empty_like(x_RC, dtype=torch.float8_e4m3fn)
    exponents_RG = x_RC.new_empty((rows, triton.cdiv(columns, FP8_GROUP)), dtype=torch.int8)
    grid = (triton.cdiv(rows, 32), exponents_RG.shape[1])
    kernels.to_fp8_kernel[grid](x_RC, values_RC, exponents_RG, rows, columns, GROUP=FP8_GROUP, BLOCK_R=32)
    return values_RC, exponents_RG


def from_fp8(values_RC: torch.Tensor, exponents_RG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `to_fp8`."""
    rows, columns = values_RC.shape
    out_RC = torch.empty_like(values_RC, dtype=dtype)
    grid = (triton.cdiv(rows, 32), exponents_RG.shape[1])
    kernels.from_fp8_kernel[grid](values_RC, exponents_RG, out_RC, rows, columns, GROUP=FP8_GROUP, BLOCK_R=32)
    return out_RC
