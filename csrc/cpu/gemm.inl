// The register-tile matrix product and the packing of its weights.
// Included inside the instruction set's anonymous namespace; see kernels.inl.
//
// Bits: every element is a chain of fused multiply-adds over k in ascending order, cut into blocks
// whose sums are added in order. Neither the number of rows in a tile nor the number of vectors in
// a panel enters, so a row's result does not depend on its company. The blocks are there for
// accuracy: the error of one chain grows with its length.

// Rows of a tile for a panel of 1..4 vectors: what fits the registers (32 with AVX-512 and on
// aarch64, else 16) beside a step along k.
#if FUSED_RNN_REGISTERS == 32
constexpr int kTileRows[5] = {0, 8, 8, 8, 6};
#else
constexpr int kTileRows[5] = {0, 8, 6, 4, 3};
#endif
// Terms of a block. Where many blocks' sums are added their number bounds the error as much, so
// blocks may be longer (where tiles are of few sums, which take a longer part of their time to be
// added to those before): sooner if the result is known to have many columns, for of few one sum's
// bad luck is all there is.
constexpr int64_t kBlockK = 32, kLongBlockK = FUSED_RNN_REGISTERS == 32 ? 32 : 64;
FN int64_t block_terms(int64_t depth, int64_t columns = 0) {
  return depth < (columns < 64 ? 1024 : 512) ? kBlockK : kLongBlockK;
}
constexpr int64_t kTurnK = 4;  // steps of a turn, so few to a block that its end is foreseen
constexpr int kMaxVectors = 4;

// Rows whose sums are in the first-level cache at a time, and the slice of a panel, along k, that
// all their tiles use before the next. With AVX-512 12 KiB of sums (and as much of a projected
// input), 8 KiB of panel, 6 KiB of operands; with AVX2 6, 8 and 12.
constexpr int64_t kGroupRows = 48;
constexpr int64_t kSliceK = kLongBlockK;
static_assert(kSliceK % kBlockK == 0, "the order of sums must not depend on the slices");

// Elements from row to row: an odd number of cache lines, so that a slice of many rows does not
// fall into few sets of the cache.
template <class T>
FN int64_t padded_row(int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return ((width + kLine - 1) / kLine | 1) * kLine;
}

// Memory that a tile asks for while it multiplies, the slice of the panel used next: weights beyond
// the second-level cache come at the pace of the products only if they are asked for during all of
// them. Every step along k asks for a line of each half. (Where they are nearer, asking costs 3 to
// 5 % and spares nothing.)
struct Ahead {
  const char* at = nullptr;
  int64_t half = 0, step = 0;  // bytes

  FN Ahead() = default;
  // The share of one of `tiles` tiles of `deep` steps in `bytes` from `slice` on.
  FN Ahead(const void* slice, int64_t bytes, int64_t tiles, int64_t tile, int64_t deep) {
    half = bytes / 2, step = half / (tiles * deep);
    if (step > 64) step = 64;
    at = static_cast<const char*>(slice) + half * tile / tiles;
  }
  FN void next() {
    __builtin_prefetch(at, 0, 3);
    __builtin_prefetch(at + half, 0, 3);
    at += step;
  }
};

// One step along k of a tile: sum[m][v] += a[m * row] * panel[v]. Of the rows' numbers and the
// panel's vectors the fewer are held, so that these, the sums and one of the others fit the
// registers.
template <class T, int kRows, int kVectors>
FN void tile_step(const T* a, int64_t row, const T* panel, Vec<T> (&sum)[kRows][kVectors]) {
  using V = Vec<T>;
  if constexpr (kRows < kVectors) {
    V x[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) x[m] = V(a[m * row]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const V w = V::load(panel + v * V::kWidth);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) sum[m][v] = fma(x[m], w, sum[m][v]);
    }
  } else {
    V w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) w[v] = V::load(panel + v * V::kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const V x(a[m * row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] = fma(x, w[v], sum[m][v]);
    }
  }
}

