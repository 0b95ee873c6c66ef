// The gate arithmetic of one step for all entries, rows and units, a thread each: the step path,
// whose matrix products are torch's. One launch a phase of a step.
//
// T is the dtype of the arithmetic, float or double. Sequences and the tape are the call's.
#pragma once

#include "cuda/flags.cuh"
#include "cuda/launch.h"
#include "cuda/numbers.cuh"

namespace fused_rnn::cuda {

constexpr int kPointwiseThreads = 128;

namespace pointwise {

// One element of a tensor of any dtype the waist has.
template <class T>
FUSED_RNN_DEVICE T get(const Rows& rows, int64_t at) {
  switch (rows.dtype) {
    case DType::kFloat64:
      return static_cast<T>(load(static_cast<const double*>(rows.data) + at));
    case DType::kBFloat16:
      return from_bf16(load(static_cast<const uint16_t*>(rows.data) + at));
    case DType::kFloat16:
      return from_f16(load(static_cast<const uint16_t*>(rows.data) + at));
    default:
      return load(static_cast<const float*>(rows.data) + at);
  }
}
template <class T>
FUSED_RNN_DEVICE void put(const Rows& rows, int64_t at, T value) {
  switch (rows.dtype) {
    case DType::kFloat64:
      return store(static_cast<double*>(rows.data) + at, static_cast<double>(value));
    case DType::kBFloat16:
      return store(static_cast<uint16_t*>(rows.data) + at, to_bf16(static_cast<float>(value)));
    case DType::kFloat16:
      return store(static_cast<uint16_t*>(rows.data) + at, to_f16(static_cast<float>(value)));
    default:
      return store(static_cast<float*>(rows.data) + at, static_cast<float>(value));
  }
}

// As io rounds it: what tensor cores multiply for 16-bit dtypes.
template <class T>
FUSED_RNN_DEVICE T rounded(DType io, T value) {
  if (io == DType::kBFloat16) return from_bf16(to_bf16(static_cast<float>(value)));
  if (io == DType::kFloat16) return from_f16(to_f16(static_cast<float>(value)));
  return value;
}

// A thread's entry, row and unit of `width` units, and its step.
struct Element {
  int64_t entry, row, unit, index;  // index: of [S, B, width]
  int64_t t, T, B;
  bool is, backwards;
  const uint8_t* flags;

