// The services the kernels ask of their surroundings: threads, memory, and the choice of the
// instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <new>
#include <string>

#if defined(__linux__)
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

bool supported(Isa isa) {
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
  if (wanted == nullptr || *wanted == '\0') {
    return supported(Isa::kAvx512) ? Isa::kAvx512
           : supported(Isa::kAvx2) ? Isa::kAvx2
                                   : Isa::kPortable;
  }
  const std::string name = wanted;
  const bool known = name == "avx512" || name == "avx2" || name == "portable";
  STD_TORCH_CHECK(known, "FUSED_RNN_CPU_ISA is '", name,
                  "'; it can be avx512, avx2 or portable, or unset for the best available");
  const Isa isa = name == "avx512" ? Isa::kAvx512 : name == "avx2" ? Isa::kAvx2 : Isa::kPortable;
  STD_TORCH_CHECK(supported(isa), "FUSED_RNN_CPU_ISA is '", name,
                  "', which this processor does not have");
  return isa;
}

}  // namespace

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

const Kernels& chosen_kernels() {
#if defined(__x86_64__)
  const Isa isa = chosen_isa();
  if (isa == Isa::kAvx512) return kKernelsAvx512;
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

void* allocate_workspace(size_t bytes) {
  void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void free_workspace(void* memory) { std::free(memory); }

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
