// Products on the tile unit (AMX), in float32: operands cut to bfloat16, their tiles, the unit.
// Included inside the instruction set's anonymous namespace; see kernels.inl.
//
// The unit multiplies bfloat16 and adds in float32. An operand is cut into parts of 8 bits, high
// to low, whose sum it is: float32 has three, float16 two, bfloat16 is one. (Two of float32 do, to
// 2^-17, beside an operand of 16 bits.) Of the products of parts those are left out that are below
// what the operands' own rounding leaves: 2^-25 of a term in float32, 2^-18 in float16. So float32
// takes six products where the vector unit takes one, of a unit 16 times as fast.
//
// Bits: an element is a sum of blocks of 32 terms, in order, and in each of their products of
// parts, in order. Neither its place in a tile nor another row enters. (Numbers below 2^-126 count
// as zero.)

constexpr bool kHasTiles = true;

constexpr int64_t kTileItems = 16, kTileDepth = 32;  // rows or columns of a tile, and along k
constexpr int64_t kTileRow = kTileDepth * 2, kTileBytes = kTileItems * kTileRow;
constexpr int64_t kAhead = 128;  // bytes asked for with a product of parts
constexpr int64_t kPanelItems = 2 * kTileItems, kPanelBytes = 2 * kTileBytes;  // of a part
FN int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

FN int parts_of(DType dtype) {
  return dtype == DType::kBFloat16 ? 1 : dtype == DType::kFloat16 ? 2 : 3;
}
FN int parts_beside(DType other, DType dtype) {
  const int parts = parts_of(dtype);
  return parts == 3 && size_of(other) == 2 ? 2 : parts;
}

// Which parts are multiplied, in an order in which few have to be loaded anew.
struct Terms {
  int parts_a, parts_b, count = 0;
  uint8_t a[6], b[6];
  bool load_a[6], load_b[6];  // whether another part than for the term before

  Terms(int left, int right) : parts_a(left), parts_b(right) {
    const int most = parts_a > parts_b ? parts_a : parts_b;
    for (int i = 0; i < parts_a; ++i) {
      for (int k = 0; k < parts_b; ++k) {
        const int j = i % 2 ? k : parts_b - 1 - k;
        if (i + j >= most) continue;
        a[count] = static_cast<uint8_t>(i), b[count] = static_cast<uint8_t>(j);
        load_a[count] = count == 0 || a[count - 1] != i;
        load_b[count] = count == 0 || b[count - 1] != j;
        ++count;
      }
    }
  }
};

// x cut into `parts` numbers of 8 bits, whose lower halves are zero. What is infinite, or would be
// when rounded, or NaN, is in the last part, which meets only the other operand's first. (But for a
// single part, which meets all: an infinity in bfloat16 may make NaN beside float16 or float32.)
FN void cut(__m512 x, int parts, __m512i (&part)[3]) {
  const __m512i bits = _mm512_castps_si512(x);
  if (parts == 1) {
    part[0] = bits;
    return;
  }
  const __m512i half = _mm512_set1_epi32(0x8000), high = _mm512_set1_epi32(-0x10000);
  const __mmask16 huge = _mm512_cmpgt_epi32_mask(
      _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f7f7fff));
  const auto rounded = [&](__m512 value) FN_LAMBDA {
    return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(value), half), high);
  };
  part[0] = _mm512_mask_mov_epi32(rounded(x), huge, _mm512_setzero_si512());
  __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(part[0]));
  if (parts == 3) {
    part[1] = _mm512_mask_mov_epi32(rounded(rest), huge, _mm512_setzero_si512());
    rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(part[1]));
  }
  __m512i last = parts == 3 ? _mm512_castps_si512(rest) : rounded(rest);
  if (__builtin_expect(huge, 0)) {  // a NaN stays one, and the largest numbers become infinite
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __mmask16 infinite = huge & ~nan;
    last = _mm512_mask_or_epi32(last, nan, bits, _mm512_set1_epi32(0x400000));
    last = _mm512_mask_and_epi32(last, infinite, rounded(x), high);
  }
  part[parts - 1] = last;
}

// Lane l: the bfloat16 of `first` lane l, and above it that of `second`.
FN __m512i pairs_across(__m512i first, __m512i second) {
  return _mm512_or_si512(_mm512_srli_epi32(first, 16),
                         _mm512_and_si512(second, _mm512_set1_epi32(-0x10000)));
}
// Lane l: the bfloat16 of values 2 l and 2 l + 1 of the 32.
FN __m512i pairs_along(__m512i first, __m512i second) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(first, _mm512_load_si512(kUpper), second);
}

// An operand's items (rows of the left one, columns of the right one): item i at k is element
// at + i * item + k * column.
struct Items {
  const void* data;
  DType dtype;
  int64_t at, item, column;
};