// tile[m][v * kWidth + lane] (+)= sum over k of a[m * row + k * column] * panel[k][v][lane], in
// blocks of so many terms.
template <class T, int kRows, int kVectors, bool kAsks>
__attribute__((noinline)) void tile_product(const T* a, int64_t row, int64_t column, const T* panel,
                                            int64_t k, int64_t terms, T* tile, bool add,
                                            Ahead ahead) {
  using V = Vec<T>;
  constexpr int kWidth = V::kWidth;
  do {
    V sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] = V(T(0));
    }
    const auto step = [&]() FN_LAMBDA {
      tile_step<T, kRows, kVectors>(a, row, panel, sum);
      if constexpr (kAsks) ahead.next();
      a += column;
      panel += kVectors * kWidth;
    };
    const int64_t block = k < terms ? k : terms;
    for (int64_t turn = block / kTurnK; turn > 0; --turn) {
#pragma GCC unroll 4
      for (int i = 0; i < kTurnK; ++i) step();
    }
    for (int64_t i = block % kTurnK; i > 0; --i) step();
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        T* at = tile + (m * kVectors + v) * kWidth;
        (add ? V::load(at) + sum[m][v] : sum[m][v]).store(at);
      }
    }
    k -= block;
    add = true;
  } while (k > 0);
}

template <class T, int kVectors, int kRows = kTileRows[kVectors]>
FN void tile_product_rows(int rows, const T* a, int64_t row, int64_t column, const T* panel,
                          int64_t k, int64_t terms, T* tile, bool add, const Ahead& ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      if constexpr (kRows >= 4) {  // with fewer, loads take as long as products
        if (ahead.at != nullptr) {
          return tile_product<T, kRows, kVectors, true>(a, row, column, panel, k, terms, tile, add,
                                                        ahead);
        }
      }
      return tile_product<T, kRows, kVectors, false>(a, row, column, panel, k, terms, tile, add,
                                                     ahead);
    }
    tile_product_rows<T, kVectors, kRows - 1>(rows, a, row, column, panel, k, terms, tile, add,
                                              ahead);
  }
}

// As tile_product for any 1 <= rows <= kTileRows[vectors].
template <class T>
__attribute__((noinline)) void tile_product(int rows, int vectors, const T* a, int64_t row,
                                            int64_t column, const T* panel, int64_t k,
                                            int64_t terms, T* tile, bool add, const Ahead& ahead) {
  switch (vectors) {
    case 4:
      return tile_product_rows<T, 4>(rows, a, row, column, panel, k, terms, tile, add, ahead);
    case 3:
      return tile_product_rows<T, 3>(rows, a, row, column, panel, k, terms, tile, add, ahead);
    case 2:
      return tile_product_rows<T, 2>(rows, a, row, column, panel, k, terms, tile, add, ahead);
    default:
      return tile_product_rows<T, 1>(rows, a, row, column, panel, k, terms, tile, add, ahead);
  }
}

// The weights of one stack entry: element (gate g, unit u, k) is at data[at + g * gate + u * unit +
// k * column], u < units, k < depth.
struct Weights {
  const void* data;
  DType dtype;
  int gates;
  int64_t units, depth;
  int64_t gate, unit, column;
};

// How the units fall into blocks: a block has all gates of 1..kMaxVectors / gates vectors of units,
// as even as can be, and its panel is [depth][vector of units][gate][kWidth], zero beyond `units`.
struct Blocks {
  int gates, width;
  int64_t units, vectors, count;

  FN Blocks() = default;
  FN Blocks(int gates_, int width_, int64_t units_) : gates(gates_), width(width_), units(units_) {
    const int most = kMaxVectors / gates;
    vectors = (units + width - 1) / width;
    count = (vectors + most - 1) / most;
  }
  FN int64_t first_vector(int64_t block) const { return vectors * block / count; }
  FN int64_t first_unit(int64_t block) const { return first_vector(block) * width; }
  // Vectors of units in a block.
  FN int depth_vectors(int64_t block) const {
    return static_cast<int>(first_vector(block + 1) - first_vector(block));
  }
  // Elements of one k of all panels; times depth, of the packed weights.
  FN int64_t row_elements() const { return vectors * gates * width; }
  FN int64_t row_offset(int64_t block) const { return first_vector(block) * gates * width; }
};

// square[i] lane l = column i of unit l, from element `at` on, of `lanes` units whose weights lie
// one after another (column == 1); zero beyond them, and beyond `wide` columns. Out of line: for
// the ends of rows and of units.
template <class T>
__attribute__((noinline)) void load_square(const Weights& w, int64_t at, int lanes, int wide,
                                           Vec<T>* square) {
  constexpr int kWidth = Vec<T>::kWidth;
  Vec<T> rows[kWidth];
  by_type<T>(w.dtype, [&](auto type) FN_LAMBDA {
    for (int l = 0; l < kWidth; ++l) {
      rows[l] = load_as<type.kValue, T>(w.data, at + l * w.unit, l < lanes ? wide : 0);
    }
  });
  transpose(rows);
  for (int i = 0; i < kWidth; ++i) square[i] = rows[i];
}

