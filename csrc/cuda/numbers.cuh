// One number as math/gates.h wants it, and numbers on their way to tensor cores.
#pragma once

#include "cuda/params.h"
#include "cuda/primitives.cuh"
#include "math/gates.h"

namespace fused_rnn::cuda {

// A float or double whose functions are found by overload. kFast (float alone): sigmoid and tanh
// from the special function unit, 4 and some 11 instructions instead of 20 to 30, within 3e-7 of
// the value: for scans whose operands are rounded to 11 bits or fewer.
template <class T, bool kFast = false>
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
    if constexpr (kFast) {
      return Value(reciprocal_fast(1.0f + exponential_2_fast(x.v * -kLog2E)));
    } else {
      return Value(reciprocal(T(1) + exponential(-x.v)));
    }
  }
  FUSED_RNN_DEVICE friend Value tanh(Value x) {
    if constexpr (kFast) {
      // 1 - 2 / (1 + e^2x) loses the digits of a small x, whose series has them.
      const float far = 1.0f - 2.0f * reciprocal_fast(1.0f + exponential_2_fast(x.v * 2 * kLog2E));
      const float s = x.v * x.v;
      float near = multiply_add(s, -17.0f / 315, 2.0f / 15);
      near = multiply_add(s, near, -1.0f / 3);
      near = multiply_add(s * x.v, near, x.v);
      return Value(s < 0.04f ? near : far);
    } else {
      return Value(hyperbolic_tangent(x.v));
    }
  }
  // (A NaN stays one, as in torch.)
  FUSED_RNN_DEVICE friend Value relu(Value x) { return Value(x.v < T(0) ? T(0) : x.v); }
  FUSED_RNN_DEVICE friend Value relu_backward(Value y, Value dy) {
    return y.v > T(0) ? dy : Value(T(0));
  }

 private:
  static constexpr float kLog2E = 1.44269504f;
};

FUSED_RNN_DEVICE bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// Rounded to TF32's 10 bits, to nearest; the tensor cores by themselves cut off. Infinities, NaN,
// and what would round to infinity are left alone: to round the GPU's own NaN, 0x7fffffff, would
// make it a zero.
FUSED_RNN_DEVICE float to_tf32(float x) {
  const float rounded = float_of((bits_of(x) + 0x1000u) & 0xffffe000u);
  return is_finite(x) && is_finite(rounded) ? rounded : x;
}

// The high one of the two parts of an operand of 3xTF32. An infinity or NaN is in the low part,
// which meets the weights' high parts alone; in the high one it would meet low parts, which may be
// zero.
FUSED_RNN_DEVICE float high_tf32(float x) { return is_finite(x) ? to_tf32(x) : 0.0f; }

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
