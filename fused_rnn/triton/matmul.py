"""The waist's matrix product: [N, M, K] @ [N, K, L] (+ bias [N, L]) -> [N, M, L], any strides.

A library product may take another order of sums for another number of rows; here the order depends
on K and L alone, so a row of the result has the same bits whatever rows are beside it.
"""

import triton
import triton.language as tl

from fused_rnn.triton.primitives import add_product

UNSPECIALIZED = ["M", "K", "blocks", "splits", "count"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def matmul_tiles(
    a, a_n, a_m, a_k, b, b_n, b_k, b_l, bias, out, M, K, L, blocks, splits,
    M_STEP: tl.constexpr, K_STEP: tl.constexpr, HAS_BIAS: tl.constexpr, IO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one part of the sum: out [splits, N, M, L], part ``split`` over ``blocks`` blocks
    of K from its own first on. IO is the dtype operands are multiplied in; M, K are multiples of
    M_STEP, K_STEP, which lets loads be wide and, where that is BLOCK_K, K go unchecked."""
    M = M // M_STEP * M_STEP
    K = K // K_STEP * K_STEP
    tiles_m, tiles_l = tl.cdiv(M, BLOCK_M), tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    tile = pid % (tiles_m * tiles_l)
    part = pid // (tiles_m * tiles_l)
    n, split = (part // splits).to(tl.int64), part % splits
    # Eight rows of tiles at a time, so that neighbours share operands in the cache.
    group = tile // (8 * tiles_l)
    height = tl.minimum(tiles_m - group * 8, 8)
    tile_m = group * 8 + (tile % (8 * tiles_l)) % height
    tile_l = (tile % (8 * tiles_l)) // height
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    col = (tile_l * BLOCK_L + tl.arange(0, BLOCK_L))[None, :]
    # Counted in blocks, the first k is known to be a multiple of BLOCK_K: without that every load
    # along K is of one element.
    first = split * blocks
    k = tl.arange(0, BLOCK_K)
    start = first.to(tl.int64) * BLOCK_K
    a_at = a + n * a_n + m.to(tl.int64) * a_m + (start + k[None, :]) * a_k
    b_at = b + n * b_n + (start + k[:, None]) * b_k + col.to(tl.int64) * b_l
    m_ok, col_ok = m < M, col < L
    last = tl.minimum(first + blocks, tl.cdiv(K, BLOCK_K))
    total = tl.zeros((BLOCK_M, BLOCK_L), out.dtype.element_ty)
    for block in tl.range(first, last):
        if K_STEP == BLOCK_K:
            x = tl.load(a_at, mask=m_ok, other=0.0)
            y = tl.load(b_at, mask=col_ok, other=0.0)
        else:
            left = K - block * BLOCK_K
            x = tl.load(a_at, mask=m_ok & (k[None, :] < left), other=0.0)
            y = tl.load(b_at, mask=(k[:, None] < left) & col_ok, other=0.0)
        total = add_product(x.to(IO), y.to(IO), total, PRECISION)
        a_at += BLOCK_K * tl.cast(a_k, tl.int64)
        b_at += BLOCK_K * tl.cast(b_k, tl.int64)
    if HAS_BIAS:
        values = tl.load(bias + n * L + col, mask=col_ok, other=0.0).to(total.dtype)
        total += tl.where(split == 0, values, 0.0)
    N = tl.num_programs(0) // (tiles_m * tiles_l * splits)
    out_at = out + ((split.to(tl.int64) * N + n) * M + m) * L + col
    tl.store(out_at, total, mask=m_ok & col_ok)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sum_parts(parts, out, count, splits, BLOCK: tl.constexpr):
    """out [count] = the sum of parts [splits, count], in ascending order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for first in tl.range(0, splits, 8):
        for i in tl.static_range(8):  # whose loads are in flight together
            total += tl.load(parts + at, mask=(at < count) & (first + i < splits), other=0.0)
            parts += count
    tl.store(out + at, total, mask=at < count)
