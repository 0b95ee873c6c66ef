// The GRU's scans, with the reset gate after or before the recurrent product.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

template <class T, bool kPlain>
struct GruForwardScan : ForwardScan<T, kPlain> {
  using Base = ForwardScan<T, kPlain>;
  using Base::kWidth, Base::layer;
  using typename Base::V, typename Base::Lines, typename Base::Hidden;
  const GruForward& p;
  State<T> rh, z;  // reset before: [S, B, H] r * h, the operand of W_hn; z, for the second phase

  GruForwardScan(Workspace<T>& memory, const GruForward& q, const Input& input)
      : Base(memory, q.layer, input, q.h0, q.y, q.h_n), p(q) {
    this->past = goes_past<T>(layer, this->places(), 4);
    this->phase[0] = this->first_phase(memory, p.w_hh, p.reset_after ? 3 : 2);
    if (!p.reset_after) {
      const int64_t hidden = layer.hidden, row = p.w_hh.row;
      this->phases = 2;
      rh = State<T>(memory, layer, hidden, false);
      z = State<T>(memory, layer, hidden, false);
      const Panels<T> w(memory, layer, p.w_hh, 2 * hidden * row, 1, hidden, hidden, 0, row, 1);
      this->phase[1] = Phase<T>{w, {}, rh, false};
    }
  }

  template <class M>
  void rows(int number, const Step& at, const Span& span, T* sums, const T* projected) const {
    if (p.reset_after) return after<M>(at, span, sums, projected);
    number == 0 ? before<M>(at, span, sums) : candidate<M>(at, span, sums);
  }

  FN void ahead(int number, const Step& at, int64_t b, int64_t u, int64_t units) const {
    if (number == 0) ask_for(p.gates_x, at.place, b, at.s, u, units, 3, layer.hidden);
  }

  template <class M>
  FN void after(const Step& at, const Span& span, T* sums, const T* projected) const {
    const int64_t size = layer.hidden;
    const bool past = this->past;
    const V zero(T(0));
    const auto marks = this->template marks<M>(at);
    const Hidden hidden(*this, at);
    const GatesX<T, kPlain> x(p.gates_x, at, span, size, projected, 3);
    const Lines tape(p.gates, at.place, at.s), bias(p.b_hn, 0, at.s);
    span.each<T, 3>(size, sums, [&](int64_t b, int64_t u, int n, T* own, int v) FN_LAMBDA {
      const bool over = marks.ended(b), cut = !over && marks.starts(b);
      math::GruOut<V> out{zero, zero, zero, zero};
      V hn = zero;
      if (!over) {
        hn = V::load(own + 2 * kWidth) + bias.load_or_zero(0, u, n);
        out = math::gru_after_forward(x.load(b, v, 0, n) + V::load(own),
                                      x.load(b, v, 1, n) + V::load(own + kWidth),
                                      x.load(b, v, 2, n), hn, hidden.previous(b, u));
      }
      if (tape) {
        tape.store(b, u, n, out.r, past);
        tape.store(b, size + u, n, out.z, past);
        tape.store(b, 2 * size + u, n, out.n, past);
        tape.store(b, 3 * size + u, n, hn, past);
      }
      hidden.put(b, u, n, over, cut, out.h);
    });
    this->leave(this->h, (at.i + 1) & 1, p.h_n, size, at, span);
  }

  template <class M>
  FN void before(const Step& at, const Span& span, T* sums) const {
    const int64_t size = layer.hidden;
    const bool past = this->past;
    const V zero(T(0));
    const auto marks = this->template marks<M>(at);
    const Hidden hidden(*this, at);
    const Lines x(p.gates_x, at.place, at.s), tape(p.gates, at.place, at.s);
    T *operand = rh.row(at.s, 0), *kept = z.row(at.s, 0);
    span.each<T, 2>(size, sums, [&](int64_t b, int64_t u, int n, T* own, int) FN_LAMBDA {
      math::GruBeforeGates<V> out{zero, zero, zero};
      if (!marks.ended(b)) {
        out = math::gru_before_gates(x.load(b, u, n) + V::load(own),
                                     x.load(b, size + u, n) + V::load(own + kWidth),
                                     hidden.previous(b, u));
      }
      if (tape) {
        tape.store(b, u, n, out.r, past);
        tape.store(b, size + u, n, out.z, past);
      }
      out.rh.store(operand + b * rh.ld + u);
      out.z.store(kept + b * z.ld + u);
    });
  }

