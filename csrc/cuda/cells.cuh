// What a scan does for each cell with the sums of its recurrent product: a lane's state, what it
// reads of a step ahead of time, the gate arithmetic (math/gates.h), what it writes. Place says
// which (unit, row) slots a lane has; see rows.cuh.
//
// state(n, slot), n < kStates, is what a lane carries from step to step: a scan whose lanes have
// other slots by turns keeps it elsewhere meanwhile.
//
// compute() is called for all slots of a lane, also those that are not there: a branch around each
// would put their long chains of arithmetic one behind the other. write() writes those that are,
// finish() is called for them.
#pragma once

#include "cuda/rows.cuh"

namespace fused_rnn::cuda {

// A number of the gate arithmetic.
template <Product kProduct>
using Number = Value<float, kProduct != Product::kIeee && kProduct != Product::kTf32x3>;

// How many numbers an operand is the sum of, but for the simple RNN's state.
constexpr int parts_of(Product product) { return product == Product::kTf32x3 ? 2 : 1; }

// Forward: state h (and c) in registers, operand the state.

template <Product kProduct, class Place>
struct LstmForwardLane {
  using Call = LstmForward;
  using F = Number<kProduct>;
  static constexpr int kSlots = Place::kSlots;
  static constexpr int kGates = 4, kParts = parts_of(kProduct);
  static constexpr int kStates = 2;
  float h[kSlots], c[kSlots], act[kGates][kSlots];
  Ahead<kProduct, kSlots, kGates> x;

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place) {
    get_slots<kProduct>(h, place, p.h0, 0);
    get_slots<kProduct>(c, place, p.c0, 0);
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int t) {
    x.read(place, p.gates_x, t);
  }
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int t) {
    prefetch_rows(place, p.gates_x, t, kGates * place.hidden);
  }
  FUSED_RNN_DEVICE float& state(int n, int slot) { return n == 0 ? h[slot] : c[slot]; }
  FUSED_RNN_DEVICE void zero(int slot) { h[slot] = c[slot] = 0.0f; }
  template <class Sums>
  FUSED_RNN_DEVICE void compute(const Call& p, int i, bool live, const Sums& sums) {
    F a[kGates];
    FUSED_RNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      a[gate] = F(x.get(p.gates_x, i, gate) + sums.gate(gate, i));
    }
    const auto out = math::lstm_forward(a[0], a[1], a[2], a[3], F(c[i]));
    h[i] = live ? out.h.v : h[i];
    c[i] = live ? out.c.v : c[i];
    act[0][i] = live ? out.i.v : 0.0f;
    act[1][i] = live ? out.f.v : 0.0f;
    act[2][i] = live ? out.g.v : 0.0f;
    act[3][i] = live ? out.o.v : 0.0f;
  }
  FUSED_RNN_DEVICE void write(const Call& p, const Place& place, int t,
                              const bool (&live)[Place::kLaneRows]) const {
    const auto one = [&](const float(&of)[kSlots], int i) {
      return live[i % Place::kLaneRows] ? of[i] : 0.0f;
    };
    put_io_slots<kProduct>(place, p.y, t, [&](int i) { return one(h, i); });
    if (p.cells.data != nullptr) {
      put_slots<1>(place, p.cells, t, [&](int, int i) { return one(c, i); });
    }
    if (p.gates.data != nullptr) {
      put_slots<kGates>(place, p.gates, t, [&](int gate, int i) { return act[gate][i]; });
    }
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put_state<kProduct>(p.h_n, place.at(p.h_n, 0) + place.beyond(p.h_n, i), h[i]);
    put(p.c_n, place.at(p.c_n, 0) + place.beyond(p.c_n, i), c[i]);
  }
};

