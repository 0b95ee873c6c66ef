// What the operators of every C++ backend do: check arguments, allocate outputs, describe the call
// in the structs of calls.h, and hand it to a Run. Schemas are fused_rnn/ops.py's; shapes and
// meanings docs/design.md's. A Run is called with a call's struct, the dtype of its arithmetic and
// the memory it touches; it checks the device in check(w_hh), and says in max_row() how far apart
// rows may lie.
#pragma once

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

#include "waist/calls.h"

namespace fused_rnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

constexpr int64_t kAny = -1;

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "]";
  return text.str();
}

// Shape, and the device of `like`.
inline void check_shape(const char* name, const Tensor& tensor, Shape shape, const char* axes,
                        const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cpu() == like.is_cpu() && tensor.is_cuda() == like.is_cuda() &&
                      tensor.get_device_index() == like.get_device_index(),
                  name, " must be on the device of the other arguments");
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) {
    same = same && (size == kAny || tensor.size(d) == size);
    ++d;
  }
  if (same) return;
  std::ostringstream wants;
  for (const int64_t size : shape) {
    wants << (&size == shape.begin() ? "" : ", ") << (size == kAny ? "any" : std::to_string(size));
  }
  STD_TORCH_CHECK(false, name, " must have shape ", axes, " = [", wants.str(), "], got ",
                  shape_of(tensor));
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline DType dtype_of(const char* name, const Tensor& tensor) {
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

inline DType acc_of(DType io) { return io == DType::kFloat64 ? io : DType::kFloat32; }

inline ScalarType scalar_of(DType dtype) {
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

// A new contiguous tensor on the device of `like`; torch::stable::new_empty looks its operator up
// by name each time, which takes longer than a small scan.
inline Tensor new_tensor(const Tensor& like, Shape shape, DType dtype) {
  int64_t strides[4], next = 1;
  STD_TORCH_CHECK(shape.size() <= 4, "new_tensor has four axes at most");
  for (size_t d = shape.size(); d-- > 0;) {
    const int64_t size = shape.begin()[d];
    strides[d] = next;
    next *= size > 1 ? size : 1;
  }
  int32_t type = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const auto scalar = torch::stable::detail::from(scalar_of(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides,
                               torch::stable::detail::to<int32_t>(scalar), type, index, &handle));
  return Tensor(handle);
}

// A piece of memory a call touches. written: it holds values already.
struct Memory {
  const void* data;
  size_t bytes;
  bool written;
  const char* name;
};

// The tensors of one call: checks them, keeps alive what it made contiguous, allocates outputs.
class Arguments {
 public:
  // w_hh decides dtype and device. max_row: what has rows farther apart is copied.
  Arguments(const Tensor& w_hh, int64_t max_row)
      : like_(w_hh), io_(dtype_of("w_hh", w_hh)), max_row_(max_row) {}

  DType io() const { return io_; }
  DType acc() const { return acc_of(io_); }
  const Tensor& like() const { return like_; }
  const std::vector<Memory>& memory() const { return memory_; }

  // [T, B, S, n]; the last axis is made contiguous where it is not.
  Rows sequence(const char* name, const MaybeTensor& tensor, Shape shape, const char* axes) {
    if (!tensor) return {};
    const Tensor& t = take(name, *tensor, shape, axes);
    return rows(name, t, t.stride(0), t.stride(1), t.stride(2));
  }
  // [S, rows, n], or [S, n].
  Rows entries(const char* name, const MaybeTensor& tensor, Shape shape, const char* axes) {
    if (!tensor) return {};
    const Tensor& t = take(name, *tensor, shape, axes);
    return rows(name, t, 0, t.dim() == 3 ? t.stride(1) : 0, t.stride(0));
  }
  const uint8_t* flags(const MaybeTensor& tensor, int64_t steps, int64_t batch) {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Byte, "flags must be uint8");
    check_shape("flags", *tensor, {steps, batch}, "[T, B]", like_);
    kept_.push_back(as_contiguous(*tensor));
    if (kept_.back().numel() == 0) return nullptr;
    const void* data = kept_.back().const_data_ptr();
    memory_.push_back({data, static_cast<size_t>(steps * batch), true, "flags"});
    return static_cast<const uint8_t*>(data);
  }
  const uint8_t* reverse(const std::vector<bool>& values, int64_t stack) {
    STD_TORCH_CHECK(static_cast<int64_t>(values.size()) == stack, "reverse must have S = ", stack,
                    " values, got ", values.size());
    reverse_.assign(values.begin(), values.end());
    return reverse_.data();
  }
  // A new [T, B, S, n] or [S, B, n], contiguous, and how kernels write it.
  Tensor output(const char* name, Shape shape, DType dtype, Rows& rows) {
    return output(name, new_tensor(like_, shape, dtype), rows);
  }
  Tensor output(const char* name, Tensor t, Rows& rows) {
    const DType dtype = dtype_of(name, t);
    rows = Rows{};
    rows.dtype = dtype;
    if (t.numel() == 0) return t;
    const bool sequence = t.dim() == 4;
    rows = Rows{t.mutable_data_ptr(), dtype, sequence ? t.stride(0) : 0, t.stride(1),
                t.stride(sequence ? 2 : 0)};
    memory_.push_back({rows.data, static_cast<size_t>(t.numel() * size_of(dtype)), false, name});
    return t;
  }

 private:
  const Tensor& take(const char* name, const Tensor& tensor, Shape shape, const char* axes) {
    check_shape(name, tensor, shape, axes, like_);
    const int64_t last = tensor.dim() - 1;
    bool dense = tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1;
    dense = dense && (last < 2 || tensor.size(1) <= 1 || tensor.stride(1) <= max_row_);
    kept_.push_back(dense ? tensor : torch::stable::contiguous(tensor));
    return kept_.back();
  }
  Rows rows(const char* name, const Tensor& t, int64_t step, int64_t row, int64_t entry) {
    const DType dtype = dtype_of(name, t);
    STD_TORCH_CHECK(dtype == io_ || dtype == acc(), name,
                    " must have the dtype of w_hh, or the one it is computed in");
    if (t.numel() == 0) return Rows{nullptr, dtype, step, row, entry};
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    void* data = const_cast<void*>(t.const_data_ptr());
    memory_.push_back({data, static_cast<size_t>((last + 1) * size_of(dtype)), true, name});
    return Rows{data, dtype, step, row, entry};
  }

  Tensor like_;
  DType io_;
  int64_t max_row_;
  std::vector<Tensor> kept_;
  std::vector<uint8_t> reverse_;
  std::vector<Memory> memory_;
};

// T, B, S, H and P from a sequence [T, B, S, n] and w_hh [S, gates*H, P], checked.
inline Layer layer_of(const char* name, const Tensor& sequence, const Tensor& w_hh, int gates) {
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

inline void check_square(const Layer& layer, const Tensor& w_hh) {
  STD_TORCH_CHECK(layer.out == layer.hidden, "w_hh must have shape [S, G*H, H], got ",
                  shape_of(w_hh));
}

struct LstmOutputs {
  Tensor y, h_n, c_n, cells, gates;
};

// The LSTM's forward; keeps cells, and gates besides, where asked.
template <class Run>
LstmOutputs run_lstm_forward(const Run& run, const Tensor& gates_x, const Tensor& w_hh,
                             const MaybeTensor& w_hr, const Tensor& h0, const Tensor& c0,
                             const MaybeTensor& flags, const std::vector<bool>& reverse,
                             bool keep_cells, bool keep_gates) {
  run.check(w_hh);
  Arguments take(w_hh, run.max_row());
  LstmForward p;
  Layer& l = p.layer = layer_of("gates_x", gates_x, w_hh, 4);
  if (!w_hr) check_square(l, w_hh);
  p.gates_x =
      take.sequence("gates_x", gates_x, {l.steps, l.batch, l.stack, 4 * l.hidden}, "[T, B, S, 4H]");
  p.w_hh = take.entries("w_hh", w_hh, {l.stack, 4 * l.hidden, l.out}, "[S, 4H, P]");
  p.w_hr = take.entries("w_hr", w_hr, {l.stack, l.out, l.hidden}, "[S, P, H]");
  p.h0 = take.entries("h0", h0, {l.stack, l.batch, l.out}, "[S, B, P]");
  p.c0 = take.entries("c0", c0, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  l.flags = take.flags(flags, l.steps, l.batch);
  l.reverse = take.reverse(reverse, l.stack);
  LstmOutputs out;
  out.y = take.output("y", {l.steps, l.batch, l.stack, l.out}, take.io(), p.y);
  out.h_n = take.output("h_n", {l.stack, l.batch, l.out}, p.h0.dtype, p.h_n);
  out.c_n = take.output("c_n", {l.stack, l.batch, l.hidden}, take.acc(), p.c_n);
  if (keep_cells) {
    const int64_t width = keep_gates ? 4 * l.hidden : 0;
    out.cells = take.output("cells", {l.steps, l.batch, l.stack, l.hidden}, take.acc(), p.cells);
    out.gates = take.output("gates", {l.steps, l.batch, l.stack, width}, take.acc(), p.gates);
  }
  run(p, take);
  return out;
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor, Tensor> run_lstm_backward(
    const Run& run, const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
    const MaybeTensor& dcells, const Tensor& w_hh, const MaybeTensor& w_hr, const Tensor& c0,
    const Tensor& cells, const Tensor& gates, const MaybeTensor& flags,
    const std::vector<bool>& reverse) {
  run.check(w_hh);
  Arguments take(w_hh, run.max_row());
  LstmBackward p;
  Layer& l = p.layer = layer_of("cells", cells, w_hh, 4);
  if (!w_hr) check_square(l, w_hh);
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
  const DType acc = take.acc();
  Tensor dgates = take.output("dgates", {l.steps, l.batch, l.stack, 4 * l.hidden}, acc, p.dgates);
  Tensor dh0 = take.output("dh0", {l.stack, l.batch, l.out}, acc, p.dh0);
  Tensor dc0 = take.output("dc0", {l.stack, l.batch, l.hidden}, acc, p.dc0);
  Tensor dh = take.output("dh", {l.steps, l.batch, l.stack, w_hr ? l.out : 0}, acc, p.dh);
  run(p, take);
  return {dgates, dh0, dc0, dh};
}

struct GruOutputs {
  Tensor y, h_n, gates;
};

template <class Run>
GruOutputs run_gru_forward(const Run& run, const Tensor& gates_x, const Tensor& w_hh,
                           const MaybeTensor& b_hn, const Tensor& h0, const MaybeTensor& flags,
                           const std::vector<bool>& reverse, bool reset_after, bool returns_gates,
                           bool keep_gates) {
  run.check(w_hh);
  Arguments take(w_hh, run.max_row());
  GruForward p;
  Layer& l = p.layer = layer_of("gates_x", gates_x, w_hh, 3);
  check_square(l, w_hh);
  STD_TORCH_CHECK(reset_after || !b_hn, "b_hn must be None with reset_after=False");
  p.gates_x =
      take.sequence("gates_x", gates_x, {l.steps, l.batch, l.stack, 3 * l.hidden}, "[T, B, S, 3H]");
  p.w_hh = take.entries("w_hh", w_hh, {l.stack, 3 * l.hidden, l.hidden}, "[S, 3H, H]");
  p.b_hn = take.entries("b_hn", b_hn, {l.stack, l.hidden}, "[S, H]");
  p.h0 = take.entries("h0", h0, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  l.flags = take.flags(flags, l.steps, l.batch);
  l.reverse = take.reverse(reverse, l.stack);
  p.reset_after = reset_after;
  GruOutputs out;
  out.y = take.output("y", {l.steps, l.batch, l.stack, l.hidden}, take.io(), p.y);
  out.h_n = take.output("h_n", {l.stack, l.batch, l.hidden}, p.h0.dtype, p.h_n);
  if (returns_gates) {
    const int64_t width = keep_gates ? (reset_after ? 4 : 3) * l.hidden : 0;
    out.gates = take.output("gates", {l.steps, l.batch, l.stack, width}, take.acc(), p.gates);
  }
  run(p, take);
  return out;
}

template <class Run>
std::tuple<Tensor, Tensor, Tensor> run_gru_backward(const Run& run, const MaybeTensor& dy,
                                                    const MaybeTensor& dh_n, const Tensor& w_hh,
                                                    const Tensor& h0, const Tensor& y,
                                                    const Tensor& gates, const MaybeTensor& flags,
                                                    const std::vector<bool>& reverse,
                                                    bool reset_after) {
  run.check(w_hh);
  Arguments take(w_hh, run.max_row());
  GruBackward p;
  Layer& l = p.layer = layer_of("y", y, w_hh, 3);
  check_square(l, w_hh);
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
  const DType acc = take.acc();
  Tensor dgates = take.output("dgates", {l.steps, l.batch, l.stack, 3 * l.hidden}, acc, p.dgates);
  Tensor dgates_hn = take.output(
      "dgates_hn", {l.steps, l.batch, l.stack, reset_after ? l.hidden : 0}, acc, p.dgates_hn);
  Tensor dh0 = take.output("dh0", {l.stack, l.batch, l.hidden}, acc, p.dh0);
  run(p, take);
  return {dgates, dgates_hn, dh0};
}

template <class Run>
std::tuple<Tensor, Tensor> run_rnn_forward(const Run& run, const Tensor& gates_x,
                                           const Tensor& w_hh, const Tensor& h0,
                                           const MaybeTensor& flags,
                                           const std::vector<bool>& reverse, bool relu) {
  run.check(w_hh);
  Arguments take(w_hh, run.max_row());
  RnnForward p;
  Layer& l = p.layer = layer_of("gates_x", gates_x, w_hh, 1);
  check_square(l, w_hh);
  p.gates_x =
      take.sequence("gates_x", gates_x, {l.steps, l.batch, l.stack, l.hidden}, "[T, B, S, H]");
  p.w_hh = take.entries("w_hh", w_hh, {l.stack, l.hidden, l.hidden}, "[S, H, H]");
  p.h0 = take.entries("h0", h0, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  l.flags = take.flags(flags, l.steps, l.batch);
  l.reverse = take.reverse(reverse, l.stack);
  p.relu = relu;
  Tensor y = take.output("y", {l.steps, l.batch, l.stack, l.hidden}, take.io(), p.y);
  Tensor h_n = take.output("h_n", {l.stack, l.batch, l.hidden}, p.h0.dtype, p.h_n);
  run(p, take);
  return {y, h_n};
}

template <class Run>
std::tuple<Tensor, Tensor> run_rnn_backward(const Run& run, const MaybeTensor& dy,
                                            const MaybeTensor& dh_n, const Tensor& w_hh,
                                            const Tensor& y, const MaybeTensor& flags,
                                            const std::vector<bool>& reverse, bool relu) {
  run.check(w_hh);
  Arguments take(w_hh, run.max_row());
  RnnBackward p;
  Layer& l = p.layer = layer_of("y", y, w_hh, 1);
  check_square(l, w_hh);
  const auto shape = {l.steps, l.batch, l.stack, l.hidden};
  p.dy = take.sequence("dy", dy, shape, "[T, B, S, H]");
  p.dh_n = take.entries("dh_n", dh_n, {l.stack, l.batch, l.hidden}, "[S, B, H]");
  p.w_hh = take.entries("w_hh", w_hh, {l.stack, l.hidden, l.hidden}, "[S, H, H]");
  p.y = take.sequence("y", y, shape, "[T, B, S, H]");
  l.flags = take.flags(flags, l.steps, l.batch);
  l.reverse = take.reverse(reverse, l.stack);
  p.relu = relu;
  Tensor dgates = take.output("dgates", shape, take.acc(), p.dgates);
  Tensor dh0 = take.output("dh0", {l.stack, l.batch, l.hidden}, take.acc(), p.dh0);
  run(p, take);
  return {dgates, dh0};
}

}  // namespace fused_rnn
