// What a backward scan of a small layer makes of the gates' gradients itself, while they are in the
// first-level cache: the gradients of weights, biases and input. They are never in memory as a
// whole.
// Included inside the instruction set's anonymous namespace; see kernels.inl.
//
// The rows of an entry are cut into chunks by shape and lengths alone, and each chunk has sums
// of its own, added in order at the end: so no number depends on the threads. The gates' gradients
// of a few steps of a chunk are kept, [step][row][G*H], and after these steps multiplied by what
// entered the steps, [step][row][H + I], into the chunk's sums, and by W_ih. The threads of a
// group, which share out the units of its chunk, share out the rows of these products.

// Rows of gates' gradients that are kept, about.
constexpr int64_t kKeptRows = 32;
// Products into the same sums before these are added to others, as chunks of K in matmul.inl.
constexpr int64_t kProductsASum = kMaxInput / kKeptRows;

template <class T>
class Gradients {
  using V = Vec<T>;
  static constexpr int kWidth = V::kWidth;

  // [rows, h + x] = the gates' gradients' columns, from column `split` on `skip` further, times
  // what entered: the states' h columns, then the inputs' x.
  struct Part {
    int64_t rows, h, x, split, skip;
    Blocks blocks;
    int64_t sums;  // [block][rows][vectors of the block], from this element of all sums on
  };

 public:
  // gates: of a unit; inner: a further gradient of a unit, the GRU's third gate's inside its
  // recurrence, which stands for it in the gradients of W_hh.
  Gradients(Workspace<T>& memory, const Layer& layer, const LayerGradients& q, int gates,
            bool inner)
      : q_(q),
        layer_(layer),
        width_(gates * layer.hidden),
        all_(width_ + (inner ? layer.hidden : 0)),
        ld_(padded_row<T>(all_)) {
    if (q.chunks == 0) return;
    const int64_t hidden = layer.hidden, h = q.dw_hh ? hidden : 0, x = q.dw_ih ? q.size : 0;
    const int64_t live = q.places.live(0, layer.batch);
    const int64_t rows = most_rows(q.places, layer.batch, q.chunks, live);
    room_ = rows < 1 ? 0 : rows < kKeptRows ? kKeptRows / rows * rows : rows;
    if (inner) {
      add_part(width_, h, 0, 2 * hidden, hidden);
      add_part(width_, 0, x, width_, 0);
    } else {
      add_part(width_, h, x, width_, 0);
    }
    panel_ = room_ * ld_;
    now_ = panel_ + room_ * panel_columns_;
    sums_size_ = elements_ + ld_;
    scratch_size_ = now_ + sums_size_;
    scratch_ = memory.take(thread_count() * scratch_size_);
    sums_ = memory.take(layer.stack * q.chunks * sums_size_);
    if (q.dx != nullptr) {
      w_ih_ = Panels<T>(memory, layer, q.w_ih, 0, 1, q.size, width_, 0, 1, q.w_ih.row,
                        Panels<T>::kVectors);
    }
  }

  int64_t chunks() const { return q_.chunks; }
  const Places& places() const { return q_.places; }
  // What a row of a step takes, beside the scan.
  double row_seconds() const {
    double columns = q_.dx != nullptr ? static_cast<double>(q_.size) : 0;
    for (int i = 0; i < parts_; ++i) columns += part_[i].h + part_[i].x;
    return 2 * width_ * columns / kFlopsPerSecond<T>;
  }
  // A member's share of packing W_ih.
  void pack(int64_t rank, int64_t members) const {
    if (q_.dx == nullptr) return;
    const int64_t count = w_ih_.blocks.count;
    for (int64_t task = rank; task < layer_.stack * count; task += members) {
      w_ih_.pack(task / count, task % count);
    }
  }

  // One chunk on its way through the steps, rows from `from` on of entry s, for one of `slices`
  // threads.
  class Chunk {
   public:
    Chunk(const Gradients& all, int64_t rank, int64_t s, int64_t chunk, int64_t from, int64_t slice,
          int64_t slices)
        : g_(all),
          s_(s),
          from_(from),
          slice_(slice),
          slices_(slices),
          own_(all.scratch_ + rank * all.scratch_size_),
          group_(own_ - slice * all.scratch_size_),
          sums_(all.sums_ + (s * all.q_.chunks + chunk) * all.sums_size_) {}

