// The recurrent product of a grid scan: a block keeps the weights of 16 hidden units (or 32) on its
// multiprocessor, as tiles of 16 rows, and what it computes goes to the others through L2.
//
// Gathering: a block multiplies its weights by the whole operand, which lies in L2 in the order the
// lanes want it. Forward a tile for each gate of its units, with k the units of the state; backward
// one, with k the units of all gates. The eight warps share out k, so that each reads its part of
// the operand only once and by itself, and waits only for the blocks that write it. Their sums meet
// in shared memory and are added in order, by the thread that has all gates of a (unit, row).
//
// Scattering: a block multiplies its own gates' gradients by the weights they have to all units,
// the warps sharing out these, and leaves for each other block its part of a sum, which that one
// adds up in the order of the blocks. Used backward where it moves fewer bytes: 8 for a unit and
// row, written and read, instead of a number of each gate.
//
// Nothing in the order of a sum depends on the rows.
#pragma once

#include "cuda/products.cuh"

namespace fused_rnn::cuda {

constexpr int kGridWarps = 8, kGridThreads = 32 * kGridWarps;
constexpr int kChunks = 2;  // of 8 rows each, whose sums a warp holds at a time: a group of rows
constexpr int kGroupRows = 8 * kChunks;
static_assert(kGridThreads == kUnits * kGroupRows, "a thread has one unit and one row of a group");

// Every derived constant. kUnitTiles: 16 units of a block each; with two of them half as many
// blocks gather the same operand, of which there is much backward. kHeld: how many pairs of steps
// along k have their weights in registers; the others are in shared memory. kParts: numbers an
// operand is the sum of; float32 is split by those who read it.
template <Product kProduct_, int kGates_, bool kBackward_, int kParts_, int kHeld_, int kUnitTiles_>
struct GridTraits {
  static constexpr Product kProduct = kProduct_;
  static constexpr int kGates = kGates_, kHeld = kHeld_;
  static constexpr bool kBackward = kBackward_;
  static constexpr int kUnitTiles = kUnitTiles_, kBlockUnits = kUnits * kUnitTiles;
  static constexpr int kParts = has_16_bits(kProduct) ? kParts_ : 1;
  // A step along k is 32 bytes of a row, as in products.cuh; of a pair a lane has 16 bytes.
  static constexpr int kBytes = has_16_bits(kProduct) ? 2 : 4;
  static constexpr int kStep = 32 / kBytes, kPairUnits = 2 * kStep;
  static constexpr bool kScatters = kBackward && kGates * kBytes > 8;
  // Tiles that share an operand (gathering), or are added up (scattering).
  static constexpr int kTiles = kBackward && !kScatters ? kUnitTiles : kGates;
  static constexpr int kSources = kBackward ? kGates : 1;
  // Sums kept apart, of even and odd steps, where there are too few others to hide an instruction:
  // with a tile or two. (Which of these must not show in the results. In 3xTF32 no pair waits for
  // another's products.)
  static constexpr bool kFewTiles = (kBackward && !kScatters) || kGates == 1;
  static constexpr int kChains = kFewTiles && kProduct != Product::kTf32x3 ? 2 : 1;
  // Pairs whose operand is asked for before the first of them is used: fewer where products take
  // registers of their own, and more time.
  static constexpr bool kSplits = kProduct == Product::kTf32x3 || kProduct == Product::kIeee;
  static constexpr int kBatch = kParts == 1 && !kSplits ? 4 : 2;

