"""LSTM on tiles of units and rows: the step path, with or without projection, and streamed scans.

The projected LSTM takes two launches a step in each direction, so it runs on the step path alone.
"""

import triton
import triton.language as tl

from fused_rnn.triton import cells as cell
from fused_rnn.triton.primitives import (
    UNSPECIALIZED,
    is_reversed,
    lanes,
    load,
    load3,
    place,
    row_of,
    store,
    store3,
)
from fused_rnn.triton.tiles import (
    backward_step,
    entering,
    forward_step,
    split4,
    tile_product,
    weight_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lstm_forward_tiles(
    gates_x, gates_x_t, gates_x_b, w_hh, hs, c, flags, flags_t, flags_b,
    y, cells, gates, m, keep_cells, keep_gates, reverse_bits, reverse_period,
    first, count, T, B, S, H, K, M, PROJECTED: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gates, cell state and hidden state.

    w_hh [S, 4H, K]; hs [2, S, B, K] the hidden state before and after the step, by parity; c
    [S, B, H] the cell state, changed in place. PROJECTED: the hidden state before projection goes
    to m [S, B, M], and hs and y are left to ``lstm_project_tiles``.
    """
    ACC: tl.constexpr = c.dtype.element_ty
    s, first_row, lane, rows_ok = place(B, BLOCK_B)
    rows = first_row + lane
    at_row = s * B + first_row
    backwards = is_reversed(s, reverse_bits, reverse_period)
    for p in tl.range(first, first + count):
        t, ended, cut = forward_step(p, T, backwards, flags, flags_t, flags_b, rows, rows_ok)
        old = hs + (p % 2) * S.to(tl.int64) * B * K
        new = hs + ((p + 1) % 2) * S.to(tl.int64) * B * K
        for u in tl.range(tl.program_id(1), tl.cdiv(H, BLOCK_U), tl.num_programs(1)):
            units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
            ok = (units < H) & rows_ok
            x_at = lanes(lane, gates_x_b, S, 4 * H) + units
            unit_at = lanes(lane, 1, S, H) + units
            gates_at = lanes(lane, 1, S, 4 * H) + units
            row = row_of(t, gates_x_t, gates_x_b, first_row)
            x_i, x_f, x_g = load3(gates_x, row, s, S, 4 * H, H, x_at, ok, ACC)
            x_o = load(gates_x, row, s, S, 4 * H, 3 * H + x_at, ok, ACC)
            w_at, w_ok = weight_rows(s, u, H, K, 4, 4, BLOCK_U)
            a = tl.zeros((4 * BLOCK_U, BLOCK_B), ACC)
            x_ok = rows_ok & (cut == 0)
            x = old + at_row * K
            a = tile_product(w_hh, w_at, w_ok, x, lane, x_ok, K, a, BLOCK_K, PRECISION)
            a_i, a_f, a_g, a_o = split4(a, BLOCK_U, BLOCK_B)
            state = lane * H + units
            c_old = load(c, at_row, 0, 1, H, state, ok, ACC)
            c_prev = tl.where(cut, 0.0, c_old)
            i, f, g, o, new_c, new_h = cell.lstm_forward(
                a_i + x_i, a_f + x_f, a_g + x_g, a_o + x_o, c_prev
            )
            store(c, at_row, 0, 1, H, state, tl.where(ended, c_old, new_c), ok)
            row = row_of(t, B, 1, first_row)
            if PROJECTED:
                store(m, at_row, 0, 1, M, lane * M + units, new_h, ok)
            else:
                at = lane * K + units
                h_old = load(old, at_row, 0, 1, K, at, ok, ACC)
                store(new, at_row, 0, 1, K, at, tl.where(ended, h_old, new_h), ok)
                store(y, row, s, S, H, unit_at, tl.where(ended, 0.0, new_h), ok)
            new_c = tl.where(ended, 0.0, new_c)
            store(cells, row, s, S, H, unit_at, new_c, ok & (keep_cells != 0))
            i, f = tl.where(ended, 0.0, i), tl.where(ended, 0.0, f)
            g, o = tl.where(ended, 0.0, g), tl.where(ended, 0.0, o)
            keep = ok & (keep_gates != 0)
            store3(gates, row, s, S, 4 * H, H, gates_at, i, f, g, keep)
            store(gates, row, s, S, 4 * H, 3 * H + gates_at, o, keep)
        tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lstm_project_tiles(
    w_hr, m, hs, flags, flags_t, flags_b, y, reverse_bits, reverse_period, first, T, B, S, P, K, D,
    ACC: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = W_hr m for one step: w_hr [S, P, K], m [S, B, K]; writes y and the other half of hs
    [2, S, B, D]."""
    s, first_row, lane, rows_ok = place(B, BLOCK_B)
    rows = first_row + lane
    at_row = s * B + first_row
    backwards = is_reversed(s, reverse_bits, reverse_period)
    t, ended, _ = forward_step(first, T, backwards, flags, flags_t, flags_b, rows, rows_ok)
    u = tl.program_id(1)
    units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
    ok = (units < P) & rows_ok
    unit_at = lanes(lane, 1, S, P) + units
    w_at, w_ok = weight_rows(s, u, P, K, 1, 1, BLOCK_U)
    h = tl.zeros((BLOCK_U, BLOCK_B), ACC)
    x = m + at_row * K
    h = tile_product(w_hr, w_at, w_ok, x, lane, rows_ok, K, h, BLOCK_K, PRECISION)
    half = S.to(tl.int64) * B * D
    at = lane * D + units
    h_old = load(hs + (first % 2) * half, at_row, 0, 1, D, at, ok, ACC)
    new = tl.where(ended, h_old, h)
    store(hs + ((first + 1) % 2) * half, at_row, 0, 1, D, at, new, ok)
    store(y, row_of(t, B, 1, first_row), s, S, P, unit_at, tl.where(ended, 0.0, h), ok)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lstm_backward_tiles(
    dy, dy_t, dy_b, dcells, dcells_t, dcells_b, w, ds, c0, cells, gates, flags, flags_t, flags_b,
    dgates, dh, dh_operand, dc, reverse_bits, reverse_period, first, count, T, B, S, H, K, D,
    PROJECTED: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gate gradients of a step, from the gate gradients of the step after it.

    w: W_hh^T [S, H, D], or W_hr^T [S, H, K] where PROJECTED; ds [2, S, B, D] the operand's gate
    gradients by parity; dh [S, B, H], dc [S, B, H]: what is handed from step to step besides the
    product, changed in place, in the end the gradients of the initial states. PROJECTED: dh_operand
    [S, B, K] is the gradient of this step's hidden state, as ``lstm_backward_project_tiles`` has
    left it; dh and dy are not read.
    """
    ACC: tl.constexpr = dgates.dtype.element_ty
    s, first_row, lane, rows_ok = place(B, BLOCK_B)
    rows = first_row + lane
    at_row = s * B + first_row
    backwards = is_reversed(s, reverse_bits, reverse_period)
    for q in tl.range(first, first + count):
        t, ended, handed_cut, before, initial, cut = backward_step(
            q, T, backwards, flags, flags_t, flags_b, rows, rows_ok
        )
        half = S.to(tl.int64) * B * D
        for u in tl.range(tl.program_id(1), tl.cdiv(H, BLOCK_U), tl.num_programs(1)):
            units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
            ok = (units < H) & rows_ok
            gates_at = lanes(lane, 1, S, 4 * H) + units
            unit_at = lanes(lane, 1, S, H) + units
            dcells_at = lanes(lane, dcells_b, S, H) + units
            dy_at = lanes(lane, dy_b, S, H) + units
            there = ok & (q < T)
            row = row_of(t, B, 1, first_row)
            i, f, g = load3(gates, row, s, S, 4 * H, H, gates_at, there, ACC)
            o = load(gates, row, s, S, 4 * H, 3 * H + gates_at, there, ACC)
            c = load(cells, row, s, S, H, unit_at, there, ACC)
            state = lane * H + units
            before_row = row_of(before, B, 1, first_row)
            c_prev = entering(
                c0, cells, at_row, before_row, s, S, H, state, unit_at, initial, cut, there, ACC
            )
            outer = row_of(t, dcells_t, dcells_b, first_row)
            dc_now = load(dcells, outer, s, S, H, dcells_at, there, ACC)
            dc_old = tl.where(handed_cut, 0.0, load(dc, at_row, 0, 1, H, state, ok, ACC))

            dm = tl.zeros((BLOCK_U, BLOCK_B), ACC)
            if PROJECTED:
                w_at, w_ok = weight_rows(s, u, H, K, 1, 1, BLOCK_U)
                x = dh_operand + at_row * K
                dm = tile_product(w, w_at, w_ok, x, lane, rows_ok, K, dm, BLOCK_K, PRECISION)
            else:
                w_at, w_ok = weight_rows(s, u, H, D, 1, 1, BLOCK_U)
                x = ds + ((q + 1) % 2) * half + at_row * D
                x_ok = rows_ok & (q > 0)
                dm = tile_product(w, w_at, w_ok, x, lane, x_ok, D, dm, BLOCK_K, PRECISION)
                dm += load(dh, at_row, 0, 1, H, state, ok, ACC)
                dm = tl.where(handed_cut, 0.0, dm)
                kept = tl.where(ended | (q == T), dm, 0.0)
                store(dh, at_row, 0, 1, H, state, kept, ok)
                dm += load(dy, row_of(t, dy_t, dy_b, first_row), s, S, H, dy_at, there, ACC)
            di, df, dg, d_o, new_dc = cell.lstm_backward(i, f, g, o, c, c_prev, dm, dc_now + dc_old)
            store(dc, at_row, 0, 1, H, state, tl.where(ended | (q == T), dc_old, new_dc), ok)
            di, df = tl.where(ended, 0.0, di), tl.where(ended, 0.0, df)
            dg, d_o = tl.where(ended, 0.0, dg), tl.where(ended, 0.0, d_o)
            store3(dgates, row, s, S, 4 * H, H, gates_at, di, df, dg, there)
            store(dgates, row, s, S, 4 * H, 3 * H + gates_at, d_o, there)
            x = ds + (q % 2) * half
            store3(x, at_row, 0, 1, D, H, lane * D + units, di, df, dg, there)
            store(x, at_row, 0, 1, D, 3 * H + lane * D + units, d_o, there)
        tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lstm_backward_project_tiles(
    dy, dy_t, dy_b, w, ds, flags, flags_t, flags_b, dh_out, dh, dh_operand,
    reverse_bits, reverse_period, first, T, B, S, P, K, D,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole gradient of a step's projected hidden state: dh_out [T, B, S, P].

    w: W_hh^T [S, P, D]; dh [S, B, P] what is handed on besides the product, in place; dh_operand
    [S, B, K] takes the gradient in the dtype of the weights.
    """
    ACC: tl.constexpr = dh.dtype.element_ty
    s, first_row, lane, rows_ok = place(B, BLOCK_B)
    rows = first_row + lane
    at_row = s * B + first_row
    backwards = is_reversed(s, reverse_bits, reverse_period)
    q = first
    t, ended, handed_cut, _, _, _ = backward_step(
        q, T, backwards, flags, flags_t, flags_b, rows, rows_ok
    )
    u = tl.program_id(1)
    units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
    ok = (units < P) & rows_ok
    dy_at = lanes(lane, dy_b, S, P) + units
    unit_at = lanes(lane, 1, S, P) + units
    there = ok & (q < T)
    w_at, w_ok = weight_rows(s, u, P, D, 1, 1, BLOCK_U)
    x = ds + ((q + 1) % 2) * S.to(tl.int64) * B * D + at_row * D
    d = tl.zeros((BLOCK_U, BLOCK_B), ACC)
    d = tile_product(w, w_at, w_ok, x, lane, rows_ok & (q > 0), D, d, BLOCK_K, PRECISION)
    state = lane * P + units
    d = tl.where(handed_cut, 0.0, d + load(dh, at_row, 0, 1, P, state, ok, ACC))
    store(dh, at_row, 0, 1, P, state, tl.where(ended | (q == T), d, 0.0), ok)
    d = d + load(dy, row_of(t, dy_t, dy_b, first_row), s, S, P, dy_at, there, ACC)
    d = tl.where(ended, 0.0, d)
    store(dh_out, row_of(t, B, 1, first_row), s, S, P, unit_at, d, there)
    store(dh_operand, at_row, 0, 1, K, lane * K + units, d, there)
