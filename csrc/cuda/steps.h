// The step path: for each step torch's matrix product, then a pointwise kernel; any size,
// projections and float64. Products are taken in the dtype of the arithmetic: 16-bit weights are
// widened once a call, and operands hold rounded values.
#pragma once

#include <array>
#include <vector>

#include "cuda/launch.h"
#include "waist/operators.h"

namespace fused_rnn::cuda {

// What an emulator has to know of a launch's memory; nothing on a GPU.
void touches(const void* data, size_t bytes, bool written, const char* name);

// out = a @ b for stacks of matrices.
inline void product_into(Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// The tensors and launches of one call by steps.
template <class Call>
class Steps {
 public:
  Steps(const Call& call, const Arguments& arguments, void* stream)
      : like_(arguments.like()), acc_(arguments.acc()), stream_(stream) {
    base_.params.call = call;
    base_.io = arguments.io();
    const Layer& l = call.layer;
    stack_ = l.stack, batch_ = l.batch;
  }

  // [S, B, width], its values not set.
  Tensor work(const char* name, int64_t width) const {
    Tensor t = new_tensor(like_, {stack_, batch_, width}, acc_);
    touches(t.mutable_data_ptr(), static_cast<size_t>(t.numel() * size_of(acc_)), false, name);
    return t;
  }
  Tensor zeros(const char* name, int64_t width) const {
    Tensor t = work(name, width);
    torch::stable::zero_(t);
    touches(t.mutable_data_ptr(), static_cast<size_t>(t.numel() * size_of(acc_)), true, name);
    return t;
  }
  // Weights in the dtype of the arithmetic; rows [first, first + count) of axis 1.
  Tensor weights(const Tensor& w, int64_t first, int64_t count) const {
    Tensor source = w;
    Tensor rows = torch::stable::narrow(source, 1, first, count);
    if (w.scalar_type() == scalar_of(acc_)) return rows;
    Tensor t = new_tensor(like_, {w.size(0), count, w.size(2)}, acc_);
    torch::stable::copy_(t, rows);
    return t;
  }
  // What a product writes, a kernel reads.
  void multiply(Tensor& out, const Tensor& a, const Tensor& b) const {
    product_into(out, a, b);
    touches(out.mutable_data_ptr(), static_cast<size_t>(out.numel() * size_of(acc_)), true,
            "product");
  }

  Pointwise<Call> base() const { return base_; }
  void launch(Phase phase, const Pointwise<Call>& p) const {
    launch_pointwise(phase, acc_, p, stream_);
  }
  // state = rows (or zeros); operand, where given, what the first product multiplies.
  void start(const Rows& rows, int64_t width, Tensor& state, Tensor* operand, DType io) const {
    Pointwise<Call> p = base_;
    p.rows = rows, p.width = width, p.state = state.mutable_data_ptr(), p.io = io;
    if (operand != nullptr) p.operand = operand->mutable_data_ptr();
    launch(Phase::kStart, p);
  }
  // rows = state (+ product).
  void finish(const Rows& rows, int64_t width, Tensor& state, Tensor* product) const {
    Pointwise<Call> p = base_;
    p.rows = rows, p.width = width, p.state = state.mutable_data_ptr();
    if (product != nullptr) p.product = product->mutable_data_ptr();
    launch(Phase::kFinish, p);
  }

 private:
  Tensor like_;
  DType acc_;
  void* stream_;
  Pointwise<Call> base_;
  int64_t stack_, batch_;
};

inline Tensor transposed(const Tensor& w) { return torch::stable::transpose(w, 1, 2); }

inline void run_steps(const LstmForward& call, const Arguments& a, const Tensor& w_hh,
                      const MaybeTensor& w_hr, void* stream) {
  const Layer& l = call.layer;
  const int64_t H = l.hidden, P = l.out;
  const Steps<LstmForward> steps(call, a, stream);
  Tensor h = steps.work("h", P), c = steps.work("c", H), operand = steps.work("operand", P);
  Tensor product = steps.work("product", 4 * H);
  const Tensor w = transposed(steps.weights(w_hh, 0, 4 * H));
  steps.start(call.h0, P, h, &operand, a.io());
  // (The second operand is not used: it is there for the cell state to be zeroed as the state is.)
  Tensor unused = steps.work("unused", H);
  steps.start(call.c0, H, c, &unused, a.acc());
  Pointwise<LstmForward> first = steps.base(), second = first;
  first.width = H, first.product = product.mutable_data_ptr();
  first.state = h.mutable_data_ptr(), first.cell = c.mutable_data_ptr();
  first.operand = operand.mutable_data_ptr();
  if (!w_hr) {
    for (first.step = 0; first.step < l.steps; ++first.step) {
      steps.multiply(product, operand, w);
      steps.launch(Phase::kFirst, first);
    }
  } else {
    Tensor m = steps.work("m", H), projected = steps.work("projected", P);
    const Tensor w_p = transposed(steps.weights(*w_hr, 0, P));
    first.operand = m.mutable_data_ptr();
    second.width = P, second.product = projected.mutable_data_ptr();
    second.state = h.mutable_data_ptr(), second.operand = operand.mutable_data_ptr();
    for (int64_t step = 0; step < l.steps; ++step) {
      first.step = second.step = step;
      steps.multiply(product, operand, w);
      steps.launch(Phase::kFirst, first);
      steps.multiply(projected, m, w_p);
      steps.launch(Phase::kSecond, second);
    }
  }
  steps.finish(call.h_n, P, h, nullptr);
  steps.finish(call.c_n, H, c, nullptr);
}

inline void run_steps(const LstmBackward& call, const Arguments& a, const Tensor& w_hh,
                      const MaybeTensor& w_hr, void* stream) {
  const Layer& l = call.layer;
  const int64_t H = l.hidden, P = l.out;
  const Steps<LstmBackward> steps(call, a, stream);
  Tensor dh = steps.work("dh", P), dc = steps.work("dc", H), operand = steps.work("operand", 4 * H);
  Tensor product = steps.zeros("product", P);
  const Tensor w = steps.weights(w_hh, 0, 4 * H);
  steps.start(call.dh_n, P, dh, nullptr, a.acc());
  steps.start(call.dc_n, H, dc, nullptr, a.acc());
  Pointwise<LstmBackward> last = steps.base(), first = last;
  last.width = H, last.product = product.mutable_data_ptr();
  last.state = dh.mutable_data_ptr(), last.cell = dc.mutable_data_ptr();
  last.operand = operand.mutable_data_ptr();
  if (!w_hr) {
    for (last.step = 0; last.step < l.steps; ++last.step) {
      steps.launch(Phase::kFirst, last);
      steps.multiply(product, operand, w);
    }
  } else {
    Tensor projected = steps.work("projected", P), dm = steps.work("dm", H);
    const Tensor w_p = steps.weights(*w_hr, 0, P);
    first.width = P, first.product = product.mutable_data_ptr();
    first.state = dh.mutable_data_ptr(), first.operand = projected.mutable_data_ptr();
    last.other = dm.mutable_data_ptr();
    for (int64_t step = 0; step < l.steps; ++step) {
      first.step = last.step = step;
      steps.launch(Phase::kFirst, first);
      steps.multiply(dm, projected, w_p);
      steps.launch(Phase::kSecond, last);
      steps.multiply(product, operand, w);
    }
  }
  steps.finish(call.dh0, P, dh, &product);
  steps.finish(call.dc0, H, dc, nullptr);
}

inline void run_steps(const GruForward& call, const Arguments& a, const Tensor& w_hh,
                      const MaybeTensor&, void* stream) {
  const Layer& l = call.layer;
  const int64_t H = l.hidden;
  const Steps<GruForward> steps(call, a, stream);
  Tensor h = steps.work("h", H), operand = steps.work("operand", H);
  steps.start(call.h0, H, h, &operand, a.io());
  const int64_t gates = call.reset_after ? 3 : 2;
  Tensor product = steps.work("product", gates * H);
  const Tensor w = transposed(steps.weights(w_hh, 0, gates * H));
  Pointwise<GruForward> first = steps.base(), second = first;
  first.width = H, first.product = product.mutable_data_ptr();
  first.state = h.mutable_data_ptr(), first.operand = operand.mutable_data_ptr();
  if (call.reset_after) {
    for (first.step = 0; first.step < l.steps; ++first.step) {
      steps.multiply(product, operand, w);
      steps.launch(Phase::kFirst, first);
    }
  } else {
    Tensor rh = steps.work("rh", H), z = steps.work("z", H), candidate = steps.work("candidate", H);
    const Tensor w_n = transposed(steps.weights(w_hh, 2 * H, H));
    first.operand = rh.mutable_data_ptr(), first.other = z.mutable_data_ptr();
    second = first;
    second.product = candidate.mutable_data_ptr(), second.operand = operand.mutable_data_ptr();
    for (int64_t step = 0; step < l.steps; ++step) {
      first.step = second.step = step;
      steps.multiply(product, operand, w);
      steps.launch(Phase::kFirst, first);
      steps.multiply(candidate, rh, w_n);
      steps.launch(Phase::kSecond, second);
    }
  }
  steps.finish(call.h_n, H, h, nullptr);
}

inline void run_steps(const GruBackward& call, const Arguments& a, const Tensor& w_hh,
                      const MaybeTensor&, void* stream) {
  const Layer& l = call.layer;
  const int64_t H = l.hidden;
  const Steps<GruBackward> steps(call, a, stream);
  const int64_t gates = call.reset_after ? 3 : 2;
  Tensor dh = steps.work("dh", H), operand = steps.work("operand", gates * H);
  Tensor product = steps.zeros("product", H);
  const Tensor w = steps.weights(w_hh, 0, gates * H);
  steps.start(call.dh_n, H, dh, nullptr, a.acc());
  Pointwise<GruBackward> first = steps.base(), second = first;
  first.width = H, first.product = product.mutable_data_ptr();
  first.state = dh.mutable_data_ptr(), first.operand = operand.mutable_data_ptr();
  if (call.reset_after) {
    for (first.step = 0; first.step < l.steps; ++first.step) {
      steps.launch(Phase::kFirst, first);
      steps.multiply(product, operand, w);
    }
  } else {
    Tensor dn = steps.work("dn", H), drh = steps.work("drh", H);
    const Tensor w_n = steps.weights(w_hh, 2 * H, H);
    second = first;
    first.operand = dn.mutable_data_ptr(), second.product = drh.mutable_data_ptr();
    for (int64_t step = 0; step < l.steps; ++step) {
      first.step = second.step = step;
      steps.launch(Phase::kFirst, first);
      steps.multiply(drh, dn, w_n);
      steps.launch(Phase::kSecond, second);
      steps.multiply(product, operand, w);
    }
  }
  steps.finish(call.dh0, H, dh, &product);
}

inline void run_steps(const RnnForward& call, const Arguments& a, const Tensor& w_hh,
                      const MaybeTensor&, void* stream) {
  const Layer& l = call.layer;
  const int64_t H = l.hidden;
  const Steps<RnnForward> steps(call, a, stream);
  Tensor h = steps.work("h", H), operand = steps.work("operand", H);
  Tensor product = steps.work("product", H);
  steps.start(call.h0, H, h, &operand, a.acc());  // unrounded; see docs/design.md
  const Tensor w = transposed(steps.weights(w_hh, 0, H));
  Pointwise<RnnForward> p = steps.base();
  p.width = H, p.product = product.mutable_data_ptr();
  p.state = h.mutable_data_ptr(), p.operand = operand.mutable_data_ptr();
  for (p.step = 0; p.step < l.steps; ++p.step) {
    steps.multiply(product, operand, w);
    steps.launch(Phase::kFirst, p);
  }
  steps.finish(call.h_n, H, h, nullptr);
}

inline void run_steps(const RnnBackward& call, const Arguments& a, const Tensor& w_hh,
                      const MaybeTensor&, void* stream) {
  const Layer& l = call.layer;
  const int64_t H = l.hidden;
  const Steps<RnnBackward> steps(call, a, stream);
  Tensor dh = steps.work("dh", H), operand = steps.work("operand", H);
  Tensor product = steps.zeros("product", H);
  const Tensor w = steps.weights(w_hh, 0, H);
  steps.start(call.dh_n, H, dh, nullptr, a.acc());
  Pointwise<RnnBackward> p = steps.base();
  p.width = H, p.product = product.mutable_data_ptr();
  p.state = dh.mutable_data_ptr(), p.operand = operand.mutable_data_ptr();
  for (p.step = 0; p.step < l.steps; ++p.step) {
    steps.launch(Phase::kFirst, p);
    steps.multiply(product, operand, w);
  }
  steps.finish(call.dh0, H, dh, &product);
}

}  // namespace fused_rnn::cuda
