// How a scan runs: the phases of its steps, and the work shared among threads.
// Included inside the instruction set's anonymous namespace; see kernels.inl.
//
// A step is one or two phases. A phase multiplies an operand row [depth] by packed weights and
// hands the sums of one block of units to the scan's epilogue, which does the gate arithmetic.
// Phases of a step, and steps, follow one another; blocks and rows are independent.

// Rates the choice of threads is made by: rough figures of one core of a server of the 2020s, good
// enough to tell 10 us from 100 us. docs/performance.md says what they were fitted to.
template <class T>
constexpr double kFlopsPerSecond = 9e9 * Vec<T>::kWidth;
constexpr double kCacheBytesPerSecond = 1.2e11;
constexpr double kMemoryBytesPerSecond = 2.4e10;
constexpr double kDirectBytesPerSecond = 4e10;                     // of weights that are not packed
constexpr double kGateSeconds = 1.6e-9 * 16 / Vec<float>::kWidth;  // of a unit of a row
constexpr double kSharedBytesPerSecond = 1e10;  // of what another core has just written
constexpr double kSecondsPerRegion = 5e-6;      // to start and join PyTorch's threads
constexpr double kSecondsPerMeeting = 3e-7;     // of threads that wait for one another
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

// Whether the tensors of K values a unit that a scan leaves for later go past the caches: those too
// large to be found there. (Written through the caches, a line is first read.)
template <class T>
bool goes_past(const Layer& layer, const Places& places, int64_t values) {
  const int64_t units = places.all(layer) * layer.stack * layer.hidden;
  return kStoresPast && units * values * static_cast<int64_t>(sizeof(T)) > 4 * l2_bytes();
}

template <class T>
class Gradients;  // gradients.inl

// Rows of the largest of so many chunks of a batch, of which the first so many count.
inline int64_t most_rows(const Places& places, int64_t batch, int64_t chunks, int64_t counted) {
  int64_t most = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t from = places.begin(c, chunks, batch), to = places.begin(c + 1, chunks, batch);
    const int64_t rows = (to < counted ? to : counted) - from;
    if (rows > most) most = rows;
  }
  return most;
}

// Memory [B, G*H (+ H)] for a step's gradients of the gates where the scan uses them up itself:
// row b begins at data[at + b * row], and the further gradient of a unit `inner` elements later.
struct Kept {
  void* data = nullptr;
  int64_t at = 0, row = 0, inner = 0;
};
// In place of what keeps them, where nothing does.
struct NoGradients {
  FN Kept next() const { return Kept{}; }
  FN bool done(int64_t, int64_t, int64_t, int64_t) { return false; }
};

// Where a scan is: its i-th step, which is step t of the sequence, of stack entry s, and where the
// rows of the step begin.
struct Step {
  int64_t i, t, s, place;
  Kept kept;
};

// Rows [from, to) and `vectors` vectors of units from u on. (Row by row: all vectors of a row
// before the next. Lines of many rows at the same place modulo 4 KiB would wait for one another.)
struct Span {
  int64_t from, to, u;
  int vectors;

  // Calls each(b, u, lanes, own, v) for every row and its v-th vector; `sums` has kGates vectors
  // for each.
  template <class T, int kGates, class Each>
  FN void each(int64_t units, T* sums, const Each& each) const {
    constexpr int kWidth = Vec<T>::kWidth;
    if constexpr (kMaxVectors / kGates == 1) {
      const int lanes = lanes_at(units, u, kWidth);
      for (int64_t b = from; b < to; ++b, sums += kGates * kWidth) each(b, u, lanes, sums, 0);
    } else {
      for (int64_t b = from; b < to; ++b) {
        for (int v = 0; v < vectors; ++v, sums += kGates * kWidth) {
          const int64_t unit = u + v * kWidth;
          each(b, unit, lanes_at(units, unit, kWidth), sums, v);
        }
      }
    }
  }
};

