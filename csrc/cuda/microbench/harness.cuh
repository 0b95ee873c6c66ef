// Runs kernels on the GPU and keeps what they say: launches, repeats, rows. Host code.
#pragma once

#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/microbench/device.cuh"
#include "cuda/microbench/report.h"

namespace fused_rnn::microbench {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it once more
  throw Error(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

constexpr uint64_t kLimit = 2'000'000'000;            // ns until a wait inside a kernel gives up
constexpr auto kPatience = std::chrono::seconds(10);  // with those no kernel can end by itself
constexpr uint32_t kSteps = 2000;
constexpr size_t kScratchBytes = size_t{1} << 20;

struct Options {
  bool quick = false;
  std::string only, json;
};

enum class Together { kNo, kGrid, kCluster };  // must blocks be on the GPU at the same time?

// How to run a kernel once, and what to divide by.
struct Launch {
  const void* kernel;
  int threads = kThreads;
  size_t shared = 0;
  Together together = Together::kNo;
  uint32_t warm_up = kSteps / 10, steps = kSteps;
  int parts = 1;             // of a step: what is reported is one of them
  double multiply_adds = 0;  // of a part
};

class Harness {
 public:
  std::vector<Row> rows;

  explicit Harness(const Options& options) : options(options) {
    check(cudaSetDevice(0), "the first GPU cannot be used");
    check(cudaGetDeviceProperties(&gpu, 0), "the GPU's properties");
    // Memory of the host that kernels write: it can still be read after a kernel ended in a trap.
    check(cudaHostAlloc(&elapsed, sizeof *elapsed, cudaHostAllocMapped), "memory of the host");
    check(cudaHostAlloc(&failure, sizeof *failure, cudaHostAllocMapped), "memory of the host");
    check(cudaMalloc(&scratch, kScratchBytes), "memory of the GPU");
    check(cudaMalloc(&failed, sizeof *failed), "memory of the GPU");
    check(cudaStreamCreate(&stream), "a stream");
  }

  bool wanted(const Case& c) const {
    return (c.benchmark + " " + c.variant).find(options.only) != std::string::npos;
  }
  int repeats() const { return options.quick ? 7 : 31; }

  // Shared memory with which no two blocks fit on one multiprocessor.
  size_t shared_of_one() const { return gpu.sharedMemPerMultiprocessor / 2 + 1024; }

  // The architecture the kernels were compiled for, such as 90.
  int compiled_for(const void* kernel) const {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel),
          "there are no kernels for this GPU in the program; build it for sm_" +
              std::to_string(gpu.major) + std::to_string(gpu.minor));
    return attributes.binaryVersion;
  }

  // The largest grid whose blocks are all on the GPU at the same time.
  int most_blocks(const Launch& launch) const {
    prepare(launch);
    int each = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, launch.kernel, launch.threads,
                                                        launch.shared),
          "occupancy");
    return each * gpu.multiProcessorCount;
  }
  // How many clusters are; 0 where there can be none of that size.
  int most_clusters(const Launch& launch, int size) const {
    prepare(launch);
    if (size > 8 &&
        cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
            cudaSuccess) {
      cudaGetLastError();
      return 0;
    }
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = configure(launch, {"", "", size, size}, attribute);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, launch.kernel, &config) != cudaSuccess) {
      cudaGetLastError();  // the size is none of this GPU's
      return 0;
    }
    return clusters;
  }

  void absent(const Case& c, const std::string& why) {
    Row row;
    row.which = c;
    row.absent = why;
    report(row);
  }

  // One row of repeated launches. `argument` is the kernel's, whose member `run` is filled in here.
  template <class Argument>
  void measure(const Case& c, const Launch& launch, const Argument& argument) {
    measure(c, launch, std::vector<Argument>(static_cast<size_t>(repeats()), argument));
  }
  // One repeat for each of the arguments.
  template <class Argument>
  void measure(const Case& c, const Launch& launch, const std::vector<Argument>& arguments) {
    prepare(launch);
    std::vector<double> ns, clocks;
    run(c, launch, arguments.front());  // the first one also brings the code to the GPU
    for (const Argument& argument : arguments) {
      const Elapsed took = run(c, launch, argument);
      const double parts = static_cast<double>(launch.steps) * launch.parts;
      ns.push_back(took.nanoseconds / parts);
      clocks.push_back(took.clocks / parts);
    }
    report({c, static_cast<int>(ns.size()), launch.steps, summarize(ns), summarize(clocks),
            launch.multiply_adds, ""});
  }

  // One launch.
  template <class Argument>
  Elapsed run(const Case& c, const Launch& launch, Argument argument) {
    argument.run = {launch.warm_up, launch.steps, kLimit, elapsed, failure, failed};
    *elapsed = {};
    *failure = {};
    check(cudaMemsetAsync(scratch, 0, kScratchBytes, stream), "memset");
    check(cudaMemsetAsync(failed, 0, sizeof *failed, stream), "memset");
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = configure(launch, c, attribute);
    void* arguments[] = {&argument};
    check(cudaLaunchKernelExC(&config, launch.kernel, arguments), name_of(c) + ": launch");
    wait(c);
    return *elapsed;
  }

  Options options;
  cudaDeviceProp gpu{};
  void* scratch = nullptr;  // zero at each launch

 private:
  Elapsed* elapsed = nullptr;
  Failure* failure = nullptr;
  uint32_t* failed = nullptr;
  cudaStream_t stream{};

  void prepare(const Launch& launch) const {
    check(cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(launch.shared)),
          "a kernel's shared memory");
  }

  cudaLaunchConfig_t configure(const Launch& launch, const Case& c,
                               cudaLaunchAttribute& attribute) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(c.blocks));
    config.blockDim = dim3(static_cast<unsigned>(launch.threads));
    config.dynamicSmemBytes = launch.shared;
    config.stream = stream;
    attribute = {};
    config.attrs = &attribute;
    config.numAttrs = launch.together == Together::kNo ? 0 : 1;
    if (launch.together == Together::kGrid) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    } else {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(c.cluster), 1, 1};
    }
    return config;
  }

  // Until the kernel has ended; not for ever, as waits of the hardware's own have no limit.
  void wait(const Case& c) const {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    cudaError_t state;
    while ((state = cudaStreamQuery(stream)) == cudaErrorNotReady) {
      if (std::chrono::steady_clock::now() > end) {
        throw Error(name_of(c) + ": the kernel does not end");
      }
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    if (state == cudaSuccess) return;
    const Failure& f = *failure;
    if (f.what == What::kNothing) check(state, name_of(c));
    char text[160];
    const std::string where = name_of(c) + ": block " + std::to_string(f.block) + ", thread " +
                              std::to_string(f.thread) + ", step " + std::to_string(f.step) + ": ";
    if (f.what == What::kTimeout) {
      std::snprintf(text, sizeof text, "waited in vain, %.0f s after the kernel began",
                    1e-9 * static_cast<double>(kLimit));
    } else {
      std::snprintf(text, sizeof text, "read 0x%08x, not 0x%08x", f.found, f.expected);
    }
    throw Error(where + text);
  }

  void report(const Row& row) {
    rows.push_back(row);
    std::printf("%s\n", table_line(row).c_str());
    std::fflush(stdout);
  }
};

}  // namespace fused_rnn::microbench
