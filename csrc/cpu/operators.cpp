// The operators fused_rnn::cpu_*: arguments checked, outputs allocated, kernels called. Schemas are
// fused_rnn/ops.py's; shapes and meanings docs/design.md's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "types.h"

namespace fused_rnn::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kAny = -1;

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "]";
  return text.str();
}

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                 const char* axes) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  std::ostringstream wants;
  for (const int64_t size : shape) {
    same = same && (size == kAny || tensor.size(d) == size);
    wants << (d++ ? ", " : "") << (size == kAny ? "any" : std::to_string(size));
  }
  STD_TORCH_CHECK(same, name, " must have shape ", axes, " = [", wants.str(), "], got ",
                  shape_of(tensor));
}

DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  return DType::kFloat32;
}

DType acc_of(DType io) { return io == DType::kFloat64 ? io : DType::kFloat32; }

ScalarType scalar_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::Float;
  }
}

// The tensors of one call: keeps what it made contiguous alive, and checks as it takes.
class Arguments {
 public:
  explicit Arguments(DType io) : io_(io) {}

  // [T, B, S, n]; the last axis is made contiguous where it is not.
  Rows sequence(const char* name, const MaybeTensor& tensor, std::initializer_list<int64_t> shape,
                const char* axes) {
    if (!tensor) return {};
    const Tensor& t = take(name, *tensor, shape, axes);
    return rows(name, t, t.stride(0), t.stride(1), t.stride(2));
  }
  // [S, rows, n], or [S, n].
  Rows entries(const char* name, const MaybeTensor& tensor, std::initializer_list<int64_t> shape,
               const char* axes) {
    if (!tensor) return {};
    const Tensor& t = take(name, *tensor, shape, axes);
    return rows(name, t, 0, t.dim() == 3 ? t.stride(1) : 0, t.stride(0));
  }
  const uint8_t* flags(const MaybeTensor& tensor, int64_t steps, int64_t batch) {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Byte, "flags must be uint8");
    check_shape("flags", *tensor, {steps, batch}, "[T, B]");
    kept_.push_back(torch::stable::contiguous(*tensor));
    return static_cast<const uint8_t*>(kept_.back().const_data_ptr());
  }
  const uint8_t* reverse(const std::vector<bool>& values, int64_t stack) {
    STD_TORCH_CHECK(static_cast<int64_t>(values.size()) == stack, "reverse must have S = ", stack,
                    " values, got ", values.size());
    reverse_.assign(values.begin(), values.end());
    return reverse_.data();
  }

 private:
  const Tensor& take(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                     const char* axes) {
    check_shape(name, tensor, shape, axes);
    const int64_t last = tensor.dim() - 1;
    const bool dense = tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1;
    kept_.push_back(dense ? tensor : torch::stable::contiguous(tensor));
    return kept_.back();
  }
  Rows rows(const char* name, const Tensor& t, int64_t step, int64_t row, int64_t entry) const {
    const DType dtype = dtype_of(name, t);
    STD_TORCH_CHECK(dtype == io_ || dtype == acc_of(io_), name,
                    " must have the dtype of w_hh, or the one it is computed in");
    void* data = t.numel() == 0 ? nullptr : const_cast<void*>(t.const_data_ptr());
    return Rows{data, dtype, step, row, entry};
  }

  DType io_;
  std::vector<Tensor> kept_;
  std::vector<uint8_t> reverse_;
};

Tensor output(const Tensor& like, std::initializer_list<int64_t> shape, DType dtype) {
  return torch::stable::new_empty(like, shape, scalar_of(dtype));
}

// An output as the kernels write it: [T, B, S, n] or [S, B, n], contiguous.
Rows written(const Tensor& t, DType dtype) {
  const int64_t at = t.dim() - 3;
  void* data = t.numel() == 0 ? nullptr : t.mutable_data_ptr();
  if (at == 0) return Rows{data, dtype, 0, t.stride(1), t.stride(0)};
  return Rows{data, dtype, t.stride(0), t.stride(1), t.stride(2)};
}

