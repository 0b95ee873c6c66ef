// The operators fused_rnn::cpu_layer_forward and cpu_layer_backward: one layer of a training step
// in one call each way, input projection and weight gradients included. They run the kernels that
// the operators of a scan and of a matrix product run, so the numbers are theirs; what they save is
// what lies between: the projected input, where a scan does not project, and the gates' gradients
// are in memory kept from call to call. Not for a projected state, or a tape that has to be
// rebuilt. y is [T, B, S*H], and the weights and biases of a single entry, and their gradients,
// may do without their first axis: what a caller need not view costs it nothing. Where rows end
// early, the tape [N, 1, S, n] and all that is computed are of the steps that are taken.
#include <array>
#include <cstring>

#include "layer.h"
#include "ragged.h"

// Since PyTorch 2.11; absent from an older one.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace fused_rnn::cpu {
namespace {

// A tensor with other sizes and strides.
Tensor view_as(const Tensor& t, Shape sizes, Shape strides) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), 0, &handle));
  return Tensor(handle);
}

// A weight or bias with a stack axis.
Tensor stacked(const Tensor& t, bool single) {
  if (!single) return t;
  if (t.dim() == 1) return view_as(t, {1, t.size(0)}, {t.size(0), t.stride(0)});
  if (t.dim() != 2) return t;  // it is refused with its own shape
  return view_as(t, {1, t.size(0), t.size(1)}, {t.size(0), t.stride(0), t.stride(1)});
}

// As new_tensor, a [T, B, S, n], in memory kept from call to call.
Tensor kept_tensor(const Tensor& like, const std::array<int64_t, 4>& sizes, DType dtype) {
  const int64_t strides[4] = {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1};
  const int64_t values = sizes[0] * strides[0];
  if (torch_from_blob == nullptr || values == 0) {
    return new_tensor(like, {sizes[0], sizes[1], sizes[2], sizes[3]}, dtype);
  }
  void* data = allocate_workspace(static_cast<size_t>(values * size_of(dtype)), true);
  const auto scalar = torch::stable::detail::from(scalar_of(dtype));
  AtenTensorHandle handle = nullptr;
  // (Where it fails, for want of memory, the deleter may have run: not to be freed here.)
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      data, 4, sizes.data(), strides, 0, torch::stable::detail::to<int32_t>(scalar),
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* of, void*) { free_workspace(of); }, nullptr));
  return Tensor(handle);
}

// What the two directions of a training step have in common.
struct Step {
  Arguments take;
  int64_t cell, gates, inputs, rows;  // rows: of all steps
  bool single;
  Tensor w_ih;
  Layer l;
  Rows w_hh;
  LiveRows order;  // where rows end early
  bool ragged = false;
  Places places;