template <Product kProduct, class Place>
struct GruForwardLane {
  using Call = GruForward;
  using F = Number<kProduct>;
  static constexpr int kSlots = Place::kSlots;
  static constexpr int kGates = 3, kParts = parts_of(kProduct);
  static constexpr int kStates = 1;
  float h[kSlots], act[4][kSlots], b_hn[Place::kLaneUnits];
  Ahead<kProduct, kSlots, kGates> x;

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place) {
    get_slots<kProduct>(h, place, p.h0, 0);
    FUSED_RNN_UNROLL
    for (int n = 0; n < Place::kLaneUnits; ++n) {
      const int unit = place.unit(Place::slot_of_unit(n));
      b_hn[n] = 0.0f;
      if (p.b_hn.data != nullptr && unit < place.hidden) {
        b_hn[n] = get<kProduct>(p.b_hn, place.entry * p.b_hn.entry + unit);
      }
    }
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int t) {
    x.read(place, p.gates_x, t);
  }
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int t) {
    prefetch_rows(place, p.gates_x, t, kGates * place.hidden);
  }
  FUSED_RNN_DEVICE float& state(int, int slot) { return h[slot]; }
  FUSED_RNN_DEVICE void zero(int slot) { h[slot] = 0.0f; }
  template <class Sums>
  FUSED_RNN_DEVICE void compute(const Call& p, int i, bool live, const Sums& sums) {
    const float hn = sums.gate(2, i) + b_hn[Place::unit_index(i)];
    const F a_r(x.get(p.gates_x, i, 0) + sums.gate(0, i));
    const F a_z(x.get(p.gates_x, i, 1) + sums.gate(1, i));
    const auto out = math::gru_after_forward(a_r, a_z, F(x.get(p.gates_x, i, 2)), F(hn), F(h[i]));
    h[i] = live ? out.h.v : h[i];
    act[0][i] = live ? out.r.v : 0.0f;
    act[1][i] = live ? out.z.v : 0.0f;
    act[2][i] = live ? out.n.v : 0.0f;
    act[3][i] = live ? hn : 0.0f;
  }
  FUSED_RNN_DEVICE void write(const Call& p, const Place& place, int t,
                              const bool (&live)[Place::kLaneRows]) const {
    put_io_slots<kProduct>(place, p.y, t,
                           [&](int i) { return live[i % Place::kLaneRows] ? h[i] : 0.0f; });
    if (p.gates.data != nullptr) {
      put_slots<4>(place, p.gates, t, [&](int k, int i) { return act[k][i]; });
    }
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put_state<kProduct>(p.h_n, place.at(p.h_n, 0) + place.beyond(p.h_n, i), h[i]);
  }
};

template <Product kProduct, class Place>
struct RnnForwardLane {
  using Call = RnnForward;
  using F = Number<kProduct>;
  static constexpr int kSlots = Place::kSlots;
  // Nothing bounds the state of a relu, whose kink makes much of a little rounding, so the state is
  // multiplied unrounded: three numbers of 16 bits have all its digits.
  static constexpr int kGates = 1, kParts = has_16_bits(kProduct) ? 3 : parts_of(kProduct);
  static constexpr int kStates = 1;
  float h[kSlots];
  Ahead<kProduct, kSlots> x;

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place) {
    get_slots<kProduct>(h, place, p.h0, 0);
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int t) {
    x.read(place, p.gates_x, t);
  }
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int t) {
    prefetch_rows(place, p.gates_x, t, place.hidden);
  }
  FUSED_RNN_DEVICE float& state(int, int slot) { return h[slot]; }
  FUSED_RNN_DEVICE void zero(int slot) { h[slot] = 0.0f; }
  template <class Sums>
  FUSED_RNN_DEVICE void compute(const Call& p, int i, bool live, const Sums& sums) {
    const float a = x.get(p.gates_x, i) + sums.gate(0, i);
    const float out = math::rnn_forward(F(a), p.relu).v;
    h[i] = live ? out : h[i];
  }
  FUSED_RNN_DEVICE void write(const Call& p, const Place& place, int t,
                              const bool (&live)[Place::kLaneRows]) const {
    put_io_slots<kProduct>(place, p.y, t,
                           [&](int i) { return live[i % Place::kLaneRows] ? h[i] : 0.0f; });
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put_state<kProduct>(p.h_n, place.at(p.h_n, 0) + place.beyond(p.h_n, i), h[i]);
  }
};

// Backward: dh, the gradient of the state between steps, in registers; the operands are the gates'
// gradients, d[gate][slot], zero where a row has ended. `before` is the step processed before t in
// the forward scan, whose state entered t; `has_before` whether there is one. `cut`: the state that
// entered the step was zeroed; `initial`: it was the initial state. read() of t begins with what
// the last one read of `before`; begin() of t stands for that where t has not been a `before`.

