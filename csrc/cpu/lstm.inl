// The LSTM's scans, with and without projection.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

template <class T, bool kPlain>
struct LstmForwardScan : ForwardScan<T, kPlain> {
  using Base = ForwardScan<T, kPlain>;
  using Base::kWidth, Base::layer;
  using typename Base::V, typename Base::Lines, typename Base::Hidden;
  const LstmForward& p;
  bool projected;
  State<T> c, m;  // [S, B, H]: the cell state; o * tanh(c), the operand of the projection

  LstmForwardScan(Workspace<T>& memory, const LstmForward& q, const Input& input)
      : Base(memory, q.layer, input, q.h0, q.y, q.h_n),
        p(q),
        projected(q.w_hr.data != nullptr),
        c(memory, q.layer, q.layer.hidden, false) {
    const int64_t hidden = layer.hidden, out = layer.out;
    this->past = goes_past<T>(layer, this->places(), 5);
    this->phase[0] = this->first_phase(memory, p.w_hh, 4);
    if (projected) {
      this->phases = 2;
      m = State<T>(memory, layer, hidden, false);
      const Panels<T> w(memory, layer, p.w_hr, 0, 1, out, hidden, 0, p.w_hr.row, 1);
      this->phase[1] = Phase<T>{w, {}, m, false};
    }
  }

  void start(int64_t s, int64_t b) const {
    Base::start(s, b);
    this->start_state(c.row(s, b), p.c0, p.c_n, s, b, layer.hidden);
  }
  FN void ahead(int number, const Step& at, int64_t b, int64_t u, int64_t units) const {
    if (number != 0) return;
    ask_for(p.gates_x, at.place, b, at.s, u, units, 4, layer.hidden);
    if (p.gates.data == nullptr) return;
    ask_to_write(p.gates, at.place, b, at.s, u, units, 4, layer.hidden);
    ask_to_write(p.cells, at.place, b, at.s, u, units, 1, layer.hidden);
    if (!projected) ask_to_write(this->y, at.place, b, at.s, u, units, 1, layer.hidden);
  }

  template <class M>
  void rows(int number, const Step& at, const Span& span, T* sums, const T* projected_x) const {
    if (number == 0) return gates<M>(at, span, sums, projected_x);
    const auto marks = this->template marks<M>(at);
    const Hidden hidden(*this, at);
    span.each<T, 1>(layer.out, sums, [&](int64_t b, int64_t u, int n, T* own, int) FN_LAMBDA {
      const bool over = marks.ended(b);
      hidden.put(b, u, n, over, !over && marks.starts(b), V::load(own));
    });
    this->leave(this->h, (at.i + 1) & 1, p.h_n, layer.out, at, span);
  }

  template <class M>
  FN void gates(const Step& at, const Span& span, T* sums, const T* projected_x) const {
    const int64_t size = layer.hidden, ld = c.ld;
    const bool past = this->past;
    const V zero(T(0));
    const auto marks = this->template marks<M>(at);
    const Hidden hidden(*this, at);
    const GatesX<T, kPlain> x(p.gates_x, at, span, size, projected_x, 4);
    const Lines cells(p.cells, at.place, at.s), tape(p.gates, at.place, at.s);
    T* cell = c.row(at.s, 0);
    T* operand = projected ? m.row(at.s, 0) : nullptr;
    // First the gates and cell states, of which o and c replace the sums, then the hidden states:
    // so exponentials of many rows stand in line, not those of one row one after another.
    span.each<T, 4>(size, sums, [&](int64_t b, int64_t u, int n, T* own, int v) FN_LAMBDA {
      const bool over = marks.ended(b), cut = !over && marks.starts(b);
      math::LstmCell<V> out{zero, zero, zero, zero, zero};
      if (!over) {
        const V state = V::load(cell + b * ld + u);
        const auto a = [&](int g)
                           FN_LAMBDA { return x.load(b, v, g, n) + V::load(own + g * kWidth); };
        out = math::lstm_cell(a(0), a(1), a(2), a(3), state);
        zero_if(cut, out.c).store(cell + b * ld + u);
      }
      if (cells) cells.store(b, u, n, out.c, past);
      if (tape) {
        tape.store(b, u, n, out.i, past);
        tape.store(b, size + u, n, out.f, past);
        tape.store(b, 2 * size + u, n, out.g, past);
        tape.store(b, 3 * size + u, n, out.o, past);
      }
      out.o.store(own);
      out.c.store(own + kWidth);
    });
    span.each<T, 4>(size, sums, [&](int64_t b, int64_t u, int n, T* own, int) FN_LAMBDA {
      const bool over = marks.ended(b), cut = !over && marks.starts(b);
      const V value = math::lstm_hidden(V::load(own), V::load(own + kWidth));
      operand != nullptr ? value.store(operand + b * m.ld + u)
                         : hidden.put(b, u, n, over, cut, value);
    });
    this->leave(c, 0, p.c_n, size, at, span);
    if (!projected) this->leave(this->h, (at.i + 1) & 1, p.h_n, size, at, span);
  }
};

