# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the experts, and nothing else: what starts them is in `experts_launch.py`.

Every matrix product is one kind of loop: tiles of sorted rows, of which each belongs to one expert, against that
expert's matrix. Programs take
the tiles in turn: as many programs as multiprocessors, or as tiles. Rows of all experts lie in one
buffer, so a tile may read rows of the next expert: those are computed and never stored. Matrices arrive through tensor
descriptors (TMA) where `TMA` is set, and through pointers where the sizes are odd or the device has no TMA.

Letters: R sorted rows, E experts, H hidden, I intermediate; a tile is BLOCK_M rows by BLOCK_N columns, BLOCK_K deep.
"""

import triton
import triton.language as tl


@triton.jit
def _block(
    source,  # a tensor descriptor, or a pointer
    row,
    column,
    rows,
    columns,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """A (ROWS, COLUMNS) block of a row-major matrix, 0 outside of it. EVEN: that dimension needs no mask."""
    if TMA:
        return source.load([row, column])
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    pointers = source + r.to(tl.int64)[:, None] * stride + c[None, :]
    if EVEN_ROWS and EVEN_COLUMNS:
        return tl.load(pointers)
    if EVEN_ROWS:
        return tl.load(pointers, mask=(c < columns)[None, :], other=0.0)
    if EVEN_COLUMNS:
        return tl.load(pointers, mask=(r < rows)[:, None], other=0.0)
    return tl.load(pointers, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)


@triton.jit
def _ends(offsets, E: tl.constexpr, E_PAD: tl.constexpr):
    """Where each expert's rows begin and end; experts of the padding are empty."""
    e = tl.arange(0, E_PAD)
    last = tl.load(offsets + E - 1)
    ends = tl.load(offsets + e, mask=e < E, other=0)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    return tl.where(e < E, starts, last), tl.where(e < E, ends, last)


@triton.jit
def _row_tiles(starts, ends, BLOCK_M: tl.constexpr):
    return (ends - starts + BLOCK_M - 1) // BLOCK_M


@triton.jit
def _pick(values, e, expert):
    return tl.sum(tl.where(e == expert, values, 0), axis=0)


