// The matrix product [N, M, K] x [N, K, L] + bias, of one or two right operands, on the tiles of
// gemm.inl, so that a row's bits depend neither on the other rows nor on the threads.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

// K is taken in chunks, whose sums are added in order: a panel of 4 vectors then fits the L2, and
// the error of long sums, which weight gradients are, grows with their square root over 16 only.
constexpr int64_t kChunkK = kMaxInput;

constexpr int64_t kCopiesPay = 4;  // blocks that use a copy of their operands
// Groups of rows taken together, a part: a block's panel serves all of them where these are all
// there are, or where the panels are too many for the second-level cache, but in both cases only
// where that holds these rows: a MiB in float32, if K is long. (Of many more, lines of the result
// in as many pages would be written in turn. To pack a panel for so many rows takes 2 % of the time
// to multiply by it.)
constexpr int64_t kPartGroups = 10;

static_assert(kChunkK % kLongBlockK == 0, "the order of sums must not depend on the chunks");

// Sums over `depth` terms from `at` on, of `rows` rows from the first on, `ld` apart, and so many
// vectors of columns from u on, to the result; with the bias where the terms are the last.
template <class T>
FN void leave_sums(const Matmul& p, const Right& r, int64_t n, int64_t at, int64_t depth,
                   int64_t first, int rows, int64_t u, int vectors, const T* sums, int64_t ld) {
  using V = Vec<T>;
  const bool adds = r.adds || at > 0, done = at + depth == p.k && r.bias.data != nullptr;
  T* out = static_cast<T*>(r.out) + (n * p.m + first) * r.l + u;
  for (int m = 0; m < rows; ++m) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t unit = u + v * V::kWidth;
      const int lanes = lanes_at(r.l, unit, V::kWidth);
      T* to = out + m * r.l + v * V::kWidth;
      V x = V::load(sums + m * ld + v * V::kWidth);
      if (adds) x = V::load(to, lanes) + x;
      if (done) {
        const int64_t from = n * r.bias.batch + unit * r.bias.column;
        x = x + load<T>(r.bias.data, r.bias.dtype, from, lanes);
      }
      x.store(to, lanes);
    }
  }
}

template <class T>
class Product {
 public:
  explicit Product(const Matmul& q)
      : p_(q),
        blocks_{{1, Vec<T>::kWidth, q.right[0].l}, {1, Vec<T>::kWidth, q.right[1].l}},
        count_(blocks_[0].count + blocks_[1].count) {}