    // Where the gates' gradients of the next step go.
    Kept next() const { return Kept{group_, (kept_ - from_) * g_.ld_, g_.ld_, g_.width_}; }
    // Step t of so many rows is done, by all of the group; `before`: the step whose state entered
    // it, -1 where that was the initial one; `next`: rows of the step that follows, -1 where none
    // does. True where what was kept has been used: the group has to wait before it keeps more.
    bool done(int64_t t, int64_t before, int64_t rows, int64_t next) {
      if (rows > 0) {
        const Places& places = g_.q_.places;
        const int64_t live = before < 0 ? 0 : places.live(before, g_.layer_.batch) - from_;
        const int64_t others = live < 0 ? 0 : live < rows ? live : rows;
        const int64_t place = places.at(t), row = place * places.apart(g_.layer_.batch);
        step_[steps_++] = {t, place, before < 0 ? 0 : places.at(before), row + from_, rows, others};
        kept_ += rows;
      }
      const int64_t most = rows > kKeptRows ? rows : kKeptRows;
      const int64_t room = g_.room_ < most ? g_.room_ : most;
      if (next >= 0 && kept_ + next <= room && steps_ < kKeptRows) return false;
      use(next < 0);
      return true;
    }

   private:
    // Step t, which is kept: where its rows begin, and where those of the step whose state entered
    // it; the first of the chunk's rows, counted through all steps; how many these are, and how
    // many of them had the step before.
    struct KeptStep {
      int64_t t, place, before, first, rows, others;
    };

    const T* kept_row(int64_t k) const { return group_ + k * g_.ld_; }
    // Slice k of n has [n * k / slices, n * (k + 1) / slices).
    int64_t own_from(int64_t n) const { return n * slice_ / slices_; }
    int64_t own_to(int64_t n) const { return n * (slice_ + 1) / slices_; }

    void use(bool last) {
      T* now = own_ + g_.now_;
      if (kept_ > 0) {
        const bool add = products_++ > 0;
        for (int i = 0; i < g_.parts_; ++i) {
          pack_entered(g_.part_[i]);
          multiply(g_.part_[i], now + g_.part_[i].sums, add);
        }
        if (g_.q_.db != nullptr && slice_ == 0) add_rows(now + g_.elements_, add);
        if (g_.q_.dx != nullptr) input_gradients();
      }
      steps_ = 0, kept_ = 0;
      if (!last && products_ < kProductsASum) return;
      if (products_ == 0 && summed_) return;
      for (int i = 0; i < g_.parts_; ++i) {
        const Part& p = g_.part_[i];
        for (int64_t block = 0; block < p.blocks.count; ++block) {
          const int64_t width = p.blocks.depth_vectors(block) * kWidth;
          const int64_t at = p.sums + p.blocks.row_offset(block) * p.rows;
          pass_on(now, at + own_from(p.rows) * width, at + own_to(p.rows) * width);
        }
      }
      if (slice_ == 0) pass_on(now, g_.elements_, g_.sums_size_);  // the biases' sums
      products_ = 0, summed_ = true;
    }
    void pass_on(const T* now, int64_t from, int64_t to) const {
      for (int64_t e = from; e < to; e += kWidth) {
        const V x = products_ > 0 ? V::load(now + e) : V(T(0));  // of a chunk without steps, zeros
        (summed_ ? V::load(sums_ + e) + x : x).store(sums_ + e);
      }
    }

