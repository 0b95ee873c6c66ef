// What the operators of whole layers share: memory, the input projection, a scan of any cell.
#pragma once

#include <algorithm>

#include "types.h"
#include "waist/operators.h"

namespace fused_rnn::cpu {

class Buffer {
 public:
  explicit Buffer(int64_t bytes) : data_(allocate_workspace(static_cast<size_t>(bytes))) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { free_workspace(data_); }
  void* at(int64_t bytes = 0) const { return static_cast<char*>(data_) + bytes; }

 private:
  void* data_;
};

inline int64_t gates_of(int64_t cell) {
  STD_TORCH_CHECK(0 <= cell && cell <= 2, "cell must be 0, 1 or 2, got ", cell);
  return cell == 0 ? 4 : cell == 1 ? 3 : 1;
}

inline void* data_of(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

// A sequence [T, B, n] whose last axis lies along memory and whose rows lie at one stride, in the
// order [T, B], or [B, T] where `in_time` does not forbid it; a copy of x where x is neither.
struct Sequence {
  Tensor kept;
  Rows rows;

  Sequence(const Tensor& x, DType dtype, bool in_time) : kept(x) {
    const int64_t steps = x.size(0), batch = x.size(1);
    const bool along = x.size(2) == 1 || x.stride(2) == 1;
    const bool ordered = steps == 1 || batch == 1 || x.stride(0) == batch * x.stride(1) ||
                         (!in_time && x.stride(1) == steps * x.stride(0));
    if (!along || !ordered) kept = as_contiguous(x);
    rows = Rows{data_of(kept), dtype, kept.stride(0), kept.stride(1), 0};
  }
};

// A sequence's rows as a matrix of T * B rows, in the order of memory.
struct RowsInOrder {
  bool batch_first;  // the order is [B, T]
  int64_t row;

  RowsInOrder(const Rows& x, const Layer& layer, const Places& places)
      : batch_first(places.first == nullptr && layer.steps > 1 && layer.batch > 1 &&
                    x.step != layer.batch * x.row),
        row(batch_first || layer.batch == 1 ? x.step : x.row) {}
};

// bias [n] of acc = b_ih + b_hh, of which last the first `folded` values count: the GRU's others
// belong inside its recurrence.
inline void add_biases(const void* b_ih, const void* b_hh, DType io, int64_t n, int64_t folded,
                       DType acc, void* bias) {
  const auto value = [io](const void* data, int64_t at) -> double {
    switch (io) {
      case DType::kBFloat16:
        return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data)[at]);
      case DType::kFloat16:
        return static_cast<float>(static_cast<const torch::headeronly::Half*>(data)[at]);
      case DType::kFloat32:
        return static_cast<const float*>(data)[at];
      default:
        return static_cast<const double*>(data)[at];
    }
  };
  for (int64_t i = 0; i < n; ++i) {
    const double sum = value(b_ih, i) + (i < folded ? value(b_hh, i) : 0.0);
    if (acc == DType::kFloat64) {
      static_cast<double*>(bias)[i] = sum;
    } else {
      static_cast<float*>(bias)[i] = static_cast<float>(sum);
    }
  }
}

// A forward scan of any cell with the projection of its input; what the cell has not stays null.
struct AnyForward {
  Layer layer;
  Input input;
  Rows h0, c0, w_hh, w_hr, b_hn, y, h_n, c_n, cells, gates;
  bool relu = false;

  void run(int64_t cell, DType acc) const {
    const int64_t width = gates_of(cell) * layer.hidden;
    if (projects_itself(width, acc)) return scan(cell, acc, Rows{}, input);
    const Places& places = input.places;
    const int64_t all = places.all(layer), entry = all * width;
    const Buffer projected(layer.stack * entry * size_of(acc));
    const RowsInOrder order(input.x, layer, places);
    const auto from = [](const Rows& rows, int64_t s) {
      return static_cast<const char*>(rows.data) + s * rows.entry * size_of(rows.dtype);
    };
    for (int64_t s = 0; s < layer.stack; ++s) {
      Matmul p;
      p.n = 1, p.m = all, p.k = input.size, p.least = layer.steps;
      p.a = Matrix{input.x.data, input.x.dtype, 0, order.row, 1};
      Right& r = p.right[0];
      r.l = width, r.out = projected.at(s * entry * size_of(acc));
      r.b = Matrix{from(input.w_ih, s), input.w_ih.dtype, 0, 1, input.w_ih.row};
      if (input.bias.data != nullptr) r.bias = Matrix{from(input.bias, s), acc, 0, 0, 1};
      chosen_kernels().matmul(p, acc);
    }
    const int64_t row = (order.batch_first ? layer.steps : 1) * width;
    const int64_t rows = order.batch_first ? 1 : places.apart(layer.batch);
    Input none;
    none.places = places;
    scan(cell, acc, Rows{projected.at(), acc, rows * width, row, entry}, none);
  }

 private:
  // Whether the scan is to project its input itself, step by step, which spares writing and reading
  // gates_x: where it has rows enough for whole tiles, and both weights stay in the second-level
  // cache or are asked for while there is much to multiply; and where no weights are packed, which
  // spares the threads a meeting.
  bool projects_itself(int64_t width, DType acc) const {
    const DType io = input.w_ih.dtype;
    if (input.x.dtype != io || input.size == 0 || input.size > kMaxInput) return false;
    if (layer.steps == 1 && layer.batch <= kDirectRows) return true;
    if (input.places.all(layer) <= kDirectRows) return false;
    const int64_t threads = thread_count(), stack = layer.stack;
    const int64_t batch = input.places.all(layer) / layer.steps;
    const int64_t rows = batch / (threads > stack ? threads / stack : 1);
    const bool tiles = scan_by_tiles(layer.steps, io, std::min(input.size, layer.out));
    const int64_t bytes = width * (layer.out + input.size) * size_of(tiles ? io : acc);
    return rows >= 6 && (bytes <= kCacheFilled * l2_bytes() || rows >= 32);
  }

  void scan(int64_t cell, DType acc, const Rows& gates_x, const Input& own) const {
    if (cell == 0) {
      const LstmForward p{.layer = layer,
                          .gates_x = gates_x,
                          .h0 = h0,
                          .c0 = c0,
                          .w_hh = w_hh,
                          .w_hr = w_hr,
                          .y = y,
                          .h_n = h_n,
                          .c_n = c_n,
                          .cells = cells,
                          .gates = gates};
      chosen_kernels().lstm_forward(p, own, acc);
    } else if (cell == 1) {
      const GruForward p{.layer = layer,
                         .gates_x = gates_x,
                         .h0 = h0,
                         .w_hh = w_hh,
                         .b_hn = b_hn,
                         .y = y,
                         .h_n = h_n,
                         .gates = gates};
      chosen_kernels().gru_forward(p, own, acc);
    } else {
      const RnnForward p{.layer = layer,
                         .gates_x = gates_x,
                         .h0 = h0,
                         .w_hh = w_hh,
                         .y = y,
                         .h_n = h_n,
                         .relu = relu};
      chosen_kernels().rnn_forward(p, own, acc);
    }
  }
};

}  // namespace fused_rnn::cpu
