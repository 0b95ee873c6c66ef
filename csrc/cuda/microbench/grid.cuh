// What blocks of one grid need to go from step to step together: a barrier through L2, and the
// exchange of a state.
#pragma once

#include <cooperative_groups.h>

#include "cuda/microbench/harness.cuh"

namespace fused_rnn::microbench {

enum class GridBarrier { kCounter, kFlags, kFlagsTogether, kCooperativeGroups };

constexpr int kMostBlocks = 256;

struct GridArgument {
  Run run;
  uint32_t* flags;  // [kMostBlocks], from zero; the counter is the first
  void* state;      // exchange: [2, blocks, a slice], by the parity of the step, from zero
};

// One warp waits until the flags from `first` to `last` have passed `step`: a lane a flag, 32 at a
// time.
FUSED_RNN_DEVICE void wait_for_flags(const Watch& watch, uint32_t step, const uint32_t* flags,
                                     int first, int last) {
  FUSED_RNN_NO_UNROLL
  for (int each = first + thread_index() % 32; each < last; each += 32) {
    watch.until(step, [&] { return load_acquire(flags + each) > step; });
  }
}

// The same with the loads of all rounds under way at a time, which acquire loads cannot be: each is
// to be over before whatever follows it.
FUSED_RNN_DEVICE void wait_for_flags_together(const Watch& watch, uint32_t step,
                                              const uint32_t* flags, int blocks) {
  constexpr int kRounds = kMostBlocks / 32;
  watch.until(step, [&] {
    uint32_t value[kRounds];
    FUSED_RNN_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      const int each = 32 * round + thread_index() % 32;
      value[round] = step + 1;
      if (each < blocks) value[round] = load_relaxed(flags + each);
    }
    bool ready = true;
    FUSED_RNN_UNROLL
    for (int round = 0; round < kRounds; ++round) ready &= value[round] > step;
    return ready;
  });
  fence();
}

template <GridBarrier kBarrier>
FUSED_RNN_KERNEL(kThreads)
grid_barrier(FUSED_RNN_PARAMS GridArgument argument) {
  const Watch watch(argument.run);
  uint32_t* const flags = argument.flags;
  const uint32_t blocks = static_cast<uint32_t>(block_count_x());
  timed(argument.run, [&](uint32_t step) {
    if constexpr (kBarrier == GridBarrier::kCooperativeGroups) {
      cooperative_groups::this_grid().sync();
    } else {
      barrier();
      if constexpr (kBarrier == GridBarrier::kCounter) {
        if (thread_index() == 0) {
          add_release(flags, 1);
          watch.until(step, [&] { return load_acquire(flags) >= (step + 1) * blocks; });
        }
      } else if (thread_index() < 32) {
        if (thread_index() == 0) store_release(flags + block_x(), step + 1);
        warp_barrier();
        if constexpr (kBarrier == GridBarrier::kFlags) {
          wait_for_flags(watch, step, flags, 0, block_count_x());
        } else {
          wait_for_flags_together(watch, step, flags, block_count_x());
        }
      }
      barrier();
    }
  });
}

// The slices that a warp reads, an eighth of them: [first, last).
struct Share {
  int first, last;
  FUSED_RNN_DEVICE Share()
      : first(thread_index() / 32 * block_count_x() / kWarps),
        last((thread_index() / 32 + 1) * block_count_x() / kWarps) {}
  FUSED_RNN_DEVICE uint32_t words_of_lane() const {
    return static_cast<uint32_t>((last - first) * kSliceWords / 32);
  }
};

// A step with flags. Two buffers are enough: who writes the state of a step has seen the flags of
// all blocks for the step before, and so has every block read the state of the step before that.
constexpr int kQuadsTogether = 20;  // loads of a lane under way: the shares of up to 160 blocks

FUSED_RNN_KERNEL(kThreads) exchange_flags(FUSED_RNN_PARAMS GridArgument argument) {
  const Watch watch(argument.run);
  const Share share;
  const int lane = thread_index() % 32;
  uint32_t at_step_0 = 0;
  FUSED_RNN_NO_UNROLL
  for (int slice = share.first; slice < share.last; ++slice) {
    at_step_0 += sum_of(quad_at(0, static_cast<uint32_t>(slice * kSliceQuads + lane)));
  }

  timed(argument.run, [&](uint32_t step) {
    uint4* const state = static_cast<uint4*>(argument.state) +
                         (step % 2) * static_cast<uint32_t>(block_count_x() * kSliceQuads);
    if (thread_index() < kSliceQuads) {
      const int quad = block_x() * kSliceQuads + thread_index();
      store(state + quad, quad_at(step, static_cast<uint32_t>(quad)));
    }
    barrier();
    if (thread_index() == 0) store_release(argument.flags + block_x(), step + 1);

    wait_for_flags(watch, step, argument.flags, share.first, share.last);
    warp_barrier();
    uint32_t sum = 0;
    FUSED_RNN_NO_UNROLL
    for (int first = share.first; first < share.last; first += kQuadsTogether) {
      uint4 quads[kQuadsTogether];
      FUSED_RNN_UNROLL
      for (int i = 0; i < kQuadsTogether; ++i) {
        quads[i] = {0, 0, 0, 0};
        if (first + i < share.last) quads[i] = load(state + (first + i) * kSliceQuads + lane);
      }
      FUSED_RNN_UNROLL
      for (int i = 0; i < kQuadsTogether; ++i) sum += sum_of(quads[i]);
    }
    watch.expect(step, sum_at(step, share.words_of_lane(), at_step_0), sum);
    barrier();  // all of the state is here: a scan would multiply now
  });
}

