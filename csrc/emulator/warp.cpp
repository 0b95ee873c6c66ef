#include "emulator/warp.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "emulator/numbers.h"

namespace fused_rnn::emulator {

namespace {

constexpr int kRows = 16, kColumns = 8;

typedef float Columns __attribute__((vector_size(kColumns * sizeof(float)), aligned(16)));

// A float32 that a sum is cut off to, towards zero; infinite where the nearest one is.
float cut_off(double sum) {
  const float nearest = static_cast<float>(sum);
  const bool beyond = std::isfinite(nearest) && std::abs(nearest) > std::abs(sum);
  return beyond ? std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - 1) : nearest;
}

// d += a b over kDepth, as tensor cores add: all terms at once, and the sum is cut off, not rounded
// (Fasi et al. 2021; the few bits they keep below a float32's are more here).
template <int kDepth>
void multiply(Columns (&d)[kRows], const float (&a)[kRows][kDepth], const Columns (&b)[kDepth]) {
  typedef double Sums __attribute__((vector_size(kColumns * sizeof(double)), aligned(16)));
  for (int i = 0; i < kRows; ++i) {
    Sums sum = __builtin_convertvector(d[i], Sums);
#pragma GCC unroll 16
    for (int k = 0; k < kDepth; ++k) {
      sum += static_cast<double>(a[i][k]) * __builtin_convertvector(b[k], Sums);
    }
    for (int column = 0; column < kColumns; ++column) d[i][column] = cut_off(sum[column]);
  }
}

template <Collective kKind>
float number(uint16_t bits) {
  return kKind == Collective::kMmaBf16 ? float_of_bf16(bits) : float_of_f16(bits);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": of element i of a lane's
// fragment, group = lane / 4, t = lane % 4,
//   a: row group (i % 4 < 2) or group + 8, column 2 t + i % 2 (i < 4) or that + 8
//   b: row 2 t + i % 2 (i < 2) or that + 8, column group
template <Collective kKind>
void gather_16(const Warp& warp, float (&a)[kRows][16], Columns (&b)[16]) {
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* a_words = static_cast<const uint32_t*>(warp.operands[lane].in[0]);
    const uint32_t* b_words = static_cast<const uint32_t*>(warp.operands[lane].in[1]);
    const int group = lane / 4, t = lane % 4;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int row = i % 4 < 2 ? group : group + 8;
      const int column = t * 2 + i % 2 + (i < 4 ? 0 : 8);
      a[row][column] = number<kKind>(static_cast<uint16_t>(a_words[i / 2] >> i % 2 * 16));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
      const int row = t * 2 + i % 2 + (i < 2 ? 0 : 8);
      b[row][group] = number<kKind>(static_cast<uint16_t>(b_words[i / 2] >> i % 2 * 16));
    }
  }
}

// "Matrix fragments for mma.m16n8k8", .tf32:
//   a: row group (i even) or group + 8, column t (i < 2) or t + 4
//   b: row t (i = 0) or t + 4, column group
void gather_tf32(const Warp& warp, float (&a)[kRows][8], Columns (&b)[8]) {
  const auto number = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* a_words = static_cast<const uint32_t*>(warp.operands[lane].in[0]);
    const uint32_t* b_words = static_cast<const uint32_t*>(warp.operands[lane].in[1]);
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[i % 2 == 0 ? group : group + 8][i < 2 ? t : t + 4] = number(a_words[i]);
    }
    for (int i = 0; i < 2; ++i) b[i == 0 ? t : t + 4][group] = number(b_words[i]);
  }
}

//   d: row group (i < 2) or group + 8, column 2 t + i % 2
template <class Use>
void for_each_sum(const Warp& warp, const Use& use) {
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<float*>(warp.operands[lane].out);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      use(d[i], lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + i % 2);
    }
  }
}

void multiply_warp(Warp& warp, Collective kind) {
  Columns d[kRows];
  for_each_sum(warp, [&](const float& x, int row, int column) { d[row][column] = x; });
  if (kind == Collective::kMmaTf32) {
    float a[kRows][8];
    Columns b[8];
    gather_tf32(warp, a, b);
    multiply<8>(d, a, b);
  } else {
    float a[kRows][16];
    Columns b[16];
    if (kind == Collective::kMmaBf16) {
      gather_16<Collective::kMmaBf16>(warp, a, b);
    } else {
      gather_16<Collective::kMmaF16>(warp, a, b);
    }
    multiply<16>(d, a, b);
  }
  for_each_sum(warp, [&](float& x, int row, int column) { x = d[row][column]; });
}

}  // namespace

void mma(Collective kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Lane& lane = *machine.current;
  Warp& warp = *lane.warp;
  warp.operands[lane.number()] = Operands{d, {a, b}, 0};
  if (arrive(kind)) {
    multiply_warp(warp, kind);
    leave();
  }
}

// Of matrix m, the address of row i is lane 8 m + i's; lane l gets the l % 4-th word of row l / 4.
void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  Lane& lane = *machine.current;
  Warp& warp = *lane.warp;
  read_shared(row, 16);
  warp.operands[lane.number()] = Operands{r, {row, nullptr}, 0};
  if (arrive(Collective::kLoadMatrix)) {
    for (int l = 0; l < 32; ++l) {
      uint32_t* to = static_cast<uint32_t*>(warp.operands[l].out);
      for (int m = 0; m < 4; ++m) {
        const void* from = warp.operands[m * 8 + l / 4].in[0];
        std::memcpy(&to[m], static_cast<const unsigned char*>(from) + l % 4 * 4, 4);
      }
    }
    leave();
  }
}

float shuffle(Collective kind, float value, int from) {
  Lane& lane = *machine.current;
  Warp& warp = *lane.warp;
  float result;
  warp.operands[lane.number()] = Operands{&result, {&value, nullptr}, from};
  if (arrive(kind)) {
    for (int l = 0; l < 32; ++l) {
      const Operands& own = warp.operands[l];
      // An xor that leaves the warp gives the lane's own value.
      int source = kind == Collective::kShuffle ? own.lane & 31 : l ^ own.lane;
      if (source < 0 || source > 31) source = l;
      *static_cast<float*>(own.out) = *static_cast<const float*>(warp.operands[source].in[0]);
    }
    leave();
  }
  return result;
}

bool any(bool value) {
  Lane& lane = *machine.current;
  Warp& warp = *lane.warp;
  bool result;
  warp.operands[lane.number()] = Operands{&result, {&value, nullptr}, 0};
  if (arrive(Collective::kAny)) {
    bool all = false;
    for (const Operands& each : warp.operands) all |= *static_cast<const bool*>(each.in[0]);
    for (const Operands& each : warp.operands) *static_cast<bool*>(each.out) = all;
    leave();
  }
  return result;
}

}  // namespace fused_rnn::emulator
