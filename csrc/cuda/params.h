// What the launchers hand to the kernels, by value: the call (waist/calls.h has shapes and
// strides), and where in the stack a launch begins.
#pragma once

#include <cstddef>
#include <cstdint>

#include "waist/calls.h"

namespace fused_rnn::cuda {

// What operands of recurrent products are and how they are multiplied. The first two have tensors
// of that dtype (io), the others of float32.
enum class Product : int32_t { kBf16, kF16, kTf32, kTf32x3, kIeee };

enum class Cell : int32_t { kLstm, kGru, kRnn };

// Stack entries of one launch: as many as have a bit here.
constexpr int kLaunchEntries = 1024;

// call.layer.flags is memory of the device; call.layer.reverse, of the host, is not used here.
template <class Call>
struct Params {
  Call call;
  int64_t first_entry = 0;
  uint32_t reverse_bits[kLaunchEntries / 32] = {};
};

// A count in memory that many blocks look at has a line of 128 bytes to itself.
constexpr int kCountWords = 32;

// What a grid scan is given; see launch.h and grid_scan.cuh. params.first_entry is the entry of the
// launch's first pair.
struct Lost;
template <class Call>
struct GridParams {
  Params<Call> params;
  int64_t first_pair = 0;  // of the launch's, (entry, tile) pairs being numbered tile by tile
  int64_t tiles = 0;       // of an entry
  int rows = 0;            // of a tile
  int groups = 0;          // of 16 rows, of a whole tile
  void* exchange = nullptr;
  uint32_t* arrived = nullptr;
  uint32_t* claimed = nullptr;
  Lost* lost = nullptr;
  // How long a wait may last, as now() counts, and what time between two looks is not counted.
  uint64_t patience = 0, pause = 0;
  int32_t scan = 0;
};

}  // namespace fused_rnn::cuda
