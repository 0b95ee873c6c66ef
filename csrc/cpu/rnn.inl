// The simple RNN's scans.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

template <class T, bool kPlain>
struct RnnForwardScan : ForwardScan<T, kPlain> {
  using Base = ForwardScan<T, kPlain>;
  using Base::layer;
  using typename Base::V, typename Base::Lines, typename Base::Hidden;
  const RnnForward& p;

  RnnForwardScan(Workspace<T>& memory, const RnnForward& q, const Input& input)
      : Base(memory, q.layer, input, q.h0, q.y, q.h_n), p(q) {
    this->phase[0] = this->first_phase(memory, p.w_hh, 1);
  }

  FN void ahead(int, const Step& at, int64_t b, int64_t u, int64_t units) const {
    ask_for(p.gates_x, at.place, b, at.s, u, units, 1, 0);
  }

  template <class M>
  void rows(int, const Step& at, const Span& span, T* sums, const T* projected) const {
    const bool relu = p.relu;
    const auto marks = this->template marks<M>(at);
    const Hidden hidden(*this, at);
    const GatesX<T, kPlain> x(p.gates_x, at, span, layer.hidden, projected, 1);
    span.each<T, 1>(layer.hidden, sums, [&](int64_t b, int64_t u, int n, T* own, int v) FN_LAMBDA {
      const bool over = marks.ended(b), cut = !over && marks.starts(b);
      V value(T(0));
      if (!over) {
        value = math::rnn_forward(x.load(b, v, 0, n) + V::load(own), relu);
      }
      hidden.put(b, u, n, over, cut, value);
    });
    this->leave(this->h, (at.i + 1) & 1, p.h_n, layer.hidden, at, span);
  }
};

template <class T, bool kPlain>
struct RnnBackwardScan : BackwardScan<T, kPlain> {
  using Base = BackwardScan<T, kPlain>;
  using Base::layer;
  using typename Base::V, typename Base::Lines, typename Base::Reaching;
  const RnnBackward& p;

  RnnBackwardScan(Workspace<T>& memory, const RnnBackward& q, const Gradients<T>& own)
      : Base(memory, q.layer, q.layer.hidden, q.dy, q.dh_n, q.dh0, own), p(q) {
    const int64_t hidden = layer.hidden;
    const Panels<T> w(memory, layer, p.w_hh, 0, 1, hidden, hidden, 0, 1, p.w_hh.row);
    this->phase[0] = Phase<T>{w, {}, this->operand, true};
  }

  FN void ahead(int, const Step& at, int64_t b, int64_t u, int64_t units) const {
    ask_for(p.dy, at.place, b, at.s, u, units, 1, 0);
    ask_for(p.y, at.place, b, at.s, u, units, 1, 0);
  }

  template <class M>
  void rows(int, const Step& at, const Span& span, T* sums, const T*) const {
    const int64_t ld = this->operand.ld;
    const bool relu = p.relu;
    const V zero(T(0));
    const auto marks = this->template marks<M>(at);
    const Reaching reaching(*this, at);
    const Lines y(p.y, at.place, at.s), dgates = this->leaving(p.dgates, at);
    T* operand = this->next_operand(at);
    span.each<T, 1>(layer.hidden, sums, [&](int64_t b, int64_t u, int n, T* own, int) FN_LAMBDA {
      const bool over = marks.ended(b), cut = !over && marks.starts(b);
      const V dh = reaching.all(b, u, n, over, V::load(own));
      V da = zero;
      if (!over) da = math::rnn_backward(y.load(b, u, n), dh, relu);
      dgates.store(b, u, n, da);
      zero_if(cut, da).store(operand + b * ld + u, n);
      reaching.carry(b, u, zero_if(!over, dh));
    });
  }
};

template <class T>
void run_rnn_forward(const RnnForward& p, const Input& input) {
  Workspace<T> memory;
  if (all_plain<T>(p.gates_x, p.h0, p.y, p.h_n)) {
    return run_scan<T>(RnnForwardScan<T, true>(memory, p, input));
  }
  run_scan<T>(RnnForwardScan<T, false>(memory, p, input));
}
template <class T>
void run_rnn_backward(const RnnBackward& p, const LayerGradients& own) {
  Workspace<T> memory;
  const Gradients<T> made(memory, p.layer, own, 1, false);
  if (all_plain<T>(p.dy, p.dh_n, p.y, p.dgates, p.dh0)) {
    return run_scan<T>(RnnBackwardScan<T, true>(memory, p, made));
  }
  run_scan<T>(RnnBackwardScan<T, false>(memory, p, made));
}
