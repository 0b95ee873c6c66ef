// The operators fused_rnn::cpu_*: waist/operators.h with this machine's kernels, and the matrix
// product.
#include "waist/operators.h"

#include "types.h"

namespace fused_rnn::cpu {
namespace {

struct Run {
  void check(const Tensor& w_hh) const {
    STD_TORCH_CHECK(w_hh.is_cpu(), "w_hh must be a CPU tensor");
  }
  int64_t max_row() const { return INT64_MAX; }
  void operator()(const LstmForward& p, const Arguments& a) const {
    chosen_kernels().lstm_forward(p, Input(), a.acc());
  }
  void operator()(const LstmBackward& p, const Arguments& a) const {
    chosen_kernels().lstm_backward(p, LayerGradients(), a.acc());
  }
  void operator()(const GruForward& p, const Arguments& a) const {
    chosen_kernels().gru_forward(p, Input(), a.acc());
  }
  void operator()(const GruBackward& p, const Arguments& a) const {
    chosen_kernels().gru_backward(p, LayerGradients(), a.acc());
  }
  void operator()(const RnnForward& p, const Arguments& a) const {
    chosen_kernels().rnn_forward(p, Input(), a.acc());
  }
  void operator()(const RnnBackward& p, const Arguments& a) const {
    chosen_kernels().rnn_backward(p, LayerGradients(), a.acc());
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(
    const Tensor& gates_x, const Tensor& w_hh, const MaybeTensor& w_hr, const Tensor& h0,
    const Tensor& c0, const MaybeTensor& flags, std::vector<bool> reverse, bool keep_gates) {
  LstmOutputs out =
      run_lstm_forward(Run(), gates_x, w_hh, w_hr, h0, c0, flags, reverse, true, keep_gates);
  return {out.y, out.h_n, out.c_n, out.cells, out.gates};
}

std::tuple<Tensor, Tensor, Tensor> lstm_inference(const Tensor& gates_x, const Tensor& w_hh,
                                                  const MaybeTensor& w_hr, const Tensor& h0,
                                                  const Tensor& c0, const MaybeTensor& flags,
                                                  std::vector<bool> reverse) {
  LstmOutputs out =
      run_lstm_forward(Run(), gates_x, w_hh, w_hr, h0, c0, flags, reverse, false, false);
  return {out.y, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
    const MaybeTensor& dcells, const Tensor& w_hh, const MaybeTensor& w_hr, const Tensor& c0,
    const Tensor& cells, const Tensor& gates, const MaybeTensor& flags, std::vector<bool> reverse) {
  return run_lstm_backward(Run(), dy, dh_n, dc_n, dcells, w_hh, w_hr, c0, cells, gates, flags,
                           reverse);
}

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& gates_x, const Tensor& w_hh,
                                               const MaybeTensor& b_hn, const Tensor& h0,
                                               const MaybeTensor& flags, std::vector<bool> reverse,
                                               bool reset_after, bool keep_gates) {
  GruOutputs out = run_gru_forward(Run(), gates_x, w_hh, b_hn, h0, flags, reverse, reset_after,
                                   true, keep_gates);
  return {out.y, out.h_n, out.gates};
}

std::tuple<Tensor, Tensor> gru_inference(const Tensor& gates_x, const Tensor& w_hh,
                                         const MaybeTensor& b_hn, const Tensor& h0,
                                         const MaybeTensor& flags, std::vector<bool> reverse,
                                         bool reset_after) {
  GruOutputs out =
      run_gru_forward(Run(), gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, false, false);
  return {out.y, out.h_n};
}

std::tuple<Tensor, Tensor, Tensor> gru_backward(const MaybeTensor& dy, const MaybeTensor& dh_n,
                                                const Tensor& w_hh, const Tensor& h0,
                                                const Tensor& y, const Tensor& gates,
                                                const MaybeTensor& flags, std::vector<bool> reverse,
                                                bool reset_after) {
  return run_gru_backward(Run(), dy, dh_n, w_hh, h0, y, gates, flags, reverse, reset_after);
}

std::tuple<Tensor, Tensor> rnn_forward(const Tensor& gates_x, const Tensor& w_hh, const Tensor& h0,
                                       const MaybeTensor& flags, std::vector<bool> reverse,
                                       bool relu) {
  return run_rnn_forward(Run(), gates_x, w_hh, h0, flags, reverse, relu);
}

std::tuple<Tensor, Tensor> rnn_backward(const MaybeTensor& dy, const MaybeTensor& dh_n,
                                        const Tensor& w_hh, const Tensor& y,
                                        const MaybeTensor& flags, std::vector<bool> reverse,
                                        bool relu) {
  return run_rnn_backward(Run(), dy, dh_n, w_hh, y, flags, reverse, relu);
}

Matrix matrix(const char* name, const Tensor& t, DType acc) {
  const DType dtype = dtype_of(name, t);
  STD_TORCH_CHECK(acc_of(dtype) == acc, name, " must be float64 where a is, and only there");
  const void* data = t.numel() == 0 ? nullptr : t.const_data_ptr();
  return Matrix{data, dtype, t.stride(0), t.dim() == 3 ? t.stride(1) : 0, t.stride(t.dim() - 1)};
}

Tensor matmul(const Tensor& a, const Tensor& b, const MaybeTensor& bias, int64_t least) {
  check_shape("a", a, {kAny, kAny, kAny}, "[N, M, K]", a);
  Matmul p;
  p.n = a.size(0), p.m = a.size(1), p.k = a.size(2), p.least = least;
  check_shape("b", b, {p.n, p.k, kAny}, "[N, K, L]", a);
  Right& r = p.right[0];
  r.l = b.size(2);
  const DType acc = acc_of(dtype_of("a", a));
  p.a = matrix("a", a, acc);
  r.b = matrix("b", b, acc);
  Tensor kept;
  if (bias) {
    check_shape("bias", *bias, {p.n, r.l}, "[N, L]", a);
    kept = as_contiguous(*bias);
    r.bias = matrix("bias", kept, acc);
  }
  Tensor out = new_tensor(a, {p.n, p.m, r.l}, acc);
  r.out = out.numel() == 0 ? nullptr : out.mutable_data_ptr();
  chosen_kernels().matmul(p, acc);
  return out;
}

}  // namespace
}  // namespace fused_rnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("cpu_lstm_forward", TORCH_BOX(&fused_rnn::cpu::lstm_forward));
  m.impl("cpu_lstm_inference", TORCH_BOX(&fused_rnn::cpu::lstm_inference));
  m.impl("cpu_lstm_backward", TORCH_BOX(&fused_rnn::cpu::lstm_backward));
  m.impl("cpu_gru_forward", TORCH_BOX(&fused_rnn::cpu::gru_forward));
  m.impl("cpu_gru_inference", TORCH_BOX(&fused_rnn::cpu::gru_inference));
  m.impl("cpu_gru_backward", TORCH_BOX(&fused_rnn::cpu::gru_backward));
  m.impl("cpu_rnn_forward", TORCH_BOX(&fused_rnn::cpu::rnn_forward));
  m.impl("cpu_rnn_backward", TORCH_BOX(&fused_rnn::cpu::rnn_backward));
  m.impl("cpu_matmul", TORCH_BOX(&fused_rnn::cpu::matmul));
}
