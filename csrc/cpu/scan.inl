// How a scan runs: packed weights, state kept between steps, and the work shared among threads.
// Included inside the instruction set's anonymous namespace; see kernels.inl.
//
// A step is one or two phases. A phase multiplies an operand row [depth] by packed weights and
// hands the sums of one block of units to the scan's epilogue, which does the gate arithmetic.
// Phases of a step, and steps, follow one another; blocks and rows are independent.

// Buffers of one call, released together.
template <class T>
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    for (int i = 0; i < count_; ++i) free_workspace(taken_[i]);
  }
  T* take(int64_t elements) {
    taken_[count_] = allocate_workspace(static_cast<size_t>(elements) * sizeof(T));
    return static_cast<T*>(taken_[count_++]);
  }

 private:
  void* taken_[8];
  int count_ = 0;
};

// Rows of acc values [S, B, ld]; an alternating state is two of them, by the parity of the step.
template <class T>
struct State {
  T* data = nullptr;
  int64_t ld = 0, batch = 0, size = 0;

  State() = default;
  State(Workspace<T>& memory, const Layer& layer, int64_t width, bool alternating)
      : ld(padded_row<T>(width)), batch(layer.batch), size(layer.stack * layer.batch * ld) {
    data = memory.take(size * (alternating ? 2 : 1));
  }
  FN T* row(int64_t s, int64_t b, int64_t parity = 0) const {
    return data + parity * size + (s * batch + b) * ld;
  }
};

template <class T>
struct Phase {
  Weights weights;
  int64_t entry;  // stride of the stack in the weights' elements
  Blocks blocks;
  State<T> operand;  // [S, B, depth]
  bool alternating;  // the operand is the state of the step's parity
  T* panels;         // [S][weights.depth * blocks.row_elements()]

  Phase() = default;
  // Gate g, unit u, column k of entry s is w.data[s * entry + offset + g * gate + u * unit + k *
  // column].
  Phase(Workspace<T>& memory, const Layer& layer, const Rows& w, int64_t offset, int gates,
        int64_t units, int64_t depth, int64_t gate, int64_t unit, int64_t column,
        const State<T>& operand_, bool alternating_)
      : entry(w.entry),
        blocks(gates, Vec<T>::kWidth, units),
        operand(operand_),
        alternating(alternating_) {
    const char* start = static_cast<const char*>(w.data) + offset * size_of(w.dtype);
    weights = Weights{start, w.dtype, gates, units, depth, gate, unit, column};
    panels = memory.take(layer.stack * panel_elements());
  }
  FN int64_t panel_elements() const { return weights.depth * blocks.row_elements(); }
  FN T* panel(int64_t s, int64_t block) const {
    return panels + s * panel_elements() + blocks.row_offset(block) * weights.depth;
  }
};

// Rates the choice of threads is made by: rough figures of one core of a server of the 2020s, good
// enough to tell 10 us from 100 us. docs/performance.md says what they were fitted to.
template <class T>
constexpr double kFlopsPerSecond = 6e9 * Vec<T>::kWidth;
constexpr double kCacheBytesPerSecond = 8e10;
constexpr double kMemoryBytesPerSecond = 1.2e10;
constexpr double kDirectBytesPerSecond = 4e10;                     // of weights that are not packed
constexpr double kGateSeconds = 2.5e-9 * 16 / Vec<float>::kWidth;  // of a unit of a row
constexpr double kSecondsPerRegion = 5e-6;   // to start and join PyTorch's threads
constexpr double kSecondsPerMeeting = 3e-7;  // of threads that wait for one another
constexpr double kSecondsWorthThreads = 2e-5;

template <class Function>
void parallel(int64_t count, bool threads, const Function& function) {
  if (!threads) {
    for (int64_t i = 0; i < count; ++i) function(i);
    return;
  }
  parallel_tasks(
      count, [](void* context, int64_t i) { (*static_cast<const Function*>(context))(i); },
      const_cast<Function*>(&function));
}

FN int lanes_at(int64_t units, int64_t u, int width) {
  return units - u < width ? static_cast<int>(units - u) : width;
}