    // What entered the kept steps, as panels of a product's blocks.
    void pack_entered(const Part& p) const {
      T* panel = own_ + g_.panel_;
      for (int64_t block = 0; block < p.blocks.count; ++block) {
        const int vectors = p.blocks.depth_vectors(block);
        T* to = panel + p.blocks.row_offset(block) * kept_;
        // Rows [first, last) of the chunk's, with states of `h` from h_at on for the first of all.
        const auto rows = [&](const KeptStep& step, const SegmentStarts& starts, const Rows& h,
                              int64_t h_at, int64_t first, int64_t last) FN_LAMBDA {
          const Rows& x = g_.q_.x;
          int64_t x_at = step.place * x.step + (from_ + first) * x.row;
          h_at += s_ * h.entry + (from_ + first) * h.row;
          for (int64_t b = first; b < last; ++b, h_at += h.row, x_at += x.row) {
            const bool cut = starts.at(from_ + b);
            for (int v = 0; v < vectors; ++v, to += kWidth) {
              const int64_t c = p.blocks.first_unit(block) + v * kWidth;
              const int of_h = c < p.h ? lanes_at(p.h, c, kWidth) : 0;
              if (of_h > 0) zero_if(cut, load<T>(h.data, h.dtype, h_at + c, of_h)).store(to);
              if (of_h == kWidth) continue;
              const int64_t column = c + of_h - p.h;
              const int of_x = column < p.x ? lanes_at(p.x, column, kWidth - of_h) : 0;
              const V rest = load<T>(x.data, x.dtype, x_at + column, of_x);
              of_h > 0 ? rest.store(to + of_h, of_x) : rest.store(to);
            }
          }
        };
        for (int64_t i = 0; i < steps_; ++i) {
          const KeptStep& step = step_[i];
          const Rows& y = g_.q_.y;
          const int64_t starting = step.t + (g_.layer_.reverse[s_] ? 1 : 0);
          const SegmentStarts starts(g_.layer_, g_.q_.places, starting);
          rows(step, starts, y, step.before * y.step, 0, step.others);
          rows(step, starts, g_.q_.h0, 0, step.others, step.rows);
        }
      }
    }
    void multiply(const Part& p, T* sums, bool add) const {
      const T *panel = own_ + g_.panel_, *a = kept_row(0);
      for (int64_t block = 0; block < p.blocks.count; ++block) {
        const int vectors = p.blocks.depth_vectors(block);
        const int64_t offset = p.blocks.row_offset(block);
        const int64_t last = own_to(p.rows);
        for (int64_t m = own_from(p.rows); m < last;) {
          const int64_t end = m < p.split && p.split < last ? p.split : last;
          const int rows = lanes_at(end, m, kTileRows[vectors]);
          tile_product<T>(rows, vectors, a + m + (m < p.split ? 0 : p.skip), 1, g_.ld_,
                          panel + offset * kept_, kept_, kBlockK,
                          sums + offset * p.rows + m * vectors * kWidth, add, Ahead());
          m += rows;
        }
      }
    }
    // sums [G*H] (+)= all kept rows.
    void add_rows(T* sums, bool add) const {
      constexpr int kVectors = 4;
      for (int64_t u = 0; u < g_.all_; u += kVectors * kWidth) {
        const int64_t left = (g_.all_ - u + kWidth - 1) / kWidth;
        const int vectors = left < kVectors ? static_cast<int>(left) : kVectors;
        V sum[kVectors];
        for (int v = 0; v < kVectors; ++v) sum[v] = V(T(0));
        for (int64_t k = 0; k < kept_; ++k) {
          const T* row = kept_row(k) + u;
          for (int v = 0; v < vectors; ++v) sum[v] = sum[v] + V::load(row + v * kWidth);
        }
        for (int v = 0; v < vectors; ++v) {
          T* to = sums + u + v * kWidth;
          (add ? V::load(to) + sum[v] : sum[v]).store(to);
        }
      }
    }
    void input_gradients() const {
      const Panels<T>& w = g_.w_ih_;
      const int64_t size = g_.q_.size, terms = block_terms(g_.width_);
      alignas(64) T tile[kTileRows[1] * kMaxVectors * kWidth];
      for (int64_t block = 0; block < w.blocks.count; ++block) {
        const int vectors = w.vectors(block);
        const int64_t u = w.blocks.first_unit(block);
        const int64_t last = own_to(kept_);
        for (int64_t k = own_from(kept_); k < last; k += kTileRows[vectors]) {
          const int rows = lanes_at(last, k, kTileRows[vectors]);
          int64_t at = 0;
          do {  // in chunks, as in matmul.inl
            const int64_t deep = g_.width_ - at < kMaxInput ? g_.width_ - at : kMaxInput;
            tile_product<T>(rows, vectors, kept_row(k) + at, g_.ld_, 1,
                            w.at(s_, block) + at * vectors * kWidth, deep, terms, tile, false,
                            Ahead());
            const T* from = tile;
            const KeptStep* step = step_;
            int64_t b = k;
            for (; b >= step->rows; ++step) b -= step->rows;
            for (int m = 0; m < rows; ++m, ++b) {
              if (b == step->rows) ++step, b = 0;
              T* to = g_.input_gradient(s_) + (step->first + b) * size;
              for (int v = 0; v < vectors; ++v, from += kWidth) {
                const int64_t unit = u + v * kWidth;
                const int lanes = lanes_at(size, unit, kWidth);
                V x = V::load(from);
                if (at > 0) x = V::load(to + unit, lanes) + x;
                x.store(to + unit, lanes);
              }
            }
            at += deep;
          } while (at < g_.width_);
        }
      }
    }

    const Gradients& g_;
    const int64_t s_, from_, slice_, slices_;
    T *own_, *group_, *sums_;  // a member's memory, its group's first member's, the chunk's sums
    KeptStep step_[kKeptRows];
    int64_t steps_ = 0, kept_ = 0, products_ = 0;  // of the rows, so many are kept
    bool summed_ = false;
  };

