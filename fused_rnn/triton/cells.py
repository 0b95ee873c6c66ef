"""The gate equations of the LSTM, GRU and RNN cells and their derivatives, for Triton kernels.

One place for each formula: every kernel of this package calls these functions on tiles of any
shape, in float32 or float64. docs/math.md derives them, csrc/math/gates.h holds the same for C++.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); e^-|x| never overflows and negative x keeps all its digits."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh_small(z):
    """(tanh(x) / x - 1) / z as a function of z = x^2: float32 for |x| < 1, a minimax fit; float64
    for |x| < 0.625 (Cephes tanh.c)."""
    if z.dtype == tl.float64:
        p = -9.64399179425052238628e-1 * z - 9.92877231001918586564e1
        p = p * z - 1.61468768441708447952e3
        q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z
        return p / (q + 4.84406305325125486048e3)
    else:
        p = (-3.58439245e-4 * z + 2.30131998e-3) * z - 7.94604514e-3
        p = (p * z + 2.14866159e-2) * z - 5.38797882e-2
        return (p * z + 1.33323443e-1) * z - 3.33332954e-1


@triton.jit
def tanh(x):
    """An odd polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel; a NaN passes through."""
    NEAR: tl.constexpr = 0.625 if x.dtype == tl.float64 else 1.0
    size = tl.abs(x)
    z = x * x
    small = x + x * z * _tanh_small(z)
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.where(size > 40.0, 40.0, size)) + 1.0)
    return tl.where(size < NEAR, small, tl.where(x < 0, -large, large))


@triton.jit
def sigmoid_slope(s):
    """d sigmoid(x) / dx from s = sigmoid(x). 1 - s is exact for s >= 1/2, s - s * s is not."""
    return s * (1.0 - s)


@triton.jit
def tanh_slope(y):
    """d tanh(x) / dx from y = tanh(x)."""
    return (1.0 - y) * (1.0 + y)


@triton.jit
def lstm_forward(a_i, a_f, a_g, a_o, c_prev):
    """(i, f, g, o, c, m) from the gates' pre-activations; m is the hidden state before any
    projection (Hochreiter and Schmidhuber 1997, Gers et al. 2000)."""
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)
    c = f * c_prev + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def lstm_backward(i, f, g, o, c, c_prev, dm, dc):
    """(di, df, dg, d_o, dc_prev). dm: gradient of m; dc: of c, without what reaches c through m."""
    tanh_c = tanh(c)
    dc = dc + dm * o * tanh_slope(tanh_c)
    di = dc * g * sigmoid_slope(i)
    df = dc * c_prev * sigmoid_slope(f)
    dg = dc * i * tanh_slope(g)
    d_o = dm * tanh_c * sigmoid_slope(o)
    return di, df, dg, d_o, dc * f


@triton.jit
def gru_update(z, n, h_prev):
    """h = (1 - z) n + z h_prev."""
    return n + z * (h_prev - n)


@triton.jit
def gru_after_forward(a_r, a_z, x_n, hn, h_prev):
    """(r, z, n, h) with the reset after the product: n = tanh(x_n + r * hn), hn = W_hn h + b_hn
    (Cho et al. 2014, in cuDNN's variant)."""
    r, z = sigmoid(a_r), sigmoid(a_z)
    n = tanh(x_n + r * hn)
    return r, z, n, gru_update(z, n, h_prev)


@triton.jit
def gru_backward(z, n, h_prev, dh):
    """(dz, dn, dh_prev) of both variants; dh_prev is what passes no product."""
    dn = dh * (1.0 - z) * tanh_slope(n)
    dz = dh * (h_prev - n) * sigmoid_slope(z)
    return dz, dn, dh * z


@triton.jit
def gru_after_backward(r, z, n, hn, h_prev, dh):
    """(dr, dz, dn, dhn, dh_prev) with the reset after the product."""
    dz, dn, dh_prev = gru_backward(z, n, h_prev, dh)
    return dn * hn * sigmoid_slope(r), dz, dn, dn * r, dh_prev


@triton.jit
def gru_before_reset_backward(r, h_prev, drh, dh_prev):
    """(dr, dh_prev) with the reset before the product: drh = W_hn^T dn."""
    return drh * h_prev * sigmoid_slope(r), dh_prev + drh * r


@triton.jit
def rnn_forward(a, relu):
    """The activation of the simple RNN (Elman 1990); NaN passes through the relu too."""
    return tl.where(relu, tl.where(a < 0, 0.0, a), tanh(a))


@triton.jit
def rnn_backward(y, dh, relu):
    """Gradient of the pre-activation from the output y; the relu's slope at zero is 0."""
    return tl.where(relu, tl.where(y <= 0, 0.0, dh), dh * tanh_slope(y))