// pack_vector of whole squares of weights of kType; the number of columns.
template <DType kType, class T>
FN int64_t pack_squares(const Weights& w, int64_t at, T* panel, int64_t step) {
  using S = Square<kType, T>;
  const int64_t size = size_of(kType);
  const char* rows = static_cast<const char*>(w.data) + at * size;
  int64_t k = 0;
  for (; k + S::kColumns <= w.depth; k += S::kColumns) {
    const S square(rows + k * size, w.unit * size);
#pragma GCC unroll 32
    for (int i = 0; i < S::kColumns; ++i) square[i].store(panel + (k + i) * step);
  }
  return k;
}

// panel[k][kWidth], k in [0, depth), at stride `step`: the lanes are `lanes` units from `at` on.
template <class T>
void pack_vector(const Weights& w, int64_t at, int lanes, T* panel, int64_t step) {
  using V = Vec<T>;
  constexpr int kWidth = V::kWidth;
  if (w.unit == 1) {
    for (int64_t k = 0; k < w.depth; ++k) {
      load<T>(w.data, w.dtype, at + k * w.column, lanes).store(panel + k * step);
    }
  } else if (w.column == 1) {
    int64_t k = 0;
    if (lanes == kWidth) {
      k = by_type<T>(w.dtype, [&](auto type) FN_LAMBDA {
        return pack_squares<type.kValue>(w, at, panel, step);
      });
    }
    for (; k < w.depth; k += kWidth) {
      const int wide = lanes_at(w.depth, k, kWidth);
      V square[kWidth];
      load_square(w, at + k, lanes, wide, square);
      for (int i = 0; i < wide; ++i) square[i].store(panel + (k + i) * step);
    }
  } else {
    alignas(64) T one[kWidth] = {};
    for (int64_t k = 0; k < w.depth; ++k) {
      for (int l = 0; l < lanes; ++l) {
        load<T>(w.data, w.dtype, at + k * w.column + l * w.unit, 1).store(one + l, 1);
      }
      V::load(one).store(panel + k * step);
    }
  }
}

// total[m * step + v] = the sums over all terms of kRows rows of x, `ld` apart, and kVectors
// vectors of units, whose weights, of kType, begin at from[v]. One square of weights at a time, so
// that kRows * kVectors chains of sums run side by side.
template <DType kType, class T, int kRows, int kVectors>
FN void direct_sums(const Weights& w, const int64_t* from, const int* lanes, const T* x, int64_t ld,
                    int64_t terms, Vec<T>* total, int step) {
  using V = Vec<T>;
  using S = Square<kType, T>;
  constexpr int kWidth = V::kWidth;
  static_assert(kBlockK % S::kColumns == 0, "only the last block may have more than squares");
  const int64_t size = size_of(kType), row = w.unit * size;
  const bool whole = lanes[kVectors - 1] == kWidth;  // and so those before
  const char* at[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) at[v] = static_cast<const char*>(w.data) + from[v] * size;
  for (int64_t k = 0; k < w.depth; k += terms) {
    const int64_t end = w.depth - k < terms ? w.depth : k + terms;
    V sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] = V(T(0));
    }
    int64_t i = k;
    for (; whole && i + S::kColumns <= end; i += S::kColumns) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const S square(at[v], row);
        at[v] += S::kColumns * size;
