// One number as math/gates.h wants it, and numbers on their way to tensor cores.
#pragma once

#include "cuda/params.h"
#include "cuda/primitives.cuh"
#include "math/gates.h"

namespace fused_rnn::cuda {

// A float or double whose functions are found by overload.
template <class T>
struct Value {
  T v;
  FUSED_RNN_DEVICE Value() : v(0) {}
  FUSED_RNN_DEVICE explicit Value(T x) : v(x) {}
  FUSED_RNN_DEVICE friend Value operator+(Value a, Value b) { return Value(a.v + b.v); }
  FUSED_RNN_DEVICE friend Value operator-(Value a, Value b) { return Value(a.v - b.v); }
  FUSED_RNN_DEVICE friend Value operator*(Value a, Value b) { return Value(a.v * b.v); }
  FUSED_RNN_DEVICE friend Value fma(Value a, Value b, Value c) {
    return Value(multiply_add(a.v, b.v, c.v));
  }
  FUSED_RNN_DEVICE friend Value sigmoid(Value x) {
    return Value(reciprocal(T(1) + exponential(-x.v)));
  }
  FUSED_RNN_DEVICE friend Value tanh(Value x) { return Value(hyperbolic_tangent(x.v)); }
  // (A NaN stays one, as in torch.)
  FUSED_RNN_DEVICE friend Value relu(Value x) { return Value(x.v < T(0) ? T(0) : x.v); }
  FUSED_RNN_DEVICE friend Value relu_backward(Value y, Value dy) {
    return y.v > T(0) ? dy : Value(T(0));
  }
};

FUSED_RNN_DEVICE bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// Rounded to TF32's 10 bits, to nearest; the tensor cores by themselves cut off. Infinities, NaN, and
// what would round to infinity are left alone.
FUSED_RNN_DEVICE float to_tf32(float x) {
  const float rounded = float_of((bits_of(x) + 0x1000u) & 0xffffe000u);
  return is_finite(rounded) ? rounded : x;
}

// What is left of x beside a part of it; nothing beside an infinity.
FUSED_RNN_DEVICE float rest(float x, float part) { return is_finite(part) ? x - part : 0.0f; }

// The 16 bits of a product's io dtype, and back.
template <Product kProduct>
FUSED_RNN_DEVICE uint16_t to_16(float x) {
  return kProduct == Product::kBf16 ? to_bf16(x) : to_f16(x);
}
template <Product kProduct>
FUSED_RNN_DEVICE float from_16(uint16_t bits) {
  return kProduct == Product::kBf16 ? from_bf16(bits) : from_f16(bits);
}

FUSED_RNN_HD constexpr bool has_16_bits(Product product) {
  return product == Product::kBf16 || product == Product::kF16;
}

}  // namespace fused_rnn::cuda
