"""The waist's matrix product: [N, M, K] @ [N, K, L] (+ bias [N, L]) -> [N, M, L], any strides.

A library product may take another order of sums for another number of rows; here the order depends
on K and L alone, so a row of the result has the same bits whatever rows are beside it.
"""

import triton
import triton.language as tl

from fused_rnn.triton.primitives import product

UNSPECIALIZED = ["M", "K", "chunk", "splits", "count"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def matmul_tiles(
    a, a_n, a_m, a_k, b, b_n, b_k, b_l, bias, out, M, K, L, chunk, splits,
    M_ALIGNED: tl.constexpr, K_ALIGNED: tl.constexpr, HAS_BIAS: tl.constexpr, IO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one part of the sum: out [splits, N, M, L], part ``split`` over the K from
    split * chunk; chunk is a multiple of BLOCK_K unless it is all of K. IO is the dtype operands
    are multiplied in; *_ALIGNED that M, K are multiples of 16, which lets loads be wide."""
    if M_ALIGNED:
        M = M // 16 * 16
    if K_ALIGNED:
        K = K // 16 * 16
    tiles_m, tiles_l = tl.cdiv(M, BLOCK_M), tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    tile = pid % (tiles_m * tiles_l)
    part = pid // (tiles_m * tiles_l)
    n, split = (part // splits).to(tl.int64), (part % splits).to(tl.int64)
    # Eight rows of tiles at a time, so that neighbours share operands in the cache.
    group = tile // (8 * tiles_l)
    height = tl.minimum(tiles_m - group * 8, 8)
    tile_m = group * 8 + (tile % (8 * tiles_l)) % height
    tile_l = (tile % (8 * tiles_l)) // height
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    col = (tile_l * BLOCK_L + tl.arange(0, BLOCK_L))[None, :]
    a_at = a + n * a_n + m.to(tl.int64) * a_m
    b_at = b + n * b_n + col.to(tl.int64) * b_l
    total = tl.zeros((BLOCK_M, BLOCK_L), out.dtype.element_ty)
    for start in tl.range(0, chunk, BLOCK_K):
        k = split * chunk + (start + tl.arange(0, BLOCK_K))
        x = tl.load(a_at + k[None, :] * a_k, mask=(m < M) & (k[None, :] < K), other=0.0)
        y = tl.load(b_at + k[:, None] * b_k, mask=(k[:, None] < K) & (col < L), other=0.0)
        total = product(x.to(IO), y.to(IO), total, PRECISION)
    if HAS_BIAS:
        values = tl.load(bias + n * L + col, mask=col < L, other=0.0).to(total.dtype)
        total += tl.where(split == 0, values, 0.0)
    N = tl.num_programs(0) // (tiles_m * tiles_l * splits)
    out_at = out + ((split * N + n) * M + m) * L + col
    tl.store(out_at, total, mask=(m < M) & (col < L))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sum_parts(parts, out, count, splits, BLOCK: tl.constexpr):
    """out [count] = the sum of parts [splits, count], in ascending order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for _ in tl.range(0, splits):
        total += tl.load(parts + at, mask=at < count, other=0.0)
        parts += count
    tl.store(out + at, total, mask=at < count)
