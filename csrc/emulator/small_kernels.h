// Small kernels, correct ones and with a fault each, for the emulator to be tested with.
#pragma once

#include <cstdint>

#include "cuda/primitives.cuh"

namespace fused_rnn::small {

using namespace fused_rnn::cuda;

enum class Fault {
  kNone,
  kNoBarrier,        // the first of a round
  kNoSecondBarrier,  // the second
  kNoRelease,
  kNoAcquire,
  kFences,  // no fault: fences and relaxed accesses in place of release and acquire
  kSystem,  // no fault: words the host could read
  kNoAcknowledgement,
  kSwapped,
  kParity,
  kNoWait,
  kUnordered,  // threads meet, but nothing orders what they did
  kNeverWaited,
  kSourceWritten,
  kBeyond,
  kMisaligned,
  kUnwritten,
  kLaneEnds,
  kDivergence,
  kNeverSet,
  kEarly,
  kPlainFlag,
  kAtomicReadThenWrite,
  kAtomicWriteThenRead,
  kReadThenAtomicWrite,
  kWriteThenAtomicRead,
};

struct SmallParams {
  const float* in;
  float* out;
  uint32_t* words;  // zero at the start
  float* scratch;   // nothing written
};

constexpr int kSmallThreads = 64, kSmallRounds = 3;

// Sums of `in` [block, round, thread], each block's and round's, by all threads: out [block, round,
// thread].
template <Fault kFault>
FUSED_RNN_KERNEL(kSmallThreads)
reduction(FUSED_RNN_PARAMS SmallParams p) {
  float* shared = &shared_memory<float>();
  const int thread = thread_index();
  for (int round = 0; round < kSmallRounds; ++round) {
    const int at = (block_x() * kSmallRounds + round) * kSmallThreads;
    store(shared + thread, load(p.in + at + thread));
    if (kFault == Fault::kLaneEnds && thread == 37) return;
    if (kFault == Fault::kDivergence && thread == 37) shuffle(0.0f, 0);
    if (kFault != Fault::kNoBarrier) barrier();
    float sum = 0.0f;
    const int end = kSmallThreads + (kFault == Fault::kBeyond ? 1 : 0);
    for (int i = 0; i < end; ++i) sum += load(shared + i);
    if (kFault == Fault::kMisaligned) {
      sum += load(reinterpret_cast<float*>(reinterpret_cast<char*>(shared) + 2));
    }
    if (kFault == Fault::kUnwritten) sum += load(p.out + at + thread);
    store(p.out + at + thread, sum);
    if (kFault != Fault::kNoSecondBarrier) barrier();
  }
}

// Each round every lane takes its neighbour's value: out = in rotated within each warp by the
// rounds.
template <Fault kFault>
FUSED_RNN_KERNEL(kSmallThreads)
rotation(FUSED_RNN_PARAMS SmallParams p) {
  float* shared = &shared_memory<float>();
  const int thread = thread_index(), warp = thread / 32 * 32, lane = thread % 32;
  float value = load(p.in + block_x() * kSmallThreads + thread);
  for (int round = 0; round < kSmallRounds; ++round) {
    store(shared + thread, value);
    if (kFault == Fault::kLaneEnds && thread == 37) return;
    if (kFault == Fault::kDivergence && thread == 37) any(true);
    if (kFault != Fault::kNoBarrier) warp_barrier();
    value = load(shared + warp + (lane + 1) % 32);
    if (kFault != Fault::kNoSecondBarrier) warp_barrier();
  }
  store(p.out + block_x() * kSmallThreads + thread, value);
}

struct alignas(16) SmallQuad {
  float x[4];
};

// Tiles of 16 bytes a thread through two buffers, each thread taking another's: out = in, in each
// tile the quads reversed.
template <Fault kFault>
FUSED_RNN_KERNEL(kSmallThreads)
tile_copy(FUSED_RNN_PARAMS SmallParams p) {
  constexpr int kTiles = 5;
  SmallQuad* shared = &shared_memory<SmallQuad>();
  const int thread = thread_index();
  const SmallQuad* in = reinterpret_cast<const SmallQuad*>(p.in);
  SmallQuad* out = reinterpret_cast<SmallQuad*>(p.out);
  const auto begin = [&](int tile) {
    copy_async<16>(shared + tile % 2 * kSmallThreads + thread, in + tile * kSmallThreads + thread);
  };
  begin(0);
  copy_async_commit();
  if (kFault == Fault::kSourceWritten) {
    // Ordered after the copy began, but not after it ended.
    barrier();
    store(const_cast<float*>(p.in) + (thread + 1) % kSmallThreads * 4, 0.0f);
    barrier();
  }
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles + (kFault == Fault::kBeyond ? 1 : 0)) begin(tile + 1);
    copy_async_commit();
    if (kFault != Fault::kNoWait) copy_async_wait<1>();
    if (kFault == Fault::kUnordered) {
      add_relaxed(p.words, 1);
      while (load_relaxed(p.words) < static_cast<uint32_t>(kSmallThreads * (tile + 1))) {
      }
    } else if (kFault != Fault::kNoBarrier) {
      barrier();
    }
    const int buffer = kFault == Fault::kParity ? (tile + 1) % 2 : tile % 2;
    const SmallQuad quad = load(shared + buffer * kSmallThreads + kSmallThreads - 1 - thread);
    store(out + tile * kSmallThreads + thread, quad);
    if (kFault != Fault::kNoSecondBarrier) barrier();
  }
  if (kFault == Fault::kNeverWaited) begin(0);
}