// Runs a scan: Scan has layer, phases, phase[], kBackward, and for one row b of entry s
//   start(s, b)                                  before the first step
//   ahead(phase, t, s, b, u, units)              asks for what rows() will read from memory
//   rows(phase, i, t, s, b, u, vectors, tile)    epilogue of units [u, ...) of the i-th step, at t
//   finish(s, b, u, vectors, tile)               backward: units of phase 0 after the last step
//   end(s, b)                                    after all
template <class T, class Scan>
class Runner {
 public:
  explicit Runner(const Scan& scan)
      : scan_(scan),
        layer_(scan.layer),
        direct_(layer_.steps == 1 && layer_.batch <= kDirectRows && along_or_beside()) {}

  void run() {
    if (layer_.batch == 0 || layer_.stack == 0) return;
    const Split split = choose(thread_count());
    const auto member = [](void* self, int64_t rank, int64_t members) {
      static_cast<Runner*>(self)->work(rank, members);
    };
    if (split.members == 1) {
      work(0, 1);
    } else {
      wanted_ = split;
      Workspace<Meeting> memory;
      meetings_ = memory.take(split.members);
      for (int64_t i = 0; i < split.members; ++i) meetings_[i] = Meeting{};
      run_together(split.members, member, this);
    }
  }

 private:
  // How a scan is shared out: the rows of every entry in `chunks`, of which each is a group's of
  // `slices` threads that share out the units and wait for one another at every phase. Without
  // slices there may be more groups than threads.
  struct Split {
    int64_t chunks = 1, slices = 1, members = 1;
  };

  // The split of least predicted time.
  Split choose(int64_t threads) const {
    const int64_t stack = layer_.stack, batch = layer_.batch;
    Split best;
    double least = stack * step_seconds(batch, 1);
    if (threads == 1 || least * layer_.steps < kSecondsWorthThreads) return best;
    const double region = kSecondsPerRegion / layer_.steps;
    for (int64_t chunks = 1; chunks <= (threads < batch ? threads : batch); ++chunks) {
      const int64_t groups = stack * chunks, rows = (batch + chunks - 1) / chunks;
      for (int64_t slices = 1; slices == 1 || groups * slices <= threads; ++slices) {
        if (slices > scan_.phase[0].blocks.count) break;
        const int64_t rounds = slices == 1 ? (groups + threads - 1) / threads : 1;
        double seconds = region + rounds * step_seconds(rows, slices);
        if (slices > 1) seconds += scan_.phases * kSecondsPerMeeting;
        if (seconds < least && groups * slices > 1) {
          least = seconds;
          const int64_t all = groups * slices;
          best = Split{chunks, slices, all < threads ? all : threads};
        }
      }
    }
    return best;
  }
  // One step of one entry on one of `slices` threads.
  double step_seconds(int64_t rows, int64_t slices) const {
    double bytes = 0;
    for (int p = 0; p < scan_.phases; ++p) {
      const Blocks& blocks = scan_.phase[p].blocks;
      const int64_t most = (blocks.count + slices - 1) / slices;
      bytes +=
          static_cast<double>(sizeof(T)) * scan_.phase[p].panel_elements() * most / blocks.count;
    }
    double rate = bytes < 0.75 * l2_bytes() ? kCacheBytesPerSecond : kMemoryBytesPerSecond;
    if (direct_ && rate > kDirectBytesPerSecond) rate = kDirectBytesPerSecond;
    const double compute = 2 * rows * bytes / sizeof(T) / kFlopsPerSecond<T>,
                 traffic = bytes / rate;
    const double gates = rows * layer_.hidden * kGateSeconds * (sizeof(T) / 4) / slices;
    return (compute > traffic ? compute : traffic) + gates;
  }

  bool along_or_beside() const {
    for (int p = 0; p < scan_.phases; ++p) {
      const Weights& w = scan_.phase[p].weights;
      if (w.unit != 1 && w.column != 1) return false;
    }
    return true;
  }

  // What one of so many threads does, all of which run at the same time.
  void work(int64_t rank, int64_t members) {
    const Split split = members == wanted_.members ? wanted_ : choose(members);
    const int64_t stack = layer_.stack, batch = layer_.batch, groups = stack * split.chunks;
    if (rank >= split.members) return;
    pack(split, rank);
    if (split.members > 1) meet(meetings_[0], split.members);
    const int64_t slices = split.slices;
    for (int64_t g = rank / slices; g < groups; g += split.members / slices) {
      const int64_t chunk = g % split.chunks;
      const Share share{g / split.chunks,
                        batch * chunk / split.chunks,
                        batch * (chunk + 1) / split.chunks,
                        rank % slices,
                        slices,
                        meetings_ + rank / slices * slices};
      sequence(share, g == 0 && slices > 1 ? split.members : 0);
    }
  }