// T, B, S, H and P from gates [T, B, S, gates*H] and w_hh [S, gates*H, P], checked.
Layer layer_of(const char* name, const Tensor& sequence, const Tensor& w_hh, int gates) {
  STD_TORCH_CHECK(sequence.dim() == 4, name, " must have shape [T, B, S, n], got ",
                  shape_of(sequence));
  STD_TORCH_CHECK(w_hh.dim() == 3, "w_hh must have shape [S, G*H, P], got ", shape_of(w_hh));
  Layer layer;
  layer.steps = sequence.size(0);
  layer.batch = sequence.size(1);
  layer.stack = sequence.size(2);
  layer.hidden = w_hh.size(1) / gates;
  layer.out = w_hh.size(2);
  STD_TORCH_CHECK(layer.steps > 0, name, " must have at least one step, got ", shape_of(sequence));
  STD_TORCH_CHECK(layer.hidden > 0 && layer.out > 0 && layer.hidden * gates == w_hh.size(1),
                  "w_hh must have shape [S, ", gates, "*H, P] with H, P > 0, got ", shape_of(w_hh));
  return layer;
}

void check_square(const Layer& layer, const Tensor& w_hh) {
  STD_TORCH_CHECK(layer.out == layer.hidden, "w_hh must have shape [S, G*H, H], got ",
                  shape_of(w_hh));
}

struct LstmOutputs {
  Tensor y, h_n, c_n, cells, gates;
};

