// The services the kernels ask of their surroundings: threads, memory, and the choice of the
// instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "types.h"

namespace fused_rnn::cpu {

extern const Kernels kKernelsPortable;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

namespace {

#if FUSED_RNN_HAS_AMX
// Whether the processor has tiles of bfloat16 and the system lets this process use them.
bool tiles_granted() {
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22, kBoth = kTile | kBf16;  // of edx
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBoth) != kBoth) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool supported(Isa isa) {
#if FUSED_RNN_HAS_AMX
  if (isa == Isa::kAmx) return supported(Isa::kAvx512) && tiles_granted();
#endif
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::kAvx512) {
    return supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  if (isa == Isa::kAvx2) {
    // Older clang does not know "f16c" in __builtin_cpu_supports; AVX2 implies that the operating
    // system saves the registers F16C uses.
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return isa == Isa::kPortable;
}

Isa choose() {
  const char* wanted = std::getenv("FUSED_RNN_CPU_ISA");
  constexpr struct {
    const char* name;
    Isa isa;
  } kAll[] = {{"amx", Isa::kAmx},
              {"avx512", Isa::kAvx512},
              {"avx2", Isa::kAvx2},
              {"portable", Isa::kPortable}};
  const bool best = wanted == nullptr || *wanted == '\0';
  for (const auto& one : kAll) {
    if (!best && std::string(wanted) != one.name) continue;
    if (supported(one.isa)) return one.isa;
    STD_TORCH_CHECK(best, "FUSED_RNN_CPU_ISA is '", wanted,
                    "', which this processor does not have");
  }
  STD_TORCH_CHECK(false, "FUSED_RNN_CPU_ISA is '", wanted,
                  "'; it can be amx, avx512, avx2 or portable, or unset for the best available");
}

}  // namespace

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

bool has_tiles() { return chosen_isa() == Isa::kAmx; }

const Kernels& chosen_kernels() {
#if defined(__x86_64__)
  const Isa isa = chosen_isa();
  if (isa == Isa::kAvx512 || isa == Isa::kAmx) return kKernelsAvx512;
  if (isa == Isa::kAvx2) return kKernelsAvx2;
#else
  chosen_isa();
#endif
  return kKernelsPortable;
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_tasks(int64_t count, void (*task)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(context, i);
  });
}

