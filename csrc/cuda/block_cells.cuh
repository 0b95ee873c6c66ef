// What a block scan does for each cell with the sums of its recurrent product: a lane's state, what it
// reads of a step ahead of time, the gate arithmetic (math/gates.h), what it writes.
#pragma once

#include "cuda/rows.cuh"

namespace fused_rnn::cuda {

using F = Value<float>;

// Forward: state h (and c) in registers, operand the state.

template <Product kProduct>
struct LstmForwardLane {
  using Call = LstmForward;
  static constexpr int kGates = 4;
  // A simple RNN's state is multiplied unrounded; see docs/design.md.
  static constexpr int kParts = kProduct == Product::kTf32x3 ? 2 : 1;
  float h[kSlots], c[kSlots], x[kGates][kSlots];

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place) {
    get_slots<kProduct>(h, place, p.h0, 0);
    get_slots<kProduct>(c, place, p.c0, 0);
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int64_t t) {
    FUSED_RNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      get_slots<kProduct>(x[gate], place, p.gates_x, t, gate * place.hidden);
    }
  }
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int64_t t) {
    prefetch_rows(place, p.gates_x, t, kGates * place.hidden);
  }
  FUSED_RNN_DEVICE void zero(int slot) { h[slot] = c[slot] = 0.0f; }
  template <class Sums>
  FUSED_RNN_DEVICE void step(const Call& p, const Place& place, int64_t t, int i, bool live,
                             const Sums& sums) {
    const auto out = math::lstm_forward(F(x[0][i] + sums.of[0][i]), F(x[1][i] + sums.of[1][i]),
                                        F(x[2][i] + sums.of[2][i]), F(x[3][i] + sums.of[3][i]),
                                        F(c[i]));
    if (live) h[i] = out.h.v, c[i] = out.c.v;
    put_io<kProduct>(p.y, place.at(p.y, t, i), live ? out.h.v : 0.0f);
    if (p.cells.data != nullptr) put(p.cells, place.at(p.cells, t, i), live ? out.c.v : 0.0f);
    if (p.gates.data != nullptr) {
      const int64_t at = place.at(p.gates, t, i);
      put(p.gates, at, live ? out.i.v : 0.0f);
      put(p.gates, at + place.hidden, live ? out.f.v : 0.0f);
      put(p.gates, at + 2 * place.hidden, live ? out.g.v : 0.0f);
      put(p.gates, at + 3 * place.hidden, live ? out.o.v : 0.0f);
    }
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put_io<kProduct>(p.h_n, place.at(p.h_n, 0, i), h[i]);
    put(p.c_n, place.at(p.c_n, 0, i), c[i]);
  }
};

template <Product kProduct>
struct GruForwardLane {
  using Call = GruForward;
  static constexpr int kGates = 3;
  static constexpr int kParts = kProduct == Product::kTf32x3 ? 2 : 1;
  float h[kSlots], x[kGates][kSlots], b_hn[2];

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place) {
    get_slots<kProduct>(h, place, p.h0, 0);
    FUSED_RNN_UNROLL
    for (int half = 0; half < 2; ++half) {
      b_hn[half] = 0.0f;
      if (p.b_hn.data != nullptr && place.unit(2 * half) < place.hidden) {
        b_hn[half] = get<kProduct>(p.b_hn, place.entry * p.b_hn.entry + place.unit(2 * half));
      }
    }
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int64_t t) {
    FUSED_RNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      get_slots<kProduct>(x[gate], place, p.gates_x, t, gate * place.hidden);
    }
  }
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int64_t t) {
    prefetch_rows(place, p.gates_x, t, kGates * place.hidden);
  }
  FUSED_RNN_DEVICE void zero(int slot) { h[slot] = 0.0f; }
  template <class Sums>
  FUSED_RNN_DEVICE void step(const Call& p, const Place& place, int64_t t, int i, bool live,
                             const Sums& sums) {
    const float hn = sums.of[2][i] + b_hn[i / 2];
    const auto out = math::gru_after_forward(F(x[0][i] + sums.of[0][i]),
                                             F(x[1][i] + sums.of[1][i]), F(x[2][i]), F(hn), F(h[i]));
    if (live) h[i] = out.h.v;
    put_io<kProduct>(p.y, place.at(p.y, t, i), live ? out.h.v : 0.0f);
    if (p.gates.data != nullptr) {
      const int64_t at = place.at(p.gates, t, i);
      put(p.gates, at, live ? out.r.v : 0.0f);
      put(p.gates, at + place.hidden, live ? out.z.v : 0.0f);
      put(p.gates, at + 2 * place.hidden, live ? out.n.v : 0.0f);
      put(p.gates, at + 3 * place.hidden, live ? hn : 0.0f);
    }
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put_io<kProduct>(p.h_n, place.at(p.h_n, 0, i), h[i]);
  }
};

