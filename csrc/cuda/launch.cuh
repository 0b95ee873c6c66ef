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

// together: all blocks are resident at the same time.
template <class Argument>
void launch(void (*kernel)(const Argument), const Grid& grid, const Argument& argument, void*,
            bool together = false) {
  emulator::run(kernel,
                {static_cast<int>(grid.x), static_cast<int>(grid.y), grid.threads,
                 grid.shared_bytes, together},
                argument);
}

#else

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it once more
  throw std::runtime_error(std::string("fused_rnn: ") + what + ": " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "there is no current GPU");
  return device;
}
inline int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "the GPU does not say what it has");
  return value;
}
// Shared memory that one block may have.
inline size_t most_shared(int device) {
  return static_cast<size_t>(attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// More shared memory than a kernel has by itself has to be asked for: as much as there is, for
// another thread may be about to launch the same kernel with more than this launch takes.
template <class Argument>
void allow_shared(void (*kernel)(const Argument), size_t bytes) {
  if (bytes <= 48 * 1024) return;
  const char* what = "the GPU does not have the shared memory a scan of this size needs";
  const size_t most = most_shared(current_device());
  if (bytes > most) check(cudaErrorInvalidValue, what);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(most)),
        what);
}

// together: all blocks are resident at the same time, or the launch fails.
template <class Argument>
void launch(void (*kernel)(const Argument), const Grid& grid, const Argument& argument,
            void* stream, bool together = false) {
  allow_shared(kernel, grid.shared_bytes);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  Argument copy = argument;
  void* arguments[] = {&copy};
  const auto start = together ? cudaLaunchCooperativeKernel<void> : cudaLaunchKernel<void>;
  check(start(reinterpret_cast<void*>(kernel), blocks, dim3(static_cast<unsigned>(grid.threads)),
              arguments, grid.shared_bytes, static_cast<cudaStream_t>(stream)),
        "a kernel could not be launched");
}

#endif

// Says which stack entries a launch begins with, and the directions of so many of them.
template <class Call>
void set_directions(Params<Call>& params, int64_t first, int64_t entries) {
  params.first_entry = first;
  std::fill(std::begin(params.reverse_bits), std::end(params.reverse_bits), 0u);
  for (int64_t s = 0; s < entries; ++s) {
    if (params.call.layer.reverse[first + s]) params.reverse_bits[s / 32] |= 1u << (s % 32);
  }
}

// Launches of at most kLaunchEntries stack entries, their directions in bits. `params` is part of
// `argument`, what the kernel takes.
template <class Argument, class Call>
void launch_stack(void (*kernel)(const Argument), Grid grid, Argument& argument,
                  Params<Call>& params, void* stream) {
  const Layer& layer = params.call.layer;
  for (int64_t first = 0; first < layer.stack; first += kLaunchEntries) {
    const int64_t entries = std::min<int64_t>(kLaunchEntries, layer.stack - first);
    set_directions(params, first, entries);
    grid.y = entries;
    launch(kernel, grid, argument, stream);
  }
}

}  // namespace fused_rnn::cuda