template <Fault kFault>
FUSED_RNN_DEVICE void signal(uint32_t* word, uint32_t value) {
  if constexpr (kFault == Fault::kFences) {
    fence();
    store_relaxed(word, value);
  } else if constexpr (kFault == Fault::kSystem) {
    store_release_system(word, value);
  } else if constexpr (kFault == Fault::kNoRelease) {
    store_relaxed(word, value);
  } else if constexpr (kFault == Fault::kPlainFlag) {
    store(word, value);
  } else if constexpr (kFault != Fault::kNeverSet) {
    store_release(word, value);
  }
}

template <Fault kFault>
FUSED_RNN_DEVICE void await(const uint32_t* word, uint32_t value) {
  if constexpr (kFault == Fault::kFences) {
    while (load_relaxed(word) < value) {
    }
    fence();
  } else if constexpr (kFault == Fault::kSystem) {
    while (load_system(word) < value) {
    }
    fence();
  } else if constexpr (kFault == Fault::kNoAcquire) {
    while (load_relaxed(word) < value) {
    }
  } else {
    while (load_acquire(word) < value) {
    }
  }
}

// Block 0 hands a row to block 1 each round, by way of the same memory: out = in [round, thread].
template <Fault kFault>
FUSED_RNN_KERNEL(kSmallThreads)
message(FUSED_RNN_PARAMS SmallParams p) {
  const int thread = thread_index();
  for (int round = 0; round < kSmallRounds; ++round) {
    const uint32_t number = static_cast<uint32_t>(round) + 1;
    const int at = round * kSmallThreads + thread;
    if (block_x() == 0) {
      if (kFault != Fault::kNoAcknowledgement) {
        if (thread == 0) await<Fault::kNone>(p.words + 1, number - 1);
        barrier();
      }
      store(p.scratch + thread, load(p.in + at));
      if (kFault != Fault::kNoBarrier) barrier();
      if (thread == 0) signal<kFault>(p.words, number);
    } else {
      if (thread == 0) await<kFault>(p.words, number);
      if (kFault != Fault::kNoSecondBarrier) barrier();
      store(p.out + at, load(p.scratch + kSmallThreads - 1 - thread));
      barrier();
      if (thread == 0) store_release(p.words + 1, number);
    }
  }
}

// Every thread of block 0 signals for itself, and every one of block 1 answers for itself: what
// each thread has done is passed on without barriers. out = in [thread].
template <Fault kFault>
FUSED_RNN_KERNEL(kSmallThreads)
arrivals(FUSED_RNN_PARAMS SmallParams p) {
  const int thread = thread_index();
  const auto add = [&](uint32_t* word) {
    if constexpr (kFault == Fault::kFences) {
      fence();
      add_relaxed(word, 1);
    } else if constexpr (kFault == Fault::kNoRelease) {
      add_relaxed(word, 1);
    } else {
      add_release(word, 1);
    }
  };
  if (block_x() == 0) {
    store(p.scratch + thread, load(p.in + thread));
    add(p.words);
    await<kFault>(p.words + 1, kSmallThreads);
    store(p.scratch + kSmallThreads - 1 - thread, 0.0f);
  } else {
    await<kFault>(p.words, kSmallThreads);
    store(p.out + thread, load(p.scratch + (thread + 1) % kSmallThreads));
    if (kFault == Fault::kNoAcknowledgement && thread == 5) add_relaxed(p.words + 1, 1);
    if (kFault != Fault::kNoAcknowledgement || thread != 5) add(p.words + 1);
  }
}

