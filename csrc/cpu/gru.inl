// The GRU's scans, with the reset gate after or before the recurrent product.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

template <class T>
struct GruForwardScan : ForwardScan<T> {
  using Base = ForwardScan<T>;
  using Base::kWidth, Base::layer, Base::h;
  using typename Base::V;
  const GruForward& p;
  State<T> rh, z;  // reset before: [S, B, H] r * h, the operand of W_hn; z, for the second phase

  GruForwardScan(Workspace<T>& memory, const GruForward& q)
      : Base(memory, q.layer, q.h0, q.y, q.h_n), p(q) {
    const int64_t hidden = layer.hidden, row = p.w_hh.row;
    this->phase[0] = Phase<T>(memory, layer, p.w_hh, 0, p.reset_after ? 3 : 2, hidden, hidden,
                              hidden * row, row, 1, h, true);
    if (!p.reset_after) {
      this->phases = 2;
      rh = State<T>(memory, layer, hidden, false);
      z = State<T>(memory, layer, hidden, false);
      this->phase[1] = Phase<T>(memory, layer, p.w_hh, 2 * hidden * row, 1, hidden, hidden, 0, row,
                                1, rh, false);
    }
  }

  void rows(int number, int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int vectors,
            const T* sums) const {
    const bool over = ended(layer, t, b), cut = !over && this->cut_after(t, s, b);
    for (int v = 0; v < vectors; ++v, u += kWidth) {
      const int n = lanes_at(layer.hidden, u, kWidth);
      if (p.reset_after) {
        after(i, t, s, b, u, n, over, cut, sums + v * 3 * kWidth);
      } else if (number == 0) {
        before(i, t, s, b, u, n, over, sums + v * 2 * kWidth);
      } else {
        candidate(i, t, s, b, u, n, over, cut, sums + v * kWidth);
      }
    }
  }

  FN void ahead(int number, int64_t t, int64_t s, int64_t b, int64_t u, int64_t units) const {
    if (number == 0) ask_for(p.gates_x, t, b, s, u, units, 3, layer.hidden);
  }

  FN void keep(int64_t t, int64_t s, int64_t b, int64_t u, int n, int gate, V value) const {
    if (p.gates.data == nullptr) return;
    Row(p.gates, t, b, s).template store<T>(gate * layer.hidden + u, n, value);
  }

  FN void after(int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int n, bool over, bool cut,
                const T* sums) const {
    const int64_t hidden = layer.hidden;
    const V zero(T(0));
    math::GruOut<V> out{zero, zero, zero, zero};
    V hn = zero;
    if (!over) {
      const Row x(p.gates_x, t, b, s);
      hn = V::load(sums + 2 * kWidth) + Row(p.b_hn, 0, 0, s).template load_or_zero<T>(u, n);
      out = math::gru_after_forward(x.template load<T>(u, n) + V::load(sums),
                                    x.template load<T>(hidden + u, n) + V::load(sums + kWidth),
                                    x.template load<T>(2 * hidden + u, n), hn,
                                    this->h_prev(i, s, b, u, n));
    }
    keep(t, s, b, u, n, 0, out.r);
    keep(t, s, b, u, n, 1, out.z);
    keep(t, s, b, u, n, 2, out.n);
    keep(t, s, b, u, n, 3, hn);
    this->put_h(i, t, s, b, u, n, over, cut, out.h);
  }

  FN void before(int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int n, bool over,
                 const T* sums) const {
    const V zero(T(0));
    math::GruBeforeGates<V> out{zero, zero, zero};
    if (!over) {
      const Row x(p.gates_x, t, b, s);
      out = math::gru_before_gates(x.template load<T>(u, n) + V::load(sums),
                                   x.template load<T>(layer.hidden + u, n) + V::load(sums + kWidth),
                                   this->h_prev(i, s, b, u, n));
    }
    keep(t, s, b, u, n, 0, out.r);
    keep(t, s, b, u, n, 1, out.z);
    out.rh.store(rh.row(s, b) + u, n);
    out.z.store(z.row(s, b) + u, n);
  }

  FN void candidate(int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int n, bool over,
                    bool cut, const T* sums) const {
    const V zero(T(0));
    math::GruBeforeCandidate<V> out{zero, zero};
    if (!over) {
      const V x = Row(p.gates_x, t, b, s).template load<T>(2 * layer.hidden + u, n);
      out = math::gru_before_candidate(x + V::load(sums), V::load(z.row(s, b) + u, n),
                                       this->h_prev(i, s, b, u, n));
    }
    keep(t, s, b, u, n, 2, out.n);
    this->put_h(i, t, s, b, u, n, over, cut, out.h);
  }
};

template <class T>
struct GruBackwardScan : BackwardScan<T> {
  using Base = BackwardScan<T>;
  using Base::kWidth, Base::layer;
  using typename Base::V;
  const GruBackward& p;
  State<T> dn;  // reset before: [S, B, H], the operand of d(r * h)