namespace {

// Waits for done(): first on the core, then leaving it to others, of which there may be more than
// there are cores.
template <class Done>
void spin(const Done& done) {
  for (int i = 0; i < 4096; ++i) {
    if (done()) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  while (!done()) std::this_thread::yield();
}

// Who takes part in run_together. A thread pool promises neither as many threads as there are tasks
// nor that they run at the same time, and a member that is waited for has to be there: so threads
// join, the first task's closes the list when all tasks have come or it has waited long enough, and
// whoever comes later finds nothing to do.
class Gathering {
 public:
  explicit Gathering(int64_t tasks) : tasks_(tasks) {}

  // The rank of the thread that has tasks [begin, end), or -1.
  int64_t join(int64_t begin, int64_t end) {
    uint64_t before = list_.load(std::memory_order_relaxed);
    do {
      if (before & kClosed) return -1;
    } while (!list_.compare_exchange_weak(before, before + kMember + (end - begin)));
    if (begin == 0) {
      const auto late = std::chrono::steady_clock::now() + std::chrono::microseconds(500);
      spin([&] {
        return tasks_in(list_.load()) == tasks_ || std::chrono::steady_clock::now() > late;
      });
      list_.fetch_or(kClosed);
    } else {
      spin([&] { return (list_.load() & kClosed) != 0; });
    }
    return static_cast<int64_t>(before / kMember);
  }
  int64_t members() const { return static_cast<int64_t>((list_.load() & ~kClosed) / kMember); }

 private:
  static constexpr uint64_t kClosed = uint64_t{1} << 63, kMember = uint64_t{1} << 32;
  static int64_t tasks_in(uint64_t list) { return static_cast<int64_t>(list % kMember); }
  const int64_t tasks_;
  std::atomic<uint64_t> list_{0};
};

}  // namespace

void run_together(int64_t wanted, void (*member)(void*, int64_t, int64_t), void* context) {
  Gathering gathering(wanted);
  torch::stable::parallel_for(0, wanted, 1, [&](int64_t begin, int64_t end) {
    const int64_t rank = gathering.join(begin, end);
    if (rank >= 0) member(context, rank, gathering.members());
  });
}

void meet(Meeting& meeting, uint64_t arrived) {
  if (__atomic_add_fetch(&meeting.arrived, 1, __ATOMIC_ACQ_REL) >= arrived) return;
  spin([&] { return __atomic_load_n(&meeting.arrived, __ATOMIC_ACQUIRE) >= arrived; });
}

namespace {

// Workspaces kept for the next call: fresh memory costs a page fault and a clearing every 4 KiB,
// 0.3 to 3 us, more than the scan of a small layer takes to fill them. At most kKept bytes in all.
constexpr size_t kSmallest = size_t{1} << 17, kKept = size_t{1} << 27;
// From twice this on in large pages, a third of the cost where memory is fresh.
constexpr size_t kLargePage = size_t{1} << 21;
constexpr int kPlaces = 8;
struct Kept {
  std::mutex mutex;
  void* place[kPlaces] = {};
  size_t bytes = 0;
};
Kept& kept() {
  static Kept* const all = new Kept;  // for threads that outlive the library's own end
  return *all;
}

// Its size is in front of a workspace, in a cache line of its own.
size_t& size_of_workspace(void* memory) {
  return *reinterpret_cast<size_t*>(static_cast<char*>(memory) - 64);
}
void release(void* memory) {
  if (memory != nullptr) std::free(static_cast<char*>(memory) - 64);
}

// The smallest kept workspace of `bytes` to `most` bytes, no longer kept; null: there is none.
void* take_kept(size_t bytes, size_t most) {
  Kept& all = kept();
  // (Nobody waits: a process forked meanwhile would do so for ever.)
  const std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock);
  if (!lock.owns_lock()) return nullptr;
  void** best = nullptr;
  for (void*& place : all.place) {
    const size_t size = place != nullptr ? size_of_workspace(place) : 0;
    if (size < bytes || size > most) continue;
    if (best == nullptr || size < size_of_workspace(*best)) best = &place;
  }
  if (best == nullptr) return nullptr;
  all.bytes -= size_of_workspace(*best);
  return std::exchange(*best, nullptr);
}

// Keeps a workspace, if need be in place of smaller ones, which serve fewer calls.
bool keep(void* memory) {
  const size_t bytes = size_of_workspace(memory);
  if (bytes < kSmallest || bytes > kKept) return false;
  Kept& all = kept();
  const std::unique_lock<std::mutex> lock(all.mutex, std::try_to_lock);
  if (!lock.owns_lock()) return false;
  size_t larger = 0;
  int places = kPlaces;  // without larger ones
  for (void* place : all.place) {
    if (place == nullptr || size_of_workspace(place) < bytes) continue;
    larger += size_of_workspace(place), --places;
  }
  if (larger + bytes > kKept || places == 0) return false;
  while (true) {
    void **empty = nullptr, **smallest = nullptr;
    for (void*& place : all.place) {
      if (place == nullptr) {
        empty = &place;
      } else if (smallest == nullptr || size_of_workspace(place) < size_of_workspace(*smallest)) {
        smallest = &place;
      }
    }
    if (empty != nullptr && all.bytes + bytes <= kKept) {
      *empty = memory, all.bytes += bytes;
      return true;
    }
    all.bytes -= size_of_workspace(*smallest);
    release(std::exchange(*smallest, nullptr));
  }
}

}  // namespace

void* allocate_workspace(size_t bytes, bool stays) {
  bytes = (bytes + 63) / 64 * 64;
  void* memory = bytes >= kSmallest ? take_kept(bytes, stays ? 2 * bytes : SIZE_MAX) : nullptr;
  if (memory != nullptr) return memory;
  const bool large = bytes >= 2 * kLargePage;
  size_t all = bytes + 64;
  if (large) all = (all + kLargePage - 1) / kLargePage * kLargePage;
  void* start = std::aligned_alloc(large ? kLargePage : 64, all);
  if (start == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (large) madvise(start, all, MADV_HUGEPAGE);  // a wish
#endif
  memory = static_cast<char*>(start) + 64;
  size_of_workspace(memory) = all - 64;
  return memory;
}

void free_workspace(void* memory) {
  if (memory != nullptr && !keep(memory)) release(memory);
}

int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = [] {
    const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return found > 0 ? found : int64_t{1} << 20;
  }();
  return bytes;
#else
  return int64_t{1} << 20;
#endif
}

namespace {
int64_t cpu_isa() { return static_cast<int64_t>(chosen_isa()); }
}  // namespace

}  // namespace fused_rnn::cpu

// No tensor argument gives it a device, hence the key.
STABLE_TORCH_LIBRARY_IMPL(fused_rnn, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fused_rnn::cpu::cpu_isa));
}