  template <class M>
  FN void candidate(const Step& at, const Span& span, T* sums) const {
    const int64_t size = layer.hidden;
    const bool past = this->past;
    const V zero(T(0));
    const auto marks = this->template marks<M>(at);
    const Hidden hidden(*this, at);
    const Lines x(p.gates_x, at.place, at.s), tape(p.gates, at.place, at.s);
    const T* kept = z.row(at.s, 0);
    span.each<T, 1>(size, sums, [&](int64_t b, int64_t u, int n, T* own, int) FN_LAMBDA {
      const bool over = marks.ended(b), cut = !over && marks.starts(b);
      math::GruBeforeCandidate<V> out{zero, zero};
      if (!over) {
        out = math::gru_before_candidate(x.load(b, 2 * size + u, n) + V::load(own),
                                         V::load(kept + b * z.ld + u), hidden.previous(b, u));
      }
      if (tape) tape.store(b, 2 * size + u, n, out.n, past);
      hidden.put(b, u, n, over, cut, out.h);
    });
    this->leave(this->h, (at.i + 1) & 1, p.h_n, size, at, span);
  }
};

template <class T, bool kPlain>
struct GruBackwardScan : BackwardScan<T, kPlain> {
  using Base = BackwardScan<T, kPlain>;
  using Base::layer;
  using typename Base::V, typename Base::Lines, typename Base::Reaching;
  const GruBackward& p;
  State<T> dn;  // reset before: [S, B, H], the operand of d(r * h)

  // The operand of the recurrence is (dr, dz, dhn), or (dr, dz) for reset before.
  GruBackwardScan(Workspace<T>& memory, const GruBackward& q, const Gradients<T>& own)
      : Base(memory, q.layer, (q.reset_after ? 3 : 2) * q.layer.hidden, q.dy, q.dh_n, q.dh0, own),
        p(q) {
    const int64_t hidden = layer.hidden, row = p.w_hh.row;
    this->past = this->gradients == nullptr && goes_past<T>(layer, this->places(), 4);
    const Panels<T> w(memory, layer, p.w_hh, 0, 1, hidden, (p.reset_after ? 3 : 2) * hidden, 0, 1,
                      row);
    this->phase[0] = Phase<T>{w, {}, this->operand, true};
    if (!p.reset_after) {
      this->phases = 2;
      dn = State<T>(memory, layer, hidden, false);
      const Panels<T> w_n(memory, layer, p.w_hh, 2 * hidden * row, 1, hidden, hidden, 0, 1, row);
      this->phase[1] = Phase<T>{w_n, {}, dn, false};
    }
  }

  template <class M>
  void rows(int number, const Step& at, const Span& span, T* sums, const T*) const {
    if (p.reset_after) return after<M>(at, span, sums);
    number == 0 ? before<M>(at, span, sums) : reset_gate<M>(at, span, sums);
  }

  FN void ahead(int number, const Step& at, int64_t b, int64_t u, int64_t units) const {
    if (number != 0) return;
    ask_for(p.dy, at.place, b, at.s, u, units, 1, 0);
    ask_for(p.gates, at.place, b, at.s, u, units, p.reset_after ? 4 : 3, layer.hidden);
    const int64_t before = this->step_before(at.t, at.s);
    if (before >= 0) ask_for(p.y, this->places_.at(before), b, at.s, u, units, 1, 0);
  }

  template <class M>
  FN void after(const Step& at, const Span& span, T* sums) const {
    const int64_t size = layer.hidden, ld = this->operand.ld;
    const bool past = this->past;
    const V zero(T(0));
    const auto marks = this->template marks<M>(at);
    const Reaching reaching(*this, at);
    const typename Base::template Entering<M> h_prev(*this, p.y, p.h0, at);
    const Lines tape(p.gates, at.place, at.s), dgates = this->leaving(p.dgates, at);
    const Lines dgates_hn = this->leaving(p.dgates_hn, at, true);
    T* operand = this->next_operand(at);
    span.each<T, 1>(size, sums, [&](int64_t b, int64_t u, int n, T* own, int) FN_LAMBDA {
      const bool over = marks.ended(b), cut = !over && marks.starts(b);
      const V dh = reaching.all(b, u, n, over, V::load(own));
      math::GruAfterGrad<V> d{zero, zero, zero, zero, dh};
      if (!over) {
        d = math::gru_after_backward(tape.load(b, u, n), tape.load(b, size + u, n),
                                     tape.load(b, 2 * size + u, n), tape.load(b, 3 * size + u, n),
                                     h_prev.load(b, u, n), dh);
      }
      dgates.store(b, u, n, d.dr, past);
      dgates.store(b, size + u, n, d.dz, past);
      dgates.store(b, 2 * size + u, n, d.dn, past);
      dgates_hn.store(b, u, n, d.dhn, past);
      T* next = operand + b * ld + u;
      zero_if(cut, d.dr).store(next, n);
      zero_if(cut, d.dz).store(next + size, n);
      zero_if(cut, d.dhn).store(next + 2 * size, n);
      reaching.carry(b, u, zero_if(cut, d.dh_prev));
    });
  }

