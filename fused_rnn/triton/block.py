"""Block scans: one program runs a whole sequence for a tile of rows of one stack entry.

The program keeps the recurrent weights on its multiprocessor (the compiler places tiles that a loop
does not change in shared memory or registers) and the state in registers. Nothing passes between
programs, so a row's result depends on the row alone. Tiles are [units, rows], BLOCK_H >= H.

Sequences [T, B, S, n] that come from outside have strides ``x_t`` and ``x_b`` counted in rows of
S*n elements; those made here are contiguous. Outputs and the tape are docs/design.md's.
"""

import triton
import triton.language as tl

from fused_rnn.triton import cells as cell
from fused_rnn.triton.primitives import (
    ENDED,
    UNSPECIALIZED,
    is_reversed,
    lanes,
    load,
    load3,
    load_flags,
    place,
    product,
    row_of,
    starts_segment,
    store,
    store3,
)


@triton.jit
def _place(B, H, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """Stack entry, the tile's first row, units [BLOCK_H, 1], rows of the tile [1, BLOCK_B], which
    rows and which elements exist."""
    s, first, lane, rows_ok = place(B, BLOCK_B)
    units = tl.arange(0, BLOCK_H)[:, None]
    return s, first, units, lane, rows_ok, (units < H) & rows_ok


@triton.jit
def _weights(
    w, s, gate, GATES: tl.constexpr, H, K, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """One gate's recurrent weights [H, H] of w [S, GATES*H, K], or their transpose. K is H padded
    to a multiple of 16, so that they are read in wide pieces."""
    i = tl.arange(0, BLOCK_H)[:, None]
    k = tl.arange(0, BLOCK_H)[None, :]
    base = w + (s * GATES + gate) * H * K
    at = k * K + i if TRANSPOSED else i * K + k
    ok = (k < H) & (i < K) if TRANSPOSED else (i < H) & (k < K)
    return tl.load(base + at, mask=ok, other=0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lstm_forward_block(
    gates_x, gates_x_t, gates_x_b, w_hh, h0, c0, flags, flags_t, flags_b,
    y, h_n, c_n, cells, gates, keep_cells, keep_gates, reverse_bits, reverse_period, T, B, S, H, K,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """LSTM forward without projection; stores cells and gates where keep_cells and keep_gates."""
    IO: tl.constexpr = w_hh.dtype.element_ty
    ACC: tl.constexpr = c_n.dtype.element_ty
    s, first, units, lane, rows_ok, ok = _place(B, H, BLOCK_H, BLOCK_B)
    rows = first + lane
    x_at = lanes(lane, gates_x_b, S, 4 * H) + units
    unit_at = lanes(lane, 1, S, H) + units
    gates_at = lanes(lane, 1, S, 4 * H) + units
    backwards = is_reversed(s, reverse_bits, reverse_period)
    w_i = _weights(w_hh, s, 0, 4, H, K, BLOCK_H, False)
    w_f = _weights(w_hh, s, 1, 4, H, K, BLOCK_H, False)
    w_g = _weights(w_hh, s, 2, 4, H, K, BLOCK_H, False)
    w_o = _weights(w_hh, s, 3, 4, H, K, BLOCK_H, False)
    state = lane * H + units
    state_row = (s * B + first) * H
    h = tl.load(h0 + state_row + state, mask=ok, other=0.0).to(ACC)
    c = tl.load(c0 + state_row + state, mask=ok, other=0.0).to(ACC)

    t = tl.where(backwards, T - 1, 0)
    row = row_of(t, gates_x_t, gates_x_b, first)
    x_i, x_f, x_g = load3(gates_x, row, s, S, 4 * H, H, x_at, ok, ACC)
    x_o = load(gates_x, row, s, S, 4 * H, 3 * H + x_at, ok, ACC)
    bits = load_flags(flags, flags_t, flags_b, t, rows, rows_ok, True)
    started = rows < 0  # whether a segment started at the step processed before
    padding = units >= H  # may come to hold a NaN, which would meet the zeros of padded weights
    for p in tl.range(0, T, num_stages=1):
        # The next step's inputs are on their way while this one is computed.
        more = p + 1 < T
        next_t = tl.where(backwards, T - 2 - p, p + 1)
        row = row_of(next_t, gates_x_t, gates_x_b, first)
        next_i, next_f, next_g = load3(gates_x, row, s, S, 4 * H, H, x_at, ok & more, ACC)
        next_o = load(gates_x, row, s, S, 4 * H, 3 * H + x_at, ok & more, ACC)
        next_bits = load_flags(flags, flags_t, flags_b, next_t, rows, rows_ok, more)

        ended = (bits & ENDED) != 0
        cut = tl.where(backwards, started, starts_segment(bits))
        started = starts_segment(bits)
        operand = tl.where(cut | padding, 0.0, h).to(IO)
        a_i = product(w_i, operand, x_i, PRECISION)
        a_f = product(w_f, operand, x_f, PRECISION)
        a_g = product(w_g, operand, x_g, PRECISION)
        a_o = product(w_o, operand, x_o, PRECISION)
        i, f, g, o, new_c, new_h = cell.lstm_forward(a_i, a_f, a_g, a_o, tl.where(cut, 0.0, c))
        h = tl.where(ended, h, new_h)
        c = tl.where(ended, c, new_c)

        row = row_of(t, B, 1, first)
        store(y, row, s, S, H, unit_at, tl.where(ended, 0.0, new_h), ok)
        store(cells, row, s, S, H, unit_at, tl.where(ended, 0.0, new_c), ok & (keep_cells != 0))
        keep = ok & (keep_gates != 0)
        i, f = tl.where(ended, 0.0, i), tl.where(ended, 0.0, f)
        g, o = tl.where(ended, 0.0, g), tl.where(ended, 0.0, o)
        store3(gates, row, s, S, 4 * H, H, gates_at, i, f, g, keep)
        store(gates, row, s, S, 4 * H, 3 * H + gates_at, o, keep)
        t, bits = next_t, next_bits
        x_i, x_f, x_g, x_o = next_i, next_f, next_g, next_o
    tl.store(h_n + state_row + state, h.to(h_n.dtype.element_ty), mask=ok)
    tl.store(c_n + state_row + state, c, mask=ok)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def lstm_backward_block(
    dy, dy_t, dy_b, dh_n, dc_n, dcells, dcells_t, dcells_b, w_hh, c0, cells, gates,
    flags, flags_t, flags_b, dgates, dh0, dc0, reverse_bits, reverse_period, T, B, S, H, K,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """LSTM backward without projection: the steps in the opposite order, each ending with the
    product that carries dh to the step before."""
    IO: tl.constexpr = w_hh.dtype.element_ty
    ACC: tl.constexpr = dgates.dtype.element_ty
    s, first, units, lane, rows_ok, ok = _place(B, H, BLOCK_H, BLOCK_B)
    rows = first + lane
    dy_at = lanes(lane, dy_b, S, H) + units
    dcells_at = lanes(lane, dcells_b, S, H) + units
    unit_at = lanes(lane, 1, S, H) + units
    gates_at = lanes(lane, 1, S, 4 * H) + units
    backwards = is_reversed(s, reverse_bits, reverse_period)
    w_i = _weights(w_hh, s, 0, 4, H, K, BLOCK_H, True)
    w_f = _weights(w_hh, s, 1, 4, H, K, BLOCK_H, True)
    w_g = _weights(w_hh, s, 2, 4, H, K, BLOCK_H, True)
    w_o = _weights(w_hh, s, 3, 4, H, K, BLOCK_H, True)
    state = lane * H + units
    state_row = (s * B + first) * H
    dh = tl.load(dh_n + state_row + state, mask=ok, other=0.0).to(ACC)
    dc = tl.load(dc_n + state_row + state, mask=ok, other=0.0).to(ACC)
    first_c = tl.load(c0 + state_row + state, mask=ok, other=0.0).to(ACC)
    zero = tl.zeros((BLOCK_H, BLOCK_B), ACC)

    t = tl.where(backwards, 0, T - 1)
    bits = load_flags(flags, flags_t, flags_b, t, rows, rows_ok, True)
    row = row_of(t, B, 1, first)
    c = load(cells, row, s, S, H, unit_at, ok, ACC)
    i, f, g = load3(gates, row, s, S, 4 * H, H, gates_at, ok, ACC)
    o = load(gates, row, s, S, 4 * H, 3 * H + gates_at, ok, ACC)
    dy_now = load(dy, row_of(t, dy_t, dy_b, first), s, S, H, dy_at, ok, ACC)
    dcells_now = load(dcells, row_of(t, dcells_t, dcells_b, first), s, S, H, dcells_at, ok, ACC)
    for q in tl.range(0, T, num_stages=1):
        # before: the step whose state enters this one, and which comes next; its inputs are on
        # their way while this one is computed.
        there = ok & (q + 1 < T)
        before = tl.where(backwards, q + 1, T - 2 - q)
        before_bits = load_flags(flags, flags_t, flags_b, before, rows, rows_ok, q + 1 < T)
        row = row_of(before, B, 1, first)
        before_c = load(cells, row, s, S, H, unit_at, there, ACC)
        next_i, next_f, next_g = load3(gates, row, s, S, 4 * H, H, gates_at, there, ACC)
        next_o = load(gates, row, s, S, 4 * H, 3 * H + gates_at, there, ACC)
        next_dy = load(dy, row_of(before, dy_t, dy_b, first), s, S, H, dy_at, there, ACC)
        row = row_of(before, dcells_t, dcells_b, first)
        next_dcells = load(dcells, row, s, S, H, dcells_at, there, ACC)

        ended = (bits & ENDED) != 0
        cut = starts_segment(tl.where(backwards, before_bits, bits))
        initial = ((before_bits & ENDED) != 0) | (q + 1 >= T)
        c_prev = tl.where(cut, 0.0, tl.where(initial, first_c, before_c))
        di, df, dg, d_o, new_dc = cell.lstm_backward(
            i, f, g, o, c, c_prev, dy_now + dh, dcells_now + dc
        )
        di = tl.where(ended, 0.0, di)
        df = tl.where(ended, 0.0, df)
        dg = tl.where(ended, 0.0, dg)
        d_o = tl.where(ended, 0.0, d_o)
        row = row_of(t, B, 1, first)
        store3(dgates, row, s, S, 4 * H, H, gates_at, di, df, dg, ok)
        store(dgates, row, s, S, 4 * H, 3 * H + gates_at, d_o, ok)
        # Two chains of products instead of one: half the latency.
        new_dh = product(w_i, di.to(IO), zero, PRECISION)
        other = product(w_f, df.to(IO), zero, PRECISION)
        new_dh = product(w_g, dg.to(IO), new_dh, PRECISION)
        other = product(w_o, d_o.to(IO), other, PRECISION)
        dh = tl.where(ended, dh, tl.where(cut, 0.0, new_dh + other))
        dc = tl.where(ended, dc, tl.where(cut, 0.0, new_dc))
        t, bits, c = before, before_bits, before_c
        i, f, g, o, dy_now, dcells_now = next_i, next_f, next_g, next_o, next_dy, next_dcells
    tl.store(dh0 + state_row + state, dh, mask=ok)
    tl.store(dc0 + state_row + state, dc, mask=ok)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gru_forward_block(
    gates_x, gates_x_t, gates_x_b, w_hh, b_hn, h0, flags, flags_t, flags_b,
    y, h_n, gates, keep_gates, reverse_bits, reverse_period, T, B, S, H, K,
    ACC: tl.constexpr, HAS_BIAS: tl.constexpr, RESET_AFTER: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GRU forward, reset after the recurrent product or before it."""
    IO: tl.constexpr = w_hh.dtype.element_ty
    KEPT: tl.constexpr = 4 if RESET_AFTER else 3
    s, first, units, lane, rows_ok, ok = _place(B, H, BLOCK_H, BLOCK_B)
    rows = first + lane
    x_at = lanes(lane, gates_x_b, S, 3 * H) + units
    unit_at = lanes(lane, 1, S, H) + units
    gates_at = lanes(lane, 1, S, KEPT * H) + units
    backwards = is_reversed(s, reverse_bits, reverse_period)
    w_r = _weights(w_hh, s, 0, 3, H, K, BLOCK_H, False)
    w_z = _weights(w_hh, s, 1, 3, H, K, BLOCK_H, False)
    w_n = _weights(w_hh, s, 2, 3, H, K, BLOCK_H, False)
    bias = tl.zeros((BLOCK_H, BLOCK_B), ACC)
    if HAS_BIAS:
        bias += tl.load(b_hn + s * H + units, mask=units < H, other=0.0).to(ACC)
    state = lane * H + units
    state_row = (s * B + first) * H
    h = tl.load(h0 + state_row + state, mask=ok, other=0.0).to(ACC)

    t = tl.where(backwards, T - 1, 0)
    row = row_of(t, gates_x_t, gates_x_b, first)
    x_r, x_z, x_n = load3(gates_x, row, s, S, 3 * H, H, x_at, ok, ACC)
    bits = load_flags(flags, flags_t, flags_b, t, rows, rows_ok, True)
    started = rows < 0  # whether a segment started at the step processed before
    padding = units >= H  # may come to hold a NaN, which would meet the zeros of padded weights
    for p in tl.range(0, T, num_stages=1):
        more = p + 1 < T
        next_t = tl.where(backwards, T - 2 - p, p + 1)
        row = row_of(next_t, gates_x_t, gates_x_b, first)
        next_r, next_z, next_n = load3(gates_x, row, s, S, 3 * H, H, x_at, ok & more, ACC)
        next_bits = load_flags(flags, flags_t, flags_b, next_t, rows, rows_ok, more)

        ended = (bits & ENDED) != 0
        cut = tl.where(backwards, started, starts_segment(bits))
        started = starts_segment(bits)
        h_prev = tl.where(cut, 0.0, h)
        operand = tl.where(padding, 0.0, h_prev).to(IO)
        a_r = product(w_r, operand, x_r, PRECISION)
        a_z = product(w_z, operand, x_z, PRECISION)
        row = row_of(t, B, 1, first)
        keep = ok & (keep_gates != 0)
        if RESET_AFTER:
            hn = product(w_n, operand, bias, PRECISION)
            r, z, n, new_h = cell.gru_after_forward(a_r, a_z, x_n, hn, h_prev)
            at = 3 * H + gates_at
            store(gates, row, s, S, KEPT * H, at, tl.where(ended, 0.0, hn), keep)
        else:
            r, z = cell.sigmoid(a_r), cell.sigmoid(a_z)
            n = cell.tanh(product(w_n, tl.where(padding, 0.0, r * h_prev).to(IO), x_n, PRECISION))
            new_h = cell.gru_update(z, n, h_prev)
        h = tl.where(ended, h, new_h)

        store(y, row, s, S, H, unit_at, tl.where(ended, 0.0, new_h), ok)
        r, z, n = tl.where(ended, 0.0, r), tl.where(ended, 0.0, z), tl.where(ended, 0.0, n)
        store3(gates, row, s, S, KEPT * H, H, gates_at, r, z, n, keep)
        t, bits = next_t, next_bits
        x_r, x_z, x_n = next_r, next_z, next_n
    tl.store(h_n + state_row + state, h.to(h_n.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gru_backward_block(
    dy, dy_t, dy_b, dh_n, w_hh, h0, y, gates, flags, flags_t, flags_b,
    dgates, dgates_hn, dh0, reverse_bits, reverse_period, T, B, S, H, K,
    RESET_AFTER: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GRU backward: the steps in the opposite order."""
    IO: tl.constexpr = w_hh.dtype.element_ty
    ACC: tl.constexpr = dgates.dtype.element_ty
    KEPT: tl.constexpr = 4 if RESET_AFTER else 3
    s, first, units, lane, rows_ok, ok = _place(B, H, BLOCK_H, BLOCK_B)
    rows = first + lane
    dy_at = lanes(lane, dy_b, S, H) + units
    unit_at = lanes(lane, 1, S, H) + units
    gates_at = lanes(lane, 1, S, KEPT * H) + units
    dgates_at = lanes(lane, 1, S, 3 * H) + units
    backwards = is_reversed(s, reverse_bits, reverse_period)
    w_r = _weights(w_hh, s, 0, 3, H, K, BLOCK_H, True)
    w_z = _weights(w_hh, s, 1, 3, H, K, BLOCK_H, True)
    w_n = _weights(w_hh, s, 2, 3, H, K, BLOCK_H, True)
    state = lane * H + units
    state_row = (s * B + first) * H
    dh = tl.load(dh_n + state_row + state, mask=ok, other=0.0).to(ACC)
    first_h = tl.load(h0 + state_row + state, mask=ok, other=0.0).to(ACC)
    zero = tl.zeros((BLOCK_H, BLOCK_B), ACC)

    t = tl.where(backwards, 0, T - 1)
    bits = load_flags(flags, flags_t, flags_b, t, rows, rows_ok, True)
    row = row_of(t, B, 1, first)
    r, z, n = load3(gates, row, s, S, KEPT * H, H, gates_at, ok, ACC)
    hn = load(gates, row, s, S, KEPT * H, (KEPT - 1) * H + gates_at, ok, ACC)
    dy_now = load(dy, row_of(t, dy_t, dy_b, first), s, S, H, dy_at, ok, ACC)
    for q in tl.range(0, T, num_stages=1):
        # before: the step whose state enters this one, and which comes next; its inputs are on
        # their way while this one is computed.
        there = ok & (q + 1 < T)
        before = tl.where(backwards, q + 1, T - 2 - q)
        before_bits = load_flags(flags, flags_t, flags_b, before, rows, rows_ok, q + 1 < T)
        row = row_of(before, B, 1, first)
        before_h = load(y, row, s, S, H, unit_at, there, ACC)
        next_r, next_z, next_n = load3(gates, row, s, S, KEPT * H, H, gates_at, there, ACC)
        next_hn = load(gates, row, s, S, KEPT * H, (KEPT - 1) * H + gates_at, there, ACC)
        next_dy = load(dy, row_of(before, dy_t, dy_b, first), s, S, H, dy_at, there, ACC)

        ended = (bits & ENDED) != 0
        cut = starts_segment(tl.where(backwards, before_bits, bits))
        initial = ((before_bits & ENDED) != 0) | (q + 1 >= T)
        h_prev = tl.where(cut, 0.0, tl.where(initial, first_h, before_h))
        total = dy_now + dh
        row = row_of(t, B, 1, first)
        if RESET_AFTER:
            dr, dz, dn, dhn, new_dh = cell.gru_after_backward(r, z, n, hn, h_prev, total)
            dhn = tl.where(ended, 0.0, dhn)
            store(dgates_hn, row, s, S, H, unit_at, dhn, ok)
            new_dh += product(w_n, dhn.to(IO), zero, PRECISION)
        else:
            dz, dn, new_dh = cell.gru_backward(z, n, h_prev, total)
            drh = product(w_n, tl.where(ended, 0.0, dn).to(IO), zero, PRECISION)
            dr, new_dh = cell.gru_before_reset_backward(r, h_prev, drh, new_dh)
        dr = tl.where(ended, 0.0, dr)
        dz = tl.where(ended, 0.0, dz)
        store3(dgates, row, s, S, 3 * H, H, dgates_at, dr, dz, tl.where(ended, 0.0, dn), ok)
        from_rz = product(w_r, dr.to(IO), zero, PRECISION)
        from_rz = product(w_z, dz.to(IO), from_rz, PRECISION)
        dh = tl.where(ended, dh, tl.where(cut, 0.0, new_dh + from_rz))
        t, bits = before, before_bits
        r, z, n, hn, dy_now = next_r, next_z, next_n, next_hn, next_dy
    tl.store(dh0 + state_row + state, dh, mask=ok)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rnn_forward_block(
    gates_x, gates_x_t, gates_x_b, w_hh, h0, flags, flags_t, flags_b,
    y, h_n, relu, reverse_bits, reverse_period, T, B, S, H, K,
    ACC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Simple RNN forward; relu != 0 chooses the activation. Nothing bounds the state of a relu,
    whose kink makes much of a little rounding, so the state is multiplied unrounded."""
    s, first, units, lane, rows_ok, ok = _place(B, H, BLOCK_H, BLOCK_B)
    rows = first + lane
    x_at = lanes(lane, gates_x_b, S, H) + units
    unit_at = lanes(lane, 1, S, H) + units
    backwards = is_reversed(s, reverse_bits, reverse_period)
    w = _weights(w_hh, s, 0, 1, H, K, BLOCK_H, False)
    state = lane * H + units
    state_row = (s * B + first) * H
    h = tl.load(h0 + state_row + state, mask=ok, other=0.0).to(ACC)

    t = tl.where(backwards, T - 1, 0)
    row = row_of(t, gates_x_t, gates_x_b, first)
    x = load(gates_x, row, s, S, H, x_at, ok, ACC)
    bits = load_flags(flags, flags_t, flags_b, t, rows, rows_ok, True)
    started = rows < 0  # whether a segment started at the step processed before
    padding = units >= H  # may come to hold a NaN, which would meet the zeros of padded weights
    for p in tl.range(0, T, num_stages=1):
        more = p + 1 < T
        next_t = tl.where(backwards, T - 2 - p, p + 1)
        row = row_of(next_t, gates_x_t, gates_x_b, first)
        next_x = load(gates_x, row, s, S, H, x_at, ok & more, ACC)
        next_bits = load_flags(flags, flags_t, flags_b, next_t, rows, rows_ok, more)

        ended = (bits & ENDED) != 0
        cut = tl.where(backwards, started, starts_segment(bits))
        started = starts_segment(bits)
        a = product(w, tl.where(cut | padding, 0.0, h), x, PRECISION)
        new_h = cell.rnn_forward(a, relu != 0)
        h = tl.where(ended, h, new_h)
        row = row_of(t, B, 1, first)
        store(y, row, s, S, H, unit_at, tl.where(ended, 0.0, new_h), ok)
        t, bits, x = next_t, next_bits, next_x
    tl.store(h_n + state_row + state, h.to(h_n.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rnn_backward_block(
    dy, dy_t, dy_b, dh_n, w_hh, y, flags, flags_t, flags_b,
    dgates, dh0, relu, reverse_bits, reverse_period, T, B, S, H, K,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Simple RNN backward: the output is the tape."""
    IO: tl.constexpr = w_hh.dtype.element_ty
    ACC: tl.constexpr = dgates.dtype.element_ty
    s, first, units, lane, rows_ok, ok = _place(B, H, BLOCK_H, BLOCK_B)
    rows = first + lane
    dy_at = lanes(lane, dy_b, S, H) + units
    unit_at = lanes(lane, 1, S, H) + units
    backwards = is_reversed(s, reverse_bits, reverse_period)
    w = _weights(w_hh, s, 0, 1, H, K, BLOCK_H, True)
    state = lane * H + units
    state_row = (s * B + first) * H
    dh = tl.load(dh_n + state_row + state, mask=ok, other=0.0).to(ACC)
    zero = tl.zeros((BLOCK_H, BLOCK_B), ACC)

    t = tl.where(backwards, 0, T - 1)
    bits = load_flags(flags, flags_t, flags_b, t, rows, rows_ok, True)
    out = load(y, row_of(t, B, 1, first), s, S, H, unit_at, ok, ACC)
    dy_now = load(dy, row_of(t, dy_t, dy_b, first), s, S, H, dy_at, ok, ACC)
    for q in tl.range(0, T, num_stages=1):
        there = ok & (q + 1 < T)
        before = tl.where(backwards, q + 1, T - 2 - q)
        before_bits = load_flags(flags, flags_t, flags_b, before, rows, rows_ok, q + 1 < T)
        next_out = load(y, row_of(before, B, 1, first), s, S, H, unit_at, there, ACC)
        next_dy = load(dy, row_of(before, dy_t, dy_b, first), s, S, H, dy_at, there, ACC)

        ended = (bits & ENDED) != 0
        cut = starts_segment(tl.where(backwards, before_bits, bits))
        d = tl.where(ended, 0.0, cell.rnn_backward(out, dy_now + dh, relu != 0))
        store(dgates, row_of(t, B, 1, first), s, S, H, unit_at, d, ok)
        new_dh = product(w, d.to(IO), zero, PRECISION)
        dh = tl.where(ended, dh, tl.where(cut, 0.0, new_dh))
        t, bits, out, dy_now = before, before_bits, next_out, next_dy
    tl.store(dh0 + state_row + state, dh, mask=ok)
