// The matrix product on the tile unit: with operands that are packed and shared out like those of
// matmul.inl.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

constexpr int64_t kSliceDepth = 128;  // both operands' slices of a panel fit the L1
constexpr int64_t kGroupPanels = 8;   // rows of a chunk that stay in the L2: 768 KiB in float32
static_assert(kChunkK % kSliceDepth == 0, "the order of sums must not depend on the chunks");

// Fewer rows do not fill a tile.
constexpr int64_t kLeastRows = 16;

class TileProduct {
 public:
  explicit TileProduct(const Matmul& p)
      : p_(p),
        terms_(parts_beside(right_dtype(p), p.a.dtype), parts_beside(p.a.dtype, right_dtype(p))),
        rows_((p.m + kPanelItems - 1) / kPanelItems),
        first_columns_((p.right[0].l + kPanelItems - 1) / kPanelItems),
        columns_(first_columns_ + (p.right[1].l + kPanelItems - 1) / kPanelItems) {}

  static bool takes(const Matmul& p) {
    const Right &r = p.right[0], &also = p.right[1];
    const bool both = r.l > 0 && also.l > 0;
    if (!has_tiles() || p.k < kTileDepth || (both && r.b.dtype != also.b.dtype)) return false;
    if (p.least == 0) return p.m >= kLeastRows;  // whatever columns are wanted beside others
    // Products that a scan may do itself, for some batches, go the scan's way for all.
    if (size_of(r.b.dtype) == 2) return scan_by_tiles(p.least, r.b.dtype, p.k);
    return p.least >= kLeastRows && p.k > kMaxInput;
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
  static DType right_dtype(const Matmul& p) { return p.right[p.right[0].l > 0 ? 0 : 1].b.dtype; }

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
    const TileUnit unit(true);
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
                             terms_.parts_a, left + (row - r) * left_panel_);
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
    pack_items<false>(of, lanes_at(r.l, l, kPanelItems), deep, terms_.parts_b,
                      right_ + column * right_panel_);
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
        const LeftPanel a{left + (row - from) * left_panel_ + before * terms_.parts_a, kTileBytes,
                          kPanelBytes, terms_.parts_a * kPanelBytes};
        float* total = sums[row - from];
        if (last) ask(r, n, row * kPanelItems, rows, l, columns);
        unit.multiply(terms_, rows, columns, blocks, a, b, total, kPanelItems, k > 0, next);
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
  const int64_t rows_, first_columns_, columns_;             // panels
  int64_t left_panel_ = 0, right_panel_ = 0, own_left_ = 0;  // bytes
  char *left_ = nullptr, *right_ = nullptr;
  Meeting meeting_;
};

bool multiplied_by_tiles(const Matmul& p) {
  if (!TileProduct::takes(p)) return false;
  TileProduct(p).run();
  return true;
}
