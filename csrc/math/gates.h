// The gate equations of the LSTM, GRU and RNN cells and their derivatives, for host and device.
//
// V is one value or a vector of values of neighbouring hidden units. It has + - *, V(1), and, found
// by overload: fma(a, b, c) = a * b + c, sigmoid(V), tanh(V), relu(V) and
// relu_backward(y, dy) = y > 0 ? dy : 0. Every backend calls these functions, so there is one
// place for each formula; docs/math.md derives them.
#pragma once

#if defined(__CUDACC__)
#define FUSED_RNN_HD __host__ __device__ __forceinline__
#else
#define FUSED_RNN_HD inline __attribute__((always_inline))
#endif

namespace fused_rnn::math {

// d sigmoid(x) / dx from s = sigmoid(x). 1 - s is exact for s >= 1/2, s - s * s is not.
template <class V>
FUSED_RNN_HD V sigmoid_slope(V s) {
  return s * (V(1) - s);
}

// d tanh(x) / dx from y = tanh(x); both factors are exact or nearly so where y is near +-1.
template <class V>
FUSED_RNN_HD V tanh_slope(V y) {
  return (V(1) - y) * (V(1) + y);
}

template <class V>
struct LstmCell {
  V i, f, g, o, c;
};

// One LSTM unit up to its cell state: a_* are the gates' pre-activations.
template <class V>
FUSED_RNN_HD LstmCell<V> lstm_cell(V a_i, V a_f, V a_g, V a_o, V c_prev) {
  LstmCell<V> out;
  out.i = sigmoid(a_i);
  out.f = sigmoid(a_f);
  out.g = tanh(a_g);
  out.o = sigmoid(a_o);
  out.c = fma(out.f, c_prev, out.i * out.g);
  return out;
}

// The hidden state before any projection.
template <class V>
FUSED_RNN_HD V lstm_hidden(V o, V c) {
  return o * tanh(c);
}

template <class V>
struct LstmOut {
  V i, f, g, o, c, h;
};

template <class V>
FUSED_RNN_HD LstmOut<V> lstm_forward(V a_i, V a_f, V a_g, V a_o, V c_prev) {
  const LstmCell<V> cell = lstm_cell(a_i, a_f, a_g, a_o, c_prev);
  return {cell.i, cell.f, cell.g, cell.o, cell.c, lstm_hidden(cell.o, cell.c)};
}

template <class V>
struct LstmGrad {
  V di, df, dg, d_o, dc_prev;
};

// Gradients of the pre-activations and of c_prev. dh: of h before the projection; dc: of c, without
// what reaches c through h.
template <class V>
FUSED_RNN_HD LstmGrad<V> lstm_backward(V i, V f, V g, V o, V c, V c_prev, V dh, V dc) {
  LstmGrad<V> d;
  const V tanh_c = tanh(c);
  dc = fma(dh * o, tanh_slope(tanh_c), dc);
  d.di = dc * g * sigmoid_slope(i);
  d.df = dc * c_prev * sigmoid_slope(f);
  d.dg = dc * i * tanh_slope(g);
  d.d_o = dh * tanh_c * sigmoid_slope(o);
  d.dc_prev = dc * f;
  return d;
}

// The GRU's update: h = (1 - z) n + z h_prev.
template <class V>
FUSED_RNN_HD V gru_update(V z, V n, V h_prev) {
  return fma(z, h_prev - n, n);
}

template <class V>
struct GruOut {
  V r, z, n, h;
};

// Reset after the product (torch.nn, cuDNN): n = tanh(a_n + r * hn), hn = W_hn h_prev + b_hn.
template <class V>
FUSED_RNN_HD GruOut<V> gru_after_forward(V a_r, V a_z, V a_n, V hn, V h_prev) {
  GruOut<V> out;
  out.r = sigmoid(a_r);
  out.z = sigmoid(a_z);
  out.n = tanh(fma(out.r, hn, a_n));
  out.h = gru_update(out.z, out.n, h_prev);
  return out;
}

template <class V>
struct GruAfterGrad {
  V dr, dz, dn, dhn, dh_prev;
};

// dh_prev is what reaches h_prev without passing W_hh.
template <class V>
FUSED_RNN_HD GruAfterGrad<V> gru_after_backward(V r, V z, V n, V hn, V h_prev, V dh) {
  GruAfterGrad<V> d;
  d.dn = dh * (V(1) - z) * tanh_slope(n);
  d.dz = dh * (h_prev - n) * sigmoid_slope(z);
  d.dr = d.dn * hn * sigmoid_slope(r);
  d.dhn = d.dn * r;
  d.dh_prev = dh * z;
  return d;
}

template <class V>
struct GruBeforeGates {
  V r, z, rh;
};

// Reset before the product (Keras reset_after=False, ONNX linear_before_reset=0), first half: rh is
// the operand of W_hn.
template <class V>
FUSED_RNN_HD GruBeforeGates<V> gru_before_gates(V a_r, V a_z, V h_prev) {
  GruBeforeGates<V> out;
  out.r = sigmoid(a_r);
  out.z = sigmoid(a_z);
  out.rh = out.r * h_prev;
  return out;
}

template <class V>
struct GruBeforeCandidate {
  V n, h;
};

// Second half: a_n includes W_hn (r * h_prev).
template <class V>
FUSED_RNN_HD GruBeforeCandidate<V> gru_before_candidate(V a_n, V z, V h_prev) {
  GruBeforeCandidate<V> out;
  out.n = tanh(a_n);
  out.h = gru_update(z, out.n, h_prev);
  return out;
}

template <class V>
struct GruBeforeGrad {
  V dz, dn, dh_prev;
};

// Second half backward; drh = W_hn^T dn then enters gru_before_reset_backward.
template <class V>
FUSED_RNN_HD GruBeforeGrad<V> gru_before_backward(V z, V n, V h_prev, V dh) {
  GruBeforeGrad<V> d;
  d.dn = dh * (V(1) - z) * tanh_slope(n);
  d.dz = dh * (h_prev - n) * sigmoid_slope(z);
  d.dh_prev = dh * z;
  return d;
}

template <class V>
struct GruResetGrad {
  V dr, dh_prev;
};

// First half backward; dh_prev comes in as what gru_before_backward gave.
template <class V>
FUSED_RNN_HD GruResetGrad<V> gru_before_reset_backward(V r, V h_prev, V drh, V dh_prev) {
  GruResetGrad<V> d;
  d.dr = drh * h_prev * sigmoid_slope(r);
  d.dh_prev = fma(drh, r, dh_prev);
  return d;
}

template <class V>
FUSED_RNN_HD V rnn_forward(V a, bool use_relu) {
  return use_relu ? relu(a) : tanh(a);
}

template <class V>
FUSED_RNN_HD V rnn_backward(V y, V dh, bool use_relu) {
  return use_relu ? relu_backward(y, dh) : dh * tanh_slope(y);
}

}  // namespace fused_rnn::math