  // A member packs the weights it is to multiply by first, for its own cache.
  void pack(const Split& split, int64_t rank) const {
    if (direct_) return;
    const int64_t members = split.members, slices = split.slices;
    for (int p = 0; p < scan_.phases; ++p) {
      const Phase<T>& phase = scan_.phase[p];
      const int64_t count = phase.blocks.count;
      for (int64_t task = 0; task < layer_.stack * count; ++task) {
        const int64_t s = task / count, block = task % count;
        int64_t owner = task % members;
        if (slices > 1) {
          owner =
              (s * split.chunks + block % split.chunks) * slices + slice_of(block, count, slices);
        }
        if (owner != rank) continue;
        pack_panel(phase.weights, s * phase.entry, phase.blocks, block, phase.panel(s, block));
      }
    }
  }
  // Slice k has blocks [count * k / slices, count * (k + 1) / slices).
  FN static int64_t slice_of(int64_t block, int64_t count, int64_t slices) {
    return ((block + 1) * slices - 1) / count;
  }

  FN int64_t step_at(int64_t i, int64_t s) const {
    const bool down = (layer_.reverse[s] != 0) != Scan::kBackward;
    return down ? layer_.steps - 1 - i : i;
  }

  // What one thread does of a group's work: its slice of the units of rows [from, to) of entry s.
  struct Share {
    int64_t s, from, to, slice, slices;
    Meeting* meeting;
  };

  // A share, start to end; `arrived` have met before.
  void sequence(const Share& share, uint64_t arrived) const {
    const auto wait = [&] {
      if (share.slices > 1) meet(*share.meeting, arrived += share.slices);
    };
    const int64_t rows = share.to - share.from;
    const int64_t first = share.from + rows * share.slice / share.slices;
    const int64_t last = share.from + rows * (share.slice + 1) / share.slices;
    for (int64_t b = first; b < last; ++b) scan_.start(share.s, b);
    wait();
    for (int64_t i = 0; i < layer_.steps; ++i) {
      for (int p = 0; p < scan_.phases; ++p) {
        blocks(p, i, share);
        wait();
      }
    }
    if constexpr (Scan::kBackward) {
      blocks(0, layer_.steps, share);
      wait();
    }
    for (int64_t b = first; b < last; ++b) scan_.end(share.s, b);
  }

  FN void blocks(int p, int64_t i, const Share& share) const {
    const int64_t count = scan_.phase[p].blocks.count;
    const int64_t end = count * (share.slice + 1) / share.slices;
    for (int64_t block = count * share.slice / share.slices; block < end; ++block) {
      tiles(p, i, share.s, block, share.from, share.to);
    }
  }

  // One block of units of phase p for rows [from, to), at the i-th step; i == steps finishes.
  void tiles(int p, int64_t i, int64_t s, int64_t block, int64_t from, int64_t to) const {
    const int64_t groups = (to - from + kGroupRows - 1) / kGroupRows;
    for (int64_t g = 0; g < groups; ++g) {
      group(p, i, s, block, from + (to - from) * g / groups, from + (to - from) * (g + 1) / groups);
    }
  }

  void group(int p, int64_t i, int64_t s, int64_t block, int64_t from, int64_t to) const {
    const Phase<T>& phase = scan_.phase[p];
    const int units = phase.blocks.depth_vectors(block), vectors = units * phase.weights.gates;
    const int64_t u = phase.blocks.first_unit(block), width = vectors * Vec<T>::kWidth;
    const bool finishing = i == layer_.steps;
    const int64_t t = finishing ? 0 : step_at(i, s);
    alignas(64) T sums[kGroupRows * kMaxVectors * Vec<T>::kWidth];
    if (!finishing) {
      for (int64_t b = from; b < to; ++b) {
        scan_.ahead(p, t, s, b, u, lanes_at(layer_.hidden, u, units * Vec<T>::kWidth));
      }
    }
    if (Scan::kBackward && p == 0 && i == 0) {
      for (int64_t e = 0; e < (to - from) * width; ++e) sums[e] = T(0);
    } else {
      multiply(phase, i, t, s, block, from, to, sums);
    }
    for (int64_t b = from; b < to; ++b) {
      if constexpr (Scan::kBackward) {
        if (finishing) {
          scan_.finish(s, b, u, units, sums + (b - from) * width);
          continue;
        }
      }
      scan_.rows(p, i, t, s, b, u, units, sums + (b - from) * width);
    }
  }