  // What keeps the gradients of a chunk, rows from `from` on, of entry s.
  Chunk chunk(int64_t rank, int64_t s, int64_t number, int64_t from, int64_t slice,
              int64_t slices) const {
    return Chunk(*this, rank, s, number, from, slice, slices);
  }

  // A member's share of the results, after all chunks.
  void leave(int64_t rank, int64_t members) const {
    const int64_t rows = q_.places.all(layer_);
    for (int64_t s = 1; q_.dx != nullptr && s < layer_.stack; ++s) {
      const int64_t last = rows * (rank + 1) / members * q_.size;
      for (int64_t e = rows * rank / members * q_.size; e < last; e += kWidth) {
        const int lanes = lanes_at(last, e, kWidth);
        T* to = input_gradient(0) + e;
        (V::load(to, lanes) + V::load(input_gradient(s) + e, lanes)).store(to, lanes);
      }
    }
    for (int64_t s = 0; s < layer_.stack; ++s) {
      const T* sums = sums_ + s * q_.chunks * sums_size_;
      for (int i = 0; i < parts_; ++i) {
        const Part& p = part_[i];
        const int64_t last = p.rows * (rank + 1) / members;
        for (int64_t m = p.rows * rank / members; m < last; ++m) leave_row(p, s, m, sums + p.sums);
      }
      if (rank > 0) continue;
      leave_sums(sums + elements_, width_, q_.db, s * width_);
      leave_sums(sums + elements_ + width_, all_ - width_, q_.db_hn, s * layer_.hidden);
    }
  }

 private:
  void add_part(int64_t rows, int64_t h, int64_t x, int64_t split, int64_t skip) {
    if (h + x == 0) return;
    const Part p{rows, h, x, split, skip, Blocks(1, kWidth, h + x), elements_};
    part_[parts_++] = p;
    elements_ += rows * p.blocks.row_elements();
    if (p.blocks.row_elements() > panel_columns_) panel_columns_ = p.blocks.row_elements();
  }

  FN T* input_gradient(int64_t s) const {
    if (s == 0) return static_cast<T*>(q_.dx);
    return static_cast<T*>(q_.dx_more) + (s - 1) * q_.places.all(layer_) * q_.size;
  }
  // The sum of all chunks' values, of `lanes` from element `at` on.
  FN V summed(const T* sums, int64_t at, int lanes = kWidth) const {
    V total = V::load(sums + at, lanes);
    for (int64_t c = 1; c < q_.chunks; ++c) {
      total = total + V::load(sums + c * sums_size_ + at, lanes);
    }
    return total;
  }
  void leave_row(const Part& p, int64_t s, int64_t m, const T* sums) const {
    T* of_h = static_cast<T*>(q_.dw_hh) + (s * width_ + m) * p.h;
    T* of_x = static_cast<T*>(q_.dw_ih) + (s * width_ + m) * p.x;
    alignas(64) T vector[kWidth];
    for (int64_t block = 0; block < p.blocks.count; ++block) {
      const int vectors = p.blocks.depth_vectors(block);
      int64_t c = p.blocks.first_unit(block);
      int64_t at = p.blocks.row_offset(block) * p.rows + m * vectors * kWidth;
      for (int v = 0; v < vectors; ++v, c += kWidth, at += kWidth) {
        const V total = summed(sums, at);
        const int lanes = c < p.h ? lanes_at(p.h, c, kWidth) : 0;
        if (lanes > 0) total.store(of_h + c, lanes);
        const int64_t column = c + lanes - p.h;
        if (lanes == kWidth || column >= p.x) continue;
        total.store(vector);
        const int rest = lanes_at(p.x, column, kWidth - lanes);
        V::load(vector + lanes, rest).store(of_x + column, rest);
      }
    }
  }
  void leave_sums(const T* sums, int64_t n, void* out, int64_t at) const {
    if (out == nullptr) return;
    for (int64_t u = 0; u < n; u += kWidth) {
      const int lanes = lanes_at(n, u, kWidth);
      summed(sums, u, lanes).store(static_cast<T*>(out) + at + u, lanes);
    }
  }

  const LayerGradients& q_;
  const Layer& layer_;
  const int64_t width_, all_, ld_;  // gradients of gates of a row: in W_ih's rows, all, in memory
  int64_t room_ = 0;                // rows that can be kept
  Part part_[2];
  int parts_ = 0;
  int64_t elements_ = 0, panel_columns_ = 0;
  // A member's memory: kept rows, panel, the sums of now; sums: of weights, then biases.
  int64_t panel_ = 0, now_ = 0, scratch_size_ = 0, sums_size_ = 0;
  T *scratch_ = nullptr, *sums_ = nullptr;
  Panels<T> w_ih_;
};
