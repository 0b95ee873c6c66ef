// The matrix product on the tile unit (AMX), in float32.
// Included inside the instruction set's anonymous namespace, after kernels.inl, by compilers that
// know AMX.
//
// The unit multiplies bfloat16 and adds in float32. An operand is cut into parts of 8 bits, high
// to low, whose sum it is: float32 has three, float16 two, bfloat16 is one. Of the products of
// parts those are left out that are below the rounding of float32 (2^-25 of a term). So float32
// takes six products where the vector unit takes one, of a unit 16 times as fast.
//
// Bits: an element is the sum over slices of kSliceDepth, in order, each of which is the sum of
// its blocks of 32 and of their products of parts, in order. Neither its place in a tile nor
// another row enters. (Numbers below 2^-126 count as zero.)

constexpr int64_t kTileItems = 16, kTileDepth = 32;  // rows or columns of a tile, and along k
constexpr int64_t kTileBytes = kTileItems * kTileDepth * 2;
constexpr int64_t kPanelItems = 2 * kTileItems, kPanelBytes = 2 * kTileBytes;  // of a part
constexpr int64_t kSliceDepth = 128;   // both operands' slices of a panel fit the L1
constexpr int64_t kGroupPanels = 8;    // rows of a chunk that stay in the L2: 768 KiB in float32
static_assert(kChunkK % kSliceDepth == 0, "the order of sums must not depend on the chunks");

constexpr int64_t kAhead = 128;        // bytes of what is used next asked for with a term
// What makes it worth while, beside many rows: packing takes as long as some 30 columns.
constexpr int64_t kLeastDepth = 32, kLeastColumns = 64;

FN int parts_of(DType dtype) {
  return dtype == DType::kBFloat16 ? 1 : dtype == DType::kFloat16 ? 2 : 3;
}

// Which parts are multiplied, in an order in which few have to be loaded anew.
struct Terms {
  int parts_a, parts_b, count = 0;
  uint8_t a[6], b[6];
  bool load_a[6], load_b[6];

  Terms(DType left, DType right) : parts_a(parts_of(left)), parts_b(parts_of(right)) {
    const int most = parts_a > parts_b ? parts_a : parts_b;
    for (int i = 0; i < parts_a; ++i) {
      for (int j = parts_b - 1; j >= 0; --j) {
        if (i + j >= most) continue;
        load_a[count] = j == parts_b - 1 || i + j == most - 1, load_b[count] = count == 0 || b[count - 1] != j;
        a[count] = static_cast<uint8_t>(i), b[count++] = static_cast<uint8_t>(j);
      }
    }
  }
};

// x cut into `parts` numbers of 8 bits, whose lower halves are zero. What is infinite, or would be
// when rounded, or NaN, is in the last part, which meets only the other operand's first.
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
  __m512i last = _mm512_castps_si512(rest);
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
  alignas(64) static constexpr uint16_t kUpper[32] = {
      1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(first, _mm512_load_si512(kUpper), second);
}

// An operand's items (rows of the left one, columns of the right one): item i at k is element
// at + i * item + k * column.
struct Items {
  const void* data;
  DType dtype;
  int64_t at, item, column;
};

template <DType kType>
FN VecF load_items(const void* data, int64_t at, int n) {
  if (kType == DType::kFloat32) return VecF::load(static_cast<const float*>(data) + at, n);
  const uint16_t* p = static_cast<const uint16_t*>(data) + at;
  return kType == DType::kBFloat16 ? load_bf16(p, n) : load_f16(p, n);
}

