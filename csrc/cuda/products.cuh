// The recurrent product of a block scan: weights kept on the multiprocessor, operands in shared
// memory, sums in the registers of the lanes that need them.
//
// A warp owns 16 hidden units of all gates: one 16-row tile a gate. Its sums lie as tensor cores
// leave them: with g = lane / 4 and q = lane % 4, sum i of a lane is of unit g + 8 (i / 2) of the
// warp's and column 2 q + i % 2 of the operand's 8, which are rows of the batch. So a lane holds
// all gates of its four (unit, row) slots and no value has to travel for the gate arithmetic. Where
// a block has four rows only they are the even columns, and a lane has two slots: the gates, which
// take longer than the products, then take half the time. (No column has to do with another: a row
// has the same bits in either.)
#pragma once

#include "cuda/numbers.cuh"

namespace fused_rnn::cuda {

constexpr int kColumns = 8;  // of one tensor core product, and of an operand
constexpr int kUnits = 16;   // of a warp
constexpr int kSums = 4;     // of a lane and tensor core product

// Every derived constant of a product. kMaxUnits: the largest H. kHeld: how many steps along k have
// their weights in registers; the others are in shared memory. kSources: operands (a forward scan
// has one, the state; a backward scan one a gate). kParts: numbers an operand is the sum of.
// kLaneRows: two, or one where there are four rows.
template <Product kProduct_, int kGates_, int kMaxUnits_, int kHeld_, int kSources_, int kParts_,
          int kLaneRows_>
struct ProductTraits {
  static constexpr Product kProduct = kProduct_;
  static constexpr int kGates = kGates_, kMaxUnits = kMaxUnits_, kSources = kSources_;
  static constexpr int kParts = kParts_, kLaneRows = kLaneRows_;
  static constexpr bool kTensorCores = kProduct != Product::kIeee;
  static constexpr int kThreads = 2 * kMaxUnits;  // 32 for every 16 units
  // One step along k is 32 bytes of each row.
  static constexpr int kBytes = has_16_bits(kProduct) ? 2 : 4;
  static constexpr int kStep = 32 / kBytes;
  static constexpr int kSteps = kMaxUnits / kStep;
  static constexpr int kHeld = kTensorCores ? (kHeld_ < kSteps ? kHeld_ : kSteps) : 0;
  // Chains of products, one behind the other, whose sums are kept apart: forward one a gate; where
  // all goes into one sum two, of even and odd gates, or of even and odd steps.
  static constexpr bool kOneSum = kGates == 1 || kSources > 1;
  static constexpr int kChains = kOneSum ? 2 : kGates;
  static FUSED_RNN_HD constexpr int chain_of(int gate, int step) {
    return kGates == 1 ? step % 2 : kOneSum ? gate % 2 : gate;
  }
  // A row of an operand: read 64 bytes at a time, and shifted by 16 from the row before, so that
  // eight rows are in different banks.
  static constexpr int kRowBytes = (kMaxUnits * kBytes + 63) / 64 * 64 + 16;

  static_assert(kMaxUnits % kUnits == 0 && kMaxUnits <= 256);
  static_assert(kSources == 1 || kSources == kGates);
};

// 16 bytes, loaded at once.
struct alignas(16) Quad {
  uint32_t x, y, z, w;
};

// An operand: kParts x kSources x [kColumns, k]. Twice, for the step that reads and the one that
// writes.
template <class Traits>
struct alignas(16) Operand {
  unsigned char bytes[Traits::kParts][Traits::kSources][kColumns][Traits::kRowBytes];
};

// Writes a number as the parts it is the sum of, the greatest first, each as operands have it.
template <class Traits>
FUSED_RNN_DEVICE void store_parts(unsigned char* at, int distance, float value) {
  const auto put = [&](int part, float number) {
    if constexpr (Traits::kBytes == 2) {
      store(reinterpret_cast<uint16_t*>(at + part * distance), to_16<Traits::kProduct>(number));
    } else {
      store(reinterpret_cast<float*>(at + part * distance), number);
    }
  };
  if constexpr (Traits::kProduct == Product::kTf32) {
    value = to_tf32(value);
  }
  FUSED_RNN_UNROLL
  for (int part = 0; part + 1 < Traits::kParts; ++part) {
    float high;
    if constexpr (Traits::kBytes == 2) {
      high = from_16<Traits::kProduct>(to_16<Traits::kProduct>(value));
    } else {
      high = high_tf32(value);
    }
    put(part, high);
    value = rest(value, high);
  }
  put(Traits::kParts - 1, value);
}

// Writes one number of an operand.
template <class Traits>
FUSED_RNN_DEVICE void place(Operand<Traits>& operand, int source, int row, int unit, float value) {
  store_parts<Traits>(operand.bytes[0][source][row] + unit * Traits::kBytes,
                      static_cast<int>(sizeof(operand.bytes[0])), value);
}

// Fills both operands with zeros: padding stays so, and rows and units that are not there.
template <class Traits>
FUSED_RNN_DEVICE void clear(Operand<Traits> (&operands)[2]) {
  constexpr int kQuads = static_cast<int>(2 * sizeof(Operand<Traits>) / (sizeof(Quad)));
  Quad* at = reinterpret_cast<Quad*>(&operands[0]);
  for (int i = thread_index(); i < kQuads; i += thread_count()) store(at + i, Quad{0, 0, 0, 0});
}

// Sums of one warp.
template <class Traits>
struct Sums {
  float of[Traits::kChains][kSums] = {};