// The tiles of 16 items, `lanes` of which there are, and of 32 terms, `deep` of which there are,
// one for each part, kPanelBytes apart; zero elsewhere. A left operand's tile is [item][pair of
// k], a right one's [pair of k][item].
template <DType kType, int kParts, bool kLeft>
__attribute__((noinline)) void pack_tiles(const Items& of, int lanes, int deep, char* to) {
  constexpr int kWidth = VecF::kWidth;
  VecF words[kParts][kWidth];
  const auto put = [&](int i, VecF first, VecF second, bool along) FN_LAMBDA {
    __m512i a[3], b[3];
    cut(first.v, kParts, a), cut(second.v, kParts, b);
#pragma GCC unroll 3
    for (int p = 0; p < kParts; ++p) {
      words[p][i].v =
          _mm512_castsi512_ps(along ? pairs_along(a[p], b[p]) : pairs_across(a[p], b[p]));
    }
  };
  const bool across = of.item == 1 && of.column != 1;
  if (across) {
    for (int i = 0; i < kWidth; ++i) {
      const auto row = [&](int k) FN_LAMBDA {
        return load_as<kType, float>(of.data, of.at + k * of.column, k < deep ? lanes : 0);
      };
      put(i, row(2 * i), row(2 * i + 1), false);
    }
  } else {
    const int low = deep < kWidth ? deep : kWidth, high = deep - low;
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = of.at + i * of.item;
      if (of.column == 1 || i >= lanes) {
        put(i, load_as<kType, float>(of.data, at, i < lanes ? low : 0),
            load_as<kType, float>(of.data, at + kWidth, i < lanes ? high : 0), true);
      } else {
        alignas(64) float row[kTileDepth] = {};
        for (int k = 0; k < deep; ++k) {
          load_as<kType, float>(of.data, at + k * of.column, 1).store(row + k, 1);
        }
        put(i, VecF::load(row), VecF::load(row + kWidth), true);
      }
    }
  }
  for (int p = 0; p < kParts; ++p, to += kPanelBytes) {
    if (across == kLeft) transpose(words[p]);
    float* tile = reinterpret_cast<float*>(to);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) words[p][i].store(tile + i * kWidth);
  }
}

// A panel of up to 32 items over `deep` terms: [block of 32 terms][part][half][1 KiB].
template <bool kLeft>
FN void pack_items(const Items& of, int items, int64_t deep, int parts, char* to) {
  for (int half = 0; half * kTileItems < items; ++half) {
    const int lanes = lanes_at(items, half * kTileItems, kTileItems);
    Items tile = of;
    tile.at += half * kTileItems * of.item;
    char* at = to + half * kTileBytes;
    for (int64_t k = 0; k < deep; k += kTileDepth, at += parts * kPanelBytes) {
      const int terms = lanes_at(deep, k, kTileDepth);
      if (of.dtype == DType::kBFloat16 && parts == 1) {
        pack_tiles<DType::kBFloat16, 1, kLeft>(tile, lanes, terms, at);
      } else if (of.dtype == DType::kBFloat16) {
        pack_tiles<DType::kBFloat16, 2, kLeft>(tile, lanes, terms, at);
      } else if (of.dtype == DType::kFloat16) {
        pack_tiles<DType::kFloat16, 2, kLeft>(tile, lanes, terms, at);
      } else if (parts == 2) {
        pack_tiles<DType::kFloat32, 2, kLeft>(tile, lanes, terms, at);
      } else {
        pack_tiles<DType::kFloat32, 3, kLeft>(tile, lanes, terms, at);
      }
      tile.at += kTileDepth * of.column;
    }
  }
}

// Whether weights in bfloat16 have an infinity or NaN; `at` is where those of an entry begin.
inline bool any_infinite(const Weights& w, int64_t at) {
  const bool along = w.column == 1;  // else units lie side by side, or anyhow
  const int64_t lines = along ? w.units : w.depth, length = along ? w.depth : w.units;
  const int64_t line = along ? w.unit : w.column, step = along ? w.column : w.unit;
  const auto* data = static_cast<const uint16_t*>(w.data) + at;
  const __m512i sign = _mm512_set1_epi16(0x7fff), finite = _mm512_set1_epi16(0x7f7f);
  __mmask32 found = 0;
  for (int g = 0; g < w.gates; ++g) {
    for (int64_t l = 0; l < lines; ++l) {
      const uint16_t* from = data + g * w.gate + l * line;
      for (int64_t k = 0; k < length; step == 1 ? k += 32 : ++k) {
        const int64_t left = step == 1 ? length - k : 1;
        const __mmask32 mask = left < 32 ? (1u << left) - 1u : ~0u;
        const __m512i x = _mm512_maskz_loadu_epi16(mask, from + k * step);
        found |= _mm512_cmpgt_epi16_mask(_mm512_and_si512(x, sign), finite);
      }
    }
  }
  return found != 0;
}

