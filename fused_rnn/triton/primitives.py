"""What every kernel here shares: products at a stated precision, and where rows and steps lie.

Tiles are [units, rows]: hidden units along the first axis, so that the weights are the first
operand of a product (tensor cores want 16 or 64 of those) and the batch, often small, the second.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Bits of flags, as in fused_rnn.reference.
ENDED = tl.constexpr(1)
RESET = tl.constexpr(2)

# Arguments that change from call to call must not make new variants of a kernel.
UNSPECIALIZED = [
    *("gates_x_t", "gates_x_b", "dy_t", "dy_b", "dcells_t", "dcells_b", "flags_t", "flags_b"),
    *("keep_cells", "keep_gates", "relu", "reverse_bits", "reverse_period", "T", "B", "S"),
    *("first", "count"),
]


@triton.jit
def to_tf32(x):
    """float32 rounded to TF32's 10 bits, to nearest; the tensor cores by themselves cut off.
    Infinities, NaN, and what would round to infinity are left alone."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(rounded) < float("inf"), rounded, x)


@triton.jit
def _finite(x):
    """x, or zero where it is infinite or NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b. PRECISION: "tf32" or "tf32x3" for float32 operands, else "ieee".

    Where b is wider than a, of 16 bits, it is taken as the sum of three numbers of a's dtype: three
    products for all of its digits.
    tf32x3 splits each operand in two TF32 numbers and leaves out the product of the small parts.
    Under interpretation 16-bit operands are widened first, because there tl.dot multiplies the raw
    bits of bfloat16 (seen with Triton 3.7.1); the widening loses nothing.
    """
    if b.dtype != a.dtype:
        high = b.to(a.dtype)
        rest = _finite(b - high.to(b.dtype))
        middle = rest.to(a.dtype)
        low = (rest - middle.to(b.dtype)).to(a.dtype)
        total = product(a, low, total, PRECISION)
        total = product(a, middle, total, PRECISION)
        b = high
    if INTERPRETED:
        if a.dtype == tl.bfloat16 or a.dtype == tl.float16:
            a, b = a.to(tl.float32), b.to(tl.float32)
    if PRECISION == "ieee":
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)
    else:
        a_high, b_high = to_tf32(a), to_tf32(b)
        if PRECISION == "tf32x3":
            # Products of infinities are in the last line; here they would meet zeros. (A tensor
            # core cuts its sum off after each instruction, always towards zero: the sum begins with
            # the small products, and is added to the total as a whole.)
            a_low, b_low = to_tf32(_finite(a - a_high)), to_tf32(_finite(b - b_high))
            small = tl.dot(a_low, _finite(b_high), input_precision="tf32")
            small = tl.dot(_finite(a_high), b_low, small, input_precision="tf32")
            total += tl.dot(a_high, b_high, small, input_precision="tf32")
        else:
            total = tl.dot(a_high, b_high, total, input_precision="tf32")
    return total


@triton.jit
def add_product(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b, as one block of a longer sum: a block's sums of float32 or float64 start from
    zero and are added as a whole. A chain of K terms would gather K roundings, or truncations,
    which is how tensor cores add TF32."""
    if total.dtype == a.dtype and PRECISION == "ieee":
        # A bound on inexact terms, which has no other meaning here, keeps Triton from taking the
        # total for where the product starts.
        zero = tl.zeros(total.shape, total.dtype)
        total += tl.dot(
            a, b, zero, input_precision="ieee", max_num_imprecise_acc=2**30, out_dtype=total.dtype
        )
    else:
        total = product(a, b, total, PRECISION)
    return total


@triton.jit
def place(B, BLOCK_B: tl.constexpr):
    """Stack entry, the tile's first row, its rows [1, BLOCK_B], and which exist."""
    tiles = tl.cdiv(B, BLOCK_B)
    s = (tl.program_id(0) // tiles).to(tl.int64)
    first_row = ((tl.program_id(0) % tiles) * BLOCK_B).to(tl.int64)
    lane = tl.arange(0, BLOCK_B)[None, :]
    return s, first_row, lane, first_row + lane < B


@triton.jit
def is_reversed(s, reverse_bits, reverse_period):
    """Whether stack entry s runs backwards: bit s modulo the period. (The remainder is taken in 32
    bits; one of 64 is a function call on a GPU, for which registers are spilled.)"""
    return ((reverse_bits >> (s.to(tl.int32) % reverse_period)) & 1) != 0


@triton.jit
def load_flags(flags, flags_t, flags_b, t, rows, rows_ok, valid):
    """flags [T, B] at step t for a tile of rows [1, rows]; 0 where not ``valid``, and ENDED beyond
    the batch, so that rows which are not there do nothing."""
    at = t.to(tl.int64) * flags_t + rows.to(tl.int64) * flags_b
    found = tl.load(flags + at, mask=rows_ok & valid, other=0)
    return tl.where(rows_ok, found, ENDED)


@triton.jit
def starts_segment(bits):
    """Whether a new segment starts at a step; where the row has ended it does not."""
    return (bits & (ENDED | RESET)) == RESET


@triton.jit
def lanes(r, b_stride, S, width):
    """Offsets [1, rows] of a tile's rows in a sequence, from its first row. They fit 32 bits: the
    launcher sees to it. One 64-bit address a tile and offsets of 32 save half the registers."""
    return r * (b_stride * S * width)


@triton.jit
def row_of(t, t_stride, b_stride, first_row):
    """The row of step t and of a tile's first row in a sequence, in 64 bits."""
    return t.to(tl.int64) * t_stride + first_row * b_stride


@triton.jit
def load(x, row, s, S, width, at, ok, DTYPE: tl.constexpr):
    """Elements ``at`` [units, rows], counted from a row, of a sequence [.., S, width], in DTYPE."""
    return tl.load(x + (row * S + s) * width + at, mask=ok, other=0.0).to(DTYPE)


@triton.jit
def load3(x, row, s, S, width, H, at, ok, DTYPE: tl.constexpr):
    """The first three gates of a sequence [.., S, width]."""
    return (
        load(x, row, s, S, width, at, ok, DTYPE),
        load(x, row, s, S, width, H + at, ok, DTYPE),
        load(x, row, s, S, width, 2 * H + at, ok, DTYPE),
    )


@triton.jit
def store(x, row, s, S, width, at, value, ok):
    """Write elements ``at`` [units, rows], counted from a row, of a sequence [.., S, width]."""
    tl.store(x + (row * S + s) * width + at, value.to(x.dtype.element_ty), mask=ok)


@triton.jit
def store3(x, row, s, S, width, H, at, a, b, c, ok):
    """The first three gates of a sequence [.., S, width]."""
    store(x, row, s, S, width, at, a, ok)
    store(x, row, s, S, width, H + at, b, ok)
    store(x, row, s, S, width, 2 * H + at, c, ok)
