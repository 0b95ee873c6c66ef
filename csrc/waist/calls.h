// One call of each scan as plain structs: what operators hand to kernels, on a CPU and on GPUs
// alike. Nothing here depends on torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_rnn {

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
  Rows y, h_n;             // [T, B, S, P] io, [S, B, P] of h0's dtype
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

}  // namespace fused_rnn
