"""Simple RNN on tiles of units and rows: the step path and streamed scans."""

import triton
import triton.language as tl

from fused_rnn.triton import cells as cell
from fused_rnn.triton.primitives import is_reversed, load, row_of, store
from fused_rnn.triton.tiles import (
    UNSPECIALIZED,
    backward_step,
    forward_step,
    place,
    tile_product,
    weight_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rnn_forward_tiles(
    gates_x, gates_x_t, gates_x_b, w_hh, hs, flags, flags_t, flags_b,
    y, relu, reverse_bits, reverse_period, first, count, T, B, S, H,
    ACC: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w_hh [S, H, H]; hs [2, S, B, H] the hidden state before and after the step, by parity."""
    s, rows, rows_ok = place(B, BLOCK_B)
    backwards = is_reversed(s, reverse_bits, reverse_period)
    for p in tl.range(first, first + count):
        t, ended, cut = forward_step(p, T, backwards, flags, flags_t, flags_b, rows, rows_ok)
        old = hs + (p % 2) * S.to(tl.int64) * B * H
        new = hs + ((p + 1) % 2) * S.to(tl.int64) * B * H
        for u in tl.range(tl.program_id(1), tl.cdiv(H, BLOCK_U), tl.num_programs(1)):
            units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
            ok = (units < H) & rows_ok
            x_now = load(gates_x, row_of(t, gates_x_t, gates_x_b, rows), s, S, H, units, ok, ACC)
            w_at, w_ok = weight_rows(s, u, H, H, 1, 1, BLOCK_U)
            a = tl.zeros((BLOCK_U, BLOCK_B), ACC)
            x_at, x_ok = (s * B + rows) * H, rows_ok & (cut == 0)
            a = tile_product(w_hh, w_at, w_ok, old, x_at, x_ok, H, a, BLOCK_K, PRECISION)
            new_h = cell.rnn_forward(a + x_now, relu != 0)
            state = (s * B + rows) * H + units
            h_old = tl.load(old + state, mask=ok, other=0.0)
            tl.store(new + state, tl.where(ended, h_old, new_h.to(h_old.dtype)), mask=ok)
            store(y, row_of(t, B, 1, rows), s, S, H, units, tl.where(ended, 0.0, new_h), ok)
        tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rnn_backward_tiles(
    dy, dy_t, dy_b, w, ds, y, flags, flags_t, flags_b,
    dgates, dh, relu, reverse_bits, reverse_period, first, count, T, B, S, H,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w: W_hh^T [S, H, H]; ds [2, S, B, H] the operand's gradients by parity; dh [S, B, H] what is
    handed on besides the product, in place."""
    ACC: tl.constexpr = dgates.dtype.element_ty
    s, rows, rows_ok = place(B, BLOCK_B)
    backwards = is_reversed(s, reverse_bits, reverse_period)
    for q in tl.range(first, first + count):
        t, ended, handed_cut, _, _, _ = backward_step(
            q, T, backwards, flags, flags_t, flags_b, rows, rows_ok
        )
        half = S.to(tl.int64) * B * H
        x_at = (s * B + rows) * H
        for u in tl.range(tl.program_id(1), tl.cdiv(H, BLOCK_U), tl.num_programs(1)):
            units = u * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
            ok = (units < H) & rows_ok
            there = ok & (q < T)
            row = row_of(t, B, 1, rows)
            out = load(y, row, s, S, H, units, there, ACC)
            w_at, w_ok = weight_rows(s, u, H, H, 1, 1, BLOCK_U)
            d = tl.zeros((BLOCK_U, BLOCK_B), ACC)
            K = tl.where(q > 0, H, 0)
            x = ds + ((q + 1) % 2) * half
            d = tile_product(w, w_at, w_ok, x, x_at, rows_ok, K, d, BLOCK_K, PRECISION)
            state = (s * B + rows) * H + units
            handed = tl.where(handed_cut, 0.0, d + tl.load(dh + state, mask=ok, other=0.0))
            tl.store(dh + state, tl.where(ended | (q == T), handed, 0.0), mask=ok)
            d = handed + load(dy, row_of(t, dy_t, dy_b, rows), s, S, H, units, there, ACC)
            d = tl.where(ended, 0.0, cell.rnn_backward(out, d, relu != 0))
            store(dgates, row, s, S, H, units, d, there)
            store(ds + (q % 2) * half, s * B + rows, 0, 1, H, units, d, there)
        tl.debug_barrier()
