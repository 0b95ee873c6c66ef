// The matrix product [N, M, K] x [N, K, L] + bias on the tiles of gemm.inl, so that a row's bits
// depend neither on the other rows nor on the threads.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

// K is taken in chunks, whose sums are added in order: a panel of 4 vectors then fits the L2, and
// the error of long sums, which weight gradients are, grows with their square root over 16 only.
constexpr int64_t kChunkK = kMaxInput;

constexpr int64_t kCopiesPay = 4;  // blocks that use a copy of their operands
// Groups of rows taken together: a block's panel serves all of them where the panels are too many
// for the second-level cache, in which these rows then stay. (Of many more, lines of the result in
// as many pages would be written in turn.)
constexpr int64_t kPartGroups = 10;

static_assert(kChunkK % kBlockK == 0, "the order of sums must not depend on the chunks");

template <class T>
class Product {
 public:
  explicit Product(const Matmul& q)
      : p_(q), blocks_(1, Vec<T>::kWidth, q.l), groups_((q.m + kGroupRows - 1) / kGroupRows) {}

  void run() {
    const int64_t threads = thread_count();
    const double flops = 2.0 * p_.n * p_.m * p_.k * p_.l;
    const double bytes = static_cast<double>(sizeof(T)) * p_.n * p_.k * p_.l;
    const double rate =
        bytes < kCacheFilled * l2_bytes() ? kDirectBytesPerSecond : kMemoryBytesPerSecond;
    const bool threaded = threads > 1 && (flops > kFlopsPerSecond<T> * kSecondsWorthThreads ||
                                          bytes > rate * kSecondsWorthThreads);
    const bool along = p_.a.column == 1 && p_.a.dtype == kNative<T>;
    const bool lies = p_.b.row == 1 || p_.b.column == 1;
    if (p_.m <= kDirectRows && lies && along) return directly(threaded);
    const int64_t chunk = p_.k < kChunkK ? p_.k : kChunkK;
    // Rows that lie one after another share no sets of a cache, and few blocks make no use of a
    // copy.
    const bool pays = p_.a.row != chunk && p_.m > kRows && blocks_.count >= kCopiesPay;
    copy_ = p_.a.column != 1 ? kByColumns : !along || pays ? kByRows : kNone;
    const int64_t panels = chunk * blocks_.row_elements();
    blocks_first_ = panels * static_cast<int64_t>(sizeof(T)) > l2_bytes() / 2;
    part_ = blocks_first_ ? kPartGroups : copy_ == kNone ? groups_ : 2 * threads;
    if (part_ > groups_) part_ = groups_;
    Workspace<T> memory;
    panels_ = memory.take(panels);
    group_elements_ = kGroupRows * (copy_ == kByRows ? padded_row<T>(chunk) : chunk);
    if (copy_ != kNone) own_a_ = memory.take(part_ * group_elements_);
    if (!threaded) return work(0, 1);
    run_together(
        threads,
        [](void* self, int64_t rank, int64_t members) {
          static_cast<Product*>(self)->work(rank, members);
        },
        this);
  }

 private:
  static constexpr int kRows = kTileRows[kMaxVectors];
  static constexpr int64_t kGroupTiles = kGroupRows / kRows;
  static_assert(kGroupTiles * kRows == kGroupRows, "whole tiles");

  // A chunk of K of the n-th product, from `at` on.
  struct Chunk {
    int64_t n, at, depth;
  };