  static_assert(!kScatters || (kParts == 1 && kPairUnits == kUnits));
  static_assert(kUnitTiles == 1 || (kBackward && !kScatters && kBlockUnits <= kPairUnits));
};

// What the warps share out evenly, each the next few. Gathering: blocks of a pair's units; they lie
// in all sources one after the other, so that a warp's pairs come from few blocks of threads.
// Scattering: tiles of 16 units.
template <class Traits>
FUSED_RNN_HD constexpr int unit_blocks(int64_t hidden) {
  return static_cast<int>((hidden + Traits::kPairUnits - 1) / Traits::kPairUnits);
}
FUSED_RNN_HD constexpr int first_of_warp(int all, int warp) { return all * warp / kGridWarps; }

// The most a warp has of what its weights are kept by: gathering pairs, scattering tiles of all
// gates.
template <class Traits>
FUSED_RNN_HD constexpr int most_pieces(int64_t hidden) {
  const int blocks = (unit_blocks<Traits>(hidden) + kGridWarps - 1) / kGridWarps;
  return Traits::kScatters ? blocks : blocks * Traits::kSources;
}

// An operand of eight rows that is gathered: [unit block][source][part][lane] of 16 bytes.
template <class Traits>
FUSED_RNN_HD constexpr int chunk_quads(int64_t hidden) {
  return unit_blocks<Traits>(hidden) * Traits::kSources * Traits::kParts * 32;
}

// Writes one number of an operand where the lane that multiplies it reads it. row: of the chunk;
// unit: from the chunk's first on.
template <class Traits>
FUSED_RNN_DEVICE void place(Quad* chunk, int source, int row, int unit, float value) {
  const int block = unit / Traits::kPairUnits, within = unit % Traits::kPairUnits;
  const int step = within / Traits::kStep, k = within % Traits::kStep;
  // (Of a step, a lane's two words are half the step apart.)
  constexpr int kHalf = Traits::kStep / 2, kNumbers = 4 / Traits::kBytes;
  const int lane = row * 4 + k % kHalf / kNumbers;
  const int word = step * 2 + k / kHalf;
  Quad* quad = chunk + (block * Traits::kSources + source) * Traits::kParts * 32 + lane;
  unsigned char* at = reinterpret_cast<unsigned char*>(quad) + word * 4;
  store_parts<Traits>(at + k % kNumbers * Traits::kBytes, 32 * sizeof(Quad), value);
}

// One step's operand of kCount chunks as it is multiplied.
template <Product kProduct, int kParts, int kCount>
class StepOperand {
 public:
  // Of each lane's 16 bytes of a pair, [part][chunk], the words of its first or second step.
  FUSED_RNN_DEVICE StepOperand(const uint32_t (&b)[kParts][kCount][4], int half) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < 2 * kCount; ++i) {
      FUSED_RNN_UNROLL
      for (int part = 0; part < kParts; ++part) {
        words_[part][i / 2][i % 2] = b[part][i / 2][2 * half + i % 2];
      }
      if constexpr (kProduct == Product::kTf32x3) {
        const float whole = float_of(words_[0][i / 2][i % 2]), part = high_tf32(whole);
        words_[0][i / 2][i % 2] = bits_of(part);
        low_[i / 2][i % 2] = bits_of(whole - part);
      }
    }
  }

  // sums += a b.
  FUSED_RNN_DEVICE void multiply(float (&sums)[kChunks][4], const uint32_t (&a)[4]) const {
    if constexpr (kProduct == Product::kIeee) {
      multiply_add_step(sums, a);
    } else if constexpr (kProduct == Product::kTf32x3) {
      const SplitWeights weights(a);
      FUSED_RNN_UNROLL
      for (int chunk = 0; chunk < kCount; ++chunk) {
        mma_3xtf32(sums[chunk], weights, words_[0][chunk], low_[chunk]);
      }
    } else {
      FUSED_RNN_UNROLL
      for (int part = kParts - 1; part >= 0; --part) {  // the smallest first
        FUSED_RNN_UNROLL
        for (int chunk = 0; chunk < kCount; ++chunk) {
          mma<kProduct>(sums[chunk], a, words_[part][chunk]);
        }
      }
    }
  }

 private:
  // By multiply-adds, with operands where tensor cores would have them: the lanes hand them round.
  FUSED_RNN_DEVICE void multiply_add_step(float (&sums)[kChunks][4], const uint32_t (&a)[4]) const {
    const int g = thread_index() % 32 / 4, q = thread_index() % 4;
    FUSED_RNN_UNROLL
    for (int k = 0; k < 8; ++k) {
      float row[2];
      FUSED_RNN_UNROLL
      for (int i = 0; i < 2; ++i) row[i] = shuffle(float_of(a[k / 4 * 2 + i]), g * 4 + k % 4);
      FUSED_RNN_UNROLL
      for (int n = 0; n < 2 * kCount; ++n) {
        const float mine = float_of(words_[0][n / 2][k / 4]);
        const float column = shuffle(mine, (2 * q + n % 2) * 4 + k % 4);
        FUSED_RNN_UNROLL
        for (int i = 0; i < 2; ++i) {
          float& sum = sums[n / 2][2 * i + n % 2];
          sum = multiply_add(row[i], column, sum);
        }
      }
    }
  }

  uint32_t words_[kParts][kCount][2];
  uint32_t low_[kCount][2];  // 3xTF32
};