  void run() {
    const int64_t threads = thread_count();
    const double right = static_cast<double>(p_.n) * p_.k * (p_.right[0].l + p_.right[1].l);
    const double flops = 2.0 * p_.m * right, bytes = sizeof(T) * right;
    const double rate =
        bytes < kCacheFilled * l2_bytes() ? kDirectBytesPerSecond : kMemoryBytesPerSecond;
    const bool threaded = threads > 1 && (flops > kFlopsPerSecond<T> * kSecondsWorthThreads ||
                                          bytes > rate * kSecondsWorthThreads);
    const bool along = p_.a.column == 1 && p_.a.dtype == kNative<T>;
    const Matrix& b = p_.right[0].b;
    const bool lies = b.row == 1 || b.column == 1;
    if (p_.m <= kDirectRows && lies && along && p_.right[1].l == 0) return directly(threaded);
    const int64_t chunk = p_.k < kChunkK ? p_.k : kChunkK;
    // Rows that lie one after another fill a cache evenly, and few blocks make no use of a copy.
    const bool pays = p_.a.row != chunk && p_.m > kRows && count_ >= kCopiesPay;
    copy_ = p_.a.column != 1 ? kByColumns : !along || pays ? kByRows : kNone;
    const int64_t members = threaded ? threads : 1;
    const int64_t panels = chunk * (blocks_[0].row_elements() + blocks_[1].row_elements());
    const int64_t rows = kPartGroups * kGroupRows < p_.m ? kPartGroups * kGroupRows : p_.m;
    const auto fill = [](int64_t elements) { return sizeof(T) * elements / double(l2_bytes()); };
    share_out(members, fill(panels) > 0.5, fill(rows * chunk) <= kCacheFilled);
    own_panel_ = chunk * kMaxVectors * Vec<T>::kWidth;
    Workspace<T> memory;
    panels_ = memory.take(blocks_first_ ? members * own_panel_ : panels);
    group_elements_ = kGroupRows * (copy_ == kByRows ? padded_row<T>(chunk) : chunk);
    if (copy_ != kNone) own_a_ = memory.take(part_ * group_elements_);
    if (members == 1) return work(0, 1);
    run_together(
        members,
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

  // Rows to groups of whole tiles, as large as can be; where there is little to share out, as many
  // as give every thread the same. many: panels fill the cache; stay: a part's rows do not.
  void share_out(int64_t threads, bool many, bool stay) {
    const int64_t tiles = (p_.m + kRows - 1) / kRows;
    groups_ = (tiles + kGroupTiles - 1) / kGroupTiles;
    const bool few = groups_ <= kPartGroups;
    if (groups_ * count_ < 4 * threads) groups_ = (groups_ + threads - 1) / threads * threads;
    const int64_t each = (tiles + groups_ - 1) / groups_;
    group_rows_ = each * kRows, groups_ = (tiles + each - 1) / each;
    // (Short sums are bound by their result, of which whole rows are written fastest.)
    blocks_first_ = stay && (many || (few && p_.k >= kSliceK));
    part_ = few ? groups_ : blocks_first_ ? kPartGroups : copy_ == kNone ? groups_ : 2 * threads;
    if (part_ > groups_) part_ = groups_;
  }

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
        if (!blocks_first_) pack_share(c, rank, members);
        for (int64_t first = 0; first < groups_; first += part_) {
          const int64_t all = groups_ - first < part_ ? groups_ - first : part_;
          if (copy_ == kByColumns) {
            copy_columns(c, first, all, c.depth * rank / members, c.depth * (rank + 1) / members);
          } else if (copy_ == kByRows) {
            const int64_t last = all * (rank + 1) / members;
            for (int64_t g = all * rank / members; g < last; ++g) copy_rows(c, first + g, g);
          }
          if (copy_ != kNone || !blocks_first_) wait();
          const int64_t units = count_ * all, last = units * (rank + 1) / members;
          for (int64_t unit = units * rank / members, packed = -1; unit < last; ++unit) {
            const int64_t block = blocks_first_ ? unit / all : unit % count_;
            const int64_t own = blocks_first_ ? unit % all : unit / count_;
            T* weights = blocks_first_ ? panels_ + rank * own_panel_ : panel(c, block);
            if (blocks_first_ && block != packed) pack(c, packed = block, 0, c.depth, weights);
            tiles(c, block, first + own, own, weights);
          }
          if (copy_ != kNone || !blocks_first_) wait();
        }
        at += c.depth;
      } while (at < p_.k);
    }
  }

  // Blocks of the first right operand come before those of the second.
  FN int right_of(int64_t block) const { return block >= blocks_[0].count; }
  FN int64_t own_block(int64_t block) const {
    return block - (right_of(block) ? blocks_[0].count : 0);
  }
  FN int vectors_of(int64_t block) const {
    return blocks_[right_of(block)].depth_vectors(own_block(block));
  }
  FN T* panel(const Chunk& c, int64_t block) const {
    const int r = right_of(block);
    const int64_t before = r ? blocks_[0].row_elements() : 0;
    return panels_ + (before + blocks_[r].row_offset(own_block(block))) * c.depth;
  }
  // A member's share of the panels: some blocks, or, where there are few, a part of each along K.
  void pack_share(const Chunk& c, int64_t rank, int64_t members) const {
    if (count_ >= 4 * members) {
      const int64_t to = count_ * (rank + 1) / members;
      for (int64_t block = count_ * rank / members; block < to; ++block) {
        pack(c, block, 0, c.depth, panel(c, block));
      }
      return;
    }
    constexpr int64_t kWidth = Vec<T>::kWidth;
    const int64_t vectors = (c.depth + kWidth - 1) / kWidth;
    const int64_t from = vectors * rank / members * kWidth;
    const int64_t to = vectors * (rank + 1) / members * kWidth;
    for (int64_t block = 0; block < count_; ++block) {
      pack(c, block, from, to < c.depth ? to : c.depth, panel(c, block));
    }
  }
  // Terms [from, to) of a block's panel.
  void pack(const Chunk& c, int64_t block, int64_t from, int64_t to, T* panel) const {
    const int r = right_of(block);
    const Matrix& b = p_.right[r].b;
    const Weights weights{b.data, b.dtype, 1, p_.right[r].l, to - from, 0, b.column, b.row};
    const int64_t width = vectors_of(block) * Vec<T>::kWidth;
    pack_panel(weights, c.n * b.batch + (c.at + from) * b.row, blocks_[r], own_block(block),
               panel + from * width);
  }
  FN int rows_of(int64_t group) const {
    return lanes_at(p_.m, group * group_rows_, static_cast<int>(group_rows_));
  }
  FN int64_t start_of_a(const Chunk& c, int64_t group) const {
    return c.n * p_.a.batch + c.at * p_.a.column + group * group_rows_ * p_.a.row;
  }

  // A group's copy [row][k], rows padded_row apart.
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

  // Copies [k][kGroupRows] of the groups of a part, of k in [from, to): every k of all groups
  // before the next, for what lies side by side is read fastest at once.
  void copy_columns(const Chunk& c, int64_t first, int64_t groups, int64_t from, int64_t to) const {
    constexpr int kWidth = Vec<T>::kWidth;
    for (int64_t k = from; k < to; ++k) {
      for (int64_t g = 0; g < groups; ++g) {
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
    const Matrix& b = p_.right[0].b;
    parallel(p_.n * count_, threaded, [&](int64_t task) {
      const int64_t n = task / count_, block = task % count_;
      alignas(64) T sums[kDirectRows * kMaxVectors * Vec<T>::kWidth];
      const int rows = static_cast<int>(p_.m);
      int64_t at = 0;
      do {
        const Chunk c{n, at, p_.k - at < kChunkK ? p_.k - at : kChunkK};
        const Weights weights{b.data, b.dtype, 1, p_.right[0].l, c.depth, 0, b.column, b.row};
        const T* a = static_cast<const T*>(p_.a.data) + n * p_.a.batch + at;
        direct_product<T>(rows, weights, n * b.batch + at * b.row, blocks_[0], block, a, p_.a.row,
                          block_terms(p_.k), sums);
        leave(c, 0, block, rows, sums);
        at += c.depth;
      } while (at < p_.k);
    });
  }

  // A block's sums of a chunk, of `rows` rows from the first on, to the result.
  void leave(const Chunk& c, int64_t first, int64_t block, int rows, const T* sums) const {
    const int which = right_of(block), vectors = vectors_of(block);
    leave_sums(p_, p_.right[which], c.n, c.at, c.depth, first, rows,
               blocks_[which].first_unit(own_block(block)), vectors, sums,
               vectors * Vec<T>::kWidth);
  }

  // Asks for the lines that a block's sums of some rows are to be written to: all at once these
  // would be waited for.
  FN void ask_for_result(const Chunk& c, int64_t block, int64_t first, int rows) const {
    const Right& r = p_.right[right_of(block)];
    const int64_t bytes = vectors_of(block) * Vec<T>::kWidth * static_cast<int64_t>(sizeof(T));
    const T* out = static_cast<const T*>(r.out) + (c.n * p_.m + first) * r.l +
                   blocks_[right_of(block)].first_unit(own_block(block));
    for (int m = 0; m < rows; ++m, out += r.l) ask_lines_to_write(out, bytes);
  }

  // One block, whose panel is `weights`, of a group of rows, the part's `own`-th.
  void tiles(const Chunk& c, int64_t block, int64_t group, int64_t own, const T* weights) const {
    using V = Vec<T>;
    const int vectors = vectors_of(block), all = rows_of(group), high = kTileRows[vectors];
    const int64_t width = vectors * V::kWidth;
    const int64_t terms = block_terms(p_.k);
    const T* a = own_a_ + own * group_elements_;
    int64_t row = padded_row<T>(c.depth), column = 1;
    if (copy_ == kByColumns) {
      row = 1, column = kGroupRows;
    } else if (copy_ == kNone) {
      a = static_cast<const T*>(p_.a.data) + start_of_a(c, group), row = p_.a.row;
    }
    alignas(64) T sums[kGroupRows * kMaxVectors * V::kWidth];
    for (int64_t k = 0; k < c.depth || k == 0; k += kSliceK) {
      const int64_t deep = c.depth - k < kSliceK ? c.depth - k : kSliceK;
      for (int64_t m = 0; m < all; m += high) {
        const int rows = lanes_at(all, m, high);
        if (kAsksToWrite && k + deep == c.depth) {
          ask_for_result(c, block, group * group_rows_ + m, rows);
        }
        tile_product<T>(rows, vectors, a + m * row + k * column, row, column, weights + k * width,
                        deep, terms, sums + m * width, k > 0, Ahead());
      }
    }
    leave(c, group * group_rows_, block, all, sums);
  }

  const Matmul& p_;
  const Blocks blocks_[2];
  const int64_t count_;
  int64_t groups_ = 0, group_rows_ = 0;               // at most kGroupRows each
  enum { kNone, kByRows, kByColumns } copy_ = kNone;  // of the left operand
  // All groups of a part for one block before the next, whose panel a member packs when it comes to
  // it: it is read where it was written, and only there. Else all panels are packed first, and a
  // group has all blocks before the next.
  bool blocks_first_ = false;
  int64_t part_ = 1;  // groups whose rows are copied at a time
  int64_t group_elements_ = 0;
  int64_t own_panel_ = 0;  // elements of a member's panel
  T *panels_ = nullptr, *own_a_ = nullptr;
  Meeting meeting_;
};

template <class T>
void run_matmul(const Matmul& p) {
  if (p.n == 0 || p.m == 0 || p.right[0].l + p.right[1].l == 0) return;
  if (kHasTiles && sizeof(T) == 4 && multiplied_by_tiles(p)) return;
  Product<T>(p).run();
}