  // The operand of the recurrence is (dr, dz, dhn), or (dr, dz) for reset before.
  GruBackwardScan(Workspace<T>& memory, const GruBackward& q)
      : Base(memory, q.layer, (q.reset_after ? 3 : 2) * q.layer.hidden, q.dy, q.dh_n, q.dh0), p(q) {
    const int64_t hidden = layer.hidden, row = p.w_hh.row;
    this->phase[0] = Phase<T>(memory, layer, p.w_hh, 0, 1, hidden, (p.reset_after ? 3 : 2) * hidden,
                              0, 1, row, this->operand, true);
    if (!p.reset_after) {
      this->phases = 2;
      dn = State<T>(memory, layer, hidden, false);
      this->phase[1] = Phase<T>(memory, layer, p.w_hh, 2 * hidden * row, 1, hidden, hidden, 0, 1,
                                row, dn, false);
    }
  }

  void rows(int number, int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int vectors,
            const T* sums) const {
    const bool over = ended(layer, t, b), cut = !over && was_reset(layer, this->reverse(s), t, b);
    for (int v = 0; v < vectors; ++v, u += kWidth, sums += kWidth) {
      const int n = lanes_at(layer.hidden, u, kWidth);
      if (number == 1) {
        reset_gate(i, t, s, b, u, n, over, cut, V::load(sums));
        continue;
      }
      const V dh = this->gradient(t, s, b, u, n, over, V::load(sums));
      p.reset_after ? after(i, t, s, b, u, n, over, cut, dh)
                    : before(i, t, s, b, u, n, over, cut, dh);
    }
  }

  FN void ahead(int number, int64_t t, int64_t s, int64_t b, int64_t u, int64_t units) const {
    if (number != 0) return;
    ask_for(p.dy, t, b, s, u, units, 1, 0);
    ask_for(p.gates, t, b, s, u, units, p.reset_after ? 4 : 3, layer.hidden);
    ask_for(p.y, this->step_before(t, s), b, s, u, units, 1, 0);
  }

  FN V gate(int64_t t, int64_t s, int64_t b, int64_t u, int n, int number) const {
    return Row(p.gates, t, b, s).template load<T>(number * layer.hidden + u, n);
  }
  FN V h_prev(int64_t t, int64_t s, int64_t b, int64_t u, int n) const {
    return this->entering(p.y, p.h0, t, s, b).template load_or_zero<T>(u, n);
  }

  FN void after(int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int n, bool over, bool cut,
                V dh) const {
    const int64_t hidden = layer.hidden;
    const V zero(T(0));
    math::GruAfterGrad<V> d{zero, zero, zero, zero, dh};
    if (!over) {
      d = math::gru_after_backward(gate(t, s, b, u, n, 0), gate(t, s, b, u, n, 1),
                                   gate(t, s, b, u, n, 2), gate(t, s, b, u, n, 3),
                                   h_prev(t, s, b, u, n), dh);
    }
    const Row dgates(p.dgates, t, b, s);
    dgates.template store<T>(u, n, d.dr);
    dgates.template store<T>(hidden + u, n, d.dz);
    dgates.template store<T>(2 * hidden + u, n, d.dn);
    Row(p.dgates_hn, t, b, s).template store<T>(u, n, d.dhn);
    T* next = this->next_operand(i, s, b) + u;
    (cut ? zero : d.dr).store(next, n);
    (cut ? zero : d.dz).store(next + hidden, n);
    (cut ? zero : d.dhn).store(next + 2 * hidden, n);
    this->carry(s, b, u, n, cut ? zero : d.dh_prev);
  }

  FN void before(int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int n, bool over, bool cut,
                 V dh) const {
    const int64_t hidden = layer.hidden;
    const V zero(T(0));
    math::GruBeforeGrad<V> d{zero, zero, dh};
    if (!over) {
      d = math::gru_before_backward(gate(t, s, b, u, n, 1), gate(t, s, b, u, n, 2),
                                    h_prev(t, s, b, u, n), dh);
    }
    const Row dgates(p.dgates, t, b, s);
    dgates.template store<T>(hidden + u, n, d.dz);
    dgates.template store<T>(2 * hidden + u, n, d.dn);
    d.dn.store(dn.row(s, b) + u, n);
    (cut ? zero : d.dz).store(this->next_operand(i, s, b) + hidden + u, n);
    this->carry(s, b, u, n, cut ? zero : d.dh_prev);
  }

  FN void reset_gate(int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int n, bool over,
                     bool cut, V drh) const {
    const V zero(T(0));
    math::GruResetGrad<V> d{zero, zero};
    if (!over) {
      d = math::gru_before_reset_backward(gate(t, s, b, u, n, 0), h_prev(t, s, b, u, n), drh,
                                          V::load(this->carried.row(s, b) + u, n));
      this->carry(s, b, u, n, cut ? zero : d.dh_prev);
    }
    Row(p.dgates, t, b, s).template store<T>(u, n, d.dr);
    (cut ? zero : d.dr).store(this->next_operand(i, s, b) + u, n);
  }
};

template <class T>
void run_gru_forward(const GruForward& p) {
  Workspace<T> memory;
  run_scan<T>(GruForwardScan<T>(memory, p));
}
template <class T>
void run_gru_backward(const GruBackward& p) {
  Workspace<T> memory;
  run_scan<T>(GruBackwardScan<T>(memory, p));
}
