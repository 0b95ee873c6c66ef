"""What the tile kernels share: one program computes BLOCK_U hidden units of a tile of rows.

A kernel of this family runs steps ``first`` to ``first + count`` in processing order. Launched for
one step over all tiles it is the *step path*: any size, one launch a step. Launched for all steps
with a single program per tile of rows it is the *streamed block scan*: the program goes through all
blocks of units, reading the weights anew each step, and a barrier ends the step. What one step
hands to the next lies in memory, twice where programs read what others write.

The operand of a recurrent product is kept in the dtype of the weights; state that enters sums is
kept in float32 (float64) besides. Weights have the summed axis last, so that one loop serves all,
and that axis, of weights and operands alike, is padded with zeros to K (or D), a multiple of 16, so
that they are read in wide pieces whatever the sizes are.
"""

import triton
import triton.language as tl

from fused_rnn.triton.primitives import ENDED, add_product, load, load_flags, starts_segment


@triton.jit
def weight_rows(s, u, H, K, GATES: tl.constexpr, TILES: tl.constexpr, BLOCK_U: tl.constexpr):
    """Offsets [TILES*BLOCK_U, 1] of the rows of a block of units in weights [S, GATES*H, K], of the
    first TILES gates, a power of two and so perhaps more than there are, and which exist."""
    r = tl.arange(0, TILES * BLOCK_U)[:, None]
    gate, unit = r // BLOCK_U, u * BLOCK_U + r % BLOCK_U
    at = ((s * GATES + gate) * H + unit) * K
    return at, (gate < GATES) & (unit < H)


@triton.jit
def tile_product(
    w, w_at, w_ok, x, lane, x_ok, K, total, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """total [M, rows] + the sum over k < K of w[w_at + k] [M, 1] * x[lane * K + k] [1, rows]."""
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(w + w_at + k[None, :], mask=w_ok & (k[None, :] < K), other=0.0)
        b = tl.load(x + (lane * K + k[:, None]), mask=x_ok & (k[:, None] < K), other=0.0)
        total = add_product(a, b, total, PRECISION)
    return total


@triton.jit
def split4(x, BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr):
    """[4*BLOCK_U, BLOCK_B] as its four gates [BLOCK_U, BLOCK_B]."""
    x = tl.reshape(x, (2, 2, BLOCK_U, BLOCK_B))
    even, odd = tl.split(tl.permute(x, (2, 3, 0, 1)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def forward_step(p, T, backwards, flags, flags_t, flags_b, rows, rows_ok):
    """The p-th step in processing order: t, whether rows have ended, and whether the state that
    enters is cut off."""
    t = tl.where(backwards, T - 1 - p, p)
    bits = load_flags(flags, flags_t, flags_b, t, rows, rows_ok, True)
    source = tl.where(backwards, t + 1, t)  # a reversed entry is cut after the step it has left
    source_bits = load_flags(flags, flags_t, flags_b, source, rows, rows_ok, source < T)
    return t, (bits & ENDED) != 0, starts_segment(source_bits)


@triton.jit
def backward_step(q, T, backwards, flags, flags_t, flags_b, rows, rows_ok):
    """The q-th step of the backward scan, q = T being what is left after the last one.

    Returns t; whether rows have ended; whether the gradient handed over by the step after is cut
    off; the step ``before``, whose state enters t, and whether that is the initial state or is cut
    off. Where q = T only the third has a meaning.
    """
    t = tl.where(backwards, q, T - 1 - q)
    bits = load_flags(flags, flags_t, flags_b, t, rows, rows_ok, q < T)
    source = tl.where(backwards, t, t + 1)
    handed = (q > 0) & (source < T)
    handed_bits = load_flags(flags, flags_t, flags_b, source, rows, rows_ok, handed)
    before = tl.where(backwards, t + 1, t - 1)
    there = (before >= 0) & (before < T)
    before_bits = load_flags(flags, flags_t, flags_b, before, rows, rows_ok, there)
    cut = starts_segment(tl.where(backwards, before_bits, bits))
    initial = ((before_bits & ENDED) != 0) | (q + 1 >= T)
    return t, (bits & ENDED) != 0, starts_segment(handed_bits), before, initial, cut


@triton.jit
def entering(
    first, states, at_row, before_row, s, S, H, state, unit_at, initial, cut, ok,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The state [units, rows] that enters a step: zero where it is cut off, first [S, B, H] where
    it is the initial state, else the row before of states [T, B, S, H]."""
    own = load(first, at_row, 0, 1, H, state, ok, DTYPE)
    inner = ok & (initial == 0) & (cut == 0)
    left = load(states, before_row, s, S, H, unit_at, inner, DTYPE)
    return tl.where(cut, 0.0, tl.where(initial, own, left))