#pragma GCC unroll 32
        for (int c = 0; c < S::kColumns; ++c) {
          const V units = square[c];
#pragma GCC unroll 8
          for (int m = 0; m < kRows; ++m) sum[m][v] = fma(V(x[m * ld + i + c]), units, sum[m][v]);
        }
      }
    }
    for (; i < end; i += kWidth) {
      const int wide = lanes_at(end, i, kWidth);
      for (int v = 0; v < kVectors; ++v) {
        V square[kWidth];
        load_square(w, from[v] + i, lanes[v], wide, square);
        for (int c = 0; c < wide; ++c) {
#pragma GCC unroll 8
          for (int m = 0; m < kRows; ++m) {
            sum[m][v] = fma(V(x[m * ld + i + c]), square[c], sum[m][v]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        V& to = total[m * step + v];
        to = k > 0 ? to + sum[m][v] : sum[m][v];
      }
    }
  }
}

// total[m * step] (+)= the sums over `deep` terms of kRows rows of x, `ld` apart, and a vector of
// units whose weights lie side by side (unit == 1).
template <class T, int kRows>
FN void direct_sums_beside(const Weights& w, int64_t from, int lanes, const T* x, int64_t ld,
                           int64_t deep, Vec<T>* total, int step, bool add) {
  using V = Vec<T>;
  V sum[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) sum[m] = V(T(0));
  for (int64_t k = 0; k < deep; ++k) {
    const V units = load<T>(w.data, w.dtype, from + k * w.column, lanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) sum[m] = fma(V(x[m * ld + k]), units, sum[m]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    V& to = total[m * step];
    to = add ? to + sum[m] : sum[m];
  }
}

// direct_sums of `vectors` of up to kVectors vectors.
template <class T, int kRows, int kVectors>
FN void direct_vectors(int vectors, const Weights& w, const int64_t* from, const int* lanes,
                       const T* x, int64_t ld, int64_t terms, Vec<T>* total, int step) {
  if constexpr (kVectors > 0) {
    if (vectors < kVectors) {
      return direct_vectors<T, kRows, kVectors - 1>(vectors, w, from, lanes, x, ld, terms, total,
                                                    step);
    }
    by_type<T>(w.dtype, [&](auto type) FN_LAMBDA {
      direct_sums<type.kValue, T, kRows, kVectors>(w, from, lanes, x, ld, terms, total, step);
    });
  }
}

// direct_product of kRows rows.
template <class T, int kRows>
__attribute__((noinline)) void direct_rows(const Weights& w, int64_t at, const Blocks& blocks,
                                           int64_t block, const T* x, int64_t ld, int64_t terms,
                                           T* tile) {
  using V = Vec<T>;
  constexpr int kWidth = V::kWidth;
  const int vectors = blocks.depth_vectors(block) * w.gates;
  int64_t from[kMaxVectors];
  int lanes[kMaxVectors];
  V total[kRows * kMaxVectors];
  for (int v = 0; v < vectors; ++v) {
    const int64_t u = blocks.first_unit(block) + v / w.gates * kWidth;
    from[v] = at + v % w.gates * w.gate + u * w.unit;
    lanes[v] = w.units - u < kWidth ? static_cast<int>(w.units - u) : kWidth;
  }
  for (int i = 0; i < kRows * vectors; ++i) total[i] = V(T(0));
  for (int64_t k = 0; w.unit == 1 && k < w.depth; k += terms) {
    const int64_t deep = w.depth - k < terms ? w.depth - k : terms;
    for (int v = 0; v < vectors; ++v) {
      direct_sums_beside<T, kRows>(w, from[v], lanes[v], x + k, ld, deep, total + v, vectors,
                                   k > 0);
      from[v] += terms * w.column;
    }
  }
  // Of one row as many vectors side by side as the registers hold; of more, their sums are many.
  constexpr int kMost = kRows > 1 ? 1 : FUSED_RNN_REGISTERS >= 32 ? 4 : 2;
  for (int v = 0, count = 0; w.unit != 1 && v < vectors; v += count) {
    count = vectors - v < kMost ? vectors - v : kMost;
    while (count > 1 && lanes[v + count - 1] < kWidth) --count;  // the last by itself
    direct_vectors<T, kRows, kMost>(count, w, from + v, lanes + v, x, ld, terms, total + v,
                                    vectors);
  }
  for (int i = 0; i < kRows * vectors; ++i) total[i].store(tile + i * kWidth);
}

// As tile_product for up to kDirectRows rows x [rows, depth], `ld` apart, and a block of weights
// that are not packed, whose units lie one after another (column == 1) or side by side (unit == 1):
// packing what is used once costs more than it saves. `at` is where the stack entry's weights
// begin.
template <class T, int kRows = kDirectRows>
FN void direct_product(int rows, const Weights& w, int64_t at, const Blocks& blocks, int64_t block,
                       const T* x, int64_t ld, int64_t terms, T* tile) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return direct_rows<T, kRows>(w, at, blocks, block, x, ld, terms, tile);
    direct_product<T, kRows - 1>(rows, w, at, blocks, block, x, ld, terms, tile);
  }
}

// The panel of one block; `at` is where the stack entry's weights begin.
template <class T>
void pack_panel(const Weights& w, int64_t at, const Blocks& blocks, int64_t block, T* panel) {
  constexpr int kWidth = Vec<T>::kWidth;
  const int vectors = blocks.depth_vectors(block);
  const int64_t step = static_cast<int64_t>(vectors) * w.gates * kWidth;
  for (int v = 0; v < vectors; ++v) {
    const int64_t u = blocks.first_unit(block) + v * kWidth;
    const int lanes = w.units - u < kWidth ? static_cast<int>(w.units - u) : kWidth;
    for (int g = 0; g < w.gates; ++g) {
      pack_vector(w, at + g * w.gate + u * w.unit, lanes, panel + (v * w.gates + g) * kWidth, step);
    }
  }
}
