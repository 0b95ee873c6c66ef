// The simple RNN's scans.
// Included inside the instruction set's anonymous namespace; see kernels.inl.

template <class T>
struct RnnForwardScan : ForwardScan<T> {
  using Base = ForwardScan<T>;
  using Base::kWidth, Base::layer;
  using typename Base::V;
  const RnnForward& p;

  RnnForwardScan(Workspace<T>& memory, const RnnForward& q)
      : Base(memory, q.layer, q.h0, q.y, q.h_n), p(q) {
    this->phase[0] = Phase<T>(memory, layer, p.w_hh, 0, 1, layer.hidden, layer.hidden, 0,
                              p.w_hh.row, 1, this->h, true);
  }

  FN void ahead(int, int64_t t, int64_t s, int64_t b, int64_t u, int64_t units) const {
    ask_for(p.gates_x, t, b, s, u, units, 1, 0);
  }

  void rows(int, int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int vectors,
            const T* sums) const {
    const bool over = ended(layer, t, b), cut = !over && this->cut_after(t, s, b);
    for (int v = 0; v < vectors; ++v, u += kWidth, sums += kWidth) {
      const int n = lanes_at(layer.hidden, u, kWidth);
      V h(T(0));
      if (!over) {
        const V x = Row(p.gates_x, t, b, s).template load<T>(u, n);
        h = math::rnn_forward(x + V::load(sums), p.relu);
      }
      this->put_h(i, t, s, b, u, n, over, cut, h);
    }
  }
};

template <class T>
struct RnnBackwardScan : BackwardScan<T> {
  using Base = BackwardScan<T>;
  using Base::kWidth, Base::layer;
  using typename Base::V;
  const RnnBackward& p;

  RnnBackwardScan(Workspace<T>& memory, const RnnBackward& q)
      : Base(memory, q.layer, q.layer.hidden, q.dy, q.dh_n, q.dh0), p(q) {
    this->phase[0] = Phase<T>(memory, layer, p.w_hh, 0, 1, layer.hidden, layer.hidden, 0, 1,
                              p.w_hh.row, this->operand, true);
  }

  FN void ahead(int, int64_t t, int64_t s, int64_t b, int64_t u, int64_t units) const {
    ask_for(p.dy, t, b, s, u, units, 1, 0);
    ask_for(p.y, t, b, s, u, units, 1, 0);
  }

  void rows(int, int64_t i, int64_t t, int64_t s, int64_t b, int64_t u, int vectors,
            const T* sums) const {
    const bool over = ended(layer, t, b), cut = !over && was_reset(layer, this->reverse(s), t, b);
    const V zero(T(0));
    for (int v = 0; v < vectors; ++v, u += kWidth, sums += kWidth) {
      const int n = lanes_at(layer.hidden, u, kWidth);
      const V dh = this->gradient(t, s, b, u, n, over, V::load(sums));
      V da = zero;
      if (!over) da = math::rnn_backward(Row(p.y, t, b, s).template load<T>(u, n), dh, p.relu);
      Row(p.dgates, t, b, s).template store<T>(u, n, da);
      (cut ? zero : da).store(this->next_operand(i, s, b) + u, n);
      this->carry(s, b, u, n, over ? dh : zero);
    }
  }
};

template <class T>
void run_rnn_forward(const RnnForward& p) {
  Workspace<T> memory;
  run_scan<T>(RnnForwardScan<T>(memory, p));
}
template <class T>
void run_rnn_backward(const RnnBackward& p) {
  Workspace<T> memory;
  run_scan<T>(RnnBackwardScan<T>(memory, p));
}