template <class T, bool kPlain>
struct LstmBackwardScan : BackwardScan<T, kPlain> {
  using Base = BackwardScan<T, kPlain>;
  using Base::kWidth, Base::layer;
  using typename Base::V, typename Base::Lines, typename Base::Reaching;
  const LstmBackward& p;
  bool projected;
  State<T> dc, dh;  // [S, B, H] what reaches c; [S, B, P] of the projected state, the operand of dm

  LstmBackwardScan(Workspace<T>& memory, const LstmBackward& q, const Gradients<T>& own)
      : Base(memory, q.layer, 4 * q.layer.hidden, q.dy, q.dh_n, q.dh0, own),
        p(q),
        projected(q.w_hr.data != nullptr),
        dc(memory, q.layer, q.layer.hidden, false) {
    const int64_t hidden = layer.hidden, out = layer.out;
    this->past = this->gradients == nullptr && goes_past<T>(layer, this->places(), 4);
    const Panels<T> w(memory, layer, p.w_hh, 0, 1, out, 4 * hidden, 0, 1, p.w_hh.row);
    this->phase[0] = Phase<T>{w, {}, this->operand, true};
    if (projected) {
      this->phases = 2;
      dh = State<T>(memory, layer, out, false);
      const Panels<T> own(memory, layer, p.w_hr, 0, 1, hidden, out, 0, 1, p.w_hr.row);
      this->phase[1] = Phase<T>{own, {}, dh, false};
    }
  }

  void start(int64_t s, int64_t b) const {
    Base::start(s, b);
    start_row<T, kPlain>(dc.row(s, b), p.dc_n, s, b, layer.hidden);
  }
  FN void ahead(int number, const Step& at, int64_t b, int64_t u, int64_t units) const {
    if (number == 0) ask_for(p.dy, at.place, b, at.s, u, units, 1, 0);
    if (projected && number == 0) return;
    ask_for(p.gates, at.place, b, at.s, u, units, 4, layer.hidden);
    ask_for(p.cells, at.place, b, at.s, u, units, 1, 0);
    const int64_t before = this->step_before(at.t, at.s);
    if (before >= 0) ask_for(p.cells, this->places_.at(before), b, at.s, u, units, 1, 0);
    ask_for(p.dcells, at.place, b, at.s, u, units, 1, 0);
  }
  void end(int64_t s, int64_t b) const {
    const T* from = dc.row(s, b);
    const Lines to(p.dc0, 0, s);
    for (int64_t u = 0; u < layer.hidden; u += kWidth) {
      to.store(b, u, lanes_at(layer.hidden, u, kWidth), V::load(from + u));
    }
  }

