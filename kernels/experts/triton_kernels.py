# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the experts, and nothing else: what starts them is in `launch.py`.

Every matrix product is one kind of loop: tiles of sorted rows, of which each belongs to one expert, against that
expert's matrix. Programs take the tiles in turn: as many programs as multiprocessors, or as tiles. Rows of all experts
lie in one buffer, so a tile may read rows of the next expert: those are computed and never stored. Matrices arrive
through tensor descriptors (TMA) where `TMA` is set, and through pointers where the sizes are odd or the device has no
TMA. What depends on the number of tokens is not specialised (`do_not_specialize`): a batch of another size compiles
nothing.

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
        block = source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        pointers = source + r.to(tl.int64)[:, None] * stride + c[None, :]
        if EVEN_ROWS and EVEN_COLUMNS:
            block = tl.load(pointers)
        elif EVEN_ROWS:
            block = tl.load(pointers, mask=(c < columns)[None, :], other=0.0)
        elif EVEN_COLUMNS:
            block = tl.load(pointers, mask=(r < rows)[:, None], other=0.0)
        else:
            block = tl.load(pointers, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    return block


@triton.jit
def _pointers(matrix, row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a block: the far offset as one 64-bit number, so that those within the block fit 32 bits."""
    near = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    return matrix + tl.cast(row, tl.int64) * stride + column + near


@triton.jit
def _ends(offsets, E: tl.constexpr, E_PAD: tl.constexpr):
    """Where each expert's rows begin and end; experts of the padding are empty."""
    e = tl.arange(0, E_PAD)
    last = tl.load(offsets + E - 1)
    ends = tl.load(offsets + e, mask=e < E, other=0)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    return tl.where(e < E, starts, last), tl.where(e < E, ends, last)


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
def _tile_of(
    tile,
    starts,
    ends,
    tiles,  # how many tiles each expert's rows make
    columns,
    E_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile's expert, its first row, where that expert's rows end, and its first column."""
    last_tiles = tl.cumsum(tiles, axis=0)
    row_tile, column_tile = _place(tile, tl.sum(tiles, axis=0), tl.cdiv(columns, BLOCK_N), GROUP_M)
    expert = tl.sum((last_tiles <= row_tile).to(tl.int32), axis=0)
    e = tl.arange(0, E_PAD)
    row = _pick(starts - (last_tiles - tiles) * BLOCK_M, e, expert) + row_tile * BLOCK_M
    return expert, row, _pick(ends, e, expert), column_tile * BLOCK_N


@triton.jit
def _silu_parts(gate, up):
    """silu(gate), its slope, and silu(gate) * up, in fp32."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid), silu * up


@triton.jit(do_not_specialize=["rows"])
def count_kernel(ids_R, counts_BE, rows, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a block's rows each expert gets."""
    block = tl.program_id(0)
    r = block * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, E_PAD)
    ids = tl.load(ids_R + r, mask=r < rows, other=E)
    counts = tl.sum((ids[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(counts_BE + block * E + e, counts, mask=e < E)


@triton.jit(do_not_specialize=["rows", "blocks"])
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
    """The place of every row among the sorted ones: behind earlier experts, earlier blocks, its block's rows."""
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
    padded = tl.where(e < E, (tl.maximum(totals, 1) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT, 0)
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
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PADDED: tl.constexpr,
):
    """For every sorted row, the token that lies at it; between the experts of a padded buffer, zeros."""
    first = tl.program_id(0) * BLOCK_R
    row = first + tl.arange(0, BLOCK_R)
    place = row
    if PADDED:
        if first >= tl.load(padded_offsets_E + E - 1):  # read by no one
            return
        row, end = _padded_rows(first, row, offsets_E, padded_offsets_E, E, E_PAD)
    else:
        end = tl.load(offsets_E + E - 1)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    real = row < end
    inside = (h < H)[None, :]
    token = tl.load(order_R + row, mask=real, other=0) // TOP_K
    x = tl.load(x_TH + token.to(tl.int64)[:, None] * stride_x + h[None, :], mask=real[:, None] & inside, other=0.0)
    written = inside if PADDED else real[:, None] & inside
    tl.store(out + place.to(tl.int64)[:, None] * H + h[None, :], x, mask=written)


@triton.jit
def _padded_rows(first, place, offsets_E, padded_offsets_E, E: tl.constexpr, E_PAD: tl.constexpr):
    """The rows at places of a padded buffer that belong to one expert, as `first` does, and where its rows end."""
    e = tl.arange(0, E_PAD)
    starts, ends = _ends(offsets_E, E, E_PAD)
    padded_starts, padded_ends = _ends(padded_offsets_E, E, E_PAD)
    expert = tl.sum(((padded_ends <= first) & (e < E)).to(tl.int32), axis=0)
    return place - _pick(padded_starts, e, expert) + _pick(starts, e, expert), _pick(ends, e, expert)


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    rows_RH,
    slots_TK,
    weights_TK,
    out_TH,
    tokens,
    H,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The sum of a token's rows, in fp32 and in the order of its choices."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (t < tokens)[:, None] & (h < H)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = tl.load(slots_TK + t * TOP_K + k, mask=t < tokens, other=-1).to(tl.int64)[:, None]
        row = tl.load(rows_RH + slot * H + h[None, :], mask=(slot >= 0) & (h < H)[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weights_TK + t * TOP_K + k, mask=t < tokens, other=0.0).to(tl.float32)[:, None]
        total += row
    out = out_TH + t.to(tl.int64)[:, None] * H + h[None, :]
    tl.store(out, total.to(out_TH.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(pre_RF, act_RI, offsets_E, I, E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    """act = silu(gate) * up, where torch's grouped_mm made the products. Rows of no expert here stay unwritten."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (r < tl.load(offsets_E + E - 1))[:, None] & (i < I)[None, :]
    pre = pre_RF + r.to(tl.int64)[:, None] * (2 * I) + i[None, :]
    gate = tl.load(pre, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pre + I, mask=mask, other=0.0).to(tl.float32)
    _, _, act = _silu_parts(gate, up)
    tl.store(act_RI + r.to(tl.int64)[:, None] * I + i[None, :], act.to(act_RI.dtype.element_ty), mask=mask)


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
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """From the gradient of the output to that of the products before SwiGLU.

    With a = silu(gate) * up and y = w * (down @ a), and `dact` = down.T @ dy: da = w * dact, and dw = dy · (down @ a)
    = dact · a, so the gradient of the router's weight needs no output of the forward pass.
    """
    first = tl.program_id(0) * BLOCK_R
    if first >= tl.load(padded_offsets_E + E - 1):
        return
    place = first + tl.arange(0, BLOCK_R)
    row, end = _padded_rows(first, place, offsets_E, padded_offsets_E, E, E_PAD)
    real = row < end
    choice = tl.load(order_R + row, mask=real, other=0)
    weight = tl.load(weights_R + choice, mask=real, other=0.0).to(tl.float32)[:, None]
    dact_rows = dact_PI + place.to(tl.int64)[:, None] * I
    pre_rows = pre_RF + row.to(tl.int64)[:, None] * (2 * I)
    dpre_rows = dpre_PF + place.to(tl.int64)[:, None] * (2 * I)
    dtype = dpre_PF.dtype.element_ty
    dweight = tl.zeros((BLOCK_R,), tl.float32)
    for column in range(0, I, BLOCK_I):
        i = (column + tl.arange(0, BLOCK_I))[None, :]
        inside = i < I
        mask = real[:, None] & inside
        dact = tl.load(dact_rows + i, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(pre_rows + i, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pre_rows + I + i, mask=mask, other=0.0).to(tl.float32)
        silu, slope, act = _silu_parts(gate, up)
        dweight += tl.sum(dact * act, axis=1)
        dact = dact * weight
        tl.store(dact_rows + i, (act * weight).to(dtype), mask=inside)
        tl.store(dpre_rows + i, (dact * up * slope).to(dtype), mask=inside)
        tl.store(dpre_rows + I + i, (dact * silu).to(dtype), mask=inside)
    tl.store(dweight_R + row, dweight, mask=real)


@triton.jit(do_not_specialize=["rows"])
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
    """act = silu(x @ gate.T) * (x @ up.T), and both products before it (`pre`) where the backward pass wants them."""
    starts, ends = _ends(offsets_E, E, E_PAD)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, axis=0) * tl.cdiv(I, BLOCK_N), tl.num_programs(0)):
        expert, row, end, column = _tile_of(tile, starts, ends, tiles, I, E_PAD, BLOCK_M, BLOCK_N, GROUP_M)
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
            pre = _pointers(pre_RF, row, column, 2 * I, BLOCK_M, BLOCK_N)
            tl.store(pre, gate, mask=mask)
            tl.store(pre + I, up, mask=mask)
        _, _, act = _silu_parts(gate.to(tl.float32), up.to(tl.float32))
        act_block = _pointers(act_RI, row, column, I, BLOCK_M, BLOCK_N)
        tl.store(act_block, act.to(act_RI.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
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
    scale,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    NN: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out = a @ b[expert].T, or with NN a @ b[expert]: the down-projection, and the gradients of both inputs.

    With ADD, `scale` times that is added to what is in `out`: what LoRA adds to a product.
    """
    starts, ends = _ends(offsets_E, E, E_PAD)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, axis=0) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        expert, row, end, column = _tile_of(tile, starts, ends, tiles, N, E_PAD, BLOCK_M, BLOCK_N, GROUP_M)
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
        out_block = _pointers(out_RN, row, column, N, BLOCK_M, BLOCK_N)
        mask = (r < end)[:, None] & (c < N)[None, :]
        if ADD:
            out = out * scale + tl.load(out_block, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_block, out.to(out_RN.dtype.element_ty), mask=mask)


@triton.jit
def _block_of_four_bits(
    packed,  # two weights a byte, the first in the upper half; rows of all experts one below the other
    absmax,  # a scale for every SCALED weights in a row; with DOUBLE its code
    nested_absmax,  # with DOUBLE a scale for every NESTED codes of an expert
    nested_offset,  # with DOUBLE what is added to an expert's scales
    nested_code,  # with DOUBLE what the 256 codes mean
    code,  # what the 16 codes of weights mean, fp32
    expert,
    row,  # within the expert
    column,
    rows,
    columns,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOUBLE: tl.constexpr,
    SCALED: tl.constexpr,
    NESTED: tl.constexpr,
):
    """A (ROWS, COLUMNS) block of an expert's matrix, dequantised as bitsandbytes does; 0 outside of the matrix."""
    GROUP: tl.constexpr = min(SCALED, COLUMNS)
    r = row + tl.arange(0, ROWS)
    first = (tl.cast(expert, tl.int64) * rows + row) * columns
    near = tl.arange(0, ROWS)[:, None] * columns
    pair = column // 2 + tl.arange(0, COLUMNS // 2)
    inside = (r < rows)[:, None] & (pair < columns // 2)[None, :]
    two = tl.load(packed + first // 2 + near // 2 + pair[None, :], mask=inside, other=0).to(tl.int32)
    weights = tl.join(tl.load(code + (two >> 4)), tl.load(code + (two & 15)))
    weights = weights.reshape(ROWS, COLUMNS // GROUP, GROUP)
    place = (column + tl.arange(0, COLUMNS // GROUP) * GROUP) // SCALED
    inside = (r < rows)[:, None] & (place < columns // SCALED)[None, :]
    scale = tl.load(absmax + first // SCALED + near // SCALED + place[None, :], mask=inside, other=0)
    if DOUBLE:
        within = (r * (columns // SCALED))[:, None] + place[None, :]
        nested = expert * tl.cdiv(rows * (columns // SCALED), NESTED) + within // NESTED
        scale = tl.load(nested_code + scale.to(tl.int32)) * tl.load(nested_absmax + nested, mask=inside, other=0.0)
        scale = tl.where(inside, scale + tl.load(nested_offset + expert), 0.0)
    return (weights * scale[:, :, None]).reshape(ROWS, COLUMNS).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def rows_of_four_bits_kernel(
    a_RK,
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    nested_code,
    code,
    out_RN,
    offsets_E,  # or the padded ones: `out` has the rows of `a`
    rows,
    K,
    N,
    stride_a,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    NN: tl.constexpr,
    DOUBLE: tl.constexpr,
    SCALED: tl.constexpr,
    NESTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`rows_kernel` with matrices in four bits: out = a @ w[expert].T for (N, K), or with NN a @ w[expert] for (K, N).

    Each tile is dequantised on its way to the product: no matrix is ever written in 16 bits.
    """
    dtype: tl.constexpr = a_RK.dtype.element_ty
    starts, ends = _ends(offsets_E, E, E_PAD)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, axis=0) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        expert, row, end, column = _tile_of(tile, starts, ends, tiles, N, E_PAD, BLOCK_M, BLOCK_N, GROUP_M)
        out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a = _block(a_RK, row, k, rows, K, stride_a, BLOCK_M, BLOCK_K, False, False, False)
            if NN:
                w = _block_of_four_bits(
                    packed, absmax, nested_absmax, nested_offset, nested_code, code, expert, k, column, K, N,
                    dtype, BLOCK_K, BLOCK_N, DOUBLE, SCALED, NESTED,
                )  # fmt: skip
                out = tl.dot(a, w, out, input_precision=PRECISION)
            else:
                w = _block_of_four_bits(
                    packed, absmax, nested_absmax, nested_offset, nested_code, code, expert, column, k, N, K,
                    dtype, BLOCK_N, BLOCK_K, DOUBLE, SCALED, NESTED,
                )  # fmt: skip
                out = tl.dot(a, w.T, out, input_precision=PRECISION)
        r = row + tl.arange(0, BLOCK_M)
        c = column + tl.arange(0, BLOCK_N)
        out_block = _pointers(out_RN, row, column, N, BLOCK_M, BLOCK_N)
        tl.store(out_block, out.to(dtype), mask=(r < end)[:, None] & (c < N)[None, :])


@triton.jit(do_not_specialize=["rows"])
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
    """out[expert] = a[its rows].T @ b[its rows]: of rows, a multiple of BLOCK_K, so that the loop has no mask."""
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
        out_row = tl.cast(expert, tl.int64) * M + row_tile * BLOCK_M
        out_block = _pointers(out_EMN, out_row, column_tile * BLOCK_N, N, BLOCK_M, BLOCK_N)
        tl.store(out_block, out.to(out_EMN.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["rows"])
def to_fp8_kernel(x_RC, out_RC, exponents_RG, rows, columns, GROUP: tl.constexpr, BLOCK_R: tl.constexpr):
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


@triton.jit(do_not_specialize=["rows"])
def from_fp8_kernel(x_RC, exponents_RG, out_RC, rows, columns, GROUP: tl.constexpr, BLOCK_R: tl.constexpr):
    """Back from eight bits."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(1)
    c = group * GROUP + tl.arange(0, GROUP)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    x = tl.load(x_RC + r[:, None] * columns + c[None, :], mask=mask, other=0.0).to(tl.float32)
    exponent = tl.load(exponents_RG + r * tl.num_programs(1) + group, mask=r < rows, other=0).to(tl.float32)
    out = x * tl.exp2(exponent)[:, None]
    tl.store(out_RC + r[:, None] * columns + c[None, :], out.to(out_RC.dtype.element_ty), mask=mask)
