// What the flags and the directions of a call say; see docs/design.md.
#pragma once

#include "cuda/params.h"
#include "cuda/primitives.cuh"

namespace fused_rnn::cuda {

constexpr int kEnded = 1, kReset = 2;

FUSED_RNN_DEVICE bool starts_segment(int bits) { return (bits & (kEnded | kReset)) == kReset; }

// entry: of the launch's.
template <class Call>
FUSED_RNN_DEVICE bool is_reversed(const Params<Call>& p, int entry) {
  return p.reverse_bits[entry / 32] >> (entry % 32) & 1;
}

}  // namespace fused_rnn::cuda