@triton.jit
def _place(tile, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """Row and column of a tile, in an order in which tiles that run together share rows and columns (for the L2)."""
    group = tile // (GROUP_M * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    within = tile % (GROUP_M * column_tiles)
    return group * GROUP_M + within % height, within // height


@triton.jit
def _silu_parts(gate, up):
    """silu(gate), its slope, and silu(gate) * up, in fp32."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid), silu * up


@triton.jit
def count_kernel(ids_R, counts_BE, rows, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a block's rows each expert gets."""
    block = tl.program_id(0)
    r = block * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, E_PAD)
    ids = tl.load(ids_R + r, mask=r < rows, other=E)
    counts = tl.sum((ids[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(counts_BE + block * E + e, counts, mask=e < E)


@triton.jit
def place_kernel(
    ids_R,
    running_BE,  # counts of this block and of all before it
    order_R,
    slots_R,
    padded_slots_R,
    offsets_E,
    padded_offsets_E,
    rows,
    blocks,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """The place of every row among the sorted ones: those of earlier experts, of earlier blocks, and of its own block."""
    block = tl.program_id(0)
    r = block * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, E_PAD)
    ids = tl.load(ids_R + r, mask=r < rows, other=E)
    chosen = (ids[:, None] == e[None, :]).to(tl.int32)
    counts = tl.sum(chosen, axis=0)
    if ONE_BLOCK:
        totals = counts
        before = tl.zeros_like(counts)
    else:
        totals = tl.load(running_BE + (blocks - 1) * E + e, mask=e < E, other=0)
        before = tl.load(running_BE + block * E + e, mask=e < E, other=0) - counts
    ends = tl.cumsum(totals, axis=0)
    padded = (totals + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    padded_ends = tl.cumsum(padded, axis=0)
    rank = tl.cumsum(chosen, axis=0) - 1 + before[None, :]
    slots = tl.sum(chosen * ((ends - totals)[None, :] + rank), axis=1)
    padded_slots = tl.sum(chosen * ((padded_ends - padded)[None, :] + rank), axis=1)
    here = ids < E
    tl.store(slots_R + r, tl.where(here, slots, -1), mask=r < rows)
    tl.store(padded_slots_R + r, tl.where(here, padded_slots, -1), mask=r < rows)
    tl.store(order_R + slots, r, mask=(r < rows) & here)
    if block == 0:
        tl.store(offsets_E + e, ends, mask=e < E)
        tl.store(padded_offsets_E + e, padded_ends, mask=e < E)


@triton.jit
def permute_kernel(
    x_TH,
    order_R,
    offsets_E,
    padded_offsets_E,
    out,
    stride_x,
    H,
    TOP_K: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Row by row, the token that lies at it; between the experts of a padded buffer, zeros."""
    place = tl.program_id(0)
    row = place
    end = tl.load(offsets_E + E - 1)
    if PADDED:
        e = tl.arange(0, E_PAD)
        starts, ends = _ends(offsets_E, E, E_PAD)
        padded_starts, padded_ends = _ends(padded_offsets_E, E, E_PAD)
        expert = tl.sum(((padded_ends <= place) & (e < E)).to(tl.int32), axis=0)
        row = place - _pick(padded_starts, e, expert) + _pick(starts, e, expert)
        end = _pick(ends, e, expert)
        if place >= tl.load(padded_offsets_E + E - 1):  # read by no one
            return
    elif place >= end:
        return
    token = tl.load(order_R + row, mask=row < end, other=0) // TOP_K
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    x = tl.load(x_TH + tl.cast(token, tl.int64) * stride_x + h, mask=h < tl.where(row < end, H, 0), other=0.0)
    tl.store(out + tl.cast(place, tl.int64) * H + h, x, mask=h < H)


@triton.jit
def combine_kernel(
    rows_RH, slots_TK, weights_TK, out_TH, H, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_H: tl.constexpr
):
    """The sum of a token's rows, in fp32 and in the order of its choices."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = tl.load(slots_TK + token * TOP_K + k).to(tl.int64)
        row = tl.load(rows_RH + slot * H + h, mask=h < tl.where(slot >= 0, H, 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weights_TK + token * TOP_K + k).to(tl.float32)
        total += row
    tl.store(out_TH + token * H + h, total.to(out_TH.dtype.element_ty), mask=h < H)


@triton.jit
def swiglu_kernel(pre_RF, act_RI, offsets_E, I, E: tl.constexpr, BLOCK_I: tl.constexpr):
    """act = silu(gate) * up, where torch's grouped_mm made the products; rows of no expert here stay unwritten."""
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(offsets_E + E - 1):
        return
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    gate = tl.load(pre_RF + row * 2 * I + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(pre_RF + row * 2 * I + I + i, mask=i < I, other=0.0).to(tl.float32)
    _, _, act = _silu_parts(gate, up)
    tl.store(act_RI + row * I + i, act.to(act_RI.dtype.element_ty), mask=i < I)


@triton.jit
def swiglu_backward_kernel(
    dact_PI,  # padded rows; replaced by the weighted activation
    pre_RF,
    weights_R,
    order_R,
    dpre_PF,
    dweight_R,
    offsets_E,
    padded_offsets_E,
    I,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """What `down_backward_kernel` does after its product, where torch's grouped_mm made that: one row a program."""
    place = tl.program_id(0)
    if place >= tl.load(padded_offsets_E + E - 1):
        return
    e = tl.arange(0, E_PAD)
    starts, ends = _ends(offsets_E, E, E_PAD)
    padded_starts, padded_ends = _ends(padded_offsets_E, E, E_PAD)
    expert = tl.sum(((padded_ends <= place) & (e < E)).to(tl.int32), axis=0)
    row = place - _pick(padded_starts, e, expert) + _pick(starts, e, expert)
    real = row < _pick(ends, e, expert)
    flat = tl.load(order_R + row, mask=real, other=0)
    weight = tl.load(weights_R + flat, mask=real, other=0.0).to(tl.float32)
    dact_row = dact_PI + tl.cast(place, tl.int64) * I
    pre_row = pre_RF + row.to(tl.int64) * (2 * I)
    dpre_row = dpre_PF + tl.cast(place, tl.int64) * (2 * I)
    dtype = dpre_PF.dtype.element_ty
    dweight = tl.zeros((BLOCK_I,), tl.float32)
    for column in range(0, I, BLOCK_I):
        i = column + tl.arange(0, BLOCK_I)
        mask = i < tl.where(real, I, 0)
        dact = tl.load(dact_row + i, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(pre_row + i, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pre_row + I + i, mask=mask, other=0.0).to(tl.float32)
        silu, slope, act = _silu_parts(gate, up)
        dweight += dact * act
        dact = dact * weight
        tl.store(dact_row + i, (act * weight).to(dtype), mask=i < I)
        tl.store(dpre_row + i, (dact * up * slope).to(dtype), mask=i < I)
        tl.store(dpre_row + I + i, (dact * silu).to(dtype), mask=i < I)
    tl.store(dweight_R + row, tl.sum(dweight, axis=0), mask=real)


@triton.jit
def up_kernel(
    x_RH,
    gate_up_FH,  # all experts' matrices one below the other: (E * 2 * I, H), each gate rows, then up rows
    pre_RF,
    act_RI,
    offsets_E,
    rows,
    H,
    I,
    stride_x,
    stride_w,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """act = silu(x @ gate.T) * (x @ up.T), and the two products before it (`pre`) where the backward pass wants them."""
    e = tl.arange(0, E_PAD)
    starts, ends = _ends(offsets_E, E, E_PAD)
    tiles = _row_tiles(starts, ends, BLOCK_M)
    last_tiles = tl.cumsum(tiles, axis=0)
    row_tiles = tl.sum(tiles, axis=0)
    column_tiles = tl.cdiv(I, BLOCK_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP_M)
        expert = tl.sum((last_tiles <= row_tile).to(tl.int32), axis=0)
        row = _pick(starts - (last_tiles - tiles) * BLOCK_M, e, expert) + row_tile * BLOCK_M
        end = _pick(ends, e, expert)
        column = column_tile * BLOCK_N
        gate_row = expert * 2 * I + column
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, H, BLOCK_K):
            x = _block(x_RH, row, k, rows, H, stride_x, BLOCK_M, BLOCK_K, False, EVEN_K, TMA)
            w = _block(gate_up_FH, gate_row, k, E * 2 * I, H, stride_w, BLOCK_N, BLOCK_K, False, EVEN_K, TMA)
            gate = tl.dot(x, w.T, gate, input_precision=PRECISION)
            w = _block(gate_up_FH, gate_row + I, k, E * 2 * I, H, stride_w, BLOCK_N, BLOCK_K, False, EVEN_K, TMA)
            up = tl.dot(x, w.T, up, input_precision=PRECISION)
        r = row + tl.arange(0, BLOCK_M)
        c = column + tl.arange(0, BLOCK_N)
        mask = (r < end)[:, None] & (c < I)[None, :]
        gate = gate.to(act_RI.dtype.element_ty)  # rounded as the backward pass will read them
        up = up.to(act_RI.dtype.element_ty)
        if SAVE_PRE:
            pre = pre_RF + r.to(tl.int64)[:, None] * (2 * I) + c[None, :]
            tl.store(pre, gate, mask=mask)
            tl.store(pre + I, up, mask=mask)
        _, _, act = _silu_parts(gate.to(tl.float32), up.to(tl.float32))
        tl.store(act_RI + r.to(tl.int64)[:, None] * I + c[None, :], act.to(act_RI.dtype.element_ty), mask=mask)


@triton.jit
def rows_kernel(
    a_RK,
    b,  # (E * N, K), or with NN (E * K, N)
    out_RN,
    offsets_E,  # or the padded ones: `out` has the rows of `a`
    rows,
    K,
    N,
    stride_a,
    stride_b,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    NN: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out = a @ b[expert].T, or with NN a @ b[expert]: the down-projection, and the gradient of the up-projection's x."""
    e = tl.arange(0, E_PAD)
    starts, ends = _ends(offsets_E, E, E_PAD)
    tiles = _row_tiles(starts, ends, BLOCK_M)
    last_tiles = tl.cumsum(tiles, axis=0)
    row_tiles = tl.sum(tiles, axis=0)
    column_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP_M)
        expert = tl.sum((last_tiles <= row_tile).to(tl.int32), axis=0)
        row = _pick(starts - (last_tiles - tiles) * BLOCK_M, e, expert) + row_tile * BLOCK_M
        end = _pick(ends, e, expert)
        column = column_tile * BLOCK_N
        out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = _block(a_RK, row, k, rows, K, stride_a, BLOCK_M, BLOCK_K, False, EVEN_K, TMA)
            if NN:
                w = _block(b, expert * K + k, column, E * K, N, stride_b, BLOCK_K, BLOCK_N, EVEN_K, False, TMA)
                out = tl.dot(a, w, out, input_precision=PRECISION)
            else:
                w = _block(b, expert * N + column, k, E * N, K, stride_b, BLOCK_N, BLOCK_K, False, EVEN_K, TMA)
                out = tl.dot(a, w.T, out, input_precision=PRECISION)
        r = row + tl.arange(0, BLOCK_M)
        c = column + tl.arange(0, BLOCK_N)
        pointers = out_RN + r.to(tl.int64)[:, None] * N + c[None, :]
        tl.store(pointers, out.to(out_RN.dtype.element_ty), mask=(r < end)[:, None] & (c < N)[None, :])


@triton.jit
def down_backward_kernel(
    dout_PH,  # padded rows: the gradient of each row's token
    down_FI,  # (E * H, I)
    pre_RF,
    weights_R,  # unsorted, as `order_R` names them
    order_R,
    dpre_PF,  # padded
    act_PI,  # padded: the weighted activation, for the gradient of the down-projection
    dweight_CR,  # for each column tile, the part of the router weights' gradient
    offsets_E,
    padded_offsets_E,
    rows,
    padded_rows,
    H,
    I,
    stride_dout,
    stride_w,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """From the output's gradient to that of the up-projection's products, through weight, down-projection and SwiGLU.

    With a = silu(gate) * up and y = w * (a @ down.T): da = w * (dy @ down), and dw = dy · (a @ down.T) = (dy @ down) · a,
    so the gradient of the router's weight needs no output of the forward pass.
    """
    e = tl.arange(0, E_PAD)
    starts, ends = _ends(offsets_E, E, E_PAD)
    padded_starts, padded_ends = _ends(padded_offsets_E, E, E_PAD)
    tiles = _row_tiles(padded_starts, padded_ends, BLOCK_M)
    last_tiles = tl.cumsum(tiles, axis=0)
    row_tiles = tl.sum(tiles, axis=0)
    column_tiles = tl.cdiv(I, BLOCK_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP_M)
        expert = tl.sum((last_tiles <= row_tile).to(tl.int32), axis=0)
        within = row_tile * BLOCK_M - _pick(last_tiles - tiles, e, expert) * BLOCK_M
        padded_row = _pick(padded_starts, e, expert) + within
        column = column_tile * BLOCK_N
        dact = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, H, BLOCK_K):
            dout = _block(dout_PH, padded_row, k, padded_rows, H, stride_dout, BLOCK_M, BLOCK_K, False, EVEN_K, TMA)
            w = _block(down_FI, expert * H + k, column, E * H, I, stride_w, BLOCK_K, BLOCK_N, EVEN_K, False, TMA)
            dact = tl.dot(dout, w, dact, input_precision=PRECISION)
        r = _pick(starts, e, expert) + within + tl.arange(0, BLOCK_M)
        p = padded_row + tl.arange(0, BLOCK_M)
        c = column + tl.arange(0, BLOCK_N)
        real = r < _pick(ends, e, expert)
        mask = real[:, None] & (c < I)[None, :]
        pre = pre_RF + r.to(tl.int64)[:, None] * (2 * I) + c[None, :]
        gate = tl.load(pre, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pre + I, mask=mask, other=0.0).to(tl.float32)
        silu, slope, act = _silu_parts(gate, up)
        dact = tl.where(mask, dact, 0.0)
        tl.store(dweight_CR + tl.cast(column_tile, tl.int64) * rows + r, tl.sum(dact * act, axis=1), mask=real)
        weight = tl.load(weights_R + tl.load(order_R + r, mask=real, other=0), mask=real, other=0.0).to(tl.float32)
        dact = dact * weight[:, None]
        store = (p < _pick(padded_ends, e, expert))[:, None] & (c < I)[None, :]
        dtype = act_PI.dtype.element_ty
        tl.store(act_PI + p.to(tl.int64)[:, None] * I + c[None, :], (act * weight[:, None]).to(dtype), mask=store)
        dpre = dpre_PF + p.to(tl.int64)[:, None] * (2 * I) + c[None, :]
        tl.store(dpre, (dact * up * slope).to(dtype), mask=store)
        tl.store(dpre + I, (dact * silu).to(dtype), mask=store)


@triton.jit
def weight_gradient_kernel(
    a_PM,  # padded rows
    b_PN,  # padded rows
    out_EMN,
    padded_offsets_E,
    M,
    N,
    rows,
    stride_a,
    stride_b,
    E: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[expert] = a[its rows].T @ b[its rows]. An expert's rows are a multiple of BLOCK_K, so the loop has no mask."""
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), E * row_tiles * column_tiles, tl.num_programs(0)):
        expert = tile // (row_tiles * column_tiles)
        row_tile, column_tile = _place(tile % (row_tiles * column_tiles), row_tiles, column_tiles, GROUP_M)
        start = tl.load(padded_offsets_E + expert - 1, mask=expert > 0, other=0)
        end = tl.load(padded_offsets_E + expert)
        out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(start, end, BLOCK_K):
            a = _block(a_PM, k, row_tile * BLOCK_M, rows, M, stride_a, BLOCK_K, BLOCK_M, True, False, TMA)
            b = _block(b_PN, k, column_tile * BLOCK_N, rows, N, stride_b, BLOCK_K, BLOCK_N, True, False, TMA)
            out = tl.dot(a.T, b, out, input_precision=PRECISION)
        m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        pointers = out_EMN + (tl.cast(expert, tl.int64) * M + m[:, None]) * N + n[None, :]
        tl.store(pointers, out.to(out_EMN.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def to_fp8_kernel(x_RC, out_RC, exponents_RG, columns, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, rows):
    """Eight bits (e4m3) and, for every GROUP values of a row, the power of two that brings the largest below 448."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(1)
    c = group * GROUP + tl.arange(0, GROUP)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    x = tl.load(x_RC + r[:, None] * columns + c[None, :], mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)
    exponent = tl.ceil(tl.log2(tl.maximum(largest, 1e-30) / 448.0))
    exponent = tl.minimum(tl.maximum(exponent, -126.0), 127.0)
    scaled = x * tl.exp2(-exponent)[:, None]
    tl.store(out_RC + r[:, None] * columns + c[None, :], scaled.to(out_RC.dtype.element_ty), mask=mask)
    tl.store(exponents_RG + r * tl.num_programs(1) + group, exponent.to(tl.int8), mask=r < rows)


@triton.jit
def from_fp8_kernel(x_RC, exponents_RG, out_RC, columns, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, rows):
    """Back from eight bits."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(1)
    c = group * GROUP + tl.arange(0, GROUP)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    x = tl.load(x_RC + r[:, None] * columns + c[None, :], mask=mask, other=0.0).to(tl.float32)
    exponent = tl.load(exponents_RG + r * tl.num_programs(1) + group, mask=r < rows, other=0).to(tl.float32)
    out = x * tl.exp2(exponent)[:, None]
    tl.store(out_RC + r[:, None] * columns + c[None, :], out.to(out_RC.dtype.element_ty), mask=mask)
