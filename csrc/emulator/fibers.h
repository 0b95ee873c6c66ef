// Stacks of their own for the lanes, and the switch between them.
#pragma once

#include <cstddef>

#if !(defined(__x86_64__) && defined(__ELF__))
#include <ucontext.h>
#endif

namespace fused_rnn::emulator {

#if defined(__x86_64__) && defined(__ELF__)

struct Fiber {
  void* stack_pointer;
};

// Saves the registers a callee has to keep on the stack it leaves, and takes them from the other's.
extern "C" __attribute__((visibility("hidden"))) void fused_rnn_emulator_switch(void** from,
                                                                                void* to);

inline void switch_fiber(Fiber& from, Fiber& to) {
  fused_rnn_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

#else

struct Fiber {
  ucontext_t context;
};

inline void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

// The next switch to the fiber calls `entry`, which never returns, on stack number `stack`. Stacks
// are kept for the fibers of later launches.
void prepare_fiber(Fiber& fiber, size_t stack, void (*entry)());

}  // namespace fused_rnn::emulator
