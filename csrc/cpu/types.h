// What the operators hand to the kernels: plain structs and one table of functions per instruction
// set. Nothing here depends on torch or on the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_rnn::cpu {

// The element types the kernels read and write. They compute in float for the first three and in
// double for the last ("acc" in docs/design.md).
enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A tensor [T, B, S, n] (or [S, B, n], with step = 0) whose last axis is contiguous; strides in
// elements. data is null for an absent tensor or one of no elements.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t step = 0, row = 0, entry = 0;
};

// What all scans share.
struct Layer {
  int64_t steps = 0, batch = 0, stack = 0;  // T B S
  int64_t hidden = 0, out = 0;              // H P
  const uint8_t* flags = nullptr;           // [T, B] or null
  const uint8_t* reverse = nullptr;         // [S]
};

struct LstmForward {
  Layer layer;
  Rows gates_x, h0, c0;    // [T, B, S, 4H] [S, B, P] [S, B, H]
  Rows w_hh, w_hr;         // entry and row strides: [S, 4H, P] [S, P, H]
  Rows y, h_n;             // [T, B, S, P] [S, B, P] io
  Rows c_n, cells, gates;  // [S, B, H] [T, B, S, H] [T, B, S, 4H] acc; the last two may be null
};

struct LstmBackward {
  Layer layer;
  Rows dy, dh_n, dc_n, dcells;  // each may be null
  Rows w_hh, w_hr, c0, cells, gates;
  Rows dgates, dh0, dc0, dh;  // [T, B, S, 4H] [S, B, P] [S, B, H] [T, B, S, P] (null: no w_hr)
};

struct GruForward {
  Layer layer;
  Rows gates_x, h0, w_hh, b_hn;  // [T, B, S, 3H] [S, B, H] [S, 3H, H] [S, H] (may be null)
  Rows y, h_n, gates;            // gates [T, B, S, K*H] may be null
  bool reset_after = true;
};

struct GruBackward {
  Layer layer;
  Rows dy, dh_n, w_hh, h0, y, gates;
  Rows dgates, dgates_hn, dh0;  // [T, B, S, 3H] [T, B, S, H] (null: reset before) [S, B, H]
  bool reset_after = true;
};

struct RnnForward {
  Layer layer;
  Rows gates_x, h0, w_hh, y, h_n;
  bool relu = false;
};

struct RnnBackward {
  Layer layer;
  Rows dy, dh_n, w_hh, y, dgates, dh0;
  bool relu = false;
};

// One operand of the matrix product, [N, rows, columns] with any strides (in elements).
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch = 0, row = 0, column = 0;
};

struct Matmul {
  int64_t n = 0, m = 0, k = 0, l = 0;
  Matrix a, b, bias;    // [N, M, K] [N, K, L] and [N, L] in bias.batch, bias.column (may be null)
  void* out = nullptr;  // [N, M, L] contiguous, acc
};

// The kernels of one instruction set. dtype: the type of all arithmetic, kFloat32 or kFloat64.
struct Kernels {
  void (*lstm_forward)(const LstmForward&, DType dtype);
  void (*lstm_backward)(const LstmBackward&, DType dtype);
  void (*gru_forward)(const GruForward&, DType dtype);
  void (*gru_backward)(const GruBackward&, DType dtype);
  void (*rnn_forward)(const RnnForward&, DType dtype);
  void (*rnn_backward)(const RnnBackward&, DType dtype);
  void (*matmul)(const Matmul&, DType dtype);
};

enum class Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The instruction set in use: the best this machine has, or what FUSED_RNN_CPU_ISA names.
Isa chosen_isa();
const Kernels& chosen_kernels();

// What the kernels need of the outside world (runtime.cpp); they include no torch header.

// Threads a parallel_tasks may use now: 1 inside another parallel region.
int64_t thread_count();
// Calls task(context, i) for 0 <= i < count, on PyTorch's threads, in contiguous ranges.
void parallel_tasks(int64_t count, void (*task)(void* context, int64_t i), void* context);
// bytes of memory aligned to 64, or an exception; released by free_workspace.
void* allocate_workspace(size_t bytes);
void free_workspace(void* memory);
// Bytes of second-level cache of one core.
int64_t l2_bytes();

}  // namespace fused_rnn::cpu