// A step with a tag beside each payload of 4 bytes, the step's number plus one, in the upper half
// of a word of 8 bytes that is read and written as one. No order of accesses is asked for: a word
// has its tag, and a block writes the state of a step only after it has found that of the step
// before whole, which each block writes after having found the one before that.
constexpr int kPairsTogether = 20;  // loads of a lane under way; there are two to a slice

FUSED_RNN_KERNEL(kThreads) exchange_tagged(FUSED_RNN_PARAMS GridArgument argument) {
  const Watch watch(argument.run);
  const Share share;
  const int lane = thread_index() % 32, slice_words = kSliceWords;
  // Load number i of a lane is words 64 i + 2 lane and the next one from the share's first on.
  const int first_word = share.first * slice_words + 2 * lane;
  const int pairs = 2 * (share.last - share.first);
  uint32_t at_step_0 = 0;
  FUSED_RNN_NO_UNROLL
  for (int pair = 0; pair < pairs; ++pair) {
    const uint32_t word = static_cast<uint32_t>(first_word + 64 * pair);
    at_step_0 += word_at(0, word) + word_at(0, word + 1);
  }

  timed(argument.run, [&](uint32_t step) {
    uint64_t* const state = static_cast<uint64_t*>(argument.state) +
                            (step % 2) * static_cast<uint32_t>(block_count_x() * slice_words);
    const uint64_t tag = static_cast<uint64_t>(step + 1) << 32;
    if (thread_index() < slice_words) {
      const int word = block_x() * slice_words + thread_index();
      store_relaxed_wide(state + word, tag | word_at(step, static_cast<uint32_t>(word)));
    }
    uint32_t sum = 0;
    FUSED_RNN_NO_UNROLL
    for (int first = 0; first < pairs; first += kPairsTogether) {
      const uint64_t* const from = state + first_word + 64 * first;
      uint64_t found[kPairsTogether][2] = {};
      const auto missing = [&](int i) { return ((found[i][0] ^ tag) | (found[i][1] ^ tag)) >> 32; };
      FUSED_RNN_UNROLL
      for (int i = 0; i < kPairsTogether; ++i) {
        found[i][0] = found[i][1] = first + i < pairs ? 0 : tag;
      }
      watch.until(step, [&] {
        FUSED_RNN_UNROLL
        for (int i = 0; i < kPairsTogether; ++i) {
          load_relaxed_pair(missing(i) != 0, found[i], from + 64 * i);
        }
        uint64_t any_missing = 0;
        FUSED_RNN_UNROLL
        for (int i = 0; i < kPairsTogether; ++i) any_missing |= missing(i);
        return any_missing == 0;
      });
      FUSED_RNN_UNROLL
      for (int i = 0; i < kPairsTogether; ++i) {
        sum += static_cast<uint32_t>(found[i][0]) + static_cast<uint32_t>(found[i][1]);
      }
    }
    watch.expect(step, sum_at(step, share.words_of_lane(), at_step_0), sum);
    barrier();
  });
}

inline std::vector<int> grid_sizes(int most) {
  std::vector<int> sizes;
  for (const int size : {8, 16, 32, 64, 96, 132, 160, 192, 224}) {
    if (size < most) sizes.push_back(size);
  }
  sizes.push_back(most);
  return sizes;
}

inline void grid_benchmarks(Harness& harness) {
  struct Each {
    const char *benchmark, *variant;
    void (*kernel)(const GridArgument);
  };
  const Each all[] = {
      {"grid_barrier", "counter", grid_barrier<GridBarrier::kCounter>},
      {"grid_barrier", "flags", grid_barrier<GridBarrier::kFlags>},
      {"grid_barrier", "flags_together", grid_barrier<GridBarrier::kFlagsTogether>},
      {"grid_barrier", "cooperative_groups", grid_barrier<GridBarrier::kCooperativeGroups>},
      {"exchange", "flags", exchange_flags},
      {"exchange", "tagged", exchange_tagged},
  };
  unsigned char* const scratch = static_cast<unsigned char*>(harness.scratch);
  constexpr size_t kFlagBytes = 4096;
  static_assert(kMostBlocks * sizeof(uint32_t) <= kFlagBytes);
  static_assert(kFlagBytes + 2 * kMostBlocks * kSliceWords * sizeof(uint64_t) <= kScratchBytes);
  const GridArgument argument{{}, reinterpret_cast<uint32_t*>(scratch), scratch + kFlagBytes};
  for (const Each& each : all) {
    Case c{each.benchmark, each.variant};
    if (!harness.wanted(c)) continue;
    Launch launch{reinterpret_cast<const void*>(each.kernel)};
    launch.shared = harness.shared_of_one();
    launch.together = Together::kGrid;
    for (const int blocks : grid_sizes(std::min(kMostBlocks, harness.most_blocks(launch)))) {
      c.blocks = blocks;
      harness.measure(c, launch, argument);
    }
  }
}

}  // namespace fused_rnn::microbench
