// The LSTM's scans, with and without projection.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

template <class T>
struct LstmForwardScan : ForwardScan<T> {
  using Base = ForwardScan<T>;
  using Base::kWidth, Base::layer, Base::h;
  using typename Base::V;
  const LstmForward& p;
  bool projected;
  State<T> c, m;  // [S, B, H]: the cell state; o * tanh(c), the operand of the projection

  LstmForwardScan(Workspace<T>& memory, const LstmForward& q)
      : Base(memory, q.layer, q.h0, q.y, q.h_n),
        p(q),
        projected(q.w_hr.data != nullptr),
        c(memory, q.layer, q.layer.hidden, false) {
    const int64_t hidden = layer.hidden, out = layer.out;
    this->phase[0] = Phase<T>(memory, layer, p.w_hh, 0, 4, hidden, out, hidden * p.w_hh.row,
                              p.w_hh.row, 1, h, true);
    if (projected) {
      this->phases = 2;
      m = State<T>(memory, layer, hidden, false);
      this->phase[1] =
          Phase<T>(memory, layer, p.w_hr, 0, 1, out, hidden, 0, p.w_hr.row, 1, m, false);
    }
  }

  void start(int64_t s, int64_t b) const {
    Base::start(s, b);
    this->start_state(c.row(s, b), p.c0, s, b, layer.hidden);
  }
  FN void ahead(int number, int64_t t, int64_t s, int64_t b, int64_t u, int64_t units) const {
    if (number == 0) ask_for(p.gates_x, t, b, s, u, units, 4, layer.hidden);
  }

  void rows(int number, int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int vectors,
            const T* sums) const {
    const bool over = ended(layer, t, b), cut = !over && this->cut_after(t, s, b);
    for (int v = 0; v < vectors; ++v, u += kWidth) {
      if (number == 1) {
        const int n = lanes_at(layer.out, u, kWidth);
        this->put_h(i, t, s, b, u, n, over, cut, V::load(sums + v * kWidth));
      } else {
        gates(i, t, s, b, u, over, cut, sums + v * 4 * kWidth);
      }
    }
  }

  FN void gates(int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, bool over, bool cut,
                const T* sums) const {
    const int64_t hidden = layer.hidden;
    const int n = lanes_at(hidden, u, kWidth);
    const V zero(T(0));
    T* cell = c.row(s, b) + u;
    math::LstmOut<V> out{zero, zero, zero, zero, zero, zero};
    V state = V::load(cell, n);
    if (!over) {
      const Row x(p.gates_x, t, b, s);
      const auto a = [&](int g) FN_LAMBDA {
        return x.template load<T>(g * hidden + u, n) + V::load(sums + g * kWidth);
      };
      out = math::lstm_forward(a(0), a(1), a(2), a(3), state);
      state = out.c;
      (cut ? zero : state).store(cell, n);
    }
    if (this->last(i)) Row(p.c_n, 0, b, s).template store<T>(u, n, state);
    if (p.cells.data != nullptr) Row(p.cells, t, b, s).template store<T>(u, n, out.c);
    if (p.gates.data != nullptr) {
      const Row tape(p.gates, t, b, s);
      tape.template store<T>(u, n, out.i);
      tape.template store<T>(hidden + u, n, out.f);
      tape.template store<T>(2 * hidden + u, n, out.g);
      tape.template store<T>(3 * hidden + u, n, out.o);
    }
    if (projected) {
      out.h.store(m.row(s, b) + u, n);
    } else {
      this->put_h(i, t, s, b, u, n, over, cut, out.h);
    }
  }
};

template <class T>
struct LstmBackwardScan : BackwardScan<T> {
  using Base = BackwardScan<T>;
  using Base::kWidth, Base::layer;
  using typename Base::V;
  const LstmBackward& p;
  bool projected;
  State<T> dc, dh;  // [S, B, H] what reaches c; [S, B, P] of the projected state, the operand of dm