// The state that entered a step.
template <Product kProduct, class Place>
FUSED_RNN_DEVICE float entering(float before, const Place& place, const Rows& first, int i,
                                bool live, bool cut, bool initial) {
  if (initial && live && place.is[i])
    before = get<kProduct>(first, place.at(first, 0) + place.beyond(first, i));
  return cut ? 0.0f : before;
}

template <Product kProduct, class Place>
struct LstmBackwardLane {
  using Call = LstmBackward;
  using F = Number<kProduct>;
  static constexpr int kSlots = Place::kSlots;
  static constexpr int kGates = 4, kParts = parts_of(kProduct);
  static constexpr int kStates = 2;
  float dh[kSlots], dc[kSlots], d[kGates][kSlots];
  Ahead<kProduct, kSlots> dy, c, c_before;
  Ahead<kProduct, kSlots, kGates> gates;

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place) {
    get_slots<kProduct>(dh, place, p.dh_n, 0);
    get_slots<kProduct>(dc, place, p.dc_n, 0);
  }
  FUSED_RNN_DEVICE float& state(int n, int slot) { return n == 0 ? dh[slot] : dc[slot]; }
  FUSED_RNN_DEVICE void begin(const Call& p, const Place& place, int t) {
    c_before.read(place, p.cells, t);
  }
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int t) {
    prefetch_rows(place, p.dy, t, place.hidden);
    prefetch_rows(place, p.cells, t, place.hidden);
    prefetch_rows(place, p.dcells, t, place.hidden);
    prefetch_rows(place, p.gates, t, 4 * place.hidden);
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int t, int before,
                             bool has_before) {
    c = c_before;
    gates.read(place, p.gates, t);
    dy.read(place, p.dy, t);
    c_before.read(place, p.cells, before, has_before);
  }
  FUSED_RNN_DEVICE void compute(const Call& p, const Place& place, int t, int i, bool live,
                                bool cut, bool initial) {
    const float c_prev =
        entering<kProduct>(c_before.get(p.cells, i), place, p.c0, i, live, cut, initial);
    float dc_now = dc[i];
    if (p.dcells.data != nullptr && place.is[i]) {
      dc_now += get<kProduct>(p.dcells, place.at(p.dcells, t) + place.beyond(p.dcells, i));
    }
    F a[kGates];
    FUSED_RNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) a[gate] = F(gates.get(p.gates, i, gate));
    const auto out = math::lstm_backward(a[0], a[1], a[2], a[3], F(c.get(p.cells, i)), F(c_prev),
                                         F(dy.get(p.dy, i) + dh[i]), F(dc_now));
    d[0][i] = live ? out.di.v : 0.0f;
    d[1][i] = live ? out.df.v : 0.0f;
    d[2][i] = live ? out.dg.v : 0.0f;
    d[3][i] = live ? out.d_o.v : 0.0f;
    dh[i] = live ? 0.0f : dh[i];
    dc[i] = !live ? dc[i] : cut ? 0.0f : out.dc_prev.v;
  }
  FUSED_RNN_DEVICE void write(const Call& p, const Place& place, int t) const {
    put_slots<kGates>(place, p.dgates, t, [&](int gate, int i) { return d[gate][i]; });
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put(p.dh0, place.at(p.dh0, 0) + place.beyond(p.dh0, i), dh[i]);
    put(p.dc0, place.at(p.dc0, 0) + place.beyond(p.dc0, i), dc[i]);
  }
};

