// float32 to 16 bits and back, to nearest even.
#pragma once

#include <bit>
#include <cstdint>

namespace fused_rnn::emulator {

inline uint16_t bf16_of(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // the NaN the hardware gives
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float float_of_bf16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t f16_of(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  // From halfway between the largest number and the next power of two on.
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Below 2^-14: beside 1/2 a unit in the last place is 2^-24, that of subnormal numbers.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000) >> 13);
}

// Without branches, for loops over many. Multiplying by 2^112 brings the exponent to float32's,
// also from a subnormal number; only infinities and NaN have to be given theirs.
inline float float_of_f16(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | (bits & 0x8000u) << 16);
}

// A normal number y moved by two units in the last place, which way by a bit of x; subnormal
// numbers are zero.
inline float approximate(float y, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(y), exponent = bits & 0x7f800000;
  if (exponent == 0) return std::bit_cast<float>(bits & 0x80000000);
  if (exponent == 0x7f800000) return y;
  const bool up = (std::bit_cast<uint32_t>(x) >> 3 & 1) != 0;
  return std::bit_cast<float>(up ? bits + 2 : bits - 2);
}

}  // namespace fused_rnn::emulator