template <Product kProduct>
struct RnnForwardLane {
  using Call = RnnForward;
  static constexpr int kGates = 1;
  // Nothing bounds the state of a relu, whose kink makes much of a little rounding, so the state is
  // multiplied unrounded: three numbers of 16 bits have all its digits.
  static constexpr int kParts =
      has_16_bits(kProduct) ? 3 : (kProduct == Product::kTf32x3 ? 2 : 1);
  float h[kSlots], x[kSlots];

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place) {
    get_slots<kProduct>(h, place, p.h0, 0);
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int64_t t) {
    get_slots<kProduct>(x, place, p.gates_x, t);
  }
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int64_t t) {
    prefetch_rows(place, p.gates_x, t, kGates * place.hidden);
  }
  FUSED_RNN_DEVICE void zero(int slot) { h[slot] = 0.0f; }
  template <class Sums>
  FUSED_RNN_DEVICE void step(const Call& p, const Place& place, int64_t t, int i, bool live,
                             const Sums& sums) {
    const float out = math::rnn_forward(F(x[i] + (sums.of[0][i] + sums.of[1][i])), p.relu).v;
    if (live) h[i] = out;
    put_io<kProduct>(p.y, place.at(p.y, t, i), live ? out : 0.0f);
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put_io<kProduct>(p.h_n, place.at(p.h_n, 0, i), h[i]);
  }
};

// Backward: dh, the gradient of the state between steps, in registers; the operands are the gates'
// gradients. `before` is the step processed before t in the forward scan, whose state entered t;
// `has_before` whether there is one.

template <Product kProduct>
struct LstmBackwardLane {
  using Call = LstmBackward;
  static constexpr int kGates = 4;
  static constexpr int kParts = kProduct == Product::kTf32x3 ? 2 : 1;
  float dh[kSlots], dc[kSlots], dy[kSlots], c_before[kSlots], gates[kGates][kSlots];

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place, int64_t t) {
    get_slots<kProduct>(dh, place, p.dh_n, 0);
    get_slots<kProduct>(dc, place, p.dc_n, 0);
    get_slots<kProduct>(c_before, place, p.cells, t);  // read() makes it this step's
  }
  float c[kSlots];
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int64_t t) {
    prefetch_rows(place, p.dy, t, place.hidden);
    prefetch_rows(place, p.cells, t, place.hidden);
    prefetch_rows(place, p.gates, t, 4 * place.hidden);
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int64_t t, int64_t before,
                             bool has_before) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kSlots; ++i) c[i] = c_before[i];
    FUSED_RNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      get_slots<kProduct>(gates[gate], place, p.gates, t, gate * place.hidden);
    }
    get_slots<kProduct>(dy, place, p.dy, t);
    get_slots<kProduct>(c_before, place, p.cells, before, 0, has_before);
  }
  // cut: the state that entered the step was zeroed; initial: it was the initial state.
  template <class Operand>
  FUSED_RNN_DEVICE void step(const Call& p, const Place& place, int64_t t, int i, bool live,
                             bool cut, bool initial, Operand& operand) {
    float c_prev = c_before[i];
    if (initial) c_prev = get<kProduct>(p.c0, place.at(p.c0, 0, i));
    if (cut) c_prev = 0.0f;
    float dc_now = dc[i];
    if (p.dcells.data != nullptr) dc_now += get<kProduct>(p.dcells, place.at(p.dcells, t, i));
    const auto d =
        math::lstm_backward(F(gates[0][i]), F(gates[1][i]), F(gates[2][i]), F(gates[3][i]), F(c[i]),
                            F(c_prev), F(dy[i] + dh[i]), F(dc_now));
    const float all[kGates] = {d.di.v, d.df.v, d.dg.v, d.d_o.v};
    const int64_t at = place.at(p.dgates, t, i);
    FUSED_RNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      put(p.dgates, at + gate * place.hidden, live ? all[gate] : 0.0f);
      cuda::place(operand, gate, place.tile_row + i % 2, place.unit(i),
                  live && !cut ? all[gate] : 0.0f);
    }
    if (live) dh[i] = 0.0f, dc[i] = cut ? 0.0f : d.dc_prev.v;
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put(p.dh0, place.at(p.dh0, 0, i), dh[i]);
    put(p.dc0, place.at(p.dc0, 0, i), dc[i]);
  }
};