  // sums[b - from] = the operand's row b times a block of weights.
  FN void multiply(const Phase<T>& phase, int64_t i, int64_t t, int64_t s, int64_t block,
                   int64_t from, int64_t to, T* sums) const {
    const int vectors = phase.blocks.depth_vectors(block) * phase.weights.gates;
    const int64_t width = vectors * Vec<T>::kWidth;
    const int64_t depth = phase.weights.depth, ld = phase.operand.ld;
    const T* operand = phase.operand.row(s, from, phase.alternating ? i & 1 : 0);
    if (direct_) {
      const int rows = static_cast<int>(to - from);
      return direct_product<T>(rows, phase.weights, s * phase.entry, phase.blocks, block, operand,
                               ld, sums);
    }
    // Tiles as even as can be: a remainder of one row would run at a fraction of the speed.
    const int64_t count = (to - from + kTileRows[vectors] - 1) / kTileRows[vectors];
    const int64_t slice = count == 1 ? depth : kSliceK;
    const T* panel = phase.panel(s, block);
    for (int64_t k = 0; k < depth; k += slice) {
      const int64_t deep = depth - k < slice ? depth - k : slice;
      for (int64_t tile = 0; tile < count; ++tile) {
        const int64_t first = (to - from) * tile / count;
        const int rows = static_cast<int>((to - from) * (tile + 1) / count - first);
        if (!Scan::kBackward && !any_active(t, from + first, rows)) continue;
        tile_product<T>(rows, vectors, operand + first * ld + k, ld, 1, panel + k * width, deep,
                        sums + first * width, k > 0);
      }
    }
  }

  // Whether a forward step needs the product for any of these rows.
  bool any_active(int64_t t, int64_t b, int rows) const {
    for (int m = 0; m < rows; ++m) {
      if (!ended(layer_, t, b + m)) return true;
    }
    return false;
  }

  const Scan& scan_;
  const Layer& layer_;
  const bool direct_;  // weights are multiplied by where they are
  Split wanted_;
  Meeting* meetings_ = nullptr;
};

template <class T, class Scan>
void run_scan(const Scan& scan) {
  Runner<T, Scan>(scan).run();
}

// What the forward scans share: the hidden state, its output and its final value.
template <class T>
struct ForwardScan {
  using V = Vec<T>;
  static constexpr bool kBackward = false;
  static constexpr int kWidth = V::kWidth;
  const Layer& layer;
  Rows h0, y, h_n;  // [S, B, P] [T, B, S, P] [S, B, P]
  State<T> h;       // [S, B, P] alternating: h entering the step, zeroed where a segment starts
  int phases = 1;
  Phase<T> phase[2];

  ForwardScan(Workspace<T>& memory, const Layer& l, const Rows& h0_, const Rows& y_,
              const Rows& h_n_)
      : layer(l), h0(h0_), y(y_), h_n(h_n_), h(memory, l, l.out, true) {}

  FN bool reverse(int64_t s) const { return layer.reverse[s] != 0; }
  FN bool last(int64_t i) const { return i + 1 == layer.steps; }
  // The state after step t is zeroed before the next step.
  FN bool cut_after(int64_t t, int64_t s, int64_t b) const {
    const int64_t next = reverse(s) ? t - 1 : t + 1;
    return next >= 0 && next < layer.steps && was_reset(layer, reverse(s), next, b);
  }
  // target[0, n) = the initial state of row b, zeroed where the first step starts a segment.
  FN void start_state(T* target, const Rows& initial, int64_t s, int64_t b, int64_t n) const {
    const int64_t t = reverse(s) ? layer.steps - 1 : 0;
    const bool cut = was_reset(layer, reverse(s), t, b);
    const Row from(initial, 0, b, s);
    for (int64_t u = 0; u < n; u += kWidth) {
      const int lanes = lanes_at(n, u, kWidth);
      (cut ? V(T(0)) : from.load_or_zero<T>(u, lanes)).store(target + u, lanes);
    }
  }
  void start(int64_t s, int64_t b) const { start_state(h.row(s, b), h0, s, b, layer.out); }
  void end(int64_t, int64_t) const {}