// Runs a scan: Scan has layer, phases, phase[], kBackward, and for one row b of entry s
//   start(s, b)                                  before the first step
//   places()                                     of sequences
//   ahead(phase, step, b, u, units)              asks for what rows() will read from memory
//   rows<M>(phase, step, span, sums, projected)  epilogue of some rows and units, marked by an M;
//                                                `projected`: gates_x, or null: they are in memory
//   input, input_row(place, b), add_bias(...)    forward: what is projected
//   widens(), widen(place, from, rows, to, ld)   forward: where it is of another type
//   finish(s, b, u, vectors, tile)               backward: units of phase 0 after the last step
//   gradients                                    backward: what keeps the gates' gradients, or null
//   step_before(t, s)                            backward: whose state entered the step
//   keep_operand(i, s, b)                        backward: of a row that ends before others
//   end(s, b)                                    after all
template <class T, class Scan>
class Runner {
 public:
  explicit Runner(const Scan& scan)
      : scan_(scan),
        layer_(scan.layer),
        places_(scan.places()),
        direct_(layer_.steps == 1 && layer_.batch <= kDirectRows && usable_unpacked()),
        tiles_(scan.phase[0].parts() + scan.phase[1].parts() > 0) {}

  void run() {
    if (layer_.batch == 0 || layer_.stack == 0) return;
    const Split split = wanted_ = choose(thread_count());
    Workspace<char> memory;
    if (tiles_) operands_ = memory.take(split.members * 2 * operand_bytes(split));
    Workspace<T> inputs;
    if constexpr (!Scan::kBackward) {
      if (scan_.widens()) widened_ = inputs.take(split.members * widened_values(split));
    }
    const auto member = [](void* self, int64_t rank, int64_t members) {
      static_cast<Runner*>(self)->work(rank, members);
    };
    if (split.members == 1) {
      work(0, 1);
    } else {
      Workspace<Meeting> meetings;
      meetings_ = meetings.take(split.members + 1);  // a group's; the last of all members
      for (int64_t i = 0; i <= split.members; ++i) meetings_[i] = Meeting{};
      run_together(split.members, member, this);
    }
  }

 private:
  // What uses up the gates' gradients, if anything does.
  FN const Gradients<T>* gradients() const {
    if constexpr (Scan::kBackward) return scan_.gradients;
    return nullptr;
  }

  // How a scan is shared out: the rows of every entry in `chunks`, of which each is a group's of
  // `slices` threads that share out the units and wait for one another at every phase. Without
  // slices there may be more groups than threads.
  struct Split {
    int64_t chunks = 1, slices = 1, members = 1;
  };

  // What one of a member's two operands takes for the tile unit.
  int64_t operand_bytes(const Split& split) const {
    int64_t depth = 0;
    for (int p = 0; p < scan_.phases; ++p) {
      const int64_t own = scan_.phase[p].depth();
      if (own > depth) depth = own;
    }
    return TileOperand::bytes(most_rows(places_, layer_.batch, split.chunks, layer_.batch), depth);
  }
  // Values of a member's rows of the input, where they are widened.
  int64_t widened_values(const Split& split) const {
    return most_rows(places_, layer_.batch, split.chunks, layer_.batch) * input_ld();
  }
  // Rows of one of so many chunks at a step, of those that live at some.
  int64_t rows_of(int64_t chunks) const {
    const int64_t rows = (places_.all(layer_) + layer_.steps - 1) / layer_.steps;
    return (rows + chunks - 1) / chunks;
  }