  Step(const Tensor& x, const Tensor& w_ih_, const Tensor& given, const MaybeTensor& flags,
       const std::vector<bool>& reverse, int64_t cell_)
      : take(given, INT64_MAX),
        cell(cell_),
        gates(gates_of(cell_)),
        single(given.dim() == 2),
        w_ih(stacked(w_ih_, single)) {
    const Tensor w_hh_ = stacked(given, single);
    STD_TORCH_CHECK(w_hh_.is_cpu(), "w_hh must be a CPU tensor");
    check_shape("x", x, {kAny, kAny, kAny}, "[T, B, I]", w_hh_);
    STD_TORCH_CHECK(dtype_of("x", x) == take.io(), "x must have the dtype of w_hh");
    STD_TORCH_CHECK(dtype_of("w_ih", w_ih) == take.io(), "w_ih must have the dtype of w_hh");
    STD_TORCH_CHECK(w_hh_.dim() == 3, "w_hh must have shape [S, G*H, H], got ", shape_of(w_hh_));
    l.steps = x.size(0), l.batch = x.size(1), l.stack = w_hh_.size(0);
    l.hidden = l.out = w_hh_.size(2);
    inputs = x.size(2);
    STD_TORCH_CHECK(l.steps > 0 && l.hidden > 0, "x must have steps, and w_hh units");
    w_hh = take.entries("w_hh", w_hh_, {l.stack, width(), l.hidden}, "[S, G*H, H]");
    check_shape("w_ih", w_ih, {l.stack, width(), inputs}, "[S, G*H, I]", w_hh_);
    l.reverse = take.reverse(reverse, l.stack);
    if (const uint8_t* of_rows = take.flags(flags, l.steps, l.batch)) {
      order = LiveRows(of_rows, l.steps, l.batch);
      ragged = order.any_ends();
      if (ragged) places = order.places();
      if (const uint8_t* ordered = order.flags(of_rows)) l.flags = ragged ? ordered : of_rows;
    }
    rows = places.all(l);
  }
  int64_t width() const { return gates * l.hidden; }
  int64_t weights() const { return width() * (l.hidden + inputs); }  // of an entry
  DType io() const { return take.io(); }
  DType acc() const { return take.acc(); }
  Tensor tensor(Shape shape, DType dtype) const { return new_tensor(take.like(), shape, dtype); }
  Tensor none() const { return tensor({0}, acc()); }
  // [S, n], or [n] of a single entry; [S, n, m].
  Tensor gradient(int64_t n) const {
    return single ? tensor({n}, acc()) : tensor({l.stack, n}, acc());
  }
  Tensor gradient(int64_t n, int64_t m) const {
    return single ? tensor({n, m}, acc()) : tensor({l.stack, n, m}, acc());
  }
  // [T, B, S*H] as [T, B, S, H].
  Tensor entries_of(const char* name, const Tensor& t) const {
    check_shape(name, t, {l.steps, l.batch, l.stack * l.hidden}, "[T, B, S*H]", take.like());
    return view_as(t, {l.steps, l.batch, l.stack, l.hidden},
                   {t.stride(0), t.stride(1), l.hidden * t.stride(2), t.stride(2)});
  }
  // Plain memory for, or a tape of, S entries of n values of each row.
  Rows sequence(void* data, DType dtype, int64_t n) const {
    return Rows{data, dtype, places.apart(l.batch) * l.stack * n, l.stack * n, n};
  }
  // The sizes of a tape.
  std::array<int64_t, 4> tape(int64_t n) const {
    if (ragged) return {rows, 1, l.stack, n};
    return {l.steps, l.batch, l.stack, n};
  }
  // A sequence or state of an argument, in the order that the layer is computed in.
  Rows ordered(const Rows& given, int64_t stack, int64_t n) {
    return ragged ? order.sequence(given, stack, n) : given;
  }
  Rows ordered_state(const Rows& given) {
    return ragged ? order.states(given, l.stack, l.hidden) : given;
  }
  // Where a state goes that a kernel writes, to be put into its tensor by leave_state.
  Rows state_there(const Rows& rows) {
    return ragged ? order.new_states(rows.dtype, l.stack, l.hidden) : rows;
  }
  void leave_state(const Rows& there, const Rows& rows) const {
    if (ragged && rows.data != nullptr) order.put_states(there, l.stack, rows.data);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_forward(
    const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const MaybeTensor& b_ih,
    const MaybeTensor& b_hh, const Tensor& h0, const MaybeTensor& c0, const MaybeTensor& flags,
    std::vector<bool> reverse, int64_t cell, bool relu) {
  Step step(x, w_ih, w_hh, flags, reverse, cell);
  const Layer& l = step.l;
  const DType io = step.io(), acc = step.acc();
  const int64_t width = step.width(), size = size_of(acc);
  Tensor b1, b2;
  STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "both biases, or none");
  if (b_ih) {
    STD_TORCH_CHECK(dtype_of("b_ih", *b_ih) == io && dtype_of("b_hh", *b_hh) == io,
                    "biases must have the dtype of w_hh");
    b1 = stacked(*b_ih, step.single), b2 = stacked(*b_hh, step.single);
    check_shape("b_ih", b1, {l.stack, width}, "[S, G*H]", w_hh);
    check_shape("b_hh", b2, {l.stack, width}, "[S, G*H]", w_hh);
    b1 = as_contiguous(b1), b2 = as_contiguous(b2);
  }
  const auto state = {l.stack, l.batch, l.hidden};
  const Rows start = step.take.entries("h0", h0, state, "[S, B, H]");
  Rows h_rows, c_rows, cells_rows, gates_rows;
  Tensor y = step.tensor({l.steps, l.batch, l.stack * l.hidden}, io);
  Tensor h_n = step.take.output("h_n", state, start.dtype, h_rows);
  Tensor c_n = step.none(), cells = step.none(), gates = step.none();
  if (cell == 0) {
    STD_TORCH_CHECK(c0.has_value(), "the LSTM has a c0");
    c_n = step.take.output("c_n", state, acc, c_rows);
    cells = kept_tensor(w_hh, step.tape(l.hidden), acc);
    step.take.output("cells", cells, cells_rows);
  }
  if (cell < 2) {
    gates = kept_tensor(w_hh, step.tape(4 * l.hidden), acc);
    step.take.output("gates", gates, gates_rows);
  }
  if (l.batch == 0 || l.stack == 0) return {y, h_n, c_n, cells, gates};

  const Buffer bias(l.stack * width * size);
  const Sequence sequence(x, io, false);
  const Tensor w = as_contiguous(step.w_ih);
  AnyForward p;
  p.layer = l, p.h0 = step.ordered_state(start), p.w_hh = step.w_hh, p.relu = relu;
  p.input = Input{step.inputs, step.ordered(sequence.rows, 1, step.inputs),
                  Rows{data_of(w), io, 0, step.inputs, width * step.inputs}, Rows{}, step.places};
  if (b_ih) {
    const int64_t folded = cell == 1 ? 2 * l.hidden : width;
    for (int64_t s = 0; s < l.stack; ++s) {
      const auto entry = [&](const Tensor& t) {
        return static_cast<char*>(data_of(t)) + s * width * size_of(io);
      };
      add_biases(entry(b1), entry(b2), io, width, folded, acc, bias.at(s * width * size));
    }
    p.input.bias = Rows{bias.at(), acc, 0, 0, width};
  }
  p.y = step.ragged ? step.order.new_sequence(io, l.stack, l.hidden)
                    : step.sequence(y.mutable_data_ptr(), io, l.hidden);
  p.h_n = step.state_there(h_rows), p.cells = cells_rows, p.gates = gates_rows;
  if (cell == 0) {
    p.c_n = step.state_there(c_rows);
    p.c0 = step.ordered_state(step.take.entries("c0", *c0, state, "[S, B, H]"));
  }
  if (cell == 1 && b_hh) {
    char* inside = static_cast<char*>(data_of(b2)) + 2 * l.hidden * size_of(io);
    p.b_hn = Rows{inside, io, 0, 0, width};
  }
  p.run(cell, acc);
  if (step.ragged) step.order.put_sequence(p.y, y.mutable_data_ptr());
  step.leave_state(p.h_n, h_rows);
  step.leave_state(p.c_n, c_rows);
  return {y, h_n, c_n, cells, gates};
}

// target [rows of all steps, H] = the state that enters each step of entry s: that of the step
// before, y [T, B, S, H], or the first, h0 [S, B, H], or zero where a segment starts.
void entering(const Layer& l, const Places& places, const Rows& y, const Rows& h0, int64_t s,
              char* target) {
  const int64_t size = size_of(y.dtype), bytes = l.hidden * size;
  const auto copy = [&](const Rows& from, int64_t place, int64_t first, int64_t last) {
    const char* row = static_cast<const char*>(from.data) +
                      (place * from.step + s * from.entry + first * from.row) * size;
    for (int64_t b = first; b < last; ++b, row += from.row * size, target += bytes) {
      std::memcpy(target, row, bytes);
    }
  };
  for (int64_t t = 0; t < l.steps; ++t) {
    const int64_t before = l.reverse[s] ? t + 1 : t - 1, live = places.live(t, l.batch);
    const bool any = 0 <= before && before < l.steps;
    const int64_t others = any ? std::min(live, places.live(before, l.batch)) : 0;
    char* const rows = target;
    if (any) copy(y, places.at(before), 0, others);
    copy(h0, 0, others, live);
    const SegmentStarts starts(l, places, l.reverse[s] ? t + 1 : t);
    for (int64_t b = 0; b < std::min(live, starts.rows); ++b) {
      if (starts.at(b)) std::memset(rows + b * bytes, 0, bytes);
    }
  }
}

// The input's gradient of fewer columns is not worth cutting the gates' gradients for.
constexpr int64_t kNarrow = 32;

// Whether a layer is not too large for the next function in any case: by its gates, where these are
// many by its weights, and where the tile unit multiplies 16-bit weights by far fewer. The product
// for the input's gradient of one that may be small has the scan's bits, so that a row does not see
// how many others there are.
bool may_be_small(const Step& step) {
  constexpr int64_t kByTiles = 24 << 10, kMostWeights = 160 << 10;
  if (size_of(step.io()) == 2 && has_tiles()) return step.weights() <= kByTiles;
  return step.width() <= kMaxInput || step.weights() <= kMostWeights;
}

// The chunks of rows in which a scan makes the layer's gradients itself, 0 where it does not: where
// weights and their gradients stay in the second-level cache side by side, there are rows for the
// tiles, and the gradients are added to often enough to be worth a chunk's own. Not a matter of the
// threads, for the order of the sums follows the chunks.
int64_t chunks_of(const Step& step) {
  constexpr int64_t kTwo = 12, kMost = 16;  // rows: for two chunks, of a chunk
  constexpr int64_t kShared = 64;           // units that threads cannot share out
  constexpr int64_t kWorth = 64;            // steps' rows of a chunk
  const Layer& l = step.l;
  const int64_t bytes = step.weights() * size_of(step.acc());
  if (!may_be_small(step) || 2 * bytes > kCacheFilled * l2_bytes()) return 0;
  const int64_t least = step.width() <= kMaxInput ? 6 : 16;  // rows
  if (l.batch < least || l.stack == 0) return 0;
  int64_t chunks = l.batch >= kTwo || l.hidden <= kShared ? 2 : 1;
  while (l.batch > kMost * chunks && chunks < 32) chunks *= 2;
  return step.rows >= kWorth * chunks ? chunks : 0;
}

void add(void* to, const void* from, int64_t values, DType dtype) {
  const auto all = [values](auto* sum, const auto* x) {
    for (int64_t i = 0; i < values; ++i) sum[i] += x[i];
  };
  if (dtype == DType::kFloat64)
    return all(static_cast<double*>(to), static_cast<const double*>(from));
  all(static_cast<float*>(to), static_cast<const float*>(from));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_backward(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
    const MaybeTensor& dcells, const Tensor& x, const Tensor& w_ih, const Tensor& w_hh,
    const Tensor& h0, const MaybeTensor& c0, const Tensor& y, const MaybeTensor& cells,
    const MaybeTensor& gates, const MaybeTensor& flags, std::vector<bool> reverse, int64_t cell,
    bool relu, bool want_x, bool want_w_ih, bool want_w_hh, bool want_bias) {
  Step step(x, w_ih, w_hh, flags, reverse, cell);
  const Layer& l = step.l;
  const DType io = step.io(), acc = step.acc();
  const int64_t width = step.width(), all = l.stack * width, size = size_of(acc);
  const auto shape = {l.steps, l.batch, l.stack, l.hidden};
  const auto state = {l.stack, l.batch, l.hidden};
  STD_TORCH_CHECK(dtype_of("y", y) == io && dtype_of("h0", h0) == io,
                  "y and h0 must have the dtype of w_hh");
  check_shape("h0", h0, state, "[S, B, H]", w_hh);
  const Rows out = step.ordered(
      step.take.sequence("y", step.entries_of("y", y), shape, "[T, B, S, H]"), l.stack, l.hidden);
  const Rows start = step.ordered_state(step.take.entries("h0", h0, state, "[S, B, H]"));
  Rows dh0_rows, dc0_rows;
  Tensor dh0 = step.take.output("dh0", state, acc, dh0_rows), dc0 = step.none();
  Tensor dx = step.none(), dw_ih = step.none(), dw_hh = step.none(), db = step.none();
  Tensor db_hn = step.none();
  if (want_x) dx = step.tensor({l.steps, l.batch, step.inputs}, acc);
  if (want_w_ih) dw_ih = step.gradient(width, step.inputs);
  if (want_w_hh) dw_hh = step.gradient(width, l.hidden);
  if (want_bias) db = step.gradient(width);
  if (want_bias && cell == 1) db_hn = step.gradient(l.hidden);
  const Tensor w = want_x ? as_contiguous(step.w_ih) : step.w_ih;
  const Sequence sequence(x, io, want_w_ih);  // without, in whatever order: it is not read
  const Rows x_rows = want_w_ih ? step.ordered(sequence.rows, 1, step.inputs) : sequence.rows;
  // The input's gradient: where it goes, or where it is to be found in the end.
  const Buffer dx_there(want_x && step.ragged ? step.rows * step.inputs * size : 0);
  char* const dx_data = static_cast<char*>(!want_x       ? nullptr
                                           : step.ragged ? dx_there.at()
                                                         : dx.mutable_data_ptr());
  const auto into = [size](Tensor& t, int64_t at) {
    return static_cast<char*>(t.mutable_data_ptr()) + at * size;
  };

  // Small layers' gradients are made in the scan.
  LayerGradients own;
  own.chunks = chunks_of(step), own.places = step.places;
  if (own.chunks > 0) {
    own.size = step.inputs, own.x = x_rows, own.h0 = start, own.y = out;
    own.w_ih = Rows{data_of(w), io, 0, step.inputs, width * step.inputs};
    own.dx = dx_data;
    if (want_w_ih) own.dw_ih = into(dw_ih, 0);
    if (want_w_hh) own.dw_hh = into(dw_hh, 0);
    if (want_bias) own.db = into(db, 0);
    if (want_bias && cell == 1) own.db_hn = into(db_hn, 0);
  }
  const bool apart = own.chunks == 0;
  const Buffer gradients(apart ? step.rows * all * size : 0);
  const Buffer more(want_x && !apart ? (l.stack - 1) * step.rows * step.inputs * size : 0);
  own.dx_more = more.at();
  const Buffer inside(apart && cell == 1 ? step.rows * l.stack * l.hidden * size : 0);
  const Rows dgates = apart ? step.sequence(gradients.at(), acc, width) : Rows{};
  const Rows dgates_hn = apart ? step.sequence(inside.at(), acc, l.hidden) : Rows{};
  const auto sequence_of = [&](const MaybeTensor& t, const char* name) {
    return step.ordered(step.take.sequence(name, t, shape, "[T, B, S, H]"), l.stack, l.hidden);
  };
  const auto state_of = [&](const MaybeTensor& t, const char* name) {
    return step.ordered_state(step.take.entries(name, t, state, "[S, B, H]"));
  };
  MaybeTensor dy_entries;
  if (dy) dy_entries = step.entries_of("dy", *dy);
  const Rows dy_rows = sequence_of(dy_entries, "dy"), dh_rows = state_of(dh_n, "dh_n");
  const Rows dh0_there = step.state_there(dh0_rows);
  const auto tape_of = [&](const MaybeTensor& t, const char* name, int64_t parts) {
    STD_TORCH_CHECK(t.has_value(), "this cell has a tape of ", name);
    const auto sizes = step.tape(parts * l.hidden);
    Rows rows = step.take.sequence(name, *t, {sizes[0], sizes[1], sizes[2], sizes[3]},
                                   step.ragged ? "[N, 1, S, K*H]" : "[T, B, S, K*H]");
    if (step.ragged) rows.row = rows.step;
    return rows;
  };
  if (cell == 0) {
    LstmBackward p;
    p.layer = l, p.dy = dy_rows, p.dh_n = dh_rows, p.w_hh = step.w_hh;
    p.dc_n = state_of(dc_n, "dc_n"), p.dcells = sequence_of(dcells, "dcells");
    STD_TORCH_CHECK(c0.has_value(), "the LSTM has a c0");
    p.c0 = state_of(*c0, "c0");
    p.cells = tape_of(cells, "cells", 1), p.gates = tape_of(gates, "gates", 4);
    dc0 = step.take.output("dc0", state, acc, dc0_rows);
    p.dgates = dgates, p.dh0 = dh0_there, p.dc0 = step.state_there(dc0_rows);
    chosen_kernels().lstm_backward(p, own, acc);
    step.leave_state(p.dc0, dc0_rows);
  } else if (cell == 1) {
    GruBackward p;
    p.layer = l, p.dy = dy_rows, p.dh_n = dh_rows, p.w_hh = step.w_hh;
    p.h0 = start, p.y = out, p.gates = tape_of(gates, "gates", 4);
    p.dgates = dgates, p.dgates_hn = dgates_hn, p.dh0 = dh0_there;
    chosen_kernels().gru_backward(p, own, acc);
  } else {
    RnnBackward p;
    p.layer = l, p.dy = dy_rows, p.dh_n = dh_rows, p.w_hh = step.w_hh, p.relu = relu;
    p.y = out, p.dgates = dgates, p.dh0 = dh0_there;
    chosen_kernels().rnn_backward(p, own, acc);
  }
  step.leave_state(dh0_there, dh0_rows);
  const auto leave_dx = [&] {
    if (!want_x || !step.ragged) return;
    step.order.put_sequence(Rows{dx_data, acc, step.inputs, step.inputs, step.inputs}, into(dx, 0));
  };
  if (!apart) {
    leave_dx();
    return {dx, dw_ih, dw_hh, db, db_hn, dh0, dc0};
  }
  if (want_x && l.stack == 0) std::memset(dx_data, 0, step.rows * step.inputs * size);
  // Entry by entry, and each's sum before it is added to another's, as in a scan.
  const bool small = may_be_small(step), first = small && width > kMaxInput;
  const int64_t values = step.rows * step.inputs;
  const Buffer other(want_x && first && l.stack > 1 ? values * size : 0);
  for (int64_t s = 0; want_x && s < l.stack; ++s) {
    const bool aside = first && s > 0;
    void* to = aside ? other.at() : dx_data;
    Matmul p;
    p.n = 1, p.m = step.rows, p.k = width;
    p.a = Matrix{gradients.at(s * width * size), acc, 0, all, 1};
    const void* from = static_cast<char*>(data_of(w)) + s * width * step.inputs * size_of(io);
    p.right[0] = Right{step.inputs, Matrix{from, io, 0, step.inputs, 1}, {}, to, s > 0 && !aside};
    p.least = small || step.inputs < kNarrow ? 1 : l.steps;
    chosen_kernels().matmul(p, acc);
    if (aside) add(dx_data, to, values, acc);
  }
  leave_dx();
  // The gradients of a weight [n, columns] of entry s, from gate gradients `from` of which rows are
  // `row` apart, and `of` the values that entered at each step: the columns of the gate gradients
  // are the rows of the product.
  const auto weights = [&](const void* from, int64_t row, int64_t n, const Right& of,
                           const Right& also) {
    Matmul p;
    p.n = 1, p.m = n, p.k = step.rows, p.a = Matrix{from, acc, 0, 1, row};
    p.right[0] = of, p.right[1] = also, p.least = 0;
    chosen_kernels().matmul(p, acc);
  };
  const RowsInOrder order(x_rows, l, step.places);
  const Buffer before(want_w_hh ? step.rows * l.hidden * size_of(io) : 0);
  for (int64_t s = 0; s < l.stack; ++s) {
    Right of_x, of_h;
    if (want_w_ih) {
      of_x.l = step.inputs, of_x.b = Matrix{x_rows.data, io, 0, order.row, 1};
      of_x.out = into(dw_ih, s * width * step.inputs);
    }
    if (want_w_hh) {
      entering(l, step.places, out, start, s, static_cast<char*>(before.at()));
      of_h.l = l.hidden, of_h.b = Matrix{before.at(), io, 0, l.hidden, 1};
      of_h.out = into(dw_hh, s * width * l.hidden);
    }
    const void* own = gradients.at(s * width * size);
    if (cell != 1 || !want_w_hh) {
      weights(own, all, width, of_x, of_h);
      continue;
    }
    // The GRU's third gate has another gradient inside its recurrence.
    const int64_t both = 2 * l.hidden;
    weights(own, all, both, of_x, of_h);
    of_x.out = want_w_ih ? into(dw_ih, (s * width + both) * step.inputs) : nullptr;
    of_h.out = into(dw_hh, (s * width + both) * l.hidden);
    weights(gradients.at((s * width + both) * size), all, l.hidden, of_x, Right());
    weights(inside.at(s * l.hidden * size), l.stack * l.hidden, l.hidden, of_h, Right());
  }
  if (want_bias) {
    const auto sums = [&](const Buffer& of, int64_t n, Tensor& t) {
      const ColumnSums p{of.at(), step.rows, l.stack * n, t.mutable_data_ptr()};
      chosen_kernels().column_sums(p, acc);
    };
    sums(gradients, width, db);
    if (cell == 1) sums(inside, l.hidden, db_hn);
  }
  return {dx, dw_ih, dw_hh, db, db_hn, dh0, dc0};
}

}  // namespace
}  // namespace fused_rnn::cpu

STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  m.impl("cpu_layer_forward", TORCH_BOX(&fused_rnn::cpu::layer_forward));
  m.impl("cpu_layer_backward", TORCH_BOX(&fused_rnn::cpu::layer_backward));
}