  LstmBackwardScan(Workspace<T>& memory, const LstmBackward& q)
      : Base(memory, q.layer, 4 * q.layer.hidden, q.dy, q.dh_n, q.dh0),
        p(q),
        projected(q.w_hr.data != nullptr),
        dc(memory, q.layer, q.layer.hidden, false) {
    const int64_t hidden = layer.hidden, out = layer.out;
    this->phase[0] = Phase<T>(memory, layer, p.w_hh, 0, 1, out, 4 * hidden, 0, 1, p.w_hh.row,
                              this->operand, true);
    if (projected) {
      this->phases = 2;
      dh = State<T>(memory, layer, out, false);
      this->phase[1] =
          Phase<T>(memory, layer, p.w_hr, 0, 1, hidden, out, 0, 1, p.w_hr.row, dh, false);
    }
  }

  void start(int64_t s, int64_t b) const {
    Base::start(s, b);
    this->start_state(dc.row(s, b), p.dc_n, s, b, layer.hidden);
  }
  FN void ahead(int number, int64_t t, int64_t s, int64_t b, int64_t u, int64_t units) const {
    if (number == 0) ask_for(p.dy, t, b, s, u, units, 1, 0);
    if (projected && number == 0) return;
    ask_for(p.gates, t, b, s, u, units, 4, layer.hidden);
    ask_for(p.cells, t, b, s, u, units, 1, 0);
    ask_for(p.cells, this->step_before(t, s), b, s, u, units, 1, 0);
    ask_for(p.dcells, t, b, s, u, units, 1, 0);
  }
  void end(int64_t s, int64_t b) const {
    const T* from = dc.row(s, b);
    for (int64_t u = 0; u < layer.hidden; u += kWidth) {
      const int n = lanes_at(layer.hidden, u, kWidth);
      Row(p.dc0, 0, b, s).template store<T>(u, n, V::load(from + u, n));
    }
  }

  void rows(int number, int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int vectors,
            const T* sums) const {
    const bool over = ended(layer, t, b);
    const V zero(T(0));
    for (int v = 0; v < vectors; ++v, u += kWidth, sums += kWidth) {
      const V product = V::load(sums);
      if (number == 1) {
        gates(i, t, s, b, u, lanes_at(layer.hidden, u, kWidth), over, product);
        continue;
      }
      const int n = lanes_at(layer.out, u, kWidth);
      const V reached = this->gradient(t, s, b, u, n, over, product);
      this->carry(s, b, u, n, over ? reached : zero);
      if (projected) {
        reached.store(dh.row(s, b) + u, n);
        Row(p.dh, t, b, s).template store<T>(u, n, over ? zero : reached);
      } else {
        gates(i, t, s, b, u, n, over, reached);
      }
    }
  }

  FN void gates(int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int n, bool over,
                V dm) const {
    const int64_t hidden = layer.hidden;
    const V zero(T(0));
    math::LstmGrad<V> d{zero, zero, zero, zero, zero};
    bool cut = false;
    if (!over) {
      const Row tape(p.gates, t, b, s);
      T* reached = dc.row(s, b) + u;
      const V sum = V::load(reached, n) + Row(p.dcells, t, b, s).template load_or_zero<T>(u, n);
      d = math::lstm_backward(
          tape.template load<T>(u, n), tape.template load<T>(hidden + u, n),
          tape.template load<T>(2 * hidden + u, n), tape.template load<T>(3 * hidden + u, n),
          Row(p.cells, t, b, s).template load<T>(u, n),
          this->entering(p.cells, p.c0, t, s, b).template load_or_zero<T>(u, n), dm, sum);
      cut = was_reset(layer, this->reverse(s), t, b);
      (cut ? zero : d.dc_prev).store(reached, n);
    }
    const Row dgates(p.dgates, t, b, s);
    T* next = this->next_operand(i, s, b) + u;
    const V parts[4] = {d.di, d.df, d.dg, d.d_o};
    for (int g = 0; g < 4; ++g) {
      dgates.template store<T>(g * hidden + u, n, parts[g]);
      (cut ? zero : parts[g]).store(next + g * hidden, n);
    }
  }
};

template <class T>
void run_lstm_forward(const LstmForward& p) {
  Workspace<T> memory;
  run_scan<T>(LstmForwardScan<T>(memory, p));
}
template <class T>
void run_lstm_backward(const LstmBackward& p) {
  Workspace<T> memory;
  run_scan<T>(LstmBackwardScan<T>(memory, p));
}