  static FUSED_RNN_DEVICE constexpr int sum_of(int slot) {
    return slot / Traits::kLaneRows * 2 + slot % Traits::kLaneRows;
  }
  // Of a gate, in a forward scan.
  FUSED_RNN_DEVICE float gate(int gate, int slot) const {
    return Traits::kGates == 1 ? all(slot) : of[gate][sum_of(slot)];
  }
  FUSED_RNN_DEVICE float all(int slot) const { return of[0][sum_of(slot)] + of[1][sum_of(slot)]; }
};

// The A fragment of a tile of 16 rows, from `first` along k. element(m, k): the bits of a weight.
template <Product kProduct, class Element>
FUSED_RNN_DEVICE void read_fragment(uint32_t (&a)[4], int first, const Element& element) {
  const int g = thread_index() % 32 / 4, q = thread_index() % 4;
  FUSED_RNN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int m = g + i % 2 * 8;
    if constexpr (has_16_bits(kProduct)) {
      const int k = first + 2 * q + i / 2 * 8;
      a[i] = element(m, k) | element(m, k + 1) << 16;
    } else {
      const uint32_t bits = element(m, first + q + i / 2 * 4);
      a[i] = kProduct == Product::kTf32 ? bits_of(to_tf32(float_of(bits))) : bits;
    }
  }
}

// sum += a b by one tensor core instruction.
template <Product kProduct>
FUSED_RNN_DEVICE void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kProduct == Product::kBf16) {
    mma_bf16(sum, a, b);
  } else if constexpr (kProduct == Product::kF16) {
    mma_f16(sum, a, b);
  } else {
    mma_tf32(sum, a, b);
  }
}

// float32 products of 3xTF32: each factor as a high and a low part, of whose products the smallest
// is left out.
struct SplitWeights {
  uint32_t low[4], high[4];

  FUSED_RNN_DEVICE explicit SplitWeights(const uint32_t (&a)[4]) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < 4; ++i) {
      // (Or the compiler would split the weights once and keep both parts in registers.)
      const float whole = float_of(opaque(a[i])), part = to_tf32(whole);
      high[i] = bits_of(part);
      low[i] = bits_of(rest(whole, part));
    }
  }
};
// sum += a b. A tensor core cuts its sum off after each instruction, always towards zero, so a
// chain of n would lack some n / 2 units in the last place: it begins at zero every step or two,
// and is added to the total as a whole.
FUSED_RNN_DEVICE void mma_3xtf32(float (&sum)[4], const SplitWeights& a, const uint32_t (&high)[2],
                                 const uint32_t (&low)[2]) {
  mma_tf32(sum, a.low, high);
  mma_tf32(sum, a.high, low);
  mma_tf32(sum, a.high, high);
}