  // The split of least predicted time.
  Split choose(int64_t threads) const {
    const int64_t stack = layer_.stack, batch = layer_.batch;
    Split best;
    int64_t given = 0;  // chunks, where these are not to be chosen
    if (gradients() != nullptr) given = best.chunks = gradients()->chunks();
    double least = stack * best.chunks * step_seconds(rows_of(best.chunks), 1);
    if (threads == 1 || least * layer_.steps < kSecondsWorthThreads) return best;
    const double region = kSecondsPerRegion / layer_.steps;
    const int64_t most = given > 0 ? given : threads < batch ? threads : batch;
    for (int64_t chunks = given > 0 ? given : 1; chunks <= most; ++chunks) {
      const int64_t groups = stack * chunks, rows = rows_of(chunks);
      for (int64_t slices = 1; slices == 1 || groups * slices <= threads; ++slices) {
        if (slices > scan_.phase[0].recurrent.blocks.count) break;
        const int64_t rounds = slices == 1 ? (groups + threads - 1) / threads : 1;
        double seconds = region + rounds * step_seconds(rows, slices);
        if (slices > 1) seconds += (scan_.phases + (given > 0)) * kSecondsPerMeeting;
        seconds += shared_bytes(chunks, slices) / kSharedBytesPerSecond;
        if (seconds < least && groups * slices > 1) {
          least = seconds;
          const int64_t all = groups * slices;
          best = Split{chunks, slices, all < threads ? all : threads};
        }
      }
    }
    return best;
  }
  // Bytes of weights that one of `slices` threads reads in a step.
  double step_bytes(int64_t slices) const {
    double bytes = 0;
    for (int p = 0; p < scan_.phases; ++p) {
      const int64_t count = scan_.phase[p].recurrent.blocks.count;
      const int64_t most = (count + slices - 1) / slices;
      bytes += static_cast<double>(sizeof(T)) * scan_.phase[p].elements() * most / count;
    }
    return bytes;
  }
  // Bytes a step that a thread reads of what others wrote: of their packing, which is once for all
  // steps, and of the operands.
  double shared_bytes(int64_t chunks, int64_t slices) const {
    double bytes = 0;
    if (!direct_) bytes = step_bytes(slices) * (chunks - 1) / chunks / layer_.steps;
    const int64_t rows = rows_of(chunks);
    for (int p = 0; p < scan_.phases; ++p) {
      const int64_t values = rows * scan_.phase[p].recurrent.depth();
      bytes += static_cast<double>(sizeof(T)) * values * (slices - 1) / slices;
    }
    return bytes;
  }
  // One step of one entry on one of `slices` threads.
  double step_seconds(int64_t rows, int64_t slices) const {
    const double bytes = step_bytes(slices);
    double rate = bytes < kCacheFilled * l2_bytes() ? kCacheBytesPerSecond : kMemoryBytesPerSecond;
    if (direct_ && rate > kDirectBytesPerSecond) rate = kDirectBytesPerSecond;
    const double compute = product_seconds(rows, slices, bytes), traffic = bytes / rate;
    const double gates = rows * layer_.hidden * kGateSeconds * (sizeof(T) / 4) / slices;
    const double more = gradients() ? gradients()->row_seconds() * rows / slices : 0;
    // (The tile unit waits for weights, the other one asks for them meanwhile.)
    const double product = tiles_ ? compute + traffic : compute > traffic ? compute : traffic;
    return product + gates + more;
  }

  // The products of a step, of `bytes` of weights.
  double product_seconds(int64_t rows, int64_t slices, double bytes) const {
    const auto by_vectors = [&](double own) { return 2 * rows * own / kFlopsPerSecond<T>; };
    if (!tiles_) return by_vectors(bytes / sizeof(T));
    const auto of = [&](const Panels<T>& w) {
      const double columns = static_cast<double>(w.blocks.row_elements()) / slices;
      return w.parts > 0 ? tile_seconds(rows, w.depth(), columns, w.parts)
                         : by_vectors(columns * w.depth());
    };
    double seconds = 0;
    for (int p = 0; p < scan_.phases; ++p) {
      const Phase<T>& phase = scan_.phase[p];
      seconds += of(phase.recurrent);
      if (phase.projection.depth() > 0) seconds += of(phase.projection);
    }
    return seconds;
  }

  bool usable_unpacked() const {
    const auto usable = [](const Weights& w)
                            FN_LAMBDA { return w.depth == 0 || w.unit == 1 || w.column == 1; };
    for (int p = 0; p < scan_.phases; ++p) {
      const Phase<T>& phase = scan_.phase[p];
      if (!usable(phase.recurrent.weights) || !usable(phase.projection.weights)) return false;
    }
    return true;
  }