// The LSTM's forward; keeps cells, and gates besides, where asked.
LstmOutputs lstm(const Tensor& gates_x, const Tensor& w_hh, const MaybeTensor& w_hr,
                 const Tensor& h0, const Tensor& c0, const MaybeTensor& flags,
                 const std::vector<bool>& reverse, bool keep_cells, bool keep_gates) {
  const DType io = dtype_of("w_hh", w_hh), acc = acc_of(io);
  LstmForward p;
  Layer& l = p.layer = layer_of("gates_x", gates_x, w_hh, 4);
  if (!w_hr) check_square(l, w_hh);
  Arguments take(io);
  p.gates_x =
      take.sequence("gates_x", gates_x, {l.steps, l.batch, l.stack, 4 * l.hidden}, "[T, B, S, 4H]");
  p.w_hh = take.entries("w_hh", w_hh, {l.stack, 4 * l.hidden, l.out}, "[S, 4H, P]");
  p.w_hr = take.entries("w_hr", w_hr, {l.stack, l.out, l.hidden}, "[S, P, H]");
  p.h0 = take.entries("h0", h0, {l.stack, l.batch, l.out}, "[S, B, P]");
  p.c0 = take.entries("c0", c0, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  l.flags = take.flags(flags, l.steps, l.batch);
  l.reverse = take.reverse(reverse, l.stack);
  LstmOutputs out{output(w_hh, {l.steps, l.batch, l.stack, l.out}, io),
                  output(w_hh, {l.stack, l.batch, l.out}, io),
                  output(w_hh, {l.stack, l.batch, l.hidden}, acc), Tensor(), Tensor()};
  p.y = written(out.y, io);
  p.h_n = written(out.h_n, io);
  p.c_n = written(out.c_n, acc);
  if (keep_cells) {
    out.cells = output(w_hh, {l.steps, l.batch, l.stack, l.hidden}, acc);
    out.gates = output(w_hh, {l.steps, l.batch, l.stack, keep_gates ? 4 * l.hidden : 0}, acc);
    p.cells = written(out.cells, acc);
    p.gates = written(out.gates, acc);
  }
  chosen_kernels().lstm_forward(p, acc);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(
    const Tensor& gates_x, const Tensor& w_hh, const MaybeTensor& w_hr, const Tensor& h0,
    const Tensor& c0, const MaybeTensor& flags, std::vector<bool> reverse, bool keep_gates) {
  LstmOutputs out = lstm(gates_x, w_hh, w_hr, h0, c0, flags, reverse, true, keep_gates);
  return {out.y, out.h_n, out.c_n, out.cells, out.gates};
}

std::tuple<Tensor, Tensor, Tensor> lstm_inference(const Tensor& gates_x, const Tensor& w_hh,
                                                  const MaybeTensor& w_hr, const Tensor& h0,
                                                  const Tensor& c0, const MaybeTensor& flags,
                                                  std::vector<bool> reverse) {
  LstmOutputs out = lstm(gates_x, w_hh, w_hr, h0, c0, flags, reverse, false, false);
  return {out.y, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
    const MaybeTensor& dcells, const Tensor& w_hh, const MaybeTensor& w_hr, const Tensor& c0,
    const Tensor& cells, const Tensor& gates, const MaybeTensor& flags, std::vector<bool> reverse) {
  const DType io = dtype_of("w_hh", w_hh), acc = acc_of(io);
  LstmBackward p;
  Layer& l = p.layer = layer_of("cells", cells, w_hh, 4);
  if (!w_hr) check_square(l, w_hh);
  Arguments take(io);
  const auto shape = {l.steps, l.batch, l.stack, l.hidden};
  p.dy = take.sequence("dy", dy, {l.steps, l.batch, l.stack, l.out}, "[T, B, S, P]");
  p.dh_n = take.entries("dh_n", dh_n, {l.stack, l.batch, l.out}, "[S, B, P]");
  p.dc_n = take.entries("dc_n", dc_n, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  p.dcells = take.sequence("dcells", dcells, shape, "[T, B, S, H]");
  p.w_hh = take.entries("w_hh", w_hh, {l.stack, 4 * l.hidden, l.out}, "[S, 4H, P]");
  p.w_hr = take.entries("w_hr", w_hr, {l.stack, l.out, l.hidden}, "[S, P, H]");
  p.c0 = take.entries("c0", c0, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  p.cells = take.sequence("cells", cells, shape, "[T, B, S, H]");
  p.gates =
      take.sequence("gates", gates, {l.steps, l.batch, l.stack, 4 * l.hidden}, "[T, B, S, 4H]");
  l.flags = take.flags(flags, l.steps, l.batch);
  l.reverse = take.reverse(reverse, l.stack);
  Tensor dgates = output(w_hh, {l.steps, l.batch, l.stack, 4 * l.hidden}, acc);
  Tensor dh0 = output(w_hh, {l.stack, l.batch, l.out}, acc);
  Tensor dc0 = output(w_hh, {l.stack, l.batch, l.hidden}, acc);
  Tensor dh = output(w_hh, {l.steps, l.batch, l.stack, w_hr ? l.out : 0}, acc);
  p.dgates = written(dgates, acc);
  p.dh0 = written(dh0, acc);
  p.dc0 = written(dc0, acc);
  p.dh = written(dh, acc);
  chosen_kernels().lstm_backward(p, acc);
  return {dgates, dh0, dc0, dh};
}

struct GruOutputs {
  Tensor y, h_n, gates;
};

GruOutputs gru(const Tensor& gates_x, const Tensor& w_hh, const MaybeTensor& b_hn, const Tensor& h0,
               const MaybeTensor& flags, const std::vector<bool>& reverse, bool reset_after,
               bool returns_gates, bool keep_gates) {
  const DType io = dtype_of("w_hh", w_hh), acc = acc_of(io);
  GruForward p;
  Layer& l = p.layer = layer_of("gates_x", gates_x, w_hh, 3);
  check_square(l, w_hh);
  STD_TORCH_CHECK(reset_after || !b_hn, "b_hn must be None with reset_after=False");
  Arguments take(io);
  p.gates_x =
      take.sequence("gates_x", gates_x, {l.steps, l.batch, l.stack, 3 * l.hidden}, "[T, B, S, 3H]");
  p.w_hh = take.entries("w_hh", w_hh, {l.stack, 3 * l.hidden, l.hidden}, "[S, 3H, H]");
  p.b_hn = take.entries("b_hn", b_hn, {l.stack, l.hidden}, "[S, H]");
  p.h0 = take.entries("h0", h0, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  l.flags = take.flags(flags, l.steps, l.batch);
  l.reverse = take.reverse(reverse, l.stack);
  p.reset_after = reset_after;
  GruOutputs out{output(w_hh, {l.steps, l.batch, l.stack, l.hidden}, io),
                 output(w_hh, {l.stack, l.batch, l.hidden}, io), Tensor()};
  p.y = written(out.y, io);
  p.h_n = written(out.h_n, io);
  if (returns_gates) {
    const int64_t width = keep_gates ? (reset_after ? 4 : 3) * l.hidden : 0;
    out.gates = output(w_hh, {l.steps, l.batch, l.stack, width}, acc);
    p.gates = written(out.gates, acc);
  }
  chosen_kernels().gru_forward(p, acc);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gru_forward(const Tensor& gates_x, const Tensor& w_hh,
                                               const MaybeTensor& b_hn, const Tensor& h0,
                                               const MaybeTensor& flags, std::vector<bool> reverse,
                                               bool reset_after, bool keep_gates) {
  GruOutputs out = gru(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, true, keep_gates);
  return {out.y, out.h_n, out.gates};
}

std::tuple<Tensor, Tensor> gru_inference(const Tensor& gates_x, const Tensor& w_hh,
                                         const MaybeTensor& b_hn, const Tensor& h0,
                                         const MaybeTensor& flags, std::vector<bool> reverse,
                                         bool reset_after) {
  GruOutputs out = gru(gates_x, w_hh, b_hn, h0, flags, reverse, reset_after, false, false);
  return {out.y, out.h_n};
}

std::tuple<Tensor, Tensor, Tensor> gru_backward(const MaybeTensor& dy, const MaybeTensor& dh_n,
                                                const Tensor& w_hh, const Tensor& h0,
                                                const Tensor& y, const Tensor& gates,
                                                const MaybeTensor& flags, std::vector<bool> reverse,
                                                bool reset_after) {
  const DType io = dtype_of("w_hh", w_hh), acc = acc_of(io);
  GruBackward p;
  Layer& l = p.layer = layer_of("y", y, w_hh, 3);
  check_square(l, w_hh);
  Arguments take(io);
  const auto shape = {l.steps, l.batch, l.stack, l.hidden};
  p.dy = take.sequence("dy", dy, shape, "[T, B, S, H]");
  p.dh_n = take.entries("dh_n", dh_n, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  p.w_hh = take.entries("w_hh", w_hh, {l.stack, 3 * l.hidden, l.hidden}, "[S, 3H, H]");
  p.h0 = take.entries("h0", h0, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  p.y = take.sequence("y", y, shape, "[T, B, S, H]");
  p.gates =
      take.sequence("gates", gates, {l.steps, l.batch, l.stack, (reset_after ? 4 : 3) * l.hidden},
                    reset_after ? "[T, B, S, 4H]" : "[T, B, S, 3H]");
  l.flags = take.flags(flags, l.steps, l.batch);
  l.reverse = take.reverse(reverse, l.stack);
  p.reset_after = reset_after;
  Tensor dgates = output(w_hh, {l.steps, l.batch, l.stack, 3 * l.hidden}, acc);
  Tensor dgates_hn = output(w_hh, {l.steps, l.batch, l.stack, reset_after ? l.hidden : 0}, acc);
  Tensor dh0 = output(w_hh, {l.stack, l.batch, l.hidden}, acc);
  p.dgates = written(dgates, acc);
  p.dgates_hn = written(dgates_hn, acc);
  p.dh0 = written(dh0, acc);
  chosen_kernels().gru_backward(p, acc);
  return {dgates, dgates_hn, dh0};
}

std::tuple<Tensor, Tensor> rnn_forward(const Tensor& gates_x, const Tensor& w_hh, const Tensor& h0,
                                       const MaybeTensor& flags, std::vector<bool> reverse,
                                       bool relu) {
  const DType io = dtype_of("w_hh", w_hh), acc = acc_of(io);
  RnnForward p;
  Layer& l = p.layer = layer_of("gates_x", gates_x, w_hh, 1);
  check_square(l, w_hh);
  Arguments take(io);
  p.gates_x =
      take.sequence("gates_x", gates_x, {l.steps, l.batch, l.stack, l.hidden}, "[T, B, S, H]");
  p.w_hh = take.entries("w_hh", w_hh, {l.stack, l.hidden, l.hidden}, "[S, H, H]");
  p.h0 = take.entries("h0", h0, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  l.flags = take.flags(flags, l.steps, l.batch);
  l.reverse = take.reverse(reverse, l.stack);
  p.relu = relu;
  Tensor y = output(w_hh, {l.steps, l.batch, l.stack, l.hidden}, io);
  Tensor h_n = output(w_hh, {l.stack, l.batch, l.hidden}, io);
  p.y = written(y, io);
  p.h_n = written(h_n, io);
  chosen_kernels().rnn_forward(p, acc);
  return {y, h_n};
}

std::tuple<Tensor, Tensor> rnn_backward(const MaybeTensor& dy, const MaybeTensor& dh_n,
                                        const Tensor& w_hh, const Tensor& y,
                                        const MaybeTensor& flags, std::vector<bool> reverse,
                                        bool relu) {
  const DType io = dtype_of("w_hh", w_hh), acc = acc_of(io);
  RnnBackward p;
  Layer& l = p.layer = layer_of("y", y, w_hh, 1);
  check_square(l, w_hh);
  Arguments take(io);
  const auto shape = {l.steps, l.batch, l.stack, l.hidden};
  p.dy = take.sequence("dy", dy, shape, "[T, B, S, H]");
  p.dh_n = take.entries("dh_n", dh_n, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  p.w_hh = take.entries("w_hh", w_hh, {l.stack, l.hidden, l.hidden}, "[S, H, H]");
  p.y = take.sequence("y", y, shape, "[T, B, S, H]");
  l.flags = take.flags(flags, l.steps, l.batch);
  l.reverse = take.reverse(reverse, l.stack);
  p.relu = relu;
  Tensor dgates = output(w_hh, shape, acc);
  Tensor dh0 = output(w_hh, {l.stack, l.batch, l.hidden}, acc);
  p.dgates = written(dgates, acc);
  p.dh0 = written(dh0, acc);
  chosen_kernels().rnn_backward(p, acc);
  return {dgates, dh0};
}

Matrix matrix(const char* name, const Tensor& t, DType acc) {
  const DType dtype = dtype_of(name, t);
  STD_TORCH_CHECK(acc_of(dtype) == acc, name, " must be float64 where a is, and only there");
  const void* data = t.numel() == 0 ? nullptr : t.const_data_ptr();
  return Matrix{data, dtype, t.stride(0), t.dim() == 3 ? t.stride(1) : 0, t.stride(t.dim() - 1)};
}

Tensor matmul(const Tensor& a, const Tensor& b, const MaybeTensor& bias) {
  check_shape("a", a, {kAny, kAny, kAny}, "[N, M, K]");
  Matmul p;
  p.n = a.size(0), p.m = a.size(1), p.k = a.size(2);
  check_shape("b", b, {p.n, p.k, kAny}, "[N, K, L]");
  p.l = b.size(2);
  const DType acc = acc_of(dtype_of("a", a));
  p.a = matrix("a", a, acc);
  p.b = matrix("b", b, acc);
  Tensor kept;
  if (bias) {
    check_shape("bias", *bias, {p.n, p.l}, "[N, L]");
    kept = torch::stable::contiguous(*bias);
    p.bias = matrix("bias", kept, acc);
  }
  Tensor out = output(a, {p.n, p.m, p.l}, acc);
  p.out = out.numel() == 0 ? nullptr : out.mutable_data_ptr();
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