// Weights as the A operand of tensor core products. `element(gate, m, k)` gives the bits of weight
// [m, k] of a gate, m < 16 being the warp's units.
template <class Traits>
class TensorCoreWeights {
 public:
  // shared: room for (steps - kHeld) x kGates x 32 quads of each warp. steps: along k, for this H.
  template <class Element>
  FUSED_RNN_DEVICE void fill(Quad* shared, int steps, const Element& element) {
    const int beyond = steps > Traits::kHeld ? steps - Traits::kHeld : 0;
    shared_ = shared + thread_index() / 32 * beyond * Traits::kGates * 32 + thread_index() % 32;
    steps_ = steps;
    // A few at a time: all loads at once would need more registers than there are.
    constexpr int kGroup = Traits::kMaxUnits > 128 ? 1 : 4;
    FUSED_RNN_NO_UNROLL
    for (int first = 0; first < Traits::kHeld; first += kGroup) {
      FUSED_RNN_NO_UNROLL
      for (int gate = 0; gate < Traits::kGates; ++gate) {
        uint32_t a[kGroup][4];
        FUSED_RNN_UNROLL
        for (int n = 0; n < kGroup; ++n) fragment(a[n], gate, first + n, element);
        FUSED_RNN_UNROLL
        for (int j = 0; j < Traits::kHeld; ++j) {
          FUSED_RNN_UNROLL
          for (int held = 0; held < Traits::kGates; ++held) {
            const bool here = held == gate && j / kGroup * kGroup == first;
            FUSED_RNN_UNROLL
            for (int i = 0; i < 4; ++i)
              held_[j][held][i] = here ? a[j % kGroup][i] : held_[j][held][i];
          }
        }
      }
    }
    FUSED_RNN_NO_UNROLL
    for (int j = Traits::kHeld; j < steps; ++j) {
      for (int gate = 0; gate < Traits::kGates; ++gate) {
        uint32_t a[4];
        fragment(a, gate, j, element);
        store(at(j, gate), Quad{a[0], a[1], a[2], a[3]});
      }
    }
  }

  // sums += weights x operand.
  FUSED_RNN_DEVICE void multiply(Sums<Traits>& sums, const Operand<Traits>& operand) const {
    const int lane = thread_index() % 32;
    FUSED_RNN_UNROLL
    for (int j = 0; j < Traits::kSteps; j += 2) {
      if (j < steps_) {
        uint32_t b[Traits::kParts][Traits::kSources][4];  // of steps j and j + 1, two words each
        FUSED_RNN_UNROLL
        for (int part = 0; part < Traits::kParts; ++part) {
          FUSED_RNN_UNROLL
          for (int source = 0; source < Traits::kSources; ++source) {
            const unsigned char* row = operand.bytes[part][source][lane % 8];
            load_matrix_x4(b[part][source], row + j * 32 + lane / 8 * 16);
          }
        }
        step<0>(sums, j, b);
        if (j + 1 < Traits::kSteps) {
          if (j + 1 < steps_) step<1>(sums, j + 1, b);
        }
      }
    }
  }

 private:
  template <class Element>
  FUSED_RNN_DEVICE void fragment(uint32_t (&a)[4], int gate, int j, const Element& element) const {
    read_fragment<Traits::kProduct>(a, j * Traits::kStep,
                                    [&](int m, int k) { return element(gate, m, k); });
  }
  FUSED_RNN_DEVICE Quad* at(int j, int gate) const {
    return shared_ + ((j - Traits::kHeld) * Traits::kGates + gate) * 32;
  }

  // The products of step j; kHalf: j's parity.
  template <int kHalf>
  FUSED_RNN_DEVICE void step(Sums<Traits>& sums, int j,
                             const uint32_t (&b)[Traits::kParts][Traits::kSources][4]) const {
    FUSED_RNN_UNROLL
    for (int gate = 0; gate < Traits::kGates; ++gate) {
      const int source = Traits::kSources == 1 ? 0 : gate;
      float(&sum)[4] = sums.of[Traits::chain_of(gate, kHalf)];
      uint32_t a[4];
      if (j < Traits::kHeld) {
        FUSED_RNN_UNROLL
        for (int i = 0; i < 4; ++i) a[i] = held_[j < Traits::kHeld ? j : 0][gate][i];
      } else {
        const Quad quad = load(at(j, gate));
        a[0] = quad.x, a[1] = quad.y, a[2] = quad.z, a[3] = quad.w;
      }
      if constexpr (Traits::kProduct == Product::kTf32x3) {
        const uint32_t* high = b[0][source] + 2 * kHalf;
        const uint32_t* low = b[Traits::kParts - 1][source] + 2 * kHalf;
        float part[4] = {};
        mma_3xtf32(part, SplitWeights(a), {high[0], high[1]}, {low[0], low[1]});
        FUSED_RNN_UNROLL
        for (int i = 0; i < 4; ++i) sum[i] += part[i];
      } else {
        FUSED_RNN_UNROLL
        for (int part = Traits::kParts - 1; part >= 0; --part) {  // the smallest first
          mma<Traits::kProduct>(sum, a,
                                {b[part][source][2 * kHalf], b[part][source][2 * kHalf + 1]});
        }
      }
    }
  }