  // Where there are fewer members than were wanted. (One has the memory of all for its operands,
  // of all rows.)
  Split with_fewer(int64_t members) const {
    if (tiles_) return choose(1);
    const Split fewer = choose(members);
    const auto widened = [&](const Split& split) { return split.members * widened_values(split); };
    return widened_ != nullptr && widened(fewer) > widened(wanted_) ? choose(1) : fewer;
  }

  // What one of so many threads does, all of which run at the same time.
  void work(int64_t rank, int64_t members) {
    const Split split = members == wanted_.members ? wanted_ : with_fewer(members);
    const int64_t stack = layer_.stack, batch = layer_.batch, groups = stack * split.chunks;
    if (rank >= split.members) return;
    pack(split, rank);
    if (split.members > 1) meet(meetings_[0], split.members);
    const int64_t slices = split.slices;
    const TileUnit unit(tiles_);
    TileOperand state, input;
    if (tiles_) {
      const int64_t bytes = operand_bytes(split);
      state.data = operands_ + 2 * rank * bytes;
      input.data = state.data + bytes;
    }
    for (int64_t g = rank / slices; g < groups; g += split.members / slices) {
      const int64_t chunk = g % split.chunks;
      const Share share{g / split.chunks,
                        places_.begin(chunk, split.chunks, batch),
                        places_.begin(chunk + 1, split.chunks, batch),
                        rank % slices,
                        slices,
                        meetings_ + rank / slices * slices,
                        step_bytes(slices) > kCacheFilled * l2_bytes(),
                        Kept{},
                        &unit,
                        &state,
                        &input,
                        widened_ == nullptr ? nullptr : widened_ + rank * widened_values(split)};
      const uint64_t arrived = g == 0 && slices > 1 ? split.members : 0;
      if constexpr (Scan::kBackward) {
        if (scan_.gradients != nullptr) {
          sequence(share, arrived,
                   scan_.gradients->chunk(rank, share.s, chunk, share.from, share.slice, slices));
          continue;
        }
      }
      sequence(share, arrived, NoGradients());
    }
    if (gradients() == nullptr) return;
    if (split.members > 1) meet(meetings_[split.members], split.members);
    gradients()->leave(rank, split.members);
  }

  // A member packs the weights it is to multiply by first, for its own cache.
  void pack(const Split& split, int64_t rank) const {
    if (direct_) return;
    const int64_t members = split.members, slices = split.slices;
    if (gradients() != nullptr) gradients()->pack(rank, members);
    for (int p = 0; p < scan_.phases; ++p) {
      const Phase<T>& phase = scan_.phase[p];
      const int64_t count = phase.recurrent.blocks.count;
      for (int64_t task = 0; task < layer_.stack * count; ++task) {
        const int64_t s = task / count, block = task % count;
        const int64_t group = s * split.chunks + block % split.chunks;
        const int64_t owner = (group * slices + slice_of(block, count, slices)) % members;
        if (owner != rank) continue;
        phase.recurrent.pack(s, block);
        if (phase.projection.depth() > 0) phase.projection.pack(s, block);
      }
    }
  }
  // Slice k has blocks [count * k / slices, count * (k + 1) / slices).
  FN static int64_t slice_of(int64_t block, int64_t count, int64_t slices) {
    return ((block + 1) * slices - 1) / count;
  }

  FN int64_t input_ld() const { return padded_row<T>(scan_.phase[0].projection.depth()); }
  FN int64_t step_at(int64_t i, int64_t s) const {
    const bool down = (layer_.reverse[s] != 0) != Scan::kBackward;
    return down ? layer_.steps - 1 - i : i;
  }

