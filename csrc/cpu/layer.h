// What the operators of whole layers share: memory, the input projection, a scan of any cell.
#pragma once

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

// A forward scan of any cell; what the cell has not stays null.
struct AnyForward {
  Layer layer;
  Rows gates_x, h0, c0, w_hh, w_hr, b_hn, y, h_n, c_n, cells, gates;
  bool relu = false;

  void run(int64_t cell, DType acc) const {
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
      chosen_kernels().lstm_forward(p, acc);
    } else if (cell == 1) {
      const GruForward p{.layer = layer,
                         .gates_x = gates_x,
                         .h0 = h0,
                         .w_hh = w_hh,
                         .b_hn = b_hn,
                         .y = y,
                         .h_n = h_n,
                         .gates = gates};
      chosen_kernels().gru_forward(p, acc);
    } else {
      const RnnForward p{.layer = layer,
                         .gates_x = gates_x,
                         .h0 = h0,
                         .w_hh = w_hh,
                         .y = y,
                         .h_n = h_n,
                         .relu = relu};
      chosen_kernels().rnn_forward(p, acc);
    }
  }
};

inline void* data_of(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }

// A sequence [T, B, n] as a matrix of T * B rows, in the order of memory.
struct Sequence {
  Tensor kept;
  Matrix matrix;
  bool batch_first = false;  // rows are in the order [B, T]

  // in_time: rows have to be in the order [T, B].
  Sequence(const Tensor& x, DType dtype, bool in_time) : kept(x) {
    const int64_t steps = x.size(0), batch = x.size(1);
    int64_t row = x.stride(1);
    if (steps == 1 || batch == 1 || x.stride(0) == batch * x.stride(1)) {
      row = batch == 1 ? x.stride(0) : x.stride(1);
    } else if (!in_time && x.stride(1) == steps * x.stride(0)) {
      batch_first = true, row = x.stride(0);
    } else {
      kept = as_contiguous(x), row = kept.stride(1);
    }
    matrix = Matrix{data_of(kept), dtype, 0, row, kept.stride(2)};
  }
};

// One entry's projection of a sequence: out [rows, width] = a w_ih^T + b_ih + b_hh, of which last
// the first `folded` values count (the GRU's others belong inside its recurrence); `bias` is room
// for width values of acc.
struct Projection {
  Matrix a;
  int64_t rows, inputs, width, folded;
  DType io, acc;

  void run(const void* w_ih, const void* b_ih, const void* b_hh, void* bias, void* out) const {
    Matmul p;
    p.n = 1, p.m = rows, p.k = inputs, p.l = width;
    p.a = a;
    p.b = Matrix{w_ih, io, 0, 1, inputs};
    if (b_ih != nullptr) {
      acc == DType::kFloat64 ? add<double>(b_ih, b_hh, bias) : add<float>(b_ih, b_hh, bias);
      p.bias = Matrix{bias, acc, 0, 0, 1};
    }
    p.out = out;
    chosen_kernels().matmul(p, acc);
  }

 private:
  template <class T>
  T value(const void* data, int64_t at) const {
    switch (io) {
      case DType::kBFloat16:
        return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data)[at]);
      case DType::kFloat16:
        return static_cast<float>(static_cast<const torch::headeronly::Half*>(data)[at]);
      default:
        return static_cast<const T*>(data)[at];
    }
  }
  template <class T>
  void add(const void* b_ih, const void* b_hh, void* bias) const {
    T* target = static_cast<T*>(bias);
    for (int64_t i = 0; i < width; ++i) {
      target[i] = value<T>(b_ih, i) + (i < folded ? value<T>(b_hh, i) : T(0));
    }
  }
};

}  // namespace fused_rnn::cpu