template <Product kProduct>
struct GruBackwardLane {
  using Call = GruBackward;
  static constexpr int kGates = 3;
  static constexpr int kParts = kProduct == Product::kTf32x3 ? 2 : 1;
  float dh[kSlots], dy[kSlots], h_before[kSlots], gates[4][kSlots];

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place, int64_t) {
    get_slots<kProduct>(dh, place, p.dh_n, 0);
  }
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int64_t t) {
    prefetch_rows(place, p.dy, t, place.hidden);
    prefetch_rows(place, p.y, t, place.hidden);
    prefetch_rows(place, p.gates, t, 4 * place.hidden);
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int64_t t, int64_t before,
                             bool has_before) {
    FUSED_RNN_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      get_slots<kProduct>(gates[gate], place, p.gates, t, gate * place.hidden);
    }
    get_slots<kProduct>(dy, place, p.dy, t);
    get_slots<kProduct>(h_before, place, p.y, before, 0, has_before);
  }
  template <class Operand>
  FUSED_RNN_DEVICE void step(const Call& p, const Place& place, int64_t t, int i, bool live,
                             bool cut, bool initial, Operand& operand) {
    float h_prev = h_before[i];
    if (initial) h_prev = get<kProduct>(p.h0, place.at(p.h0, 0, i));
    if (cut) h_prev = 0.0f;
    const auto d =
        math::gru_after_backward(F(gates[0][i]), F(gates[1][i]), F(gates[2][i]), F(gates[3][i]),
                                 F(h_prev), F(dy[i] + dh[i]));
    const int64_t at = place.at(p.dgates, t, i);
    put(p.dgates, at, live ? d.dr.v : 0.0f);
    put(p.dgates, at + place.hidden, live ? d.dz.v : 0.0f);
    put(p.dgates, at + 2 * place.hidden, live ? d.dn.v : 0.0f);
    put(p.dgates_hn, place.at(p.dgates_hn, t, i), live ? d.dhn.v : 0.0f);
    const float all[kGates] = {d.dr.v, d.dz.v, d.dhn.v};
    FUSED_RNN_UNROLL
    for (int gate = 0; gate < kGates; ++gate) {
      cuda::place(operand, gate, place.tile_row + i % 2, place.unit(i),
                  live && !cut ? all[gate] : 0.0f);
    }
    if (live) dh[i] = cut ? 0.0f : d.dh_prev.v;
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put(p.dh0, place.at(p.dh0, 0, i), dh[i]);
  }
};

template <Product kProduct>
struct RnnBackwardLane {
  using Call = RnnBackward;
  static constexpr int kGates = 1;
  static constexpr int kParts = kProduct == Product::kTf32x3 ? 2 : 1;
  float dh[kSlots], dy[kSlots], y[kSlots];

  FUSED_RNN_DEVICE void start(const Call& p, const Place& place, int64_t) {
    get_slots<kProduct>(dh, place, p.dh_n, 0);
  }
  static FUSED_RNN_DEVICE void ahead(const Call& p, const Place& place, int64_t t) {
    prefetch_rows(place, p.dy, t, place.hidden);
    prefetch_rows(place, p.y, t, place.hidden);
  }
  FUSED_RNN_DEVICE void read(const Call& p, const Place& place, int64_t t, int64_t, bool) {
    get_slots<kProduct>(dy, place, p.dy, t);
    get_slots<kProduct>(y, place, p.y, t);
  }
  template <class Operand>
  FUSED_RNN_DEVICE void step(const Call& p, const Place& place, int64_t t, int i, bool live,
                             bool cut, bool, Operand& operand) {
    const float d = math::rnn_backward(F(y[i]), F(dy[i] + dh[i]), p.relu).v;
    put(p.dgates, place.at(p.dgates, t, i), live ? d : 0.0f);
    cuda::place(operand, 0, place.tile_row + i % 2, place.unit(i),
                live && !cut ? d : 0.0f);
    if (live) dh[i] = 0.0f;
  }
  FUSED_RNN_DEVICE void finish(const Call& p, const Place& place, int i) const {
    put(p.dh0, place.at(p.dh0, 0, i), dh[i]);
  }
};

}  // namespace fused_rnn::cuda
