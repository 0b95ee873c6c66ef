// Runs a kernel written with cuda/primitives.cuh on the CPU, checking each access; for launchers.
//
// A lane is a fiber. Which lane runs is drawn from a seed, adversarially; faults (out of bounds,
// races, reads of memory nobody wrote, deadlocks) end the launch with a report.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_rnn::emulator {

struct Options {
  uint64_t seed = 0;
  int resident = 2;  // blocks that run interleaved; blocks that wait for one another all need to be
  // Scheduling steps without a barrier passed, a word changed by an atomic or a lane ended.
  int64_t step_limit = int64_t{1} << 24;
  bool check_races = true;
};

Options& options();

// Global memory a launch may touch: nothing else. written = false: it holds no value yet (what no
// earlier call covers is filled with 0xFF bytes, NaN); reading it before a write is a fault. Holds
// until forget(). Calls that overlap mean their union.
void allow(const void* data, size_t bytes, bool written, const char* name);
void forget();

struct Launch {
  int grid_x, grid_y, threads;
  size_t shared_bytes;
  bool together = false;  // all blocks are resident, whatever the options say
};

// The launch of one kernel, its types erased.
struct Entry {
  void (*invoke)(const Entry&);
  void (*kernel)();
  const void* params;
};
void run(const Launch& launch, const Entry& entry);

// Throws std::runtime_error with a report on any fault; its first word, up to a colon, is the kind.
template <class Params>
void run(void (*kernel)(const Params), const Launch& launch, const Params& params) {
  const auto invoke = [](const Entry& entry) {
    reinterpret_cast<void (*)(const Params)>(entry.kernel)(
        *static_cast<const Params*>(entry.params));
  };
  run(launch, Entry{invoke, reinterpret_cast<void (*)()>(kernel), &params});
}

}  // namespace fused_rnn::emulator
