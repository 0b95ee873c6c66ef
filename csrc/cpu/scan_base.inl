// What the scans of all cells share: the forward ones the hidden state and the projection of their
// input, the backward ones the gradient that reaches a step.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

// Where a forward scan's epilogue reads gates_x of a span of rows and units: in memory, or as they
// were projected, [row][vector of units][gate][kWidth].
template <class T, bool kPlain>
struct GatesX {
  using V = Vec<T>;
  LinesOf<T, kPlain> lines;
  const Span span;
  const T* at;  // of the span's first row and unit; null: by `lines`, which converts
  int64_t row, vector, gate;

  FN GatesX(const Rows& gates_x, const Step& step, const Span& span_, int64_t units,
            const T* projected, int gates)
      : lines(gates_x, step.place, step.s), span(span_), at(projected) {
    if (projected != nullptr) {
      row = span.vectors * gates * V::kWidth, vector = gates * V::kWidth, gate = V::kWidth;
    } else {
      row = lines.row, vector = V::kWidth, gate = units;
      if (kPlain) at = static_cast<const T*>(lines.data) + lines.at + span.from * row + span.u;
    }
  }
  // Gate g of n units, the v-th vector, of row b.
  FN V load(int64_t b, int v, int g, int n) const {
    if (!kPlain && at == nullptr) return lines.load(b, g * gate + span.u + v * vector, n);
    return V::load(at + (b - span.from) * row + v * vector + g * gate, n);
  }
};

// target[0, n) = what of row b a tensor [S, B, n] has, or zeros where it is absent; zeros in the
// rest of a last vector, which stay zeros.
template <class T, bool kPlain>
FN void start_row(T* target, const Rows& initial, int64_t s, int64_t b, int64_t n) {
  constexpr int kWidth = Vec<T>::kWidth;
  const LinesOf<T, kPlain> from(initial, 0, s);
  for (int64_t u = 0; u < n; u += kWidth) {
    from.load_or_zero(b, u, lanes_at(n, u, kWidth)).store(target + u);
  }
}

// What the forward scans share: the hidden state, its output and its final value. kPlain: all
// tensors are of dtype T.
template <class T, bool kPlain>
struct ForwardScan {
  using V = Vec<T>;
  using Lines = LinesOf<T, kPlain>;
  static constexpr bool kBackward = false;
  static constexpr int kWidth = V::kWidth;
  const Layer& layer;
  Rows h0, y, h_n;  // [S, B, P] [T, B, S, P] [S, B, P]
  State<T> h;       // [S, B, P] alternating: h entering the step, zeroed where a segment starts
  Input input;
  bool past = false;  // the tape goes past the caches
  int phases = 1;
  Phase<T> phase[2];

  ForwardScan(Workspace<T>& memory, const Layer& l, const Input& input_, const Rows& h0_,
              const Rows& y_, const Rows& h_n_)
      : layer(l), h0(h0_), y(y_), h_n(h_n_), h(memory, l, l.out, true), input(input_) {}

  // The first phase, of all gates: W_hh, and W_ih where the scan projects its input.
  Phase<T> first_phase(Workspace<T>& memory, const Rows& w_hh, int gates) const {
    const auto panels = [&](const Rows& w, int64_t depth, auto beside) {
      return Panels<T>(memory, layer, w, 0, gates, layer.hidden, depth, layer.hidden * w.row, w.row,
                       1, beside);
    };
    Phase<T> found{panels(w_hh, layer.out, Panels<T>::kState), {}, h, true};
    if (input.size > 0) {
      found.projection = panels(input.w_ih, input.size, Panels<T>::kInput);
    }
    return found;
  }
  FN const T* input_row(int64_t place, int64_t b) const {
    return static_cast<const T*>(input.x.data) + place * input.x.step + b * input.x.row;
  }
  // Whether vectors multiply an input of another type than theirs.
  FN bool widens() const {
    const Panels<T>& w = phase[0].projection;
    return w.depth() > 0 && w.parts == 0 && input.x.dtype != kNative<T>;
  }
  // to [rows of ld] = rows [from, from + rows) of the input at a place.
  void widen(int64_t place, int64_t from, int64_t rows, T* to, int64_t ld) const {
    const Rows& x = input.x;
    int64_t at = place * x.step + from * x.row;
    by_type<T>(x.dtype, [&](auto type) FN_LAMBDA {
      for (int64_t b = 0; b < rows; ++b, at += x.row, to += ld) {
        for (int64_t k = 0; k < input.size; k += kWidth) {
          const int n = lanes_at(input.size, k, kWidth);
          load_as<type.kValue, T>(x.data, at + k, n).store(to + k);
        }
      }
    });
  }
  FN const Places& places() const { return input.places; }
  // sums [rows][vector of units][gate] += the projection's bias, of units from u on.
  FN void add_bias(int64_t s, int64_t u, int vectors, int64_t rows, T* sums) const {
    if (input.bias.data == nullptr) return;
    const int gates = phase[0].recurrent.weights.gates;
    const LinesOf<T, true> bias(input.bias, 0, s);
    V of[kMaxVectors];
    for (int v = 0; v < vectors * gates; ++v) {
      const int64_t unit = u + v / gates * kWidth;
      of[v] = bias.load(0, v % gates * layer.hidden + unit, lanes_at(layer.hidden, unit, kWidth));
    }
    for (int64_t b = 0; b < rows; ++b) {
      for (int v = 0; v < vectors * gates; ++v, sums += kWidth) (V::load(sums) + of[v]).store(sums);
    }
  }