  // The work of one of so many threads that run at the same time: of every chunk its share of
  // packing, and of the blocks of every part of the rows.
  void work(int64_t rank, int64_t members) {
    uint64_t arrived = 0;
    const auto wait = [&] {
      if (members > 1) meet(meeting_, arrived += members);
    };
    for (int64_t n = 0; n < p_.n; ++n) {
      int64_t at = 0;
      do {
        const Chunk c{n, at, p_.k - at < kChunkK ? p_.k - at : kChunkK};
        const Weights b{p_.b.data, p_.b.dtype, 1, p_.l, c.depth, 0, p_.b.column, p_.b.row};
        const int64_t count = blocks_.count;
        for (int64_t block = count * rank / members; block < count * (rank + 1) / members;
             ++block) {
          pack_panel(b, n * p_.b.batch + at * p_.b.row, blocks_, block, panel(block, c));
        }
        for (int64_t first = 0; first < groups_; first += part_) {
          const int64_t all = groups_ - first < part_ ? groups_ - first : part_;
          take_rows(c, first, all * rank / members, all * (rank + 1) / members);
          wait();
          const int64_t units = count * all, last = units * (rank + 1) / members;
          for (int64_t unit = units * rank / members; unit < last; ++unit) {
            const int64_t block = blocks_first_ ? unit / all : unit % count;
            const int64_t own = blocks_first_ ? unit % all : unit / count;
            tiles(c, block, first + own, own);
          }
          wait();
        }
        at += c.depth;
      } while (at < p_.k);
    }
  }

  FN T* panel(int64_t block, const Chunk& c) const {
    return panels_ + blocks_.row_offset(block) * c.depth;
  }
  FN int rows_of(int64_t group) const {
    return lanes_at(p_.m, group * kGroupRows, static_cast<int>(kGroupRows));
  }
  FN int64_t start_of_a(const Chunk& c, int64_t group) const {
    return c.n * p_.a.batch + c.at * p_.a.column + group * kGroupRows * p_.a.row;
  }

  // Copies the rows of groups [from, to) of the part that begins with group `first`, if they are to
  // be.
  void take_rows(const Chunk& c, int64_t first, int64_t from, int64_t to) const {
    if (copy_ == kByColumns) return copy_columns(c, first, from, to);
    for (int64_t g = from; copy_ == kByRows && g < to; ++g) copy_rows(c, first + g, g);
  }

  // [row][k], rows padded_row apart.
  void copy_rows(const Chunk& c, int64_t group, int64_t own) const {
    constexpr int kWidth = Vec<T>::kWidth;
    const int64_t ld = padded_row<T>(c.depth), start = start_of_a(c, group);
    T* to = own_a_ + own * group_elements_;
    for (int m = 0; m < rows_of(group); ++m, to += ld) {
      for (int64_t k = 0; k < c.depth; k += kWidth) {
        const int lanes = lanes_at(c.depth, k, kWidth);
        load<T>(p_.a.data, p_.a.dtype, start + m * p_.a.row + k, lanes).store(to + k, lanes);
      }
    }
  }

  // [k][kGroupRows], every k of all groups before the next: what lies side by side is read at once.
  void copy_columns(const Chunk& c, int64_t first, int64_t from, int64_t to) const {
    constexpr int kWidth = Vec<T>::kWidth;
    for (int64_t k = 0; k < c.depth; ++k) {
      for (int64_t g = from; g < to; ++g) {
        const int rows = rows_of(first + g);
        const int64_t start = start_of_a(c, first + g) + k * p_.a.column;
        T* own = own_a_ + g * group_elements_ + k * kGroupRows;
        if (p_.a.row == 1) {
          for (int m = 0; m < rows; m += kWidth) {
            const int lanes = lanes_at(rows, m, kWidth);
            load<T>(p_.a.data, p_.a.dtype, start + m, lanes).store(own + m, lanes);
          }
        } else {
          for (int m = 0; m < rows; ++m) {
            load<T>(p_.a.data, p_.a.dtype, start + m * p_.a.row, 1).store(own + m, 1);
          }
        }
      }
    }
  }