// A plain and an atomic access of one word by two blocks, the second after the first but not
// ordered.
template <Fault kFault>
FUSED_RNN_KERNEL(kSmallThreads)
mixed(FUSED_RNN_PARAMS SmallParams p) {
  if (thread_index() != 0) return;
  uint32_t* word = p.words + 2;
  if (block_x() == 0) {
    if (kFault == Fault::kAtomicReadThenWrite) load_relaxed(word);
    if (kFault == Fault::kAtomicWriteThenRead) store_release(word, 1);
    if (kFault == Fault::kReadThenAtomicWrite) load(word);
    if (kFault == Fault::kWriteThenAtomicRead) store(word, 1u);
    store_relaxed(p.words, 1);
  } else {
    while (load_relaxed(p.words) == 0) {
    }
    if (kFault == Fault::kAtomicReadThenWrite) store(word, 1u);
    if (kFault == Fault::kAtomicWriteThenRead) load(word);
    if (kFault == Fault::kReadThenAtomicWrite) store_release(word, 1);
    if (kFault == Fault::kWriteThenAtomicRead) load_acquire(word);
  }
}

constexpr int kCounterBlocks = 4;

// Each round every block writes a row, waits for all, and adds all rows: out [block, round,
// thread].
template <Fault kFault>
FUSED_RNN_KERNEL(kSmallThreads)
counter(FUSED_RNN_PARAMS SmallParams p) {
  const int thread = thread_index();
  for (int round = 0; round < kSmallRounds; ++round) {
    const int at = (block_x() * kSmallRounds + round) * kSmallThreads + thread;
    const int buffer = kFault == Fault::kParity ? 0 : round % 2;
    float* rows = p.scratch + buffer * kCounterBlocks * kSmallThreads;
    store(rows + block_x() * kSmallThreads + thread, load(p.in + at));
    if (kFault != Fault::kNoBarrier) barrier();
    if (thread == 0) {
      if constexpr (kFault == Fault::kFences) {
        fence();
        add_relaxed(p.words, 1);
      } else if constexpr (kFault == Fault::kNoRelease) {
        add_relaxed(p.words, 1);
      } else {
        add_release(p.words, 1);
      }
      const int all = kCounterBlocks * (round + 1) - (kFault == Fault::kEarly ? 1 : 0);
      await<kFault>(p.words, static_cast<uint32_t>(all));
    }
    if (kFault != Fault::kNoSecondBarrier) barrier();
    float sum = 0.0f;
    for (int i = 0; i < kCounterBlocks; ++i) sum += load(rows + i * kSmallThreads + thread);
    store(p.out + at, sum);
  }
}

// out [16, 8] = a [16, 16] b [16, 8] in bf16, `in` being a and, by columns, b.
template <Fault kFault>
FUSED_RNN_KERNEL(32)
product(FUSED_RNN_PARAMS SmallParams p) {
  constexpr int kRow = 24;  // numbers of a row in shared memory
  uint16_t* shared = &shared_memory<uint16_t>();
  uint16_t* shared_b = shared + 16 * kRow;
  const int lane = thread_index();
  for (int i = lane; i < 24 * 16; i += 32) {
    store(shared + i / 16 * kRow + i % 16, to_bf16(load(p.in + i)));
  }
  if (kFault != Fault::kNoBarrier) warp_barrier();
  if (kFault == Fault::kLaneEnds && lane == 9) return;
  uint32_t a[4], b[4];
  load_matrix_x4(a, shared + lane % 16 * kRow + lane / 16 * 8 + (kFault == Fault::kMisaligned));
  load_matrix_x4(b, shared_b + lane % 8 * kRow + lane / 8 % 2 * 8);
  if (kFault == Fault::kSwapped) {
    const uint32_t held = a[1];
    a[1] = a[2], a[2] = held;
  }
  float d[4] = {};
  const uint32_t words[2] = {b[0], b[1]};
  if (kFault == Fault::kDivergence && lane == 9) {
    mma_f16(d, a, words);
  } else {
    mma_bf16(d, a, words);
  }
  for (int i = 0; i < 4; ++i) {
    store(p.out + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, d[i]);
  }
}