  // (An array of no elements is not C++.)
  uint32_t held_[Traits::kHeld ? Traits::kHeld : 1][Traits::kGates][4] = {};
  Quad* shared_;
  int steps_;
};

// float32 by multiply-adds. Weights are in shared memory as rows [gate][unit][k]; a lane reads four
// numbers along k at a time of two weight rows a gate and of two operand rows.
template <class Traits>
class PlainWeights {
 public:
  // Numbers of a row in memory: a shift of 16 bytes a row keeps eight rows in different banks.
  static FUSED_RNN_HD constexpr int row_size(int steps) { return steps * Traits::kStep + 4; }

  template <class Element>
  FUSED_RNN_DEVICE void fill(Quad* shared, int steps, const Element& element) {
    const int size = row_size(steps), units = steps * Traits::kStep, lane = thread_index() % 32;
    float* all = reinterpret_cast<float*>(shared);
    const int first = thread_index() / 32 * kUnits;
    rows_ = all + (first + lane / 4) * size;
    gate_size_ = units * size;
    size_ = size, units_ = units;
    for (int gate = 0; gate < Traits::kGates; ++gate) {
      for (int m = 0; m < kUnits; ++m) {
        float* row = all + gate * gate_size_ + (first + m) * size;
        for (int k = lane; k < units; k += 32) store(row + k, float_of(element(gate, m, k)));
      }
    }
  }

  FUSED_RNN_DEVICE void multiply(Sums<Traits>& sums, const Operand<Traits>& operand) const {
    const int q = thread_index() % 4;
    FUSED_RNN_NO_UNROLL
    for (int k = 0; k < units_; k += 4) {
      FUSED_RNN_UNROLL
      for (int gate = 0; gate < Traits::kGates; ++gate) {
        const int source = Traits::kSources == 1 ? 0 : gate;
        float b[Traits::kLaneRows][4];
        FUSED_RNN_UNROLL
        for (int n = 0; n < Traits::kLaneRows; ++n) {
          get(b[n], reinterpret_cast<const float*>(operand.bytes[0][source][2 * q + n]) + k);
        }
        FUSED_RNN_UNROLL
        for (int half = 0; half < 2; ++half) {
          float a[4];
          get(a, rows_ + gate * gate_size_ + half * 8 * size_ + k);
          FUSED_RNN_UNROLL
          for (int i = 0; i < 4; ++i) {
            FUSED_RNN_UNROLL
            for (int n = 0; n < Traits::kLaneRows; ++n) {
              float& sum = sums.of[Traits::chain_of(gate, 0)][2 * half + n];
              sum = multiply_add(a[i], b[n][i], sum);
            }
          }
        }
      }
    }
  }

 private:
  static FUSED_RNN_DEVICE void get(float (&to)[4], const float* from) {
    const Quad quad = load(reinterpret_cast<const Quad*>(from));
    to[0] = float_of(quad.x), to[1] = float_of(quad.y);
    to[2] = float_of(quad.z), to[3] = float_of(quad.w);
  }

  const float* rows_;
  int gate_size_, size_, units_;
};

template <bool kTensorCores, class Traits>
struct WeightsOf {
  using Type = TensorCoreWeights<Traits>;
};
template <class Traits>
struct WeightsOf<false, Traits> {
  using Type = PlainWeights<Traits>;
};
template <class Traits>
using Weights = typename WeightsOf<Traits::kTensorCores, Traits>::Type;

// Steps along k of H units, whole warps' worth.
template <class Traits>
FUSED_RNN_HD constexpr int steps_of(int64_t hidden) {
  return static_cast<int>((hidden + kUnits - 1) / kUnits * (kUnits / Traits::kStep));
}

// Bytes of shared memory the weights of H units take.
template <class Traits>
constexpr size_t weight_bytes(int64_t hidden) {
  const int steps = steps_of<Traits>(hidden);
  const size_t warps = static_cast<size_t>((hidden + kUnits - 1) / kUnits);
  if (!Traits::kTensorCores) {
    return sizeof(float) * Traits::kGates * warps * kUnits * PlainWeights<Traits>::row_size(steps);
  }
  const int beyond = steps > Traits::kHeld ? steps - Traits::kHeld : 0;
  return sizeof(Quad) * 32 * Traits::kGates * warps * beyond;
}

}  // namespace fused_rnn::cuda