  // What one thread does of a group's work: its slice of the units of rows [from, to) of entry s.
  struct Share {
    int64_t s, from, to, slice, slices;
    Meeting* meeting;
    bool asks;  // for weights before their use, which are beyond the second-level cache
    Kept kept;  // where a backward step leaves the gates' gradients
    const TileUnit* unit;
    TileOperand *state, *input;  // the operands of the phase at hand, for the unit
    T* widened;                  // rows of its input in T, input_ld() apart; null: not needed
  };

  // A share, start to end; `arrived` have met before.
  template <class Keeps>
  void sequence(Share share, uint64_t arrived, Keeps keeps) const {
    const auto wait = [&] {
      if (share.slices > 1) meet(*share.meeting, arrived += share.slices);
    };
    const int64_t rows = share.to - share.from;
    const int64_t first = share.from + rows * share.slice / share.slices;
    const int64_t last = share.from + rows * (share.slice + 1) / share.slices;
    for (int64_t b = first; b < last; ++b) scan_.start(share.s, b);
    wait();
    Share live = share;  // the rows that have the step
    for (int64_t i = 0; i < layer_.steps; ++i) {
      const int64_t t = step_at(i, share.s);
      live.kept = keeps.next();
      live.to = live_to(share, t);
      for (int p = 0; p < scan_.phases; ++p) {
        blocks(p, i, live);
        wait();
      }
      if constexpr (Scan::kBackward) {
        const bool end = i + 1 == layer_.steps;
        const int64_t stay = end ? live.to : live_to(share, step_at(i + 1, share.s));
        const int64_t rows = live.to - live.from, next = end ? -1 : stay - live.from;
        if (keeps.done(t, scan_.step_before(t, share.s), rows, next)) wait();
        for (int64_t b = stay + share.slice; b < live.to; b += share.slices) {
          scan_.keep_operand(i, share.s, b);
        }
      }
    }
    if constexpr (Scan::kBackward) {
      blocks(0, layer_.steps, share);
      wait();
    }
    for (int64_t b = first; b < last; ++b) scan_.end(share.s, b);
    fence();
  }

  // One past the last of a share's rows that have step t.
  FN int64_t live_to(const Share& share, int64_t t) const {
    const int64_t live = places_.live(t, layer_.batch);
    return live < share.from ? share.from : live < share.to ? live : share.to;
  }

  // A share's blocks at one step, in an order that turns round from step to step: of weights that
  // do not fit the second-level cache, those used last are still there.
  FN void blocks(int p, int64_t i, const Share& share) const {
    const int64_t count = scan_.phase[p].recurrent.blocks.count;
    const int64_t first = count * share.slice / share.slices;
    const int64_t all = count * (share.slice + 1) / share.slices - first;
    const auto block = [&](int64_t k) FN_LAMBDA { return first + (i & 1 ? all - 1 - k : k); };
    if (share.to == share.from) return;
    if (tiles_ || share.widened != nullptr) take_operands(p, i, share);
    for (int64_t k = 0; k < all; ++k) {
      tiles(p, i, share, block(k), block(k + 1 < all ? k + 1 : k));
    }
  }

  // A share's rows of what a phase multiplies, for the tile unit or widened.
  void take_operands(int p, int64_t i, const Share& share) const {
    const Phase<T>& phase = scan_.phase[p];
    const int64_t rows = share.to - share.from;
    if (phase.recurrent.parts > 0 && (!Scan::kBackward || p > 0 || i > 0)) {
      const T* from = phase.operand.row(share.s, share.from, phase.alternating ? i & 1 : 0);
      share.state->take(from, kNative<T>, 0, phase.operand.ld, rows, phase.recurrent.depth());
    }
    if constexpr (!Scan::kBackward) {
      const Rows& x = scan_.input.x;
      const int64_t place = places_.at(step_at(i, share.s)), deep = phase.projection.depth();
      if (phase.projection.parts > 0) {
        const int64_t at = place * x.step + share.from * x.row;
        share.input->take(x.data, x.dtype, at, x.row, rows, deep);
      } else if (share.widened != nullptr && deep > 0) {
        scan_.widen(place, share.from, rows, share.widened, input_ld());
      }
    }
  }