// Runs a program: of each thread its operations, in order, each with one argument.
enum class Operation : int32_t {
  kNothing,
  kRead,  // number `argument` of scratch
  kWrite,
  kReadShared,
  kWriteShared,
  kBarrier,
  kWarpBarrier,
  kRelease,  // word `argument` becomes 1
  kFencedRelease,
  kAcquire,  // waits until it is
  kFencedAcquire,
};

struct ProgramParams {
  const int32_t* operations;  // [thread of the launch, operation, 2], not memory of the kernel
  int count;
  uint16_t* numbers;
  uint32_t* words;
  int shared_numbers;
};

FUSED_RNN_KERNEL(kSmallThreads)
program(FUSED_RNN_PARAMS ProgramParams p) {
  uint16_t* shared = &shared_memory<uint16_t>();
  for (int i = thread_index(); i < p.shared_numbers; i += kSmallThreads) {
    store(shared + i, uint16_t{0});
  }
  barrier();
  const int thread = block_x() * kSmallThreads + thread_index();
  uint32_t sum = 0;
  for (int i = 0; i < p.count; ++i) {
    const int32_t* operation = p.operations + (static_cast<int64_t>(thread) * p.count + i) * 2;
    const int32_t argument = operation[1];
    switch (static_cast<Operation>(operation[0])) {
      case Operation::kNothing:
        break;
      case Operation::kRead:
        sum += load(p.numbers + argument);
        break;
      case Operation::kWrite:
        store(p.numbers + argument, static_cast<uint16_t>(sum));
        break;
      case Operation::kReadShared:
        sum += load(shared + argument);
        break;
      case Operation::kWriteShared:
        store(shared + argument, static_cast<uint16_t>(sum));
        break;
      case Operation::kBarrier:
        barrier();
        break;
      case Operation::kWarpBarrier:
        warp_barrier();
        break;
      case Operation::kRelease:
        signal<Fault::kNone>(p.words + argument, 1);
        break;
      case Operation::kFencedRelease:
        signal<Fault::kFences>(p.words + argument, 1);
        break;
      case Operation::kAcquire:
        await<Fault::kNone>(p.words + argument, 1);
        break;
      case Operation::kFencedAcquire:
        await<Fault::kFences>(p.words + argument, 1);
        break;
    }
  }
}

// What the threads are told of their votes, [round, thread], by their warp or by the block.
struct VoteParams {
  const uint32_t* votes;
  uint32_t* results;
  int rounds;
  bool of_block;
};

FUSED_RNN_KERNEL(kSmallThreads)
vote(FUSED_RNN_PARAMS VoteParams p) {
  for (int round = 0; round < p.rounds; ++round) {
    const int at = round * kSmallThreads + thread_index();
    const bool mine = load(p.votes + at) != 0;
    store(p.results + at, static_cast<uint32_t>(p.of_block ? barrier_any(mine) : any(mine)));
  }
}

// The times that each thread sees, [thread, count].
struct ClockParams {
  uint64_t* times;
  int count;
};

FUSED_RNN_KERNEL(kSmallThreads)
see_times(FUSED_RNN_PARAMS ClockParams p) {
  for (int i = 0; i < p.count; ++i) store(p.times + thread_index() * p.count + i, now());
}

// One access of one lane.
struct AccessParams {
  unsigned char* at;
  int bytes;
  bool writes;
};

FUSED_RNN_KERNEL(32)
one_access(FUSED_RNN_PARAMS AccessParams p) {
  const auto access = [&](auto value) {
    auto* at = reinterpret_cast<decltype(value)*>(p.at);
    if (p.writes) {
      store(at, value);
    } else {
      load(at);
    }
  };
  prefetch(p.at);
  if (thread_index() != 7) return;
  if (p.bytes == 1) access(uint8_t{0});
  if (p.bytes == 2) access(uint16_t{0});
  if (p.bytes == 4) access(uint32_t{0});
  if (p.bytes == 8) access(uint64_t{0});
  if (p.bytes == 16) access(SmallQuad{});
}

}  // namespace fused_rnn::small
