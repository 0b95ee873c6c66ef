// What blocks of one cluster need to go from step to step together: the hardware's barrier, and
// st.async into each other's shared memory. sm_90 and later; for others the kernels are empty, and
// their rows absent.
#pragma once

#include <cooperative_groups.h>

#include "cuda/microbench/harness.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FUSED_RNN_HAS_CLUSTERS 1
#endif

namespace fused_rnn::microbench {

constexpr int kLargestCluster = 16;

struct ClusterArgument {
  Run run;
};

#if defined(FUSED_RNN_HAS_CLUSTERS)

FUSED_RNN_DEVICE int cluster_rank() { return static_cast<int>(ptx::get_sreg_cluster_ctarank()); }
FUSED_RNN_DEVICE int cluster_size() { return static_cast<int>(ptx::get_sreg_cluster_nctarank()); }

FUSED_RNN_DEVICE void cluster_wide_barrier() {
  ptx::barrier_cluster_arrive(ptx::sem_release);
  ptx::barrier_cluster_wait(ptx::sem_acquire);
}

// The same variable in the shared memory of another block of the cluster.
template <class T>
FUSED_RNN_DEVICE T* of_block(T* at, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(at, rank);
}

// Memory barriers for one arrival a phase, that of the block's own thread which says how many bytes
// are to come. Afterwards all blocks of the cluster know them.
FUSED_RNN_DEVICE void begin_phases(uint64_t* barriers, int count) {
  if (thread_index() == 0) {
    for (int i = 0; i < count; ++i) ptx::mbarrier_init(barriers + i, 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  cluster_wide_barrier();
}
// Only for the block's own threads, hence the scope: a release in that of the cluster is a fence of
// the whole GPU. What comes from other blocks may do so before.
FUSED_RNN_DEVICE void expect_bytes(uint64_t* at, uint32_t bytes) {
  ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, at, bytes);
}
// What st.async wrote in that phase is visible then. (The instruction itself waits a while.)
FUSED_RNN_DEVICE void wait_for_phase(const Watch& watch, uint32_t step, uint64_t* at,
                                     uint32_t phase) {
  watch.until<16>(step, [&] {
    return ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cluster, at, phase % 2);
  });
}

#endif

// Released, it orders what the threads did before, in global memory too, and that takes a fence of
// the whole GPU; relaxed it is the bare meeting.
template <bool kReleases>
FUSED_RNN_KERNEL(kThreads)
cluster_barrier(FUSED_RNN_PARAMS ClusterArgument argument) {
#if defined(FUSED_RNN_HAS_CLUSTERS)
  timed(argument.run, [](uint32_t) {
    if constexpr (kReleases) {
      cluster_wide_barrier();
    } else {
      ptx::barrier_cluster_arrive(ptx::sem_relaxed);
      ptx::barrier_cluster_wait();
    }
  });
#endif
}

// A step: a thread of the first block sends 4 bytes to the last block of the cluster, and one of
// that sends them back.
FUSED_RNN_KERNEL(kThreads) ping_pong(FUSED_RNN_PARAMS ClusterArgument argument) {
#if defined(FUSED_RNN_HAS_CLUSTERS)
  struct Shared {
    uint64_t arrived;
    uint32_t message;
  };
  Shared& shared = shared_memory<Shared>();
  const Watch watch(argument.run);
  const int rank = cluster_rank(), last = cluster_size() - 1;
  const bool first = rank == 0;
  const bool plays = thread_index() == 0 && (first || rank == last);
  begin_phases(&shared.arrived, 1);
  uint64_t* const arrived = of_block(&shared.arrived, first ? last : 0);
  uint32_t* const message = of_block(&shared.message, first ? last : 0);

  // Each sends before it says that it expects the answer, which may come before that: a phase ends
  // with the arrival of the block's own thread at the earliest.
  const auto send = [&](uint32_t step) {
    ptx::st_async(message, word_at(step, 0), arrived);
    expect_bytes(&shared.arrived, sizeof(uint32_t));
  };
  if (plays && !first) expect_bytes(&shared.arrived, sizeof(uint32_t));
  timed(argument.run, [&](uint32_t step) {
    if (!plays) return;
    if (first) send(step);
    wait_for_phase(watch, step, &shared.arrived, step);
    watch.expect(step, word_at(step, 0), load(&shared.message));
    if (!first) send(step);
  });
  cluster_wide_barrier();  // nobody ends while another may still write to its memory
#endif
}

// A step: every block sends its slice to all, itself too, and waits for those of all. Two buffers
// and two memory barriers are enough: a block sends the slice of a step when all slices of the step
// before are there, each sent after its block had read those of the step before that.
FUSED_RNN_KERNEL(kThreads) all_to_all(FUSED_RNN_PARAMS ClusterArgument argument) {
#if defined(FUSED_RNN_HAS_CLUSTERS)
  struct Shared {
    uint64_t arrived[2];
    uint4 slices[2][kLargestCluster][kSliceQuads];
  };
  Shared& shared = shared_memory<Shared>();
  const Watch watch(argument.run);
  const int rank = cluster_rank(), size = cluster_size(), lane = thread_index() % 32;
  const int first = thread_index() / 32;  // of the peers that a warp sends to, and reads from
  constexpr int kPeers = kLargestCluster / kWarps;
  uint32_t words = 0, at_step_0 = 0;
  for (int peer = first; peer < size; peer += kWarps) {
    words += 4;
    at_step_0 += sum_of(quad_at(0, static_cast<uint32_t>(peer * kSliceQuads + lane)));
  }
  begin_phases(shared.arrived, 2);
  Shared* peers[kPeers];
  FUSED_RNN_UNROLL
  for (int i = 0; i < kPeers; ++i) peers[i] = of_block(&shared, (first + i * kWarps) % size);

  timed(argument.run, [&](uint32_t step) {
    const uint32_t parity = step % 2;
    uint64_t* const arrived = &shared.arrived[parity];
    if (thread_index() == 0) expect_bytes(arrived, static_cast<uint32_t>(size) * kSliceWords * 4);
    const uint4 quad = quad_at(step, static_cast<uint32_t>(rank * kSliceQuads + lane));
    const uint32_t value[4] = {quad.x, quad.y, quad.z, quad.w};
    FUSED_RNN_UNROLL
    for (int i = 0; i < kPeers; ++i) {
      if (first + i * kWarps >= size) continue;
      uint4* const to = &peers[i]->slices[parity][rank][lane];
      ptx::st_async(reinterpret_cast<uint32_t*>(to), value, &peers[i]->arrived[parity]);
    }
    wait_for_phase(watch, step, arrived, step / 2);
    uint32_t sum = 0;
    FUSED_RNN_UNROLL
    for (int i = 0; i < kPeers; ++i) {
      const int peer = first + i * kWarps;
      if (peer < size) sum += sum_of(load(&shared.slices[parity][peer][lane]));
    }
    watch.expect(step, sum_at(step, words, at_step_0), sum);
    barrier();
  });
  cluster_wide_barrier();
#endif
}

inline void cluster_benchmarks(Harness& harness) {
  struct Each {
    const char *benchmark, *variant;
    void (*kernel)(const ClusterArgument);
    int parts;     // of a step
    bool crowded;  // as many clusters as fit at the same time, rather than one
  };
  const Each all[] = {
      {"cluster_barrier", "one cluster", cluster_barrier<true>, 1, false},
      {"cluster_barrier", "all that fit", cluster_barrier<true>, 1, true},
      {"cluster_barrier", "relaxed", cluster_barrier<false>, 1, false},
      {"st_async_ping_pong", "one way", ping_pong, 2, false},
      {"st_async_all_to_all", "one cluster", all_to_all, 1, false},
      {"st_async_all_to_all", "all that fit", all_to_all, 1, true},
  };
  for (const Each& each : all) {
    Launch launch{reinterpret_cast<const void*>(each.kernel)};
    launch.shared = harness.shared_of_one();
    launch.together = Together::kCluster;
    launch.parts = each.parts;
    for (const int size : {2, 4, 8, 16}) {
      Case c{each.benchmark, each.variant, size, size};
      if (!harness.wanted(c)) continue;
      const int compiled_for = harness.compiled_for(launch.kernel);
      if (compiled_for < 90) {
        harness.absent(c, "clusters need sm_90, this is for sm_" + std::to_string(compiled_for));
        continue;
      }
      const int clusters = harness.most_clusters(launch, size);
      if (clusters == 0) {
        harness.absent(c, "this GPU has no clusters of that size");
        continue;
      }
      if (each.crowded) c.blocks = clusters * size;
      harness.measure(c, launch, ClusterArgument{});
    }
  }
}

}  // namespace fused_rnn::microbench
