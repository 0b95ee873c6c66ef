// The matrix product [N, M, K] x [N, K, L] + bias on the tiles of gemm.inl, so that a row's bits
// depend neither on the other rows nor on the threads.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

// K is taken in chunks, whose sums are added in order: a panel of 4 vectors then fits the L2, and
// the error of long sums, which weight gradients are, grows with their square root over 16 only.
constexpr int64_t kChunkK = kMaxInput;

constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kCopiesPay = 4;  // blocks that use a copy of their operands

static_assert(kChunkK % kBlockK == 0, "the order of sums must not depend on the chunks");

template <class T>
class Product {
 public:
  explicit Product(const Matmul& q)
      : p_(q),
        blocks_(1, Vec<T>::kWidth, q.l),
        tiles_((q.m + kRows - 1) / kRows),
        packs_a_(q.a.column != 1 || q.a.dtype != kNative<T>) {}

  void run() {
    const int64_t threads = thread_count();
    const double flops = 2.0 * p_.n * p_.m * p_.k * p_.l;
    const double bytes = static_cast<double>(sizeof(T)) * p_.n * p_.k * p_.l;
    const double rate = bytes < 0.75 * l2_bytes() ? kDirectBytesPerSecond : kMemoryBytesPerSecond;
    threaded_ = threads > 1 && (flops > kFlopsPerSecond<T> * kSecondsWorthThreads ||
                                bytes > rate * kSecondsWorthThreads);
    const bool lies = p_.b.row == 1 || p_.b.column == 1;
    if (p_.m <= kDirectRows && lies && !packs_a_) return directly();
    const int64_t chunk = p_.k < kChunkK ? p_.k : kChunkK;
    Workspace<T> memory;
    panels_ = memory.take(chunk * blocks_.row_elements());
    // A tile's columns lie kRows apart, and each store writes a whole vector.
    if (packs_a_) packed_a_ = memory.take(chunk * tiles_ * kRows + Vec<T>::kWidth * tiles_);
    for (int64_t n = 0; n < p_.n; ++n) {
      int64_t at = 0;
      do {
        const int64_t depth = p_.k - at < kChunkK ? p_.k - at : kChunkK;
        one_chunk(n, at, depth);
        at += depth;
      } while (at < p_.k);
    }
  }

 private:
  static constexpr int kRows = kTileRows[kMaxVectors];
  static constexpr int64_t kGroupTiles = kGroupRows / kRows;