  // One block of units of phase p for a share's rows, at the i-th step; i == steps finishes. `then`
  // is the block that follows.
  void tiles(int p, int64_t i, const Share& share, int64_t block, int64_t then) const {
    const int64_t rows = share.to - share.from, groups = (rows + kGroupRows - 1) / kGroupRows;
    for (int64_t g = 0; g < groups; ++g) {
      group(p, i, share, block, g + 1 < groups ? block : then, share.from + rows * g / groups,
            share.from + rows * (g + 1) / groups);
    }
  }

  // Rows [from, to) of it.
  void group(int p, int64_t i, const Share& share, int64_t block, int64_t then, int64_t from,
             int64_t to) const {
    const int64_t s = share.s;
    const Phase<T>& phase = scan_.phase[p];
    const Panels<T>&w = phase.recurrent, &w_ih = phase.projection;
    const int units = w.blocks.depth_vectors(block);
    const int64_t u = w.blocks.first_unit(block), width = w.vectors(block) * Vec<T>::kWidth;
    const bool finishing = i == layer_.steps;
    const int64_t t = finishing ? 0 : step_at(i, s);
    const Step at{i, t, s, places_.at(t), share.kept};
    constexpr int64_t kSums = kGroupRows * kMaxVectors * Vec<T>::kWidth;
    alignas(64) T sums[kSums], projected[Scan::kBackward ? 1 : kSums];
    const auto ahead = [&](int64_t first, int64_t last) FN_LAMBDA {
      if (finishing) return;
      const int lanes = lanes_at(layer_.hidden, u, units * Vec<T>::kWidth);
      for (int64_t b = first; b < last; ++b) scan_.ahead(p, at, b, u, lanes);
    };
    const T* operand = phase.operand.row(s, from, phase.alternating ? i & 1 : 0);
    const T* own = direct_ ? nullptr : w.at(s, block);
    const T* following = direct_ ? nullptr : (w_ih.depth() > 0 ? w_ih : w).at(s, then);
    bool projects = false;
    int64_t multiplied = to;  // rows before this one; those after it have ended
    if constexpr (!Scan::kBackward) {
      multiplied = last_active(t, from, to);
      projects = w_ih.depth() > 0;
      const T* x = nullptr;  // by tiles
      int64_t x_ld = scan_.input.x.row;
      if (share.widened != nullptr) {
        x_ld = input_ld(), x = share.widened + (from - share.from) * x_ld;
      } else if (projects && w_ih.parts == 0) {
        x = scan_.input_row(at.place, from);
      }
      if (projects && direct_) {
        direct_product<T>(static_cast<int>(to - from), w_ih.weights, s * w_ih.entry, w_ih.blocks,
                          block, x, x_ld, w_ih.terms, projected);
      } else if (projects) {
        multiply(w_ih, share, share.input, t, s, block, x, x_ld, own, from, multiplied, projected,
                 [](int64_t, int64_t) FN_LAMBDA {});
      }
      if (projects) {
        scan_.add_bias(s, u, units, (direct_ ? to : multiplied) - from, projected);
      }
    }
    if (Scan::kBackward && p == 0 && i == 0) {
      ahead(from, to);
      for (int64_t e = 0; e < (to - from) * width; ++e) sums[e] = T(0);
    } else if (direct_) {
      ahead(from, to);
      direct_product<T>(static_cast<int>(to - from), w.weights, s * w.entry, w.blocks, block,
                        operand, phase.operand.ld, w.terms, sums);
    } else {
      multiply(w, share, share.state, t, s, block, operand, phase.operand.ld, following, from,
               multiplied, sums, ahead);
    }
    if constexpr (Scan::kBackward) {
      if (finishing) {
        for (int64_t b = from; b < to; ++b) {
          scan_.finish(s, b, u, units, sums + (b - from) * width);
        }
        return;
      }
    }
    const Span span{from, to, u, units};
    const T* gates_x = projects ? projected : nullptr;
    if (layer_.flags == nullptr) {
      scan_.template rows<NoMarks>(p, at, span, sums, gates_x);
    } else {
      scan_.template rows<Marks>(p, at, span, sums, gates_x);
    }
  }

