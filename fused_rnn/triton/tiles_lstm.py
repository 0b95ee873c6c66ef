"""LSTM on tiles of units and rows: the step path, with or without projection, and streamed scans.

The projected LSTM takes two launches a step in each direction, so it runs on the step path alone.
"""

import triton
import triton.language as tl

from fused_rnn.triton import cells as cell
from fused_rnn.triton.primitives import is_reversed, load, load3, row_of, store, store3
from fused_rnn.triton.tiles import (
    UNSPECIALIZED,
    backward_step,
    forward_step,
    place,
    split4,
    tile_product,
    weight_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lstm_forward_tiles(
    gates_x, gates_x_t, gates_x_b, w_hh, hs, c, flags, flags_t, flags_b,
    y, cells, gates, m, keep_cells, keep_gates, reverse_bits, reverse_period,
    first, count, T, B, S, H, P, PROJECTED: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gates, cell state and hidden state.

    w_hh [S, 4H, P]; hs [2, S, B, P] the hidden state before and after the step, by parity; c
    [S, B, H] the cell state, changed in place. PROJECTED: the hidden state before projection goes
    to m [S, B, H], and hs and y are left to ``lstm_project_tiles``.
    """
    ACC: tl.constexpr = c.dtype.element_ty
    s, rows, rows_ok = place(B, BLOCK_B)
    backwards = is_reversed(s, reverse_bits, reverse_period)
    for p in tl.range(first, first + count):
        t, ended, cut = forward_step(p, T, backwards, flags, flags_t, flags_b, rows, rows_ok)
        old = hs + (p % 2) * S.to(tl.int64) * B * P
        new = hs + ((p + 1) % 2) * S.to(tl.int64) * B * P
        h_at = (s * B + rows) * P
        for u in tl.range(tl.program_id(1), tl.cdiv(H, BLOCK_U), tl.num_programs(1)):
            units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
            ok = (units < H) & rows_ok
            row = row_of(t, gates_x_t, gates_x_b, rows)
            x_i, x_f, x_g = load3(gates_x, row, s, S, 4 * H, H, units, ok, ACC)
            x_o = load(gates_x, row, s, S, 4 * H, 3 * H + units, ok, ACC)
            w_at, w_ok = weight_rows(s, u, H, P, 4, 4, BLOCK_U)
            a = tl.zeros((4 * BLOCK_U, BLOCK_B), ACC)
            a = tile_product(
                w_hh, w_at, w_ok, old, h_at, rows_ok & (cut == 0), P, a, BLOCK_K, PRECISION
            )
            a_i, a_f, a_g, a_o = split4(a, BLOCK_U, BLOCK_B)
            c_at = c + (s * B + rows) * H + units
            c_old = tl.load(c_at, mask=ok, other=0.0)
            c_prev = tl.where(cut, 0.0, c_old)
            i, f, g, o, new_c, new_h = cell.lstm_forward(
                a_i + x_i, a_f + x_f, a_g + x_g, a_o + x_o, c_prev
            )
            tl.store(c_at, tl.where(ended, c_old, new_c), mask=ok)
            row = row_of(t, B, 1, rows)
            if PROJECTED:
                m_at = m + (s * B + rows) * H + units
                tl.store(m_at, new_h.to(m.dtype.element_ty), mask=ok)
            else:
                h_old = tl.load(old + h_at + units, mask=ok, other=0.0)
                h_new = new_h.to(h_old.dtype)
                tl.store(new + h_at + units, tl.where(ended, h_old, h_new), mask=ok)
                store(y, row, s, S, H, units, tl.where(ended, 0.0, new_h), ok)
            new_c = tl.where(ended, 0.0, new_c)
            store(cells, row, s, S, H, units, new_c, ok & (keep_cells != 0))
            i, f = tl.where(ended, 0.0, i), tl.where(ended, 0.0, f)
            g, o = tl.where(ended, 0.0, g), tl.where(ended, 0.0, o)
            keep = ok & (keep_gates != 0)
            store3(gates, row, s, S, 4 * H, H, units, i, f, g, keep)
            store(gates, row, s, S, 4 * H, 3 * H + units, o, keep)
        tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lstm_project_tiles(
    w_hr, m, hs, flags, flags_t, flags_b, y, reverse_bits, reverse_period, first, T, B, S, H, P,
    ACC: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = W_hr m for one step: w_hr [S, P, H], m [S, B, H]; writes y and the other half of hs."""
    s, rows, rows_ok = place(B, BLOCK_B)
    backwards = is_reversed(s, reverse_bits, reverse_period)
    t, ended, _ = forward_step(first, T, backwards, flags, flags_t, flags_b, rows, rows_ok)
    u = tl.program_id(1)
    units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
    ok = (units < P) & rows_ok
    w_at, w_ok = weight_rows(s, u, P, H, 1, 1, BLOCK_U)
    h = tl.zeros((BLOCK_U, BLOCK_B), ACC)
    m_at = (s * B + rows) * H
    h = tile_product(w_hr, w_at, w_ok, m, m_at, rows_ok, H, h, BLOCK_K, PRECISION)
    half = S.to(tl.int64) * B * P
    h_at = hs + (s * B + rows) * P + units
    h_old = tl.load(h_at + (first % 2) * half, mask=ok, other=0.0)
    new = tl.where(ended, h_old, h.to(h_old.dtype))
    tl.store(h_at + ((first + 1) % 2) * half, new, mask=ok)
    store(y, row_of(t, B, 1, rows), s, S, P, units, tl.where(ended, 0.0, h), ok)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lstm_backward_tiles(
    dy, dy_t, dy_b, dcells, dcells_t, dcells_b, w, ds, c0, cells, gates, flags, flags_t, flags_b,
    dgates, dh, dh_operand, dc, reverse_bits, reverse_period, first, count, T, B, S, H, P,
    PROJECTED: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gate gradients of a step, from the gate gradients of the step after it.

    w: W_hh^T [S, H, 4H], or W_hr^T [S, H, P] where PROJECTED; ds [2, S, B, 4H] the operand's gate
    gradients by parity; dh [S, B, H], dc [S, B, H]: what is handed from step to step besides the
    product, changed in place, in the end the gradients of the initial states. PROJECTED: dh_operand
    [S, B, P] is the gradient of this step's hidden state, as ``lstm_backward_project_tiles`` has
    left it; dh and dy are not read.
    """
    ACC: tl.constexpr = dgates.dtype.element_ty
    s, rows, rows_ok = place(B, BLOCK_B)
    backwards = is_reversed(s, reverse_bits, reverse_period)
    for q in tl.range(first, first + count):
        t, ended, handed_cut, before, initial, cut = backward_step(
            q, T, backwards, flags, flags_t, flags_b, rows, rows_ok
        )
        half = S.to(tl.int64) * B * 4 * H
        d_at = (s * B + rows) * 4 * H
        for u in tl.range(tl.program_id(1), tl.cdiv(H, BLOCK_U), tl.num_programs(1)):
            units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
            ok = (units < H) & rows_ok
            there = ok & (q < T)
            row = row_of(t, B, 1, rows)
            i, f, g = load3(gates, row, s, S, 4 * H, H, units, there, ACC)
            o = load(gates, row, s, S, 4 * H, 3 * H + units, there, ACC)
            c = load(cells, row, s, S, H, units, there, ACC)
            state = (s * B + rows) * H + units
            first_c = tl.load(c0 + state, mask=there, other=0.0).to(ACC)
            before_row = row_of(before, B, 1, rows)
            inner = there & (initial == 0)
            c_prev = load(cells, before_row, s, S, H, units, inner & (cut == 0), ACC)
            c_prev = tl.where(cut, 0.0, tl.where(initial, first_c, c_prev))
            outer = row_of(t, dcells_t, dcells_b, rows)
            dc_now = load(dcells, outer, s, S, H, units, there, ACC)
            dc_old = tl.where(handed_cut, 0.0, tl.load(dc + state, mask=ok, other=0.0))

            dm = tl.zeros((BLOCK_U, BLOCK_B), ACC)
            if PROJECTED:
                w_at, w_ok = weight_rows(s, u, H, P, 1, 1, BLOCK_U)
                x_at = (s * B + rows) * P
                dm = tile_product(
                    w, w_at, w_ok, dh_operand, x_at, rows_ok, P, dm, BLOCK_K, PRECISION
                )
            else:
                w_at, w_ok = weight_rows(s, u, H, 4 * H, 1, 1, BLOCK_U)
                K = tl.where(q > 0, 4 * H, 0)
                x = ds + ((q + 1) % 2) * half
                dm = tile_product(w, w_at, w_ok, x, d_at, rows_ok, K, dm, BLOCK_K, PRECISION)
                dm += tl.load(dh + state, mask=ok, other=0.0)
                dm = tl.where(handed_cut, 0.0, dm)
                kept = tl.where(ended | (q == T), dm, 0.0)
                tl.store(dh + state, kept, mask=ok)
                dm += load(dy, row_of(t, dy_t, dy_b, rows), s, S, H, units, there, ACC)
            di, df, dg, d_o, new_dc = cell.lstm_backward(i, f, g, o, c, c_prev, dm, dc_now + dc_old)
            tl.store(dc + state, tl.where(ended | (q == T), dc_old, new_dc), mask=ok)
            di, df = tl.where(ended, 0.0, di), tl.where(ended, 0.0, df)
            dg, d_o = tl.where(ended, 0.0, dg), tl.where(ended, 0.0, d_o)
            store3(dgates, row, s, S, 4 * H, H, units, di, df, dg, there)
            store(dgates, row, s, S, 4 * H, 3 * H + units, d_o, there)
            x = ds + (q % 2) * half
            store3(x, s * B + rows, 0, 1, 4 * H, H, units, di, df, dg, there)
            store(x, s * B + rows, 0, 1, 4 * H, 3 * H + units, d_o, there)
        tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lstm_backward_project_tiles(
    dy, dy_t, dy_b, w, ds, flags, flags_t, flags_b, dh_out, dh, dh_operand,
    reverse_bits, reverse_period, first, T, B, S, H, P,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole gradient of a step's projected hidden state: dh_out [T, B, S, P].

    w: W_hh^T [S, P, 4H]; dh [S, B, P] what is handed on besides the product, in place; dh_operand
    [S, B, P] takes the gradient in the dtype of the weights.
    """
    ACC: tl.constexpr = dh.dtype.element_ty
    s, rows, rows_ok = place(B, BLOCK_B)
    backwards = is_reversed(s, reverse_bits, reverse_period)
    q = first
    t, ended, handed_cut, _, _, _ = backward_step(
        q, T, backwards, flags, flags_t, flags_b, rows, rows_ok
    )
    u = tl.program_id(1)
    units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
    ok = (units < P) & rows_ok
    there = ok & (q < T)
    w_at, w_ok = weight_rows(s, u, P, 4 * H, 1, 1, BLOCK_U)
    x = ds + ((q + 1) % 2) * S.to(tl.int64) * B * 4 * H
    x_at = (s * B + rows) * 4 * H
    d = tl.zeros((BLOCK_U, BLOCK_B), ACC)
    K = tl.where(q > 0, 4 * H, 0)
    d = tile_product(w, w_at, w_ok, x, x_at, rows_ok, K, d, BLOCK_K, PRECISION)
    state = (s * B + rows) * P + units
    d = tl.where(handed_cut, 0.0, d + tl.load(dh + state, mask=ok, other=0.0))
    tl.store(dh + state, tl.where(ended | (q == T), d, 0.0), mask=ok)
    d = d + load(dy, row_of(t, dy_t, dy_b, rows), s, S, P, units, there, ACC)
    d = tl.where(ended, 0.0, d)
    store(dh_out, row_of(t, B, 1, rows), s, S, P, units, d, there)
    tl.store(dh_operand + state, d.to(dh_operand.dtype.element_ty), mask=there)