// Sums of one warp as tensor cores leave them; see products.cuh.
template <class Traits>
struct WarpSums {
  float of[Traits::kTiles][Traits::kChains][kChunks][4] = {};
};

// What all warps of a block have of a product, for its threads to add up.
template <class Traits>
struct Partial {
  float of[kGridWarps][kChunks][Traits::kTiles][kUnits * 8];

  // Row m of a tile, column of a chunk: a shift that keeps pairs of columns together and spreads
  // the 16 units of two rows over all banks.
  static FUSED_RNN_DEVICE int index(int m, int column) { return m * 8 + (column ^ m / 4 * 2); }
};

// A thread's sums of a product.
template <class Traits>
struct ThreadSums {
  float of[Traits::kTiles] = {};

  FUSED_RNN_DEVICE float gate(int gate, int) const { return of[gate]; }
  FUSED_RNN_DEVICE float all(int slot) const { return of[slot]; }
  FUSED_RNN_DEVICE void spoil() {
    FUSED_RNN_UNROLL
    for (int tile = 0; tile < Traits::kTiles; ++tile) of[tile] = float_of(0x7fc00000u);  // NaN
  }
};

template <class Traits>
FUSED_RNN_DEVICE void store_sums(Partial<Traits>& partial, const WarpSums<Traits>& sums,
                                 int chunks) {
  struct alignas(8) Two {
    float x, y;
  };
  const int warp = thread_index() / 32, g = thread_index() % 32 / 4, q = thread_index() % 4;
  FUSED_RNN_UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk >= chunks) break;
    FUSED_RNN_UNROLL
    for (int tile = 0; tile < Traits::kTiles; ++tile) {
      FUSED_RNN_UNROLL
      for (int half = 0; half < 2; ++half) {
        float value[2];
        FUSED_RNN_UNROLL
        for (int n = 0; n < 2; ++n) {
          value[n] = sums.of[tile][0][chunk][2 * half + n];
          if (Traits::kChains == 2)
            value[n] += sums.of[tile][1 % Traits::kChains][chunk][2 * half + n];
        }
        float* at = partial.of[warp][chunk][tile] + Partial<Traits>::index(g + 8 * half, 2 * q);
        store(reinterpret_cast<Two*>(at), Two{value[0], value[1]});
      }
    }
  }
}

// A thread's unit in a tile is its index modulo 16.
template <class Traits>
FUSED_RNN_DEVICE void add_sums(ThreadSums<Traits>& sums, const Partial<Traits>& partial,
                               int chunks) {
  const int m = thread_index() % kUnits, row = thread_index() / kUnits, chunk = row / 8;
  if (chunk >= chunks) return;
  const int at = Partial<Traits>::index(m, row % 8);
  FUSED_RNN_UNROLL
  for (int tile = 0; tile < Traits::kTiles; ++tile) {
    sums.of[tile] = load(partial.of[0][chunk][tile] + at);
    FUSED_RNN_UNROLL
    for (int warp = 1; warp < kGridWarps; ++warp) {
      sums.of[tile] += load(partial.of[warp][chunk][tile] + at);
    }
  }
}

// A warp's weights and their products, in pieces: gathering the pairs along k of all tiles,
// scattering the tiles of all gates of 16 units.
template <class Traits>
class GridWeights {
 public:
  static constexpr Product kProduct = Traits::kProduct;