// How a scan's weights are cut for the tile unit; 0 where it does not take them. Those of bfloat16
// are one part, and of two where an infinity among them would meet both parts of a state.
inline int scan_parts(const Layer& layer, const Weights& w, int64_t entry, bool state) {
  if (!scan_by_tiles(layer.steps, w.dtype, w.depth)) return 0;
  bool infinite = false;
  if (state && w.dtype == DType::kBFloat16) {
    for (int64_t s = 0; s < layer.stack && !infinite; ++s) infinite = any_infinite(w, s * entry);
  }
  return infinite ? 2 : parts_of(w.dtype);
}
// A block's weights lie in two panels, two vectors in each.
FN int64_t tile_panel_bytes(int64_t depth, int parts) {
  return whole(depth, kTileDepth) / kTileDepth * parts * kPanelBytes;
}
FN int64_t tile_block_bytes(int64_t depth, int parts) { return 2 * tile_panel_bytes(depth, parts); }

inline void pack_tile_block(const Weights& w, int64_t at, const Blocks& blocks, int64_t block,
                            int parts, void* to) {
  const int64_t panel = tile_panel_bytes(w.depth, parts);
  const int vectors = blocks.depth_vectors(block) * w.gates;
  for (int v = 0; v < vectors; ++v) {
    const int64_t u = blocks.first_unit(block) + v / w.gates * kTileItems;
    const Items of{w.data, w.dtype, at + v % w.gates * w.gate + u * w.unit, w.unit, w.column};
    pack_items<false>(of, lanes_at(w.units, u, kTileItems), w.depth, parts,
                      static_cast<char*>(to) + v / 2 * panel + v % 2 * kTileBytes);
  }
}

// A panel of left items for TileUnit: where the second 16 items, the next part and the next block
// of terms are, in bytes.
struct LeftPanel {
  const char* at;
  int64_t half, part, block;
};

// A thread's tiles: 0 to 3 the sums of two halves of rows by two of columns, 4 and 5 the rows', 6
// and 7 the columns'.
class TileUnit {
 public:
  explicit TileUnit(bool used) : used_(used) {
    if (!used) return;
    alignas(64) uint8_t layout[64] = {1};  // the palette
    for (int tile = 0; tile < 8; ++tile) {
      layout[16 + 2 * tile] = 64, layout[48 + tile] = kTileItems;  // bytes of a row, rows
    }
    asm volatile("ldtilecfg %0" : : "m"(layout));
  }
  TileUnit(const TileUnit&) = delete;
  ~TileUnit() {
    if (used_) _tile_release();
  }

  // sums[row * ld + column] (+)= the product of two panels over so many blocks, the right one
  // packed by pack_items. Meanwhile what is `next` is asked for, kAhead bytes with a term.
  template <bool kRows, bool kColumns>  // whether there are second halves
  FN void multiply(const Terms& terms, int64_t blocks, LeftPanel a, const char* b, float* sums,
                   int64_t ld, bool add, const char* next) const {
    const int64_t row = ld * static_cast<int64_t>(sizeof(float));
    float* lower = sums + kTileItems * ld;
    if (add) {
      _tile_loadd(0, sums, row);
      if (kColumns) _tile_loadd(1, sums + kTileItems, row);
      if (kRows) _tile_loadd(2, lower, row);
      if (kRows && kColumns) _tile_loadd(3, lower + kTileItems, row);
    } else {
      _tile_zero(0);
      if (kColumns) _tile_zero(1);
      if (kRows) _tile_zero(2);
      if (kRows && kColumns) _tile_zero(3);
    }
    asm volatile("" : : : "memory");  // the loads do not say that they read what was packed
    for (; blocks > 0; --blocks) {
      for (int t = 0; t < terms.count; ++t) {
        const char* left = a.at + terms.a[t] * a.part;
        const char* right = b + terms.b[t] * kPanelBytes;
        for (int line = 0; line < kAhead; line += 64) __builtin_prefetch(next + line, 0, 2);
        next += kAhead;
        if (terms.load_a[t]) {
          _tile_loadd(4, left, kTileRow);
          if (kRows) _tile_loadd(5, left + a.half, kTileRow);
        }
        if (terms.load_b[t]) {
          _tile_loadd(6, right, kTileRow);
          if (kColumns) _tile_loadd(7, right + kTileBytes, kTileRow);
        }
        _tile_dpbf16ps(0, 4, 6);
        if (kColumns) _tile_dpbf16ps(1, 4, 7);
        if (kRows) _tile_dpbf16ps(2, 5, 6);
        if (kRows && kColumns) _tile_dpbf16ps(3, 5, 7);
      }
      a.at += a.block, b += terms.parts_b * kPanelBytes;
    }
    _tile_stored(0, sums, row);
    if (kColumns) _tile_stored(1, sums + kTileItems, row);
    if (kRows) _tile_stored(2, lower, row);
    if (kRows && kColumns) _tile_stored(3, lower + kTileItems, row);
  }
  // Of up to 32 rows and columns; all 16 or 32 of the rows are written.
  __attribute__((noinline)) void multiply(const Terms& terms, int rows, int columns, int64_t blocks,
                                          const LeftPanel& a, const char* b, float* sums,
                                          int64_t ld, bool add, const char* next) const {
    if (rows > kTileItems) {
      columns > kTileItems ? multiply<true, true>(terms, blocks, a, b, sums, ld, add, next)
                           : multiply<true, false>(terms, blocks, a, b, sums, ld, add, next);
    } else {
      columns > kTileItems ? multiply<false, true>(terms, blocks, a, b, sums, ld, add, next)
                           : multiply<false, false>(terms, blocks, a, b, sums, ld, add, next);
    }
  }

