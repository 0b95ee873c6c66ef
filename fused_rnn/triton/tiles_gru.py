"""GRU on tiles of units and rows: the step path, and streamed scans of the reset-after variant.

Reset-before takes two products one after another, hence two launches a step in each direction, so
it runs on the step path alone.
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
def gru_forward_tiles(
    gates_x, gates_x_t, gates_x_b, w_hh, b_hn, hs, h, flags, flags_t, flags_b,
    y, gates, keep_gates, reverse_bits, reverse_period, first, count, T, B, S, H, K,
    HAS_BIAS: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reset after the product. w_hh [S, 3H, K]; hs [2, S, B, K] the hidden state as an operand
    before and after the step, by parity; h [S, B, H] the hidden state itself, in place."""
    ACC: tl.constexpr = h.dtype.element_ty
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
            x_at = lanes(lane, gates_x_b, S, 3 * H) + units
            unit_at = lanes(lane, 1, S, H) + units
            gates_at = lanes(lane, 1, S, 4 * H) + units
            row = row_of(t, gates_x_t, gates_x_b, first_row)
            x_r, x_z, x_n = load3(gates_x, row, s, S, 3 * H, H, x_at, ok, ACC)
            w_at, w_ok = weight_rows(s, u, H, K, 3, 4, BLOCK_U)
            a = tl.zeros((4 * BLOCK_U, BLOCK_B), ACC)
            x, x_ok = old + at_row * K, rows_ok & (cut == 0)
            a = tile_product(w_hh, w_at, w_ok, x, lane, x_ok, K, a, BLOCK_K, PRECISION)
            a_r, a_z, hn, _ = split4(a, BLOCK_U, BLOCK_B)
            if HAS_BIAS:
                hn += tl.load(b_hn + s * H + units, mask=units < H, other=0.0).to(ACC)
            state = lane * H + units
            h_old = load(h, at_row, 0, 1, H, state, ok, ACC)
            h_prev = tl.where(cut, 0.0, h_old)
            r, z, n, new_h = cell.gru_after_forward(a_r + x_r, a_z + x_z, x_n, hn, h_prev)
            left = tl.where(ended, h_old, new_h)
            store(h, at_row, 0, 1, H, state, left, ok)
            store(new, at_row, 0, 1, K, lane * K + units, left, ok)
            row = row_of(t, B, 1, first_row)
            store(y, row, s, S, H, unit_at, tl.where(ended, 0.0, new_h), ok)
            r, z = tl.where(ended, 0.0, r), tl.where(ended, 0.0, z)
            n, hn = tl.where(ended, 0.0, n), tl.where(ended, 0.0, hn)
            keep = ok & (keep_gates != 0)
            store3(gates, row, s, S, 4 * H, H, gates_at, r, z, n, keep)
            store(gates, row, s, S, 4 * H, 3 * H + gates_at, hn, keep)
        tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gru_backward_tiles(
    dy, dy_t, dy_b, w, ds, h0, y, gates, flags, flags_t, flags_b,
    dgates, dgates_hn, dh, reverse_bits, reverse_period, first, count, T, B, S, H, D,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reset after the product. w: W_hh^T [S, H, D]; ds [2, S, B, D] the operand's gradients of
    r, z and hn by parity; dh [S, B, H] what is handed on besides the product, in place."""
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
            unit_at = lanes(lane, 1, S, H) + units
            dy_at = lanes(lane, dy_b, S, H) + units
            gates_at = lanes(lane, 1, S, 4 * H) + units
            dgates_at = lanes(lane, 1, S, 3 * H) + units
            there = ok & (q < T)
            row = row_of(t, B, 1, first_row)
            r, z, n = load3(gates, row, s, S, 4 * H, H, gates_at, there, ACC)
            hn = load(gates, row, s, S, 4 * H, 3 * H + gates_at, there, ACC)
            state = lane * H + units
            before_row = row_of(before, B, 1, first_row)
            h_prev = entering(
                h0, y, at_row, before_row, s, S, H, state, unit_at, initial, cut, there, ACC
            )

            w_at, w_ok = weight_rows(s, u, H, D, 1, 1, BLOCK_U)
            d = tl.zeros((BLOCK_U, BLOCK_B), ACC)
            x, x_ok = ds + ((q + 1) % 2) * half + at_row * D, rows_ok & (q > 0)
            d = tile_product(w, w_at, w_ok, x, lane, x_ok, D, d, BLOCK_K, PRECISION)
            handed = tl.where(handed_cut, 0.0, d + load(dh, at_row, 0, 1, H, state, ok, ACC))
            d = handed + load(dy, row_of(t, dy_t, dy_b, first_row), s, S, H, dy_at, there, ACC)
            dr, dz, dn, dhn, new_dh = cell.gru_after_backward(r, z, n, hn, h_prev, d)
            store(dh, at_row, 0, 1, H, state, tl.where(ended | (q == T), handed, new_dh), ok)
            dr, dz = tl.where(ended, 0.0, dr), tl.where(ended, 0.0, dz)
            dn, dhn = tl.where(ended, 0.0, dn), tl.where(ended, 0.0, dhn)
            store3(dgates, row, s, S, 3 * H, H, dgates_at, dr, dz, dn, there)
            store(dgates_hn, row, s, S, H, unit_at, dhn, there)
            x = ds + (q % 2) * half
            store3(x, at_row, 0, 1, D, H, lane * D + units, dr, dz, dhn, there)
        tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gru_before_gates_tiles(
    gates_x, gates_x_t, gates_x_b, w_hh, hs, h, flags, flags_t, flags_b,
    gates, rh, z_now, keep_gates, reverse_bits, reverse_period, first, T, B, S, H, K,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reset before the product, first half of a step: r and z. Leaves the operand r * h in rh
    [S, B, K] and z in z_now [S, B, H]; hs, h as in ``gru_forward_tiles``."""
    ACC: tl.constexpr = h.dtype.element_ty
    s, first_row, lane, rows_ok = place(B, BLOCK_B)
    rows = first_row + lane
    at_row = s * B + first_row
    backwards = is_reversed(s, reverse_bits, reverse_period)
    t, ended, cut = forward_step(first, T, backwards, flags, flags_t, flags_b, rows, rows_ok)
    u = tl.program_id(1)
    units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
    ok = (units < H) & rows_ok
    x_at = lanes(lane, gates_x_b, S, 3 * H) + units
    gates_at = lanes(lane, 1, S, 3 * H) + units
    row = row_of(t, gates_x_t, gates_x_b, first_row)
    x_r = load(gates_x, row, s, S, 3 * H, x_at, ok, ACC)
    x_z = load(gates_x, row, s, S, 3 * H, H + x_at, ok, ACC)
    # Both gates as one tile: rows of r, then rows of z.
    w_at, w_ok = weight_rows(s, u, H, K, 3, 2, BLOCK_U)
    old = hs + (first % 2) * S.to(tl.int64) * B * K
    a = tl.zeros((2 * BLOCK_U, BLOCK_B), ACC)
    x, x_ok = old + at_row * K, rows_ok & (cut == 0)
    a = tile_product(w_hh, w_at, w_ok, x, lane, x_ok, K, a, BLOCK_K, PRECISION)
    a_r, a_z = tl.split(tl.permute(tl.reshape(a, (2, BLOCK_U, BLOCK_B)), (1, 2, 0)))
    r, z = cell.sigmoid(a_r + x_r), cell.sigmoid(a_z + x_z)
    state = lane * H + units
    h_prev = tl.where(cut, 0.0, load(h, at_row, 0, 1, H, state, ok, ACC))
    store(rh, at_row, 0, 1, K, lane * K + units, r * h_prev, ok)
    store(z_now, at_row, 0, 1, H, state, z, ok)
    row = row_of(t, B, 1, first_row)
    keep = ok & (keep_gates != 0)
    store(gates, row, s, S, 3 * H, gates_at, tl.where(ended, 0.0, r), keep)
    store(gates, row, s, S, 3 * H, H + gates_at, tl.where(ended, 0.0, z), keep)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gru_before_candidate_tiles(
    gates_x, gates_x_t, gates_x_b, w_hh, hs, h, flags, flags_t, flags_b,
    y, gates, rh, z_now, keep_gates, reverse_bits, reverse_period, first, T, B, S, H, K,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reset before the product, second half of a step: n and the new state."""
    ACC: tl.constexpr = h.dtype.element_ty
    s, first_row, lane, rows_ok = place(B, BLOCK_B)
    rows = first_row + lane
    at_row = s * B + first_row
    backwards = is_reversed(s, reverse_bits, reverse_period)
    t, ended, cut = forward_step(first, T, backwards, flags, flags_t, flags_b, rows, rows_ok)
    u = tl.program_id(1)
    units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
    ok = (units < H) & rows_ok
    x_at = lanes(lane, gates_x_b, S, 3 * H) + units
    unit_at = lanes(lane, 1, S, H) + units
    gates_at = lanes(lane, 1, S, 3 * H) + units
    x_n = load(
        gates_x, row_of(t, gates_x_t, gates_x_b, first_row), s, S, 3 * H, 2 * H + x_at, ok, ACC
    )
    w_at = ((s * 3 + 2) * H + units) * K
    a = tl.zeros((BLOCK_U, BLOCK_B), ACC)
    x = rh + at_row * K
    a = tile_product(w_hh, w_at, units < H, x, lane, rows_ok, K, a, BLOCK_K, PRECISION)
    n = cell.tanh(a + x_n)
    state = lane * H + units
    z = load(z_now, at_row, 0, 1, H, state, ok, ACC)
    h_old = load(h, at_row, 0, 1, H, state, ok, ACC)
    new_h = cell.gru_update(z, n, tl.where(cut, 0.0, h_old))
    left = tl.where(ended, h_old, new_h)
    store(h, at_row, 0, 1, H, state, left, ok)
    new = hs + ((first + 1) % 2) * S.to(tl.int64) * B * K
    store(new, at_row, 0, 1, K, lane * K + units, left, ok)
    row = row_of(t, B, 1, first_row)
    store(y, row, s, S, H, unit_at, tl.where(ended, 0.0, new_h), ok)
    keep = ok & (keep_gates != 0)
    store(gates, row, s, S, 3 * H, 2 * H + gates_at, tl.where(ended, 0.0, n), keep)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gru_before_backward_candidate_tiles(
    dy, dy_t, dy_b, w, ds, h0, y, gates, flags, flags_t, flags_b,
    dgates, dn_operand, dh, reverse_bits, reverse_period, first, T, B, S, H, D, K,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reset before the product, first half of a backward step: dz, dn and the part of dh that
    passes no product. w: W_rz^T [S, H, D]; ds [2, S, B, D] the operand's gradients of r and z by
    parity; dn_operand [S, B, K]; dh [S, B, H] as in ``gru_backward_tiles``."""
    ACC: tl.constexpr = dgates.dtype.element_ty
    s, first_row, lane, rows_ok = place(B, BLOCK_B)
    rows = first_row + lane
    at_row = s * B + first_row
    backwards = is_reversed(s, reverse_bits, reverse_period)
    q = first
    t, ended, handed_cut, before, initial, cut = backward_step(
        q, T, backwards, flags, flags_t, flags_b, rows, rows_ok
    )
    u = tl.program_id(1)
    units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
    ok = (units < H) & rows_ok
    gates_at = lanes(lane, 1, S, 3 * H) + units
    unit_at = lanes(lane, 1, S, H) + units
    dy_at = lanes(lane, dy_b, S, H) + units
    there = ok & (q < T)
    row = row_of(t, B, 1, first_row)
    z = load(gates, row, s, S, 3 * H, H + gates_at, there, ACC)
    n = load(gates, row, s, S, 3 * H, 2 * H + gates_at, there, ACC)
    state = lane * H + units
    before_row = row_of(before, B, 1, first_row)
    h_prev = entering(h0, y, at_row, before_row, s, S, H, state, unit_at, initial, cut, there, ACC)
    half = S.to(tl.int64) * B * D
    w_at, w_ok = weight_rows(s, u, H, D, 1, 1, BLOCK_U)
    d = tl.zeros((BLOCK_U, BLOCK_B), ACC)
    x, x_ok = ds + ((q + 1) % 2) * half + at_row * D, rows_ok & (q > 0)
    d = tile_product(w, w_at, w_ok, x, lane, x_ok, D, d, BLOCK_K, PRECISION)
    handed = tl.where(handed_cut, 0.0, d + load(dh, at_row, 0, 1, H, state, ok, ACC))
    d = handed + load(dy, row_of(t, dy_t, dy_b, first_row), s, S, H, dy_at, there, ACC)
    dz, dn, new_dh = cell.gru_backward(z, n, h_prev, d)
    store(dh, at_row, 0, 1, H, state, tl.where(ended | (q == T), handed, new_dh), ok)
    dz, dn = tl.where(ended, 0.0, dz), tl.where(ended, 0.0, dn)
    store(dgates, row, s, S, 3 * H, H + gates_at, dz, there)
    store(dgates, row, s, S, 3 * H, 2 * H + gates_at, dn, there)
    store(ds + (q % 2) * half, at_row, 0, 1, D, H + lane * D + units, dz, there)
    store(dn_operand, at_row, 0, 1, K, lane * K + units, dn, there)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gru_before_backward_reset_tiles(
    w, ds, dn_operand, h0, y, gates, flags, flags_t, flags_b,
    dgates, dh, reverse_bits, reverse_period, first, T, B, S, H, D, K,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reset before the product, second half of a backward step: dr, from W_n^T dn; w: W_n^T
    [S, H, K]."""
    ACC: tl.constexpr = dgates.dtype.element_ty
    s, first_row, lane, rows_ok = place(B, BLOCK_B)
    rows = first_row + lane
    at_row = s * B + first_row
    backwards = is_reversed(s, reverse_bits, reverse_period)
    q = first
    t, ended, _, before, initial, cut = backward_step(
        q, T, backwards, flags, flags_t, flags_b, rows, rows_ok
    )
    u = tl.program_id(1)
    units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
    ok = (units < H) & rows_ok
    gates_at = lanes(lane, 1, S, 3 * H) + units
    unit_at = lanes(lane, 1, S, H) + units
    row = row_of(t, B, 1, first_row)
    r = load(gates, row, s, S, 3 * H, gates_at, ok, ACC)
    state = lane * H + units
    before_row = row_of(before, B, 1, first_row)
    h_prev = entering(h0, y, at_row, before_row, s, S, H, state, unit_at, initial, cut, ok, ACC)
    w_at, w_ok = weight_rows(s, u, H, K, 1, 1, BLOCK_U)
    drh = tl.zeros((BLOCK_U, BLOCK_B), ACC)
    x = dn_operand + at_row * K
    drh = tile_product(w, w_at, w_ok, x, lane, rows_ok, K, drh, BLOCK_K, PRECISION)
    handed = load(dh, at_row, 0, 1, H, state, ok, ACC)
    dr, new_dh = cell.gru_before_reset_backward(r, h_prev, drh, handed)
    store(dh, at_row, 0, 1, H, state, tl.where(ended, handed, new_dh), ok)
    dr = tl.where(ended, 0.0, dr)
    store(dgates, row, s, S, 3 * H, gates_at, dr, ok)
    x = ds + (q % 2) * S.to(tl.int64) * B * D
    store(x, at_row, 0, 1, D, lane * D + units, dr, ok)