  // Pieces [first, first + count) are the warp's. shared: `room` pieces of each warp. element(gate,
  // m, k): the bits of a weight; gathering m < 16 is of the block, scattering k < 16 is.
  template <class Element>
  FUSED_RNN_DEVICE void fill(Quad* shared, int room, int first, int count, const Element& element) {
    shared_ = shared + thread_index() / 32 * room * kPieceQuads + thread_index() % 32;
    count_ = count;
    // One at a time: all loads at once would need more registers than there are.
    FUSED_RNN_NO_UNROLL
    for (int j = 0; j < Traits::kHeld; ++j) {
      FUSED_RNN_NO_UNROLL
      for (int tile = 0; tile < Traits::kTiles; ++tile) {
        uint32_t a[2][4];
        fragments(a, tile, first + j, element);
        FUSED_RNN_UNROLL
        for (int n = 0; n < Traits::kHeld * Traits::kTiles; ++n) {
          const bool here = n == j * Traits::kTiles + tile;
          FUSED_RNN_UNROLL
          for (int i = 0; i < 8; ++i) {
            uint32_t& held = held_[n / Traits::kTiles][n % Traits::kTiles][i / 4][i % 4];
            held = here ? a[i / 4][i % 4] : held;
          }
        }
      }
    }
    FUSED_RNN_NO_UNROLL
    for (int j = Traits::kHeld; j < count; ++j) {
      FUSED_RNN_NO_UNROLL
      for (int tile = 0; tile < Traits::kTiles; ++tile) {
        uint32_t a[2][4];
        fragments(a, tile, first + j, element);
        FUSED_RNN_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t(&words)[4] = a[half];
          store(at(j, tile, half), Quad{words[0], words[1], words[2], words[3]});
        }
      }
    }
  }

  // Gathering: sums += weights x operand, of kCount chunks. operand: this lane's part of the warp's
  // first pair and the first chunk; distance: between chunks.
  template <int kCount>
  FUSED_RNN_DEVICE void multiply(WarpSums<Traits>& sums, const Quad* operand, int distance) const {
    const int held = count_ < Traits::kHeld ? count_ : Traits::kHeld;
    FUSED_RNN_UNROLL
    for (int first = 0; first < Traits::kHeld; first += Traits::kBatch) {
      if (first < held) {
        uint32_t b[Traits::kBatch][Traits::kParts][kCount][4];
        read<kCount>(b, operand, distance, first, held);
        FUSED_RNN_UNROLL
        for (int n = 0; n < Traits::kBatch; ++n) {
          if (first + n < Traits::kHeld && first + n < held) {
            pair<kCount>(sums, held_[first + n < Traits::kHeld ? first + n : 0], b[n]);
          }
        }
      }
    }
    FUSED_RNN_NO_UNROLL
    for (int first = Traits::kHeld; first < count_; first += Traits::kBatch) {
      uint32_t b[Traits::kBatch][Traits::kParts][kCount][4];
      read<kCount>(b, operand, distance, first, count_);
      FUSED_RNN_UNROLL
      for (int n = 0; n < Traits::kBatch; ++n) {
        if (first + n < count_) {
          uint32_t a[Traits::kTiles][2][4];
          get(a, first + n);
          pair<kCount>(sums, a, b[n]);
        }
      }
    }
  }

  // Scattering: use(piece, sums [chunk][4]) for each of the warp's. operand: this lane's part of
  // the first source and chunk, in shared memory; distance: between chunks.
  template <int kCount, class Use>
  FUSED_RNN_DEVICE void multiply_each(const Quad* operand, int distance, const Use& use) const {
    uint32_t b[Traits::kTiles][1][kCount][4];
    FUSED_RNN_UNROLL
    for (int i = 0; i < Traits::kTiles * kCount; ++i) {
      get(b[i / kCount][0][i % kCount], operand + i % kCount * distance + i / kCount * 32);
    }
    FUSED_RNN_UNROLL
    for (int j = 0; j < Traits::kHeld; ++j) {
      if (j < count_) piece<kCount>(held_[j], b, j, use);
    }
    FUSED_RNN_NO_UNROLL
    for (int j = Traits::kHeld; j < count_; ++j) {
      uint32_t a[Traits::kTiles][2][4];
      get(a, j);
      piece<kCount>(a, b, j, use);
    }
  }

 private:
  static constexpr int kPieceQuads = Traits::kTiles * 2 * 32;

  FUSED_RNN_DEVICE Quad* at(int j, int tile, int half) const {
    return shared_ + ((j - Traits::kHeld) * Traits::kTiles + tile) * 64 + half * 32;
  }
  static FUSED_RNN_DEVICE void get(uint32_t (&to)[4], const Quad* from) {
    const Quad quad = load(from);
    to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
  }
  FUSED_RNN_DEVICE void get(uint32_t (&a)[Traits::kTiles][2][4], int j) const {
    FUSED_RNN_UNROLL
    for (int i = 0; i < 2 * Traits::kTiles; ++i) get(a[i / 2][i % 2], at(j, i / 2, i % 2));
  }

  template <class Element>
  static FUSED_RNN_DEVICE void fragments(uint32_t (&a)[2][4], int tile, int piece,
                                         const Element& element) {
    constexpr bool kGathersBack = Traits::kBackward && !Traits::kScatters;
    const int gate = kGathersBack ? piece % Traits::kSources : tile;
    const int block = kGathersBack ? piece / Traits::kSources : piece;
    const int first_m = Traits::kScatters ? block * kUnits : kGathersBack ? tile * kUnits : 0;
    const int first_k = Traits::kScatters ? 0 : block * Traits::kPairUnits;
    FUSED_RNN_UNROLL
    for (int half = 0; half < 2; ++half) {
      read_fragment<kProduct>(a[half], first_k + half * Traits::kStep,
                              [&](int m, int k) { return element(gate, first_m + m, k); });
    }
  }

  // The operand of a batch of pairs, as far as there are.
  template <int kCount>
  FUSED_RNN_DEVICE void read(uint32_t (&b)[Traits::kBatch][Traits::kParts][kCount][4],
                             const Quad* operand, int distance, int first, int end) const {
    FUSED_RNN_UNROLL
    for (int n = 0; n < Traits::kBatch; ++n) {
      if (first + n < end) {
        FUSED_RNN_UNROLL
        for (int part = 0; part < Traits::kParts; ++part) {
          FUSED_RNN_UNROLL
          for (int chunk = 0; chunk < kCount; ++chunk) {
            get(b[n][part][chunk],
                operand + chunk * distance + ((first + n) * Traits::kParts + part) * 32);
          }
        }
      }
    }
  }

  template <int kCount>
  using Step = StepOperand<kProduct, Traits::kParts, kCount>;

  template <int kCount>
  static FUSED_RNN_DEVICE void pair(WarpSums<Traits>& sums,
                                    const uint32_t (&a)[Traits::kTiles][2][4],
                                    const uint32_t (&b)[Traits::kParts][kCount][4]) {
    const Step<kCount> steps[2] = {{b, 0}, {b, 1}};
    if constexpr (kProduct == Product::kTf32x3) {
      FUSED_RNN_UNROLL
      for (int tile = 0; tile < Traits::kTiles; ++tile) {
        add_pair<kCount>(sums.of[tile][0], a[tile], steps);
      }
    } else {
      FUSED_RNN_UNROLL
      for (int n = 0; n < 2 * Traits::kTiles; ++n) {
        const int half = n / Traits::kTiles, tile = n % Traits::kTiles;
        steps[half].multiply(sums.of[tile][half % Traits::kChains], a[tile][half]);
      }
    }
  }

  template <int kCount, class Use>
  static FUSED_RNN_DEVICE void piece(const uint32_t (&a)[Traits::kTiles][2][4],
                                     const uint32_t (&b)[Traits::kTiles][1][kCount][4], int j,
                                     const Use& use) {
    float sums[2][kChunks][4] = {};  // of even and odd steps, in 3xTF32 gates
    FUSED_RNN_UNROLL
    for (int gate = 0; gate < Traits::kTiles; ++gate) {
      const Step<kCount> steps[2] = {{b[gate], 0}, {b[gate], 1}};
      if constexpr (kProduct == Product::kTf32x3) {
        add_pair<kCount>(sums[gate % 2], a[gate], steps);
      } else {
        FUSED_RNN_UNROLL
        for (int half = 0; half < 2; ++half) steps[half].multiply(sums[half], a[gate][half]);
      }
    }
    FUSED_RNN_UNROLL
    for (int i = 0; i < 4 * kCount; ++i) sums[0][i / 4][i % 4] += sums[1][i / 4][i % 4];
    use(j, sums[0]);
  }

  // sums += the products of a pair in 3xTF32. (From zero, and added as a whole, as in a block scan:
  // there a step at a time, for which there are not the registers here.)
  template <int kCount>
  static FUSED_RNN_DEVICE void add_pair(float (&sums)[kChunks][4], const uint32_t (&a)[2][4],
                                        const Step<kCount> (&steps)[2]) {
    float part[kChunks][4] = {};
    FUSED_RNN_UNROLL
    for (int half = 0; half < 2; ++half) steps[half].multiply(part, a[half]);
    FUSED_RNN_UNROLL
    for (int i = 0; i < 4 * kCount; ++i) sums[i / 4][i % 4] += part[i / 4][i % 4];
  }

  // (An array of no elements is not C++.)
  uint32_t held_[Traits::kHeld ? Traits::kHeld : 1][Traits::kTiles][2][4] = {};
  Quad* shared_;
  int count_;
};

}  // namespace fused_rnn::cuda