// The tiles of 16 items, `lanes` of which there are, and of 32 terms, `deep` of which there are,
// one for each part, kPanelBytes apart; zero elsewhere. A left operand's tile is [item][pair of
// k], a right one's [pair of k][item].
template <DType kType, bool kLeft>
__attribute__((noinline)) void pack_tiles(const Items& of, int lanes, int deep, char* to) {
  constexpr int kParts = kType == DType::kBFloat16 ? 1 : kType == DType::kFloat16 ? 2 : 3;
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
        return load_items<kType>(of.data, of.at + k * of.column, k < deep ? lanes : 0);
      };
      put(i, row(2 * i), row(2 * i + 1), false);
    }
  } else {
    const int low = deep < kWidth ? deep : kWidth, high = deep - low;
    for (int i = 0; i < kWidth; ++i) {
      const int64_t at = of.at + i * of.item;
      if (of.column == 1 || i >= lanes) {
        put(i, load_items<kType>(of.data, at, i < lanes ? low : 0),
            load_items<kType>(of.data, at + kWidth, i < lanes ? high : 0), true);
      } else {
        alignas(64) float row[kTileDepth] = {};
        for (int k = 0; k < deep; ++k) {
          load_items<kType>(of.data, at + k * of.column, 1).store(row + k, 1);
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
FN void pack_items(const Items& of, int items, int64_t deep, char* to) {
  const int parts = parts_of(of.dtype);
  for (int half = 0; half * kTileItems < items; ++half) {
    const int lanes = lanes_at(items, half * kTileItems, kTileItems);
    Items tile = of;
    tile.at += half * kTileItems * of.item;
    char* at = to + half * kTileBytes;
    for (int64_t k = 0; k < deep; k += kTileDepth, at += parts * kPanelBytes) {
      const int terms = lanes_at(deep, k, kTileDepth);
      if (of.dtype == DType::kBFloat16) {
        pack_tiles<DType::kBFloat16, kLeft>(tile, lanes, terms, at);
      } else if (of.dtype == DType::kFloat16) {
        pack_tiles<DType::kFloat16, kLeft>(tile, lanes, terms, at);
      } else {
        pack_tiles<DType::kFloat32, kLeft>(tile, lanes, terms, at);
      }
      tile.at += kTileDepth * of.column;
    }
  }
}

// A thread's tiles: 0 to 3 the sums of two halves of rows by two of columns, 4 and 5 the rows', 6
// and 7 the columns'.
class TileUnit {
 public:
  TileUnit() {
    alignas(64) uint8_t layout[64] = {1};  // the palette
    for (int tile = 0; tile < 8; ++tile) {
      layout[16 + 2 * tile] = 64, layout[48 + tile] = kTileItems;  // bytes of a row, rows
    }
    asm volatile("ldtilecfg %0" : : "m"(layout));
  }
  TileUnit(const TileUnit&) = delete;
  ~TileUnit() { _tile_release(); }

  // sums [row][column] (+)= the product of two panels over so many blocks.
  template <bool kRows, bool kColumns>  // whether there are second halves
  FN void multiply(const Terms& terms, int64_t blocks, const char* a, const char* b, float* sums,
                   bool add, const char* next) const {
    constexpr int64_t kRow = kPanelItems * sizeof(float);
    float* lower = sums + kTileItems * kPanelItems;
    if (add) {
      _tile_loadd(0, sums, kRow);
      if (kColumns) _tile_loadd(1, sums + kTileItems, kRow);
      if (kRows) _tile_loadd(2, lower, kRow);
      if (kRows && kColumns) _tile_loadd(3, lower + kTileItems, kRow);
    } else {
      _tile_zero(0);
      if (kColumns) _tile_zero(1);
      if (kRows) _tile_zero(2);
      if (kRows && kColumns) _tile_zero(3);
    }
    for (; blocks > 0; --blocks) {
      for (int t = 0; t < terms.count; ++t) {
        const char* left = a + terms.a[t] * kPanelBytes;
        const char* right = b + terms.b[t] * kPanelBytes;
        for (int line = 0; line < kAhead; line += 64) __builtin_prefetch(next + line, 0, 2);
        next += kAhead;
        if (terms.load_a[t]) {
          _tile_loadd(4, left, 64);
          if (kRows) _tile_loadd(5, left + kTileBytes, 64);
        }
        if (terms.load_b[t]) {
          _tile_loadd(6, right, 64);
          if (kColumns) _tile_loadd(7, right + kTileBytes, 64);
        }
        _tile_dpbf16ps(0, 4, 6);
        if (kColumns) _tile_dpbf16ps(1, 4, 7);
        if (kRows) _tile_dpbf16ps(2, 5, 6);
        if (kRows && kColumns) _tile_dpbf16ps(3, 5, 7);
      }
      a += terms.parts_a * kPanelBytes, b += terms.parts_b * kPanelBytes;
    }
    _tile_stored(0, sums, kRow);
    if (kColumns) _tile_stored(1, sums + kTileItems, kRow);
    if (kRows) _tile_stored(2, lower, kRow);
    if (kRows && kColumns) _tile_stored(3, lower + kTileItems, kRow);
  }
  __attribute__((noinline)) void multiply(const Terms& terms, int rows, int columns,
                                          int64_t blocks, const char* a, const char* b,
                                          float* sums, bool add, const char* next) const {
    if (rows > kTileItems) {
      columns > kTileItems ? multiply<true, true>(terms, blocks, a, b, sums, add, next)
                           : multiply<true, false>(terms, blocks, a, b, sums, add, next);
    } else {
      columns > kTileItems ? multiply<false, true>(terms, blocks, a, b, sums, add, next)
                           : multiply<false, false>(terms, blocks, a, b, sums, add, next);
    }
  }
};

class TileProduct {
 public:
  explicit TileProduct(const Matmul& p)
      : p_(p),
        terms_(p.a.dtype, p.right[0].b.dtype),
        rows_((p.m + kPanelItems - 1) / kPanelItems),
        first_columns_((p.right[0].l + kPanelItems - 1) / kPanelItems),
        columns_(first_columns_ + (p.right[1].l + kPanelItems - 1) / kPanelItems) {}

  static bool takes(const Matmul& p) {
    if (!p.many || p.m <= kDirectRows) return false;
    if (p.right[1].l > 0 && p.right[1].b.dtype != p.right[0].b.dtype) return false;
    return p.k >= kLeastDepth && p.right[0].l + p.right[1].l >= kLeastColumns;
  }

  void run() {
    const int64_t threads = thread_count();
    const double flops = 2.0 * p_.n * p_.m * p_.k * (p_.right[0].l + p_.right[1].l);
    const int64_t members = flops > kFlops * kSecondsWorthThreads ? threads : 1;
    const int64_t chunk = whole(p_.k < kChunkK ? p_.k : kChunkK, kTileDepth);
    right_panel_ = chunk / kTileDepth * terms_.parts_b * kPanelBytes;
    left_panel_ = chunk / kTileDepth * terms_.parts_a * kPanelBytes;
    const int64_t groups = rows_ < kGroupPanels ? rows_ : kGroupPanels;
    Workspace<char> memory;
    right_ = memory.take(columns_ * right_panel_);
    left_ = memory.take(members * groups * left_panel_);
    own_left_ = groups * left_panel_;
    if (members == 1) return work(0, 1);
    run_together(
        members,
        [](void* self, int64_t rank, int64_t of) {
          static_cast<TileProduct*>(self)->work(rank, of);
        },
        this);
  }

 private:
  static constexpr double kFlops = 2e11;  // a second, roughly
  FN static int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

  // How members share out the panels: so many ranges of rows by so many of columns.
  FN int64_t ranges_of_columns(int64_t members) const {
    int64_t best = 1, least = INT64_MAX;
    for (int64_t ranges = 1; ranges <= members; ++ranges) {
      if (members % ranges != 0) continue;
      const int64_t rows = members / ranges;
      const int64_t most = (rows_ + rows - 1) / rows * ((columns_ + ranges - 1) / ranges);
      if (most < least) least = most, best = ranges;
    }
    return best;
  }

  void work(int64_t rank, int64_t members) {
    uint64_t arrived = 0;
    const auto wait = [&] {
      if (members > 1) meet(meeting_, arrived += members);
    };
    const TileUnit unit;
    const int64_t across = ranges_of_columns(members), down = members / across;
    const int64_t i = rank / across, j = rank % across;
    const int64_t from = rows_ * i / down, to = rows_ * (i + 1) / down;
    const int64_t begin = columns_ * j / across, end = columns_ * (j + 1) / across;
    for (int64_t n = 0; n < p_.n; ++n) {
      int64_t at = 0;
      do {
        const int64_t deep = p_.k - at < kChunkK ? p_.k - at : kChunkK;
        const int64_t last = columns_ * (rank + 1) / members;
        for (int64_t c = columns_ * rank / members; c < last; ++c) pack_right(n, at, deep, c);
        wait();
        char* left = left_ + rank * own_left_;
        for (int64_t r = from; r < to && begin < end; r += kGroupPanels) {
          const int64_t until = to - r < kGroupPanels ? to : r + kGroupPanels;
          for (int64_t row = r; row < until; ++row) {
            const Items of{p_.a.data, p_.a.dtype,
                           n * p_.a.batch + row * kPanelItems * p_.a.row + at * p_.a.column,
                           p_.a.row, p_.a.column};
            pack_items<true>(of, lanes_at(p_.m, row * kPanelItems, kPanelItems), deep,
                             left + (row - r) * left_panel_);
          }
          for (int64_t c = begin; c < end; ++c) panels(unit, n, at, deep, r, until, c, left);
        }
        wait();
        at += deep;
      } while (at < p_.k);
    }
  }

  // Panels of columns of the first right operand come before those of the second.
  FN int right_of(int64_t column) const { return column >= first_columns_; }
  FN int64_t column_of(int64_t column) const {
    return (column - (right_of(column) ? first_columns_ : 0)) * kPanelItems;
  }
  void pack_right(int64_t n, int64_t at, int64_t deep, int64_t column) const {
    const Right& r = p_.right[right_of(column)];
    const int64_t l = column_of(column);
    const Items of{r.b.data, r.b.dtype, n * r.b.batch + at * r.b.row + l * r.b.column, r.b.column,
                   r.b.row};
    pack_items<false>(of, lanes_at(r.l, l, kPanelItems), deep, right_ + column * right_panel_);
  }

  // Panels [from, to) of rows, which are packed, by one of columns.
  void panels(const TileUnit& unit, int64_t n, int64_t at, int64_t deep, int64_t from, int64_t to,
              int64_t column, const char* left) const {
    const Right& r = p_.right[right_of(column)];
    const int64_t l = column_of(column);
    const int columns = lanes_at(r.l, l, kPanelItems);
    alignas(64) float sums[kGroupPanels][kPanelItems * kPanelItems];
    const char* right = right_ + column * right_panel_;
    const int vectors = (columns + VecF::kWidth - 1) / VecF::kWidth;
    for (int64_t k = 0; k < deep; k += kSliceDepth) {
      const int64_t blocks = (lanes_at(deep, k, kSliceDepth) + kTileDepth - 1) / kTileDepth;
      const int64_t before = k / kTileDepth * kPanelBytes;
      const bool last = k + kSliceDepth >= deep;
      const char* b = right + before * terms_.parts_b;
      const char* next = b + blocks * terms_.parts_b * kPanelBytes;
      for (int64_t row = from; row < to; ++row, next += blocks * terms_.count * kAhead) {
        const int rows = lanes_at(p_.m, row * kPanelItems, kPanelItems);
        const char* a = left + (row - from) * left_panel_ + before * terms_.parts_a;
        float* total = sums[row - from];
        if (last) ask(r, n, row * kPanelItems, rows, l, columns);
        unit.multiply(terms_, rows, columns, blocks, a, b, total, k > 0, next);
        if (!last) continue;
        leave_sums(p_, r, n, at, deep, row * kPanelItems, rows, l, vectors, total, kPanelItems);
      }
    }
  }

  // Asks for the lines of the result that a panel of rows is added to or left in.
  FN void ask(const Right& r, int64_t n, int64_t row, int rows, int64_t l, int columns) const {
    const float* out = static_cast<const float*>(r.out) + (n * p_.m + row) * r.l + l;
    for (int m = 0; m < rows; ++m, out += r.l) {
      __builtin_prefetch(out, 1, 3);
      __builtin_prefetch(out + columns - 1, 1, 3);
    }
  }

  const Matmul& p_;
  const Terms terms_;
  const int64_t rows_, first_columns_, columns_;  // panels
  int64_t left_panel_ = 0, right_panel_ = 0, own_left_ = 0;  // bytes
  char *left_ = nullptr, *right_ = nullptr;
  Meeting meeting_;
};

void run_tile_matmul(const Matmul& p) {
  if (p.n > 0 && TileProduct::takes(p)) return TileProduct(p).run();
  run_matmul<float>(p);
}