  // For few rows, by a right operand as it lies.
  void directly(bool threaded) const {
    parallel(p_.n * blocks_.count, threaded, [&](int64_t task) {
      const int64_t n = task / blocks_.count, block = task % blocks_.count;
      alignas(64) T sums[kDirectRows * kMaxVectors * Vec<T>::kWidth];
      const int rows = static_cast<int>(p_.m);
      int64_t at = 0;
      do {
        const int64_t depth = p_.k - at < kChunkK ? p_.k - at : kChunkK;
        const Weights b{p_.b.data, p_.b.dtype, 1, p_.l, depth, 0, p_.b.column, p_.b.row};
        const T* a = static_cast<const T*>(p_.a.data) + n * p_.a.batch + at;
        const int64_t b_start = n * p_.b.batch + at * p_.b.row;
        direct_product<T>(rows, b, b_start, blocks_, block, a, p_.a.row, sums);
        leave(n, 0, block, rows, sums, at, at + depth == p_.k);
        at += depth;
      } while (at < p_.k);
    });
  }

  // A tile's sums of the chunk from `at` on, of `rows` rows from the first on, to the result; with
  // the bias where `done`.
  void leave(int64_t n, int64_t first, int64_t block, int rows, const T* sums, int64_t at,
             bool done) const {
    using V = Vec<T>;
    const int vectors = blocks_.depth_vectors(block);
    const int64_t u = blocks_.first_unit(block);
    T* out = static_cast<T*>(p_.out) + (n * p_.m + first) * p_.l + u;
    for (int m = 0; m < rows; ++m) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t unit = u + v * V::kWidth;
        const int lanes = lanes_at(p_.l, unit, V::kWidth);
        T* to = out + m * p_.l + v * V::kWidth;
        V x = V::load(sums + (m * vectors + v) * V::kWidth);
        if (at > 0) x = V::load(to, lanes) + x;
        if (done && p_.bias.data != nullptr) {
          const int64_t from = n * p_.bias.batch + unit * p_.bias.column;
          x = x + load<T>(p_.bias.data, p_.bias.dtype, from, lanes);
        }
        x.store(to, lanes);
      }
    }
  }

  // One block of a group of rows, the part's `own`-th.
  void tiles(const Chunk& c, int64_t block, int64_t group, int64_t own) const {
    using V = Vec<T>;
    const int vectors = blocks_.depth_vectors(block), all = rows_of(group);
    const int64_t width = vectors * V::kWidth, count = (all + kRows - 1) / kRows;
    const T* a = own_a_ + own * group_elements_;
    int64_t row = padded_row<T>(c.depth), column = 1;
    if (copy_ == kByColumns) {
      row = 1, column = kGroupRows;
    } else if (copy_ == kNone) {
      a = static_cast<const T*>(p_.a.data) + start_of_a(c, group), row = p_.a.row;
    }
    alignas(64) T sums[kGroupRows * kMaxVectors * V::kWidth];
    const T* weights = panel(block, c);
    for (int64_t k = 0; k < c.depth || k == 0; k += kSliceK) {
      const int64_t deep = c.depth - k < kSliceK ? c.depth - k : kSliceK;
      for (int64_t tile = 0; tile < count; ++tile) {
        const int rows = lanes_at(all, tile * kRows, kRows);
        tile_product<T>(rows, vectors, a + tile * kRows * row + k * column, row, column,
                        weights + k * width, deep, sums + tile * kRows * width, k > 0, Ahead());
      }
    }
    leave(c.n, group * kGroupRows, block, all, sums, c.at, c.at + c.depth == p_.k);
  }

  const Matmul& p_;
  Blocks blocks_;
  int64_t groups_;                                    // of kGroupRows rows
  enum { kNone, kByRows, kByColumns } copy_ = kNone;  // of the left operand
  bool blocks_first_ = false;  // all groups of a part for one block before the next block
  int64_t part_ = 1;           // groups whose rows are packed or copied at a time
  int64_t group_elements_ = 0;
  T *panels_ = nullptr, *own_a_ = nullptr;
  Meeting meeting_;
};

template <class T>
void run_matmul(const Matmul& p) {
  if (p.n == 0 || p.m == 0 || p.l == 0) return;
  Product<T>(p).run();
}