  // For few rows, by a right operand as it lies.
  void directly() const {
    parallel(p_.n * blocks_.count, threaded_, [&](int64_t task) {
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

  void one_chunk(int64_t n, int64_t at, int64_t depth) {
    const Weights b{p_.b.data, p_.b.dtype, 1, p_.l, depth, 0, p_.b.column, p_.b.row};
    const int64_t b_start = n * p_.b.batch + at * p_.b.row;
    parallel(blocks_.count, threaded_, [&](int64_t block) {
      pack_panel(b, b_start, blocks_, block, panels_ + blocks_.row_offset(block) * depth);
    });
    const int64_t a_start = n * p_.a.batch + at * p_.a.column;
    if (packs_a_) {
      const Weights a{p_.a.data, p_.a.dtype, 1, p_.m, depth, 0, p_.a.row, p_.a.column};
      parallel(tiles_, threaded_, [&](int64_t tile) {
        const int rows = lanes_at(p_.m, tile * kRows, kRows);
        constexpr int kWidth = Vec<T>::kWidth;
        // Last vector first: a store of its whole width runs into the next k's first lanes.
        for (int m = (rows - 1) / kWidth * kWidth; m >= 0; m -= kWidth) {
          pack_vector(a, a_start + (tile * kRows + m) * p_.a.row, lanes_at(rows, m, kWidth),
                      tile_a(tile, depth) + m, kRows);
        }
      });
    }
    // A task is some blocks of a group of rows, whose operands it copies first where they may share
    // sets of the cache.
    const int64_t groups = (tiles_ + kGroupTiles - 1) / kGroupTiles;
    const int64_t wanted = (kTasksPerThread * thread_count() + groups - 1) / groups;
    const int64_t parts = wanted < blocks_.count ? wanted : blocks_.count;
    parallel(groups * parts, threaded_, [&](int64_t task) {
      const int64_t group = task / parts, part = task % parts;
      const int64_t from = group * kGroupTiles, to = from + kGroupTiles;
      const Group g{n, at, depth, from, to < tiles_ ? to : tiles_};
      const int64_t last = blocks_.count * (part + 1) / parts;
      const auto all = [&](const T* a, int64_t row, int64_t column, int64_t tile) FN_LAMBDA {
        for (int64_t block = blocks_.count * part / parts; block < last; ++block) {
          tiles(g, block, a, row, column, tile);
        }
      };
      if (packs_a_) return all(tile_a(from, depth), 1, kRows, tile_a(1, depth) - packed_a_);
      const T* a = static_cast<const T*>(p_.a.data) + a_start + from * kRows * p_.a.row;
      const int64_t rows = lanes_at(p_.m, from * kRows, static_cast<int>(kGroupRows));
      if (rows <= kRows || last - blocks_.count * part / parts < kCopiesPay) {
        return all(a, p_.a.row, 1, kRows * p_.a.row);
      }
      alignas(64) T copy[kGroupRows * (kChunkK + 64 / sizeof(T))];
      const int64_t ld = padded_row<T>(depth);
      for (int64_t m = 0; m < rows; ++m) {
        for (int64_t k = 0; k < depth; k += Vec<T>::kWidth) {
          const int lanes = lanes_at(depth, k, Vec<T>::kWidth);
          Vec<T>::load(a + m * p_.a.row + k, lanes).store(copy + m * ld + k);
        }
      }
      all(copy, ld, 1, kRows * ld);
    });
  }

  FN T* tile_a(int64_t tile, int64_t depth) const {
    return packed_a_ + tile * (depth * kRows + Vec<T>::kWidth);
  }

  // Tiles [from, to) of the chunk of K that begins at `at`.
  struct Group {
    int64_t n, at, depth, from, to;
  };

  // One block of a group, whose operands are at a[tile * tile_step + m * row + k * column].
  void tiles(const Group& g, int64_t block, const T* a, int64_t row, int64_t column,
             int64_t tile_step) const {
    const auto [n, at, depth, from, to] = g;
    using V = Vec<T>;
    const int vectors = blocks_.depth_vectors(block);
    const int64_t first = from * kRows, width = vectors * V::kWidth;
    const int all = lanes_at(p_.m, first, static_cast<int>((to - from) * kRows));
    alignas(64) T sums[kGroupTiles * kRows * kMaxVectors * V::kWidth];
    const T* panel = panels_ + blocks_.row_offset(block) * depth;
    for (int64_t k = 0; k < depth || k == 0; k += kSliceK) {
      const int64_t deep = depth - k < kSliceK ? depth - k : kSliceK;
      for (int64_t tile = from; tile < to; ++tile) {
        const int rows = lanes_at(p_.m, tile * kRows, kRows);
        T* to_sums = sums + (tile - from) * kRows * width;
        tile_product<T>(rows, vectors, a + (tile - from) * tile_step + k * column, row, column,
                        panel + k * width, deep, to_sums, k > 0, Ahead());
      }
    }
    leave(n, first, block, all, sums, at, at + depth == p_.k);
  }

  const Matmul& p_;
  Blocks blocks_;
  int64_t tiles_;
  bool packs_a_, threaded_ = false;
  T *panels_ = nullptr, *packed_a_ = nullptr;
};

template <class T>
void run_matmul(const Matmul& p) {
  if (p.n == 0 || p.m == 0 || p.l == 0) return;
  Product<T>(p).run();
}