  template <class M>
  void rows(int number, const Step& at, const Span& span, T* sums, const T*) const {
    if (number == 1) {
      return gates<M>(at, span, sums,
                      [](int64_t, int64_t, int, bool, V product) FN_LAMBDA { return product; });
    }
    const Reaching reaching(*this, at);
    const auto reached = [&](int64_t b, int64_t u, int n, bool over, V product) FN_LAMBDA {
      const V all = reaching.all(b, u, n, over, product);
      reaching.carry(b, u, zero_if(!over, all));
      return all;
    };
    if (!projected) return gates<M>(at, span, sums, reached);
    const auto marks = this->template marks<M>(at);
    const Lines out(p.dh, at.place, at.s);
    T* operand = dh.row(at.s, 0);
    span.each<T, 1>(layer.out, sums, [&](int64_t b, int64_t u, int n, T* own, int) FN_LAMBDA {
      const bool over = marks.ended(b);
      const V all = reached(b, u, n, over, V::load(own));
      all.store(operand + b * dh.ld + u);
      out.store(b, u, n, zero_if(over, all));
    });
  }

  // dm(b, u, n, over, product): the gradient of o * tanh(c).
  template <class M, class Gradient>
  FN void gates(const Step& at, const Span& span, T* sums, const Gradient& dm) const {
    const int64_t size = layer.hidden, ld = dc.ld, operand_ld = this->operand.ld;
    const bool past = this->past;
    const V zero(T(0));
    const auto marks = this->template marks<M>(at);
    const Lines tape(p.gates, at.place, at.s), cells(p.cells, at.place, at.s);
    const Lines dcells(p.dcells, at.place, at.s), dgates = this->leaving(p.dgates, at);
    const typename Base::template Entering<M> entering(*this, p.cells, p.c0, at);
    T *carried = dc.row(at.s, 0), *operand = this->next_operand(at);
    span.each<T, 1>(size, sums, [&](int64_t b, int64_t u, int n, T* own, int) FN_LAMBDA {
      const bool over = marks.ended(b);
      const V dh = dm(b, u, n, over, V::load(own));
      math::LstmGrad<V> d{zero, zero, zero, zero, zero};
      bool cut = false;
      if (!over) {
        const V sum = V::load(carried + b * ld + u) + dcells.load_or_zero(b, u, n);
        d = math::lstm_backward(tape.load(b, u, n), tape.load(b, size + u, n),
                                tape.load(b, 2 * size + u, n), tape.load(b, 3 * size + u, n),
                                cells.load(b, u, n), entering.load(b, u, n), dh, sum);
        cut = marks.starts(b);
        zero_if(cut, d.dc_prev).store(carried + b * ld + u);
      }
      const V parts[4] = {d.di, d.df, d.dg, d.d_o};
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        dgates.store(b, g * size + u, n, parts[g], past);
        zero_if(cut, parts[g]).store(operand + b * operand_ld + g * size + u, n);
      }
    });
  }
};

template <class T>
void run_lstm_forward(const LstmForward& p, const Input& input) {
  Workspace<T> memory;
  if (all_plain<T>(p.gates_x, p.h0, p.c0, p.y, p.h_n, p.c_n, p.cells, p.gates)) {
    return run_scan<T>(LstmForwardScan<T, true>(memory, p, input));
  }
  run_scan<T>(LstmForwardScan<T, false>(memory, p, input));
}
template <class T>
void run_lstm_backward(const LstmBackward& p, const LayerGradients& own) {
  Workspace<T> memory;
  const Gradients<T> made(memory, p.layer, own, 4, false);
  if (all_plain<T>(p.dy, p.dh_n, p.dc_n, p.dcells, p.c0, p.cells, p.gates, p.dgates, p.dh0, p.dc0,
                   p.dh)) {
    return run_scan<T>(LstmBackwardScan<T, true>(memory, p, made));
  }
  run_scan<T>(LstmBackwardScan<T, false>(memory, p, made));
}
