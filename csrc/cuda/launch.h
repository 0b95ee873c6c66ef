// What the host may ask of the kernels: launches on a stream, and what a block scan needs. All
// throw std::runtime_error where the GPU refuses. Nothing here depends on CUDA's headers or
// torch's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/params.h"

namespace fused_rnn::cuda {

// Makes a GPU, by torch's index, the one that this library's CUDA runtime launches on: the current
// one already as torch sees it (fused_rnn/cuda sees to that), or torch's would change with it.
void use_device(int index);
// Whether the library has code for a GPU.
bool has_code_for(int index);

// What one block of a block scan takes. threads = 0: H is more than any of its kernels take.
struct BlockNeeds {
  int threads = 0;
  size_t shared_bytes = 0;
};

// The block scans of one cell and product. Forward and Backward are calls of waist/calls.h.
template <Cell kCell, Product kProduct>
struct BlockScan {
  static BlockNeeds needs(int64_t hidden, bool backward);
  template <class Call>
  static void launch(const Call& call, void* stream);
};

// The pointwise kernels of a step, one a phase; see pointwise.cuh.
enum class Phase : int32_t {
  kStart,   // before the first step
  kFirst,   // the step, or the first of its two phases
  kSecond,  // projected LSTM, GRU with reset before the product
  kFinish,  // after the last step
};

// What a launch has besides the call; each may be null where a kernel does not use it. All tensors
// are the launcher's own, contiguous, of the dtype of the arithmetic; P is the size of the state.
template <class Call>
struct Pointwise {
  Params<Call> params;
  int64_t step = 0;         // 0 <= step < T in the order of this scan
  void* product = nullptr;  // [S, B, ...], what the product before this launch gave
  void* operand = nullptr;  // [S, B, ...], what the product after this launch multiplies
  void* state = nullptr;    // [S, B, P], carried from step to step
  void* cell = nullptr;     // [S, B, H]: LSTM c or dc
  void* other = nullptr;    // [S, B, H]: what one phase leaves for the next
  Rows rows;                // start and finish: a tensor [S, B, width] of the call
  int64_t width = 0;        // units: elements of a row that get a thread
  DType io = DType::kFloat32;
};

// dtype: of the arithmetic, kFloat32 or kFloat64.
template <class Call>
void launch_pointwise(Phase phase, DType dtype, const Pointwise<Call>& pointwise, void* stream);

}  // namespace fused_rnn::cuda