  FN V h_prev(int64_t i, int64_t s, int64_t b, int64_t u, int n) const {
    return V::load(h.row(s, b, i & 1) + u, n);
  }
  // Hand on the new hidden state of units [u, u + n); over: the step was not taken.
  FN void put_h(int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int n, bool over, bool cut,
                V value) const {
    const V zero(T(0));
    if (over) value = h_prev(i, s, b, u, n);
    Row(y, t, b, s).store<T>(u, n, over ? zero : value);
    (cut ? zero : value).store(h.row(s, b, (i + 1) & 1) + u, n);
    if (last(i)) Row(h_n, 0, b, s).store<T>(u, n, value);
  }
};

// What the backward scans share. The gradient that reaches the state after a step is `carried`
// (what does not pass the recurrent weights) plus the product of `operand`, the gate gradients of
// the step processed before; both are zero where a segment began there.
template <class T>
struct BackwardScan {
  using V = Vec<T>;
  static constexpr bool kBackward = true;
  static constexpr int kWidth = V::kWidth;
  const Layer& layer;
  Rows dy, dh_n, dh0;         // [T, B, S, P] [S, B, P] (either may be null), [S, B, P]
  State<T> operand, carried;  // [S, B, G*H] alternating, [S, B, P]
  int phases = 1;
  Phase<T> phase[2];

  BackwardScan(Workspace<T>& memory, const Layer& l, int64_t depth, const Rows& dy_,
               const Rows& dh_n_, const Rows& dh0_)
      : layer(l),
        dy(dy_),
        dh_n(dh_n_),
        dh0(dh0_),
        operand(memory, l, depth, true),
        carried(memory, l, l.out, false) {}

  FN bool reverse(int64_t s) const { return layer.reverse[s] != 0; }
  FN void start_state(T* target, const Rows& initial, int64_t s, int64_t b, int64_t n) const {
    const Row from(initial, 0, b, s);
    for (int64_t u = 0; u < n; u += kWidth) {
      const int lanes = lanes_at(n, u, kWidth);
      from.load_or_zero<T>(u, lanes).store(target + u, lanes);
    }
  }
  void start(int64_t s, int64_t b) const { start_state(carried.row(s, b), dh_n, s, b, layer.out); }
  void end(int64_t, int64_t) const {}

  // The whole gradient of the state after the step; dy counts only where the step was taken.
  FN V gradient(int64_t t, int64_t s, int64_t b, int64_t u, int n, bool over, V product) const {
    V dh = V::load(carried.row(s, b) + u, n) + product;
    if (!over) dh = dh + Row(dy, t, b, s).load_or_zero<T>(u, n);
    return dh;
  }
  FN void carry(int64_t s, int64_t b, int64_t u, int n, V value) const {
    value.store(carried.row(s, b) + u, n);
  }
  FN T* next_operand(int64_t i, int64_t s, int64_t b) const {
    return operand.row(s, b, (i + 1) & 1);
  }
  void finish(int64_t s, int64_t b, int64_t u, int vectors, const T* sums) const {
    for (int v = 0; v < vectors; ++v, u += kWidth, sums += kWidth) {
      const int n = lanes_at(layer.out, u, kWidth);
      Row(dh0, 0, b, s).store<T>(u, n, V::load(carried.row(s, b) + u, n) + V::load(sums));
    }
  }
  // The step whose state entered step t, if any did.
  FN int64_t step_before(int64_t t, int64_t s) const {
    const int64_t at = reverse(s) ? t + 1 : t - 1;
    return at < 0 || at >= layer.steps ? t : at;
  }
  // The state that entered step t: a step's value, the initial one, or absent (zero).
  FN Row entering(const Rows& states, const Rows& initial, int64_t t, int64_t s, int64_t b) const {
    if (was_reset(layer, reverse(s), t, b)) return Row(Rows{}, 0, 0, 0);
    const int64_t from = entered_from(layer, reverse(s), t, b);
    return from < 0 ? Row(initial, 0, b, s) : Row(states, from, b, s);
  }
};