 private:
  const bool used_;
};

// The operand of a scan's products: so many rows cut in parts, [block of 32 terms][part][row].
struct TileOperand {
  char* data = nullptr;
  int64_t rows = 0, depth = 0;  // rows: there is memory for, whole tiles
  int parts = 0;

  // What `rows` rows may take. (A last tile may begin at any row.)
  static int64_t bytes(int64_t rows, int64_t depth) {
    return whole(rows, kTileItems) * whole(depth, kTileDepth) * kMostParts * 2 + kTileBytes;
  }
  // It becomes `count` rows from element `at` on, `row` apart.
  void take(const void* from, DType dtype, int64_t at, int64_t row, int64_t count, int64_t deep) {
    depth = deep, rows = whole(count, kTileItems);
    parts = dtype == DType::kBFloat16 ? 1 : kMostParts;
    switch (dtype) {
      case DType::kBFloat16:
        return take_rows<DType::kBFloat16, 1>(from, at, row, count);
      case DType::kFloat16:
        return take_rows<DType::kFloat16, kMostParts>(from, at, row, count);
      default:
        return take_rows<DType::kFloat32, kMostParts>(from, at, row, count);
    }
  }
  LeftPanel panel(int64_t row) const {
    return {data + row * kTileRow, kTileBytes, rows * kTileRow, parts * rows * kTileRow};
  }

 private:
  static constexpr int kMostParts = 2;

  template <DType kType, int kParts>
  void take_rows(const void* from, int64_t at, int64_t row, int64_t count) const {
    constexpr int kWidth = VecF::kWidth;
    for (int64_t b = 0; b < count; ++b, at += row) {
      char* to = data + b * kTileRow;
      for (int64_t k = 0; k < depth; k += kTileDepth) {
        const int terms = lanes_at(depth, k, kTileDepth), low = terms < kWidth ? terms : kWidth;
        __m512i first[3], second[3];
        cut(load_as<kType, float>(from, at + k, low).v, kParts, first);
        cut(load_as<kType, float>(from, at + k + kWidth, terms - low).v, kParts, second);
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p, to += rows * kTileRow) {
          _mm512_store_si512(to, pairs_along(first[p], second[p]));
        }
      }
    }
  }
};

// sums [rows][vectors * 16] = rows of an operand from `row` on by a block of weights, of which all
// of the last 16 are written. `next` is what is used next.
inline void multiply_tiles(const TileUnit& unit, const TileOperand& operand, int64_t row, int rows,
                           int vectors, int parts, const void* block, const void* next,
                           float* sums) {
  const Terms terms(operand.parts, parts);
  const int64_t blocks = whole(operand.depth, kTileDepth) / kTileDepth;
  const int64_t panel = tile_panel_bytes(operand.depth, parts);
  const auto* weights = static_cast<const char*>(block);
  for (int v = 0; v < vectors; v += 2) {
    const char* b = weights + v / 2 * panel;
    const char* then = v + 2 < vectors ? b + panel : static_cast<const char*>(next);
    unit.multiply(terms, rows, (vectors - v) * kTileItems, blocks, operand.panel(row), b,
                  sums + v * kTileItems, vectors * kTileItems, false, then);
  }
}

// Seconds that products of rows by so many columns take, the cutting of the rows included; roughly.
inline double tile_seconds(int64_t rows, int64_t depth, double columns, int parts) {
  constexpr double kTileFlopsPerSecond = 1.5e12, kSecondsPerCut = 2.5e-10;  // of a value
  const double values = static_cast<double>(whole(depth, kTileDepth));
  const int terms = Terms(2, parts).count;
  return 2 * terms * whole(rows, kTileItems) * values * columns / kTileFlopsPerSecond +
         kSecondsPerCut * rows * values;
}

// Whether a product is one for the unit, and then done; tile_matmul.inl.
bool multiplied_by_tiles(const Matmul& p);