  // sums[b - from] = row b of an operand, which begins with row `from`, times a block of weights.
  // ask(b, c) is called once for all rows, some at a time; `next` are the weights used next.
  template <class Ask>
  FN void multiply(const Panels<T>& w, const Share& share, const TileOperand* cut, int64_t t,
                   int64_t s, int64_t block, const T* operand, int64_t ld, const T* next,
                   int64_t from, int64_t to, T* sums, const Ask& ask) const {
    if (from == to) return;
    const int vectors = w.vectors(block);
    const int64_t width = vectors * Vec<T>::kWidth, depth = w.depth();
    if constexpr (kHasTiles && sizeof(T) == 4) {
      if (w.parts > 0) {
        for (int64_t first = from; first < to; first += kPanelItems) {
          const int rows = lanes_at(to, first, kPanelItems);
          ask(first, first + rows);
          if (!Scan::kBackward && !any_active(t, first, rows)) continue;
          multiply_tiles(*share.unit, *cut, first - share.from, rows, vectors, w.parts,
                         w.at(s, block), next, sums + (first - from) * width);
        }
        return;
      }
    }
    // Tiles as even as can be: a remainder of one row would run at a fraction of the speed.
    const int64_t count = (to - from + kTileRows[vectors] - 1) / kTileRows[vectors];
    const int64_t each = (to - from) / count, larger = (to - from) % count;
    const int64_t slice = count == 1 ? depth : kSliceK;
    // Rows asked for with a slice: a few at a time, for there are few lines that can be waited for.
    const int64_t slices = (depth + slice - 1) / slice, part = each / slices + 1;
    const T* panel = w.at(s, block);
    int64_t asked = 0;
    for (int64_t k = 0; k < depth; k += slice, asked += part) {
      const int64_t deep = depth - k < slice ? depth - k : slice;
      const T* after = k + deep < depth ? panel + (k + deep) * width : next;
      int64_t first = 0;
      for (int64_t tile = 0; tile < count; ++tile) {
        const int rows = static_cast<int>(each + (tile < larger));
        if (asked < rows) {
          ask(from + first + asked, from + first + (asked + part < rows ? asked + part : rows));
        }
        // Sums of rows that have ended are whatever was there, and not looked at.
        if (Scan::kBackward || any_active(t, from + first, rows)) {
          Ahead ahead;
          if (share.asks) ahead = Ahead(after, deep * width * sizeof(T), count, tile, deep);
          tile_product<T>(rows, vectors, operand + first * ld + k, ld, 1, panel + k * width, deep,
                          w.terms, sums + first * width, k > 0, ahead);
        }
        first += rows;
      }
    }
  }

  // One past the last of rows [from, to) that a forward step needs the product for.
  int64_t last_active(int64_t t, int64_t from, int64_t to) const {
    if (layer_.flags == nullptr) return to;
    const Marks marks(layer_, places_, t, -1);
    while (to > from && marks.ended(to - 1)) --to;
    return to;
  }

  // Whether a forward step needs the product for any of these rows.
  bool any_active(int64_t t, int64_t b, int rows) const {
    if (layer_.flags == nullptr) return true;
    const Marks marks(layer_, places_, t, -1);
    for (int m = 0; m < rows; ++m) {
      if (!marks.ended(b + m)) return true;
    }
    return false;
  }

  const Scan& scan_;
  const Layer& layer_;
  const Places& places_;
  const bool direct_;         // weights are multiplied by where they are
  const bool tiles_;          // on the tile unit
  char* operands_ = nullptr;  // of all members
  T* widened_ = nullptr;      // likewise, where the input is widened
  Split wanted_;
  Meeting* meetings_ = nullptr;
};

template <class T, class Scan>
void run_scan(const Scan& scan) {
  Runner<T, Scan>(scan).run();
}