  template <class Call>
  FUSED_RNN_DEVICE Element(const Pointwise<Call>& p, int64_t width, bool against) {
    const Layer& layer = p.params.call.layer;
    const int64_t n = static_cast<int64_t>(block_x()) * thread_count() + thread_index();
    T = layer.steps, B = layer.batch, flags = layer.flags;
    is = n < B * width;
    unit = n % width, row = n / width;
    entry = p.params.first_entry + block_y();
    index = (entry * B + row) * width + unit;
    backwards = is_reversed(p.params, block_y());
    t = backwards != against ? T - 1 - p.step : p.step;
  }
  FUSED_RNN_DEVICE int64_t at(const Rows& rows, int64_t step) const {
    return step * rows.step + row * rows.row + entry * rows.entry + unit;
  }
  FUSED_RNN_DEVICE int bits(int64_t step) const {
    return flags == nullptr ? 0 : load(flags + step * B + row);
  }
  FUSED_RNN_DEVICE bool ended(int64_t step) const { return (bits(step) & kEnded) != 0; }
  FUSED_RNN_DEVICE bool starts(int64_t step) const {
    return step < T && starts_segment(bits(step));
  }
  // The state that entered step t was zeroed.
  FUSED_RNN_DEVICE bool cut() const { return starts(backwards ? t + 1 : t); }
  // The state of step t is zeroed before the next, if there is one.
  FUSED_RNN_DEVICE bool cut_after() const { return backwards ? t > 0 && starts(t) : starts(t + 1); }
  // The step whose state entered step t, or -1 for the initial state.
  FUSED_RNN_DEVICE int64_t before() const {
    if (!backwards) return t - 1;
    return t + 1 == T || ended(t + 1) ? -1 : t + 1;
  }
};

// The state that entered a step, from a sequence of states and the initial one.
template <class T>
FUSED_RNN_DEVICE T entering(const Element& e, const Rows& states, const Rows& initial) {
  if (e.cut()) return T(0);
  const int64_t before = e.before();
  return before < 0 ? get<T>(initial, e.at(initial, 0)) : get<T>(states, e.at(states, before));
}

// Writes K values of the tape, zeros where the row has ended.
template <int kCount, class T>
FUSED_RNN_DEVICE void put_tape(const Element& e, const Rows& gates, int64_t H, bool live,
                               const T (&values)[kCount]) {
  if (gates.data == nullptr) return;
  const int64_t at = e.at(gates, e.t);
  for (int k = 0; k < kCount; ++k) put<T>(gates, at + k * H, live ? values[k] : T(0));
}

// Writes y of a step whose hidden state is h, and what the next step finds: the state, carried
// where the row has ended, and the next product's operand. io: how the operand is rounded.
template <class T, class Call>
FUSED_RNN_DEVICE void leave(const Pointwise<Call>& p, const Element& e, bool live, T h, DType io) {
  const Rows& y = p.params.call.y;
  put<T>(y, e.at(y, e.t), live ? h : T(0));
  T* state = static_cast<T*>(p.state) + e.index;
  const T next = e.cut_after() ? T(0) : live ? h : load(state);
  store(state, next);
  store(static_cast<T*>(p.operand) + e.index, rounded(io, next));
}

// Backward: the gradient of the hidden state that comes from later steps.
template <class T, class Call>
FUSED_RNN_DEVICE T carried_back(const Pointwise<Call>& p, const Element& e) {
  return load(static_cast<const T*>(p.state) + e.index) +
         load(static_cast<const T*>(p.product) + e.index);
}
// And from the output itself.
template <class T, class Call>
FUSED_RNN_DEVICE T from_output(const Pointwise<Call>& p, const Element& e) {
  const Rows& dy = p.params.call.dy;
  return dy.data == nullptr ? T(0) : get<T>(dy, e.at(dy, e.t));
}

}  // namespace pointwise

// Before the first step: state gets `rows`, or zeros where there are none. For a forward scan
// (operand given) zeros too where the first step starts a segment, and operand gets what the first
// product multiplies: `io` says how rounded.
template <class T, class Call>
FUSED_RNN_KERNEL(kPointwiseThreads)
start(FUSED_RNN_PARAMS Pointwise<Call> p) {
  using namespace pointwise;
  const Element e(p, p.width, false);
  if (!e.is) return;
  T value = p.rows.data == nullptr ? T(0) : get<T>(p.rows, e.at(p.rows, 0));
  if (p.operand != nullptr && e.cut()) value = T(0);
  store(static_cast<T*>(p.state) + e.index, value);
  if (p.operand != nullptr) {
    store(static_cast<T*>(p.operand) + e.index, rounded(p.io, value));
  }
}

// After the last step: `rows` gets state, and what the last product adds to it, if there is one.
template <class T, class Call>
FUSED_RNN_KERNEL(kPointwiseThreads)
finish(FUSED_RNN_PARAMS Pointwise<Call> p) {
  using namespace pointwise;
  const Element e(p, p.width, false);
  if (!e.is) return;
  T value = load(static_cast<const T*>(p.state) + e.index);
  if (p.product != nullptr) value += load(static_cast<const T*>(p.product) + e.index);
  put<T>(p.rows, e.at(p.rows, 0), value);
}

// Forward. state is h, unrounded; operand what the next product multiplies, zero where a segment
// starts. The launcher has put the initial states into state (and cell) and, before the first step,
// into the operand.

// product [S, B, 4H] = h W_hh^T. With a projection operand gets o tanh(c) [S, B, H], for W_hr.
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
lstm_step(FUSED_RNN_PARAMS Pointwise<LstmForward> p) {
  using namespace pointwise;
  using V = Value<T>;
  const LstmForward& call = p.params.call;
  const int64_t H = call.layer.hidden;
  const Element e(p, H, false);
  if (!e.is) return;
  const int64_t x = e.at(call.gates_x, e.t), a = (e.index - e.unit) * 4 + e.unit;
  const T* product = static_cast<const T*>(p.product);
  T* cell = static_cast<T*>(p.cell) + e.index;
  T* operand = static_cast<T*>(p.operand) + e.index;
  const bool live = !e.ended(e.t), projected = call.w_hr.data != nullptr;
  const T c_prev = load(cell);
  T gate[4];
  for (int k = 0; k < 4; ++k) gate[k] = get<T>(call.gates_x, x + k * H) + load(product + a + k * H);
  const auto out = math::lstm_forward(V(gate[0]), V(gate[1]), V(gate[2]), V(gate[3]), V(c_prev));
  if (call.cells.data != nullptr) {
    put<T>(call.cells, e.at(call.cells, e.t), live ? out.c.v : T(0));
  }
  put_tape(e, call.gates, H, live, {out.i.v, out.f.v, out.g.v, out.o.v});
  if (live) store(cell, e.cut_after() ? T(0) : out.c.v);
  if (projected) return store(operand, live ? rounded(call.y.dtype, out.h.v) : T(0));
  leave(p, e, live, out.h.v, call.y.dtype);
}

// The LSTM's second phase: product [S, B, P] = (o tanh(c)) W_hr^T.
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
lstm_project_step(FUSED_RNN_PARAMS Pointwise<LstmForward> p) {
  using namespace pointwise;
  const LstmForward& call = p.params.call;
  const Element e(p, call.layer.out, false);
  if (!e.is) return;
  const T out = load(static_cast<const T*>(p.product) + e.index);
  leave(p, e, !e.ended(e.t), out, call.y.dtype);
}

// product [S, B, 3H] = h W_hh^T.
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
gru_after_step(FUSED_RNN_PARAMS Pointwise<GruForward> p) {
  using namespace pointwise;
  using V = Value<T>;
  const GruForward& call = p.params.call;
  const int64_t H = call.layer.hidden;
  const Element e(p, H, false);
  if (!e.is) return;
  const int64_t x = e.at(call.gates_x, e.t);
  const T* product = static_cast<const T*>(p.product) + (e.index - e.unit) * 3 + e.unit;
  const bool live = !e.ended(e.t);
  const T h_prev = load(static_cast<const T*>(p.state) + e.index);
  T hn = load(product + 2 * H);
  if (call.b_hn.data != nullptr) hn += get<T>(call.b_hn, e.entry * call.b_hn.entry + e.unit);
  const auto out = math::gru_after_forward(V(get<T>(call.gates_x, x) + load(product)),
                                           V(get<T>(call.gates_x, x + H) + load(product + H)),
                                           V(get<T>(call.gates_x, x + 2 * H)), V(hn), V(h_prev));
  put_tape(e, call.gates, H, live, {out.r.v, out.z.v, out.n.v, hn});
  leave(p, e, live, out.h.v, call.y.dtype);
}

// Reset before the product, first phase: product [S, B, 2H] = h [W_hr; W_hz]^T; operand gets r h
// for W_hn, other z.
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
gru_before_gates_step(FUSED_RNN_PARAMS Pointwise<GruForward> p) {
  using namespace pointwise;
  using V = Value<T>;
  const GruForward& call = p.params.call;
  const int64_t H = call.layer.hidden;
  const Element e(p, H, false);
  if (!e.is) return;
  const int64_t x = e.at(call.gates_x, e.t);
  const T* product = static_cast<const T*>(p.product) + (e.index - e.unit) * 2 + e.unit;
  const bool live = !e.ended(e.t);
  const auto out = math::gru_before_gates(V(get<T>(call.gates_x, x) + load(product)),
                                          V(get<T>(call.gates_x, x + H) + load(product + H)),
                                          V(load(static_cast<const T*>(p.state) + e.index)));
  put_tape(e, call.gates, H, live, {out.r.v, out.z.v});
  store(static_cast<T*>(p.other) + e.index, out.z.v);
  store(static_cast<T*>(p.operand) + e.index, live ? rounded(call.y.dtype, out.rh.v) : T(0));
}

// Second phase: product [S, B, H] = (r h) W_hn^T; operand gets h.
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
gru_before_candidate_step(FUSED_RNN_PARAMS Pointwise<GruForward> p) {
  using namespace pointwise;
  using V = Value<T>;
  const GruForward& call = p.params.call;
  const int64_t H = call.layer.hidden;
  const Element e(p, H, false);
  if (!e.is) return;
  const int64_t x = e.at(call.gates_x, e.t) + 2 * H;
  const bool live = !e.ended(e.t);
  const T h_prev = load(static_cast<const T*>(p.state) + e.index);
  const T a_n = get<T>(call.gates_x, x) + load(static_cast<const T*>(p.product) + e.index);
  const auto out = math::gru_before_candidate(
      V(a_n), V(load(static_cast<const T*>(p.other) + e.index)), V(h_prev));
  if (call.gates.data != nullptr) {
    put<T>(call.gates, e.at(call.gates, e.t) + 2 * H, live ? out.n.v : T(0));
  }
  leave(p, e, live, out.h.v, call.y.dtype);
}

// product [S, B, H] = h W_hh^T. The state is multiplied unrounded; see docs/design.md.
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
rnn_step(FUSED_RNN_PARAMS Pointwise<RnnForward> p) {
  using namespace pointwise;
  using V = Value<T>;
  const RnnForward& call = p.params.call;
  const Element e(p, call.layer.hidden, false);
  if (!e.is) return;
  const T a = get<T>(call.gates_x, e.at(call.gates_x, e.t)) +
              load(static_cast<const T*>(p.product) + e.index);
  const T out = math::rnn_forward(V(a), call.relu).v;
  leave(p, e, !e.ended(e.t), out, DType::kFloat32);
}

// Backward, from the forward scan's last step to its first. state is dh as far as it does not pass
// through the next product (carried where a row has ended); product is the rest of dh: at the first
// step zeros. operand gets the gates' gradients, zero where nothing passes back.

// product [S, B, P] = dgates W_hh. Without a projection P is H; with one, other [S, B, H] is
// dh W_hr, which is all of the gradient of o tanh(c).
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
lstm_step_back(FUSED_RNN_PARAMS Pointwise<LstmBackward> p) {
  using namespace pointwise;
  using V = Value<T>;
  const LstmBackward& call = p.params.call;
  const int64_t H = call.layer.hidden;
  const Element e(p, H, true);
  if (!e.is) return;
  const bool live = !e.ended(e.t), cut = e.cut(), projected = call.w_hr.data != nullptr;
  T dh;
  if (projected) {
    dh = load(static_cast<const T*>(p.other) + e.index);
  } else {
    dh = carried_back<T>(p, e);
    store(static_cast<T*>(p.state) + e.index, live ? T(0) : dh);
    dh += from_output<T>(p, e);
  }
  T* cell = static_cast<T*>(p.cell) + e.index;
  const T carried = load(cell);
  T dc = carried;
  if (call.dcells.data != nullptr) dc += get<T>(call.dcells, e.at(call.dcells, e.t));
  const int64_t tape = e.at(call.gates, e.t);
  const auto d =
      math::lstm_backward(V(get<T>(call.gates, tape)), V(get<T>(call.gates, tape + H)),
                          V(get<T>(call.gates, tape + 2 * H)), V(get<T>(call.gates, tape + 3 * H)),
                          V(get<T>(call.cells, e.at(call.cells, e.t))),
                          V(entering<T>(e, call.cells, call.c0)), V(dh), V(dc));
  const T all[4] = {d.di.v, d.df.v, d.dg.v, d.d_o.v};
  const int64_t at = e.at(call.dgates, e.t);
  T* operand = static_cast<T*>(p.operand) + (e.index - e.unit) * 4 + e.unit;
  for (int k = 0; k < 4; ++k) {
    put<T>(call.dgates, at + k * H, live ? all[k] : T(0));
    store(operand + k * H, live && !cut ? rounded(call.w_hh.dtype, all[k]) : T(0));
  }
  store(cell, !live ? carried : cut ? T(0) : d.dc_prev.v);
}

// The LSTM's first phase with a projection: dh, the whole gradient of the projected state, is kept
// for dW_hr, and its operand is multiplied by W_hr.
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
lstm_project_step_back(FUSED_RNN_PARAMS Pointwise<LstmBackward> p) {
  using namespace pointwise;
  const LstmBackward& call = p.params.call;
  const Element e(p, call.layer.out, true);
  if (!e.is) return;
  const bool live = !e.ended(e.t);
  T dh = carried_back<T>(p, e);
  store(static_cast<T*>(p.state) + e.index, live ? T(0) : dh);
  dh += from_output<T>(p, e);
  put<T>(call.dh, e.at(call.dh, e.t), live ? dh : T(0));
  store(static_cast<T*>(p.operand) + e.index, live ? rounded(call.w_hh.dtype, dh) : T(0));
}

// product [S, B, H] = [dr dz dhn] W_hh.
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
gru_after_step_back(FUSED_RNN_PARAMS Pointwise<GruBackward> p) {
  using namespace pointwise;
  using V = Value<T>;
  const GruBackward& call = p.params.call;
  const int64_t H = call.layer.hidden;
  const Element e(p, H, true);
  if (!e.is) return;
  const bool live = !e.ended(e.t), cut = e.cut();
  T* state = static_cast<T*>(p.state) + e.index;
  const T carried = carried_back<T>(p, e), dh = carried + from_output<T>(p, e);
  const int64_t tape = e.at(call.gates, e.t);
  const auto d = math::gru_after_backward(
      V(get<T>(call.gates, tape)), V(get<T>(call.gates, tape + H)),
      V(get<T>(call.gates, tape + 2 * H)), V(get<T>(call.gates, tape + 3 * H)),
      V(entering<T>(e, call.y, call.h0)), V(dh));
  const int64_t at = e.at(call.dgates, e.t);
  put<T>(call.dgates, at, live ? d.dr.v : T(0));
  put<T>(call.dgates, at + H, live ? d.dz.v : T(0));
  put<T>(call.dgates, at + 2 * H, live ? d.dn.v : T(0));
  put<T>(call.dgates_hn, e.at(call.dgates_hn, e.t), live ? d.dhn.v : T(0));
  const T all[3] = {d.dr.v, d.dz.v, d.dhn.v};
  T* operand = static_cast<T*>(p.operand) + (e.index - e.unit) * 3 + e.unit;
  for (int k = 0; k < 3; ++k) {
    store(operand + k * H, live && !cut ? rounded(call.w_hh.dtype, all[k]) : T(0));
  }
  store(state, !live ? carried : cut ? T(0) : d.dh_prev.v);
}

// Reset before the product, first phase: product [S, B, H] = [dr dz] [W_hr; W_hz] of the step
// before. operand gets dn for W_hn; dz is written; state keeps dh's share that passes neither
// product.
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
gru_before_candidate_step_back(FUSED_RNN_PARAMS Pointwise<GruBackward> p) {
  using namespace pointwise;
  using V = Value<T>;
  const GruBackward& call = p.params.call;
  const int64_t H = call.layer.hidden;
  const Element e(p, H, true);
  if (!e.is) return;
  const bool live = !e.ended(e.t);
  T* state = static_cast<T*>(p.state) + e.index;
  const T carried = carried_back<T>(p, e), dh = carried + from_output<T>(p, e);
  const int64_t tape = e.at(call.gates, e.t), at = e.at(call.dgates, e.t);
  const auto d = math::gru_before_backward(V(get<T>(call.gates, tape + H)),
                                           V(get<T>(call.gates, tape + 2 * H)),
                                           V(entering<T>(e, call.y, call.h0)), V(dh));
  put<T>(call.dgates, at + H, live ? d.dz.v : T(0));
  put<T>(call.dgates, at + 2 * H, live ? d.dn.v : T(0));
  store(state, live ? d.dh_prev.v : carried);
  store(static_cast<T*>(p.operand) + e.index, live ? rounded(call.w_hh.dtype, d.dn.v) : T(0));
}

// Second phase: product [S, B, H] = dn W_hn; operand gets [dr dz].
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
gru_before_reset_step_back(FUSED_RNN_PARAMS Pointwise<GruBackward> p) {
  using namespace pointwise;
  using V = Value<T>;
  const GruBackward& call = p.params.call;
  const int64_t H = call.layer.hidden;
  const Element e(p, H, true);
  if (!e.is) return;
  const bool live = !e.ended(e.t), cut = e.cut();
  T* state = static_cast<T*>(p.state) + e.index;
  const T carried = load(state);
  const int64_t at = e.at(call.dgates, e.t);
  const auto d = math::gru_before_reset_backward(
      V(get<T>(call.gates, e.at(call.gates, e.t))), V(entering<T>(e, call.y, call.h0)),
      V(load(static_cast<const T*>(p.product) + e.index)), V(carried));
  put<T>(call.dgates, at, live ? d.dr.v : T(0));
  T* operand = static_cast<T*>(p.operand) + (e.index - e.unit) * 2 + e.unit;
  const bool passes = live && !cut;
  store(operand, passes ? rounded(call.w_hh.dtype, d.dr.v) : T(0));
  store(operand + H, passes ? rounded(call.w_hh.dtype, get<T>(call.dgates, at + H)) : T(0));
  store(state, !live ? carried : cut ? T(0) : d.dh_prev.v);
}

// product [S, B, H] = dgates W_hh.
template <class T>
FUSED_RNN_KERNEL(kPointwiseThreads)
rnn_step_back(FUSED_RNN_PARAMS Pointwise<RnnBackward> p) {
  using namespace pointwise;
  using V = Value<T>;
  const RnnBackward& call = p.params.call;
  const Element e(p, call.layer.hidden, true);
  if (!e.is) return;
  const bool live = !e.ended(e.t), cut = e.cut();
  T* state = static_cast<T*>(p.state) + e.index;
  const T carried = carried_back<T>(p, e), dh = carried + from_output<T>(p, e);
  const T y = get<T>(call.y, e.at(call.y, e.t));
  const T d = math::rnn_backward(V(y), V(dh), call.relu).v;
  put<T>(call.dgates, e.at(call.dgates, e.t), live ? d : T(0));
  store(static_cast<T*>(p.operand) + e.index, live && !cut ? rounded(call.w_hh.dtype, d) : T(0));
  store(state, live ? T(0) : carried);
}

}  // namespace fused_rnn::cuda
