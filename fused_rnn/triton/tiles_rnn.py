"""Simple RNN on tiles of units and rows: the step path and streamed scans."""

import triton
import triton.language as tl

from fused_rnn.triton import cells as cell
from fused_rnn.triton.primitives import (
    UNSPECIALIZED,
    is_reversed,
    lanes,
    load,
    place,
    row_of,
    store,
)
from fused_rnn.triton.tiles import (
    backward_step,
    forward_step,
    tile_product,
    weight_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rnn_forward_tiles(
    gates_x, gates_x_t, gates_x_b, w_hh, hs, flags, flags_t, flags_b,
    y, relu, reverse_bits, reverse_period, first, count, T, B, S, H, K,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w_hh [S, H, K]; hs [2, S, B, K] the hidden state before and after the step, by parity, not
    rounded to the dtype of the weights (see ``rnn_forward_block``)."""
    ACC: tl.constexpr = hs.dtype.element_ty
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
            x_at = lanes(lane, gates_x_b, S, H) + units
            unit_at = lanes(lane, 1, S, H) + units
            x_now = load(
                gates_x, row_of(t, gates_x_t, gates_x_b, first_row), s, S, H, x_at, ok, ACC
            )
            w_at, w_ok = weight_rows(s, u, H, K, 1, 1, BLOCK_U)
            a = tl.zeros((BLOCK_U, BLOCK_B), ACC)
            x, x_ok = old + at_row * K, rows_ok & (cut == 0)
            a = tile_product(w_hh, w_at, w_ok, x, lane, x_ok, K, a, BLOCK_K, PRECISION)
            new_h = cell.rnn_forward(a + x_now, relu != 0)
            at = lane * K + units
            h_old = load(old, at_row, 0, 1, K, at, ok, ACC)
            store(new, at_row, 0, 1, K, at, tl.where(ended, h_old, new_h), ok)
            store(y, row_of(t, B, 1, first_row), s, S, H, unit_at, tl.where(ended, 0.0, new_h), ok)
        tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rnn_backward_tiles(
    dy, dy_t, dy_b, w, ds, y, flags, flags_t, flags_b,
    dgates, dh, relu, reverse_bits, reverse_period, first, count, T, B, S, H, D,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w: W_hh^T [S, H, D]; ds [2, S, B, D] the operand's gradients by parity; dh [S, B, H] what is
    handed on besides the product, in place."""
    ACC: tl.constexpr = dgates.dtype.element_ty
    s, first_row, lane, rows_ok = place(B, BLOCK_B)
    rows = first_row + lane
    at_row = s * B + first_row
    backwards = is_reversed(s, reverse_bits, reverse_period)
    for q in tl.range(first, first + count):
        t, ended, handed_cut, _, _, _ = backward_step(
            q, T, backwards, flags, flags_t, flags_b, rows, rows_ok
        )
        half = S.to(tl.int64) * B * D
        for u in tl.range(tl.program_id(1), tl.cdiv(H, BLOCK_U), tl.num_programs(1)):
            units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
            ok = (units < H) & rows_ok
            unit_at = lanes(lane, 1, S, H) + units
            dy_at = lanes(lane, dy_b, S, H) + units
            there = ok & (q < T)
            row = row_of(t, B, 1, first_row)
            out = load(y, row, s, S, H, unit_at, there, ACC)
            w_at, w_ok = weight_rows(s, u, H, D, 1, 1, BLOCK_U)
            d = tl.zeros((BLOCK_U, BLOCK_B), ACC)
            x, x_ok = ds + ((q + 1) % 2) * half + at_row * D, rows_ok & (q > 0)
            d = tile_product(w, w_at, w_ok, x, lane, x_ok, D, d, BLOCK_K, PRECISION)
            state = lane * H + units
            handed = tl.where(handed_cut, 0.0, d + load(dh, at_row, 0, 1, H, state, ok, ACC))
            store(dh, at_row, 0, 1, H, state, tl.where(ended | (q == T), handed, 0.0), ok)
            d = handed + load(dy, row_of(t, dy_t, dy_b, first_row), s, S, H, dy_at, there, ACC)
            d = tl.where(ended, 0.0, cell.rnn_backward(out, d, relu != 0))
            store(dgates, row, s, S, H, unit_at, d, there)
            store(ds + (q % 2) * half, at_row, 0, 1, D, lane * D + units, d, there)
        tl.debug_barrier()
