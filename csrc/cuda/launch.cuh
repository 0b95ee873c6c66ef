// Launching one kernel, on a GPU or in the emulator, checked.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/primitives.cuh"

#if defined(FUSED_RNN_EMULATOR)
#include "emulator/emulator.h"
#endif

namespace fused_rnn::cuda {

struct Grid {
  int64_t x, y;
  int threads;
  size_t shared_bytes;
};

#if defined(FUSED_RNN_EMULATOR)

template <class Argument>
void launch(void (*kernel)(const Argument), const Grid& grid, const Argument& argument, void*) {
  emulator::run(
      kernel, {static_cast<int>(grid.x), static_cast<int>(grid.y), grid.threads, grid.shared_bytes},
      argument);
}

#else

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it once more
  throw std::runtime_error(std::string("fused_rnn: ") + what + ": " + cudaGetErrorString(error));
}

template <class Argument>
void launch(void (*kernel)(const Argument), const Grid& grid, const Argument& argument,
            void* stream) {
  if (grid.shared_bytes > 48 * 1024) {  // more than that has to be asked for
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          "the GPU does not have the shared memory a block scan of this size needs");
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  Argument copy = argument;
  void* arguments[] = {&copy};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks,
                         dim3(static_cast<unsigned>(grid.threads)), arguments, grid.shared_bytes,
                         static_cast<cudaStream_t>(stream)),
        "a kernel could not be launched");
}

#endif

// Launches of at most kLaunchEntries stack entries, their directions in bits. `params` is part of
// `argument`, what the kernel takes.
template <class Argument, class Call>
void launch_stack(void (*kernel)(const Argument), Grid grid, Argument& argument,
                  Params<Call>& params, void* stream) {
  const Layer& layer = params.call.layer;
  for (int64_t first = 0; first < layer.stack; first += kLaunchEntries) {
    const int64_t entries = std::min<int64_t>(kLaunchEntries, layer.stack - first);
    params.first_entry = first;
    std::fill(std::begin(params.reverse_bits), std::end(params.reverse_bits), 0u);
    for (int64_t s = 0; s < entries; ++s) {
      if (layer.reverse[first + s]) params.reverse_bits[s / 32] |= 1u << (s % 32);
    }
    grid.y = entries;
    launch(kernel, grid, argument, stream);
  }
}

}  // namespace fused_rnn::cuda