template <Product kProduct, class Place>
struct GruBackwardLane {
  using Call = GruBackward;
  using F = Number<kProduct>;
  static constexpr int kSlots = Place::kSlots;
  static constexpr int kGates = 3, kParts = parts_of(kProduct);
  static constexpr int kStates = 1;
  float dh[kSlots], d[kGates][kSlots], dn[kSlots];  // d: of r, z and hn
  Ahead<kProduct, kSlots> dy, h_before;
  Ahead<kProduct, kSlots, 4> gates;

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place) {
    get_slots<kProduct>(dh, place, p.dh_n, 0);
  }
  FUSED_RNN_DEVICE float& state(int, int slot) { return dh[slot]; }
  FUSED_RNN_DEVICE void begin(const Call&, const Place&, int) {}
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int t) {
    prefetch_rows(place, p.dy, t, place.hidden);
    prefetch_rows(place, p.y, t, place.hidden);
    prefetch_rows(place, p.gates, t, 4 * place.hidden);
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int t, int before,
                             bool has_before) {
    gates.read(place, p.gates, t);
    dy.read(place, p.dy, t);
    h_before.read(place, p.y, before, has_before);
  }
  FUSED_RNN_DEVICE void compute(const Call& p, const Place& place, int, int i, bool live, bool cut,
                                bool initial) {
    const float h_prev =
        entering<kProduct>(h_before.get(p.y, i), place, p.h0, i, live, cut, initial);
    F a[4];
    FUSED_RNN_UNROLL
    for (int k = 0; k < 4; ++k) a[k] = F(gates.get(p.gates, i, k));
    const auto out =
        math::gru_after_backward(a[0], a[1], a[2], a[3], F(h_prev), F(dy.get(p.dy, i) + dh[i]));
    d[0][i] = live ? out.dr.v : 0.0f;
    d[1][i] = live ? out.dz.v : 0.0f;
    d[2][i] = live ? out.dhn.v : 0.0f;
    dn[i] = live ? out.dn.v : 0.0f;
    dh[i] = !live ? dh[i] : cut ? 0.0f : out.dh_prev.v;
  }
  FUSED_RNN_DEVICE void write(const Call& p, const Place& place, int t) const {
    put_slots<kGates>(place, p.dgates, t,
                      [&](int gate, int i) { return gate == 2 ? dn[i] : d[gate][i]; });
    put_slots<1>(place, p.dgates_hn, t, [&](int, int i) { return d[2][i]; });
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put(p.dh0, place.at(p.dh0, 0) + place.beyond(p.dh0, i), dh[i]);
  }
};

template <Product kProduct, class Place>
struct RnnBackwardLane {
  using Call = RnnBackward;
  using F = Number<kProduct>;
  static constexpr int kSlots = Place::kSlots;
  static constexpr int kGates = 1, kParts = parts_of(kProduct);
  static constexpr int kStates = 1;
  float dh[kSlots], d[kGates][kSlots];
  Ahead<kProduct, kSlots> dy, y;

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place) {
    get_slots<kProduct>(dh, place, p.dh_n, 0);
  }
  FUSED_RNN_DEVICE float& state(int, int slot) { return dh[slot]; }
  FUSED_RNN_DEVICE void begin(const Call&, const Place&, int) {}
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int t) {
    prefetch_rows(place, p.dy, t, place.hidden);
    prefetch_rows(place, p.y, t, place.hidden);
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int t, int, bool) {
    dy.read(place, p.dy, t);
    y.read(place, p.y, t);
  }
  FUSED_RNN_DEVICE void compute(const Call& p, const Place&, int, int i, bool live, bool, bool) {
    const F out = math::rnn_backward(F(y.get(p.y, i)), F(dy.get(p.dy, i) + dh[i]), p.relu);
    d[0][i] = live ? out.v : 0.0f;
    dh[i] = live ? 0.0f : dh[i];
  }
  FUSED_RNN_DEVICE void write(const Call& p, const Place& place, int t) const {
    put_slots<1>(place, p.dgates, t, [&](int, int i) { return d[0][i]; });
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put(p.dh0, place.at(p.dh0, 0) + place.beyond(p.dh0, i), dh[i]);
  }
};

// Both lanes of a cell.
template <Cell kCell, Product kProduct, class Place>
struct Lanes;
template <Product kProduct, class Place>
struct Lanes<Cell::kLstm, kProduct, Place> {
  using Forward = LstmForwardLane<kProduct, Place>;
  using Backward = LstmBackwardLane<kProduct, Place>;
};
template <Product kProduct, class Place>
struct Lanes<Cell::kGru, kProduct, Place> {
  using Forward = GruForwardLane<kProduct, Place>;
  using Backward = GruBackwardLane<kProduct, Place>;
};
template <Product kProduct, class Place>
struct Lanes<Cell::kRnn, kProduct, Place> {
  using Forward = RnnForwardLane<kProduct, Place>;
  using Backward = RnnBackwardLane<kProduct, Place>;
};

}  // namespace fused_rnn::cuda
