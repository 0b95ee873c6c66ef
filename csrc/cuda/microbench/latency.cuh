// What one block's own instructions take: loads, products, barriers, a release.
#pragma once

#include <cstdint>
#include <random>
#include <utility>

#include "cuda/microbench/harness.cuh"

namespace fused_rnn::microbench {

// A chain of pointers through memory, each in a line of its own.
struct ChaseArgument {
  Run run;
  const uint64_t* first;
  uint64_t* sink;
};

FUSED_RNN_KERNEL(1) chase_l2(FUSED_RNN_PARAMS ChaseArgument argument) {
  const uint64_t* at = argument.first;
  timed(argument.run, [&](uint32_t) {
    at = reinterpret_cast<const uint64_t*>(static_cast<uintptr_t>(load_relaxed_wide(at)));
  });
  *argument.sink = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(at));
}

constexpr uint32_t kChainWords = 1024;

FUSED_RNN_KERNEL(1) chase_shared(FUSED_RNN_PARAMS ChaseArgument argument) {
  __shared__ uint32_t chain[kChainWords];  // of each word the offset in bytes of the next
  FUSED_RNN_NO_UNROLL
  for (uint32_t i = 0; i < kChainWords; ++i) {
    chain[i] = static_cast<uint32_t>(sizeof(uint32_t)) * ((i + 37) % kChainWords);
  }
  barrier();
  uint32_t at = 0;
  timed(argument.run, [&](uint32_t) {
    at = *reinterpret_cast<const volatile uint32_t*>(reinterpret_cast<const char*>(chain) + at);
  });
  *argument.sink = at;
}

struct PlainArgument {
  Run run;
  uint32_t* words;
};

enum class Mma { kBf16, kTf32 };
template <Mma kMma>
constexpr double kMultiplyAdds = 16 * 8 * (kMma == Mma::kBf16 ? 16 : 8);

// Operands from 0.5 to 1 of either sign, as the power that a product takes depends on its bits.
template <Mma kMma>
FUSED_RNN_DEVICE uint32_t operand(uint32_t which) {
  const uint32_t bits = word_at(which + 1, static_cast<uint32_t>(thread_index())) * 0xC2B2AE35u;
  return kMma == Mma::kBf16 ? (bits & 0x807F807Fu) | 0x3F003F00u
                            : (bits & 0x807FFFFFu) | 0x3F000000u;
}
template <Mma kMma>
FUSED_RNN_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kMma == Mma::kBf16) {
    mma_bf16(d, a, b);
  } else {
    mma_tf32(d, a, b);
  }
}

// A step: kLength products into each of kChains sums, by every warp.
template <Mma kMma, int kChains, int kLength>
FUSED_RNN_KERNEL(kThreads)
mma(FUSED_RNN_PARAMS PlainArgument argument) {
  const uint32_t a[4] = {operand<kMma>(0), operand<kMma>(1), operand<kMma>(2), operand<kMma>(3)};
  const uint32_t b[2] = {operand<kMma>(4), operand<kMma>(5)};
  float d[kChains][4];  // of each chain others, or they would be taken for one
  for (int chain = 0; chain < kChains; ++chain) {
    for (int i = 0; i < 4; ++i) d[chain][i] = static_cast<float>(4 * chain + i);
  }
  timed(argument.run, [&](uint32_t) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kLength; ++i) {
      FUSED_RNN_UNROLL
      for (int chain = 0; chain < kChains; ++chain) multiply<kMma>(d[chain], a, b);
    }
  });
  float sum = 0;  // products nobody wants would not be computed
  for (int chain = 0; chain < kChains; ++chain) {
    for (int i = 0; i < 4; ++i) sum += d[chain][i];
  }
  argument.words[thread_index()] = bits_of(sum);
}
constexpr int kChainLength = 16, kRateChains = 8, kRateLength = 4;

constexpr int kBarriers = 16;  // of a step, lest the loop's own instructions count

FUSED_RNN_KERNEL(kThreads) block_barrier(FUSED_RNN_PARAMS PlainArgument argument) {
  timed(argument.run, [](uint32_t) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kBarriers; ++i) barrier();
  });
}

// A write and a release of it, one pair after the other: each waits for the release before, too.
FUSED_RNN_KERNEL(1) releases(FUSED_RNN_PARAMS PlainArgument argument) {
  uint32_t* const data = argument.words + 64;  // in another line than the flag
  timed(argument.run, [&](uint32_t step) {
    store(data, step);
    store_release(argument.words, step);
  });
}

// The same, each in the quiet: until the next instruction may issue, less what the clock takes.
FUSED_RNN_KERNEL(1) releases_apart(FUSED_RNN_PARAMS PlainArgument argument) {
  constexpr long long kPause = 3000;  // clocks; far more than any write takes
  // Zero is read there, but the compiler does not know: else it would put the loads of the
  // addresses, which are a kernel's arguments, to where the clock runs.
  uint32_t* const flag = argument.words + load_relaxed(argument.words);
  uint32_t* const data = flag + 64;
  long long clocks = 0;
  timed(argument.run, [&](uint32_t step) {
    const long long before = clock64();
    const long long begin = clock64();
    store(data, step);
    store_release(flag, step);
    const long long end = clock64();
    clocks += end - begin - (begin - before);
    if (step + 1 == argument.run.warm_up) clocks = 0;
    while (clock64() - end < kPause) {
    }
  });
  // The whole loop has told how long a clock is.
  Elapsed& elapsed = *argument.run.elapsed;
  elapsed = {static_cast<double>(clocks),
             static_cast<double>(clocks) * elapsed.nanoseconds / elapsed.clocks};
}