  FN bool reverse(int64_t s) const { return layer.reverse[s] != 0; }
  template <class M>
  FN M marks(const Step& at) const {
    return forward_marks<M>(layer, input.places, reverse(at.s), at.t);
  }
  // final = a state's values after the step, of `units` in all, for the rows whose last step it is.
  FN void leave(const State<T>& state, int64_t parity, const Rows& final, int64_t units,
                const Step& at, const Span& span) const {
    int64_t last = 0;  // from this row on
    if (at.i + 1 < layer.steps) {
      if (input.places.first == nullptr || reverse(at.s)) return;
      last = input.places.live(at.t + 1, layer.batch);
    }
    for (int64_t b = last > span.from ? last : span.from; b < span.to; ++b) {
      leave_row(state.row(at.s, b, parity), final, units, at.s, b, span.u, span.vectors);
    }
  }
  void leave_row(const T* from, const Rows& final, int64_t units, int64_t s, int64_t b, int64_t u,
                 int64_t vectors) const {
    const Lines to(final, 0, s);
    for (int64_t v = 0; v < vectors; ++v, u += kWidth) {
      to.store(b, u, lanes_at(units, u, kWidth), V::load(from + u));
    }
  }

  // A state's initial value, zero where the first step starts a segment; it is the final one of a
  // row without steps that has no place.
  FN void start_state(T* target, const Rows& initial, const Rows& final, int64_t s, int64_t b,
                      int64_t n) const {
    const int64_t t = reverse(s) ? layer.steps - 1 : 0;
    const bool cut = layer.flags != nullptr &&
                     backward_marks<Marks>(layer, input.places, reverse(s), t).starts(b);
    start_row<T, kPlain>(target, cut ? Rows{} : initial, s, b, n);
    if (b < input.places.live(0, layer.batch)) return;
    leave_row(target, final, n, s, b, 0, (n + kWidth - 1) / kWidth);
  }
  void start(int64_t s, int64_t b) const {
    start_state(h.row(s, b), h0, h_n, s, b, layer.out);
    // Of a row that begins at a later step, be its parity what it may.
    if (input.places.first != nullptr) {
      __builtin_memcpy(h.row(s, b, 1), h.row(s, b), h.ld * sizeof(T));
    }
  }
  void end(int64_t, int64_t) const {}

  // The hidden state, handed from step to step by vectors of n units from u on.
  struct Hidden {
    const T* before;
    T* after;
    int64_t ld;
    Lines y;

    FN Hidden(const ForwardScan& scan, const Step& at)
        : before(scan.h.row(at.s, 0, at.i & 1)),
          after(scan.h.row(at.s, 0, (at.i + 1) & 1)),
          ld(scan.h.ld),
          y(scan.y, at.place, at.s) {}
    FN V previous(int64_t b, int64_t u) const { return V::load(before + b * ld + u); }
    // over: the step was not taken; cut: the next one begins a segment.
    FN void put(int64_t b, int64_t u, int n, bool over, bool cut, V value) const {
      if (over) value = previous(b, u);
      y.store(b, u, n, zero_if(over, value));
      zero_if(cut, value).store(after + b * ld + u);
    }
  };
};

// What the backward scans share. The gradient that reaches the state after a step is `carried`
// (what does not pass the recurrent weights) plus the product of `operand`, the gate gradients of
// the step processed before; both are zero where a segment began there.
template <class T, bool kPlain>
struct BackwardScan {
  using V = Vec<T>;
  using Lines = LinesOf<T, kPlain>;
  static constexpr bool kBackward = true;
  static constexpr int kWidth = V::kWidth;
  const Layer& layer;
  Rows dy, dh_n, dh0;  // [T, B, S, P] [S, B, P] (either may be null), [S, B, P]
  const Places& places_;
  const Gradients<T>* gradients;  // what uses up the gates' gradients, if anything does
  State<T> operand, carried;      // [S, B, G*H] alternating, [S, B, P]
  bool past = false;              // the gates' gradients go past the caches
  int phases = 1;
  Phase<T> phase[2];