  template <class M>
  FN void before(const Step& at, const Span& span, T* sums) const {
    const int64_t size = layer.hidden, ld = this->operand.ld;
    const bool past = this->past;
    const V zero(T(0));
    const auto marks = this->template marks<M>(at);
    const Reaching reaching(*this, at);
    const typename Base::template Entering<M> h_prev(*this, p.y, p.h0, at);
    const Lines tape(p.gates, at.place, at.s), dgates(p.dgates, at.place, at.s);
    T *operand = this->next_operand(at), *inner = dn.row(at.s, 0);
    span.each<T, 1>(size, sums, [&](int64_t b, int64_t u, int n, T* own, int) FN_LAMBDA {
      const bool over = marks.ended(b), cut = !over && marks.starts(b);
      const V dh = reaching.all(b, u, n, over, V::load(own));
      math::GruBeforeGrad<V> d{zero, zero, dh};
      if (!over) {
        d = math::gru_before_backward(tape.load(b, size + u, n), tape.load(b, 2 * size + u, n),
                                      h_prev.load(b, u, n), dh);
      }
      dgates.store(b, size + u, n, d.dz, past);
      dgates.store(b, 2 * size + u, n, d.dn, past);
      d.dn.store(inner + b * dn.ld + u);
      zero_if(cut, d.dz).store(operand + b * ld + size + u, n);
      reaching.carry(b, u, zero_if(cut, d.dh_prev));
    });
  }

  template <class M>
  FN void reset_gate(const Step& at, const Span& span, T* sums) const {
    const int64_t ld = this->operand.ld;
    const bool past = this->past;
    const V zero(T(0));
    const auto marks = this->template marks<M>(at);
    const Reaching reaching(*this, at);
    const typename Base::template Entering<M> h_prev(*this, p.y, p.h0, at);
    const Lines tape(p.gates, at.place, at.s), dgates(p.dgates, at.place, at.s);
    T* operand = this->next_operand(at);
    span.each<T, 1>(layer.hidden, sums, [&](int64_t b, int64_t u, int n, T* own, int) FN_LAMBDA {
      const bool over = marks.ended(b), cut = !over && marks.starts(b);
      math::GruResetGrad<V> d{zero, zero};
      if (!over) {
        d = math::gru_before_reset_backward(tape.load(b, u, n), h_prev.load(b, u, n), V::load(own),
                                            reaching.carried(b, u));
        reaching.carry(b, u, zero_if(cut, d.dh_prev));
      }
      dgates.store(b, u, n, d.dr, past);
      zero_if(cut, d.dr).store(operand + b * ld + u, n);
    });
  }
};

template <class T>
void run_gru_forward(const GruForward& p, const Input& input) {
  Workspace<T> memory;
  if (all_plain<T>(p.gates_x, p.h0, p.b_hn, p.y, p.h_n, p.gates)) {
    return run_scan<T>(GruForwardScan<T, true>(memory, p, input));
  }
  run_scan<T>(GruForwardScan<T, false>(memory, p, input));
}
template <class T>
void run_gru_backward(const GruBackward& p, const LayerGradients& own) {
  Workspace<T> memory;
  const Gradients<T> made(memory, p.layer, own, 3, true);
  if (all_plain<T>(p.dy, p.dh_n, p.h0, p.y, p.gates, p.dgates, p.dgates_hn, p.dh0)) {
    return run_scan<T>(GruBackwardScan<T, true>(memory, p, made));
  }
  run_scan<T>(GruBackwardScan<T, false>(memory, p, made));
}
