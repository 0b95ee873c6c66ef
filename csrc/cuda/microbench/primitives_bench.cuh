// Accesses of 8 bytes that csrc/cuda/primitives.cuh does not have, as no kernel needs them yet, and
// the toolkit has no function for: beside that file the only one with inline PTX.
#pragma once

#include "cuda/primitives.cuh"

namespace fused_rnn::microbench {

using namespace fused_rnn::cuda;

// One word of 8 bytes, read or written as one, at the scope of the GPU.
FUSED_RNN_DEVICE uint64_t load_relaxed_wide(const uint64_t* at) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
FUSED_RNN_DEVICE void store_relaxed_wide(uint64_t* at, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
}

// Two such words in one access of 16 bytes, each of them read as one; they may be of different
// times. Unless `wanted` nothing is read and `pair` stays: a predicate, so that many of these are
// under way at a time, where a branch might wait.
FUSED_RNN_DEVICE void load_relaxed_pair(bool wanted, uint64_t (&pair)[2], const uint64_t* at) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %3, 0;\n\t"
      "@wanted ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];\n\t}"
      : "+l"(pair[0]), "+l"(pair[1])
      : "l"(at), "r"(static_cast<uint32_t>(wanted))
      : "memory");
}

}  // namespace fused_rnn::microbench