// Lines of `bytes` bytes of the GPU's memory, each with the address of another: one cycle through
// all of them in random order.
inline uint64_t* make_cycle(size_t bytes) {
  constexpr size_t kWords = 128 / sizeof(uint64_t);  // of a line
  uint64_t* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "memory of the GPU");
  std::vector<size_t> order(bytes / 128);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::mt19937_64 random(1);
  for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
  std::vector<uint64_t> words(order.size() * kWords);
  for (size_t i = 0; i < order.size(); ++i) {
    const uint64_t* next = memory + order[(i + 1) % order.size()] * kWords;
    words[order[i] * kWords] = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(next));
  }
  check(cudaMemcpy(memory, words.data(), words.size() * sizeof(uint64_t), cudaMemcpyHostToDevice),
        "memory of the GPU");
  return memory;
}

// How far a line is depends on where in L2 it is: over many lines, and for some of them one by one,
// whose least and greatest times are those of the nearest and the farthest.
inline void l2_benchmarks(Harness& harness) {
  const Case all{"l2_load", "4 MiB"}, each{"l2_load", "a line of 32"};
  uint64_t* const sink = static_cast<uint64_t*>(harness.scratch);
  Launch launch{reinterpret_cast<const void*>(chase_l2), 1};
  if (harness.wanted(all)) {
    constexpr size_t kBytes = size_t{4} << 20;
    launch.warm_up = kBytes / 128;  // once through, so that all is in L2
    launch.steps = 8 * kSteps;
    uint64_t* const memory = make_cycle(kBytes);
    harness.measure(all, launch, ChaseArgument{{}, memory, sink});
    check(cudaFree(memory), "memory of the GPU");
  }
  if (harness.wanted(each)) {
    // A line that points to itself, and the like 4 KiB further on.
    constexpr size_t kLines = 32, kApart = 4096 / sizeof(uint64_t);
    uint64_t* memory = nullptr;
    check(cudaMalloc(&memory, kLines * kApart * sizeof(uint64_t)), "memory of the GPU");
    std::vector<uint64_t> words(kLines * kApart);
    std::vector<ChaseArgument> arguments;
    for (size_t i = 0; i < kLines; ++i) {
      const uint64_t* line = memory + i * kApart + (i % 32) * (128 / sizeof(uint64_t));
      words[static_cast<size_t>(line - memory)] =
          static_cast<uint64_t>(reinterpret_cast<uintptr_t>(line));
      arguments.push_back({{}, line, sink});
    }
    check(cudaMemcpy(memory, words.data(), words.size() * sizeof(uint64_t), cudaMemcpyHostToDevice),
          "memory of the GPU");
    launch.warm_up = kSteps / 10;
    launch.steps = kSteps;
    harness.measure(each, launch, arguments);
    check(cudaFree(memory), "memory of the GPU");
  }
}

inline void latency_benchmarks(Harness& harness) {
  l2_benchmarks(harness);
  const Case shared{"shared_load", "4 KiB"};
  if (harness.wanted(shared)) {
    Launch launch{reinterpret_cast<const void*>(chase_shared), 1};
    launch.steps = 8 * kSteps;
    uint64_t* const sink = static_cast<uint64_t*>(harness.scratch);
    harness.measure(shared, launch, ChaseArgument{{}, nullptr, sink});
  }

  struct Each {
    const char *benchmark, *variant;
    void (*kernel)(const PlainArgument);
    int threads, parts;
    double multiply_adds;
  };
  constexpr int kRateParts = kRateChains * kRateLength * kWarps;
  const Each all[] = {
      {"mma_chain", "m16n8k16 bf16", mma<Mma::kBf16, 1, kChainLength>, 32, kChainLength, 0},
      {"mma_chain", "m16n8k8 tf32", mma<Mma::kTf32, 1, kChainLength>, 32, kChainLength, 0},
      {"mma_rate", "m16n8k16 bf16", mma<Mma::kBf16, kRateChains, kRateLength>, kThreads, kRateParts,
       kMultiplyAdds<Mma::kBf16>},
      {"mma_rate", "m16n8k8 tf32", mma<Mma::kTf32, kRateChains, kRateLength>, kThreads, kRateParts,
       kMultiplyAdds<Mma::kTf32>},
      {"syncthreads", "256 threads", block_barrier, kThreads, kBarriers, 0},
      {"store_release", "back to back", releases, 1, 1, 0},
      {"store_release", "apart", releases_apart, 1, 1, 0},
  };
  for (const Each& each : all) {
    const Case c{each.benchmark, each.variant};
    if (!harness.wanted(c)) continue;
    Launch launch{reinterpret_cast<const void*>(each.kernel), each.threads};
    launch.parts = each.parts;
    launch.multiply_adds = each.multiply_adds;
    harness.measure(c, launch, PlainArgument{{}, static_cast<uint32_t*>(harness.scratch)});
  }
}

}  // namespace fused_rnn::microbench
