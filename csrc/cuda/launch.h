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

// Fills memory of the current GPU with zeros, on a stream.
void fill_zero(void* data, size_t bytes, void* stream);

// What one block of a block scan takes. threads = 0: H is more than any of its kernels take.
struct BlockNeeds {
  int threads = 0;
  size_t shared_bytes = 0;
};

// The block scans of one cell and product. Forward and Backward are calls of waist/calls.h.
template <Cell kCell, Product kProduct>
struct BlockScan {
  static BlockNeeds needs(int64_t hidden, bool backward);
  // rows: of a block, 4 or 8.
  template <class Call>
  static void launch(const Call& call, int64_t rows, void* stream);
};

// Left in memory of the host by the first grid scan of which a block waited in vain for another.
struct Lost {
  uint32_t raised = 0;  // the others hold; for good: later grid scans give up at once
  int32_t scan = 0;     // number_of_scan()
  int64_t step = 0;     // in the order of the scan, of T
  int32_t block_x = 0;  // the block that gave up: its slice and, in the launch, its pair
  int32_t block_y = 0;
  int32_t missing = 0;  // blocks that had not come
};
// The process's record, which GPUs may write.
Lost* lost_record();

// What a block of a grid scan has: rows of a batch tile, a multiple of 8, and hidden units, 16
// or 32.
struct GridTile {
  int64_t rows = 0;
  int64_t units = 16;
};

// What one launch of a grid scan takes: `pairs` (entry, batch tile) pairs of a call from `first`
// on, numbered tile by tile, each with a grid of blocks of its own.
struct GridWork {
  int64_t first = 0;
  int64_t pairs = 0;
  GridTile tile;
  void* exchange = nullptr;     // exchange_bytes of each pair
  uint32_t* arrived = nullptr;  // [pairs, groups, kCountWords], zero
  uint32_t* claimed = nullptr;  // zero
};

struct GridNeeds {
  int64_t slices = 0;  // 0: there is no such kernel; blocks of a pair, of kGridThreads threads, all
                       // resident together
  size_t shared_bytes = 0;
  size_t exchange_bytes = 0;  // of a pair
  int groups = 0;             // of a tile's rows, which are counted apart
  bool zeroed = false;        // whether these have to be zero
};

// The grid scans of one cell and product.
template <Cell kCell, Product kProduct>
struct GridScan {
  static GridNeeds needs(int64_t hidden, const GridTile& tile, bool backward);
  // How many blocks the current GPU runs at the same time, as it says itself.
  static int64_t resident(int64_t hidden, const GridTile& tile, bool backward);
  template <class Call>
  static void launch(const Call& call, const GridWork& work, void* stream);
};
constexpr int32_t number_of_scan(Cell cell, Product product, bool backward) {
  return (static_cast<int32_t>(cell) * 5 + static_cast<int32_t>(product)) * 2 + backward;
}

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
