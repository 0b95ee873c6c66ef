// What the kernels of all benchmarks share: the clock around many steps, waits that end, and how
// they say that something went wrong.
#pragma once

#include <cuda/ptx>

#include "cuda/microbench/primitives_bench.cuh"

namespace fused_rnn::microbench {

namespace ptx = ::cuda::ptx;

constexpr int kThreads = 256;  // of a block that stands for a scan's
constexpr int kWarps = kThreads / 32;

enum class What : uint32_t { kNothing, kTimeout, kWrong };

// Both lie in the host's memory, where they outlast the kernel whatever its end is.
struct Failure {
  What what;
  uint32_t block, thread, step, expected, found;
};
struct Elapsed {
  double clocks, nanoseconds;
};

// What every kernel is told. It makes `warm_up` steps and then those that are timed.
struct Run {
  uint32_t warm_up, steps;
  uint64_t limit;  // nanoseconds that a kernel may take
  Elapsed* elapsed;
  Failure* failure;
  uint32_t* failed;  // 0, and in the GPU's memory: who is the first to fail
};

// Writes down what happened and ends the kernel, all its blocks. A function of its own, to keep it
// out of the loops that are timed.
__device__ __noinline__ void give_up(const Run& run, What what, uint32_t step, uint32_t expected,
                                     uint32_t found) {
  volatile Failure* failure = run.failure;
  if (atomicExch(run.failed, 1u) == 0) {
    failure->block = blockIdx.x;
    failure->thread = threadIdx.x;
    failure->step = step;
    failure->expected = expected;
    failure->found = found;
    __threadfence_system();
    failure->what = what;
    __threadfence_system();
  } else {  // a trap ends the kernel at once: let the first one finish
    const uint64_t end = ptx::get_sreg_globaltimer() + 100'000'000;
    while (failure->what == What::kNothing && ptx::get_sreg_globaltimer() < end) {
      __nanosleep(1000);
    }
  }
  __trap();
}

// Gives up if it is late. Not part of the loop that waits, where the compiler would read the timer
// each time.
__device__ __noinline__ void look_at_the_time(const Run& run, uint64_t end, uint32_t step) {
  if (ptx::get_sreg_globaltimer() > end) give_up(run, What::kTimeout, step, 0, 0);
}

// A kernel's patience.
struct Watch {
  const Run& run;
  uint64_t end;

  FUSED_RNN_DEVICE explicit Watch(const Run& run)
      : run(run), end(ptx::get_sreg_globaltimer() + run.limit) {}

  // Asks until it is so, and looks at the time once in a while.
  template <uint32_t kPolls = 1024, class Ready>
  FUSED_RNN_DEVICE void until(uint32_t step, Ready ready) const {
    FUSED_RNN_NO_UNROLL
    for (uint32_t polls = 1; !ready(); ++polls) {
      if (polls % kPolls == 0) look_at_the_time(run, end, step);
    }
  }
  FUSED_RNN_DEVICE void expect(uint32_t step, uint32_t expected, uint32_t found) const {
    if (expected != found) give_up(run, What::kWrong, step, expected, found);
  }
};

// step(0), step(1) ... by all threads of the block; the first block writes down the time. The code
// of a step is there once, so what is timed has been run before.
template <class Step>
FUSED_RNN_DEVICE void timed(const Run& run, Step step) {
  uint32_t done = 0;
  FUSED_RNN_NO_UNROLL
  for (int pass = 0; pass < 2; ++pass) {
    const uint32_t end = pass == 0 ? run.warm_up : run.warm_up + run.steps;
    barrier();
    const uint64_t time = ptx::get_sreg_globaltimer();
    const long long clock = clock64();
    FUSED_RNN_NO_UNROLL
    for (; done < end; ++done) step(done);
    barrier();
    const long long clocks = clock64() - clock;
    const uint64_t nanoseconds = ptx::get_sreg_globaltimer() - time;
    if (pass == 1 && block_x() == 0 && thread_index() == 0) {
      *run.elapsed = {static_cast<double>(clocks), static_cast<double>(nanoseconds)};
    }
  }
}

// A state's slice, what one block contributes at a step: 16 units x 16 rows x 2 bytes.
constexpr int kSliceQuads = 32, kSliceWords = 4 * kSliceQuads;

// Word number `word` of the state at a step. Sums of such words are one product and one sum, and
// with any number of words of another step among them they are wrong.
constexpr uint32_t kOfStep = 0x9E3779B1u, kOfWord = 0x85EBCA6Bu;
FUSED_RNN_DEVICE uint32_t word_at(uint32_t step, uint32_t word) {
  return step * kOfStep + word * kOfWord;
}
FUSED_RNN_DEVICE uint4 quad_at(uint32_t step, uint32_t quad) {
  return {word_at(step, 4 * quad), word_at(step, 4 * quad + 1), word_at(step, 4 * quad + 2),
          word_at(step, 4 * quad + 3)};
}
FUSED_RNN_DEVICE uint32_t sum_of(const uint4& quad) { return quad.x + quad.y + quad.z + quad.w; }

// The sum of `words` words at any step, from what they are at step 0.
FUSED_RNN_DEVICE uint32_t sum_at(uint32_t step, uint32_t words, uint32_t at_step_0) {
  return step * (words * kOfStep) + at_step_0;
}

}  // namespace fused_rnn::microbench