  BackwardScan(Workspace<T>& memory, const Layer& l, int64_t depth, const Rows& dy_,
               const Rows& dh_n_, const Rows& dh0_, const Gradients<T>& own)
      : layer(l),
        dy(dy_),
        dh_n(dh_n_),
        dh0(dh0_),
        places_(own.places()),
        gradients(own.chunks() > 0 ? &own : nullptr),
        operand(memory, l, depth, true),
        carried(memory, l, l.out, false) {}

  FN bool reverse(int64_t s) const { return layer.reverse[s] != 0; }
  template <class M>
  FN M marks(const Step& at) const {
    return backward_marks<M>(layer, places_, reverse(at.s), at.t);
  }
  FN const Places& places() const { return places_; }
  void start(int64_t s, int64_t b) const {
    start_row<T, kPlain>(carried.row(s, b), dh_n, s, b, layer.out);
    if (places_.first == nullptr) return;
    // The operand of a row's first step, which need not be the scan's.
    for (int parity = 0; parity < 2; ++parity) {
      __builtin_memset(operand.row(s, b, parity), 0, operand.ld * sizeof(T));
    }
  }
  // Row b of entry s has ended with the i-th step: its operand stays, be the parity what it may.
  void keep_operand(int64_t i, int64_t s, int64_t b) const {
    __builtin_memcpy(operand.row(s, b, i & 1), operand.row(s, b, (i + 1) & 1),
                     operand.ld * sizeof(T));
  }
  void end(int64_t, int64_t) const {}

  // The gradient of the state after a step, by vectors of n units from u on.
  struct Reaching {
    T* rest;
    int64_t ld;
    Lines dy;

    FN Reaching(const BackwardScan& scan, const Step& at)
        : rest(scan.carried.row(at.s, 0)), ld(scan.carried.ld), dy(scan.dy, at.place, at.s) {}
    // All of it; dy counts only where the step was taken (not `over`).
    FN V all(int64_t b, int64_t u, int n, bool over, V product) const {
      const V dh = carried(b, u) + product;
      return over ? dh : dh + dy.load_or_zero(b, u, n);
    }
    FN V carried(int64_t b, int64_t u) const { return V::load(rest + b * ld + u); }
    FN void carry(int64_t b, int64_t u, V value) const { value.store(rest + b * ld + u); }
  };
  // Where the gates' gradients of a step go: into a tensor, or where they are kept.
  FN Lines leaving(const Rows& rows, const Step& at, bool inner = false) const {
    const Kept& kept = at.kept;
    if (kept.data == nullptr) return Lines(rows, at.place, at.s);
    return Lines(Rows{kept.data, kNative<T>, 1, kept.row, 0}, kept.at + (inner ? kept.inner : 0),
                 0);
  }
  // The gate gradients that the next step multiplies: rows of [G*H], operand.ld apart.
  FN T* next_operand(const Step& at) const { return operand.row(at.s, 0, (at.i + 1) & 1); }
  void finish(int64_t s, int64_t b, int64_t u, int vectors, const T* sums) const {
    const Lines to(dh0, 0, s);
    for (int v = 0; v < vectors; ++v, u += kWidth, sums += kWidth) {
      const V carry = V::load(carried.row(s, b) + u);
      to.store(b, u, lanes_at(layer.out, u, kWidth), carry + V::load(sums));
    }
  }
  // The step whose state entered step t, or -1 where that was the initial state.
  FN int64_t step_before(int64_t t, int64_t s) const {
    if (!reverse(s)) return t - 1;
    return t + 1 < layer.steps ? t + 1 : -1;
  }
  // The state that entered a step: another step's, the initial one, or none (zero).
  template <class M>
  struct Entering {
    Lines states, initial;
    int64_t others;  // rows that had the step before
    bool may_end;
    M marks, before;  // of the step; of the one before, where a row may have ended

    FN Entering(const BackwardScan& scan, const Rows& states_, const Rows& initial_, const Step& at)
        : Entering(scan, states_, initial_, at, scan.step_before(at.t, at.s)) {}
    FN V load(int64_t b, int64_t u, int n) const {
      if (marks.starts(b)) return V(T(0));
      const bool start = b >= others || (may_end && before.ended(b));
      return start ? initial.load_or_zero(b, u, n) : states.load_or_zero(b, u, n);
    }

   private:
    FN Entering(const BackwardScan& scan, const Rows& states_, const Rows& initial_, const Step& at,
                int64_t t)
        : states(states_, t < 0 ? 0 : scan.places_.at(t), at.s),
          initial(initial_, 0, at.s),
          others(t < 0 ? 0 : scan.places_.live(t, scan.layer.batch)),
          may_end(scan.reverse(at.s)),
          marks(scan.template marks<M>(at)),
          before(scan.layer, scan.places_, t < 0 ? at.t : t, -1) {}
  };
};
