#include "emulator/fibers.h"

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include <sys/mman.h>

namespace fused_rnn::emulator {

namespace {

// Far more than a kernel uses: only pages that are touched take memory.
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kGuardBytes = 4096;

char* stack_end(size_t index) {
  static std::vector<char*> ends;
  while (ends.size() <= index) {
    void* at = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    mprotect(at, kGuardBytes, PROT_NONE);
    // Stacks begin at different cache sets: all lanes use the same few lines below their first.
    const size_t i = ends.size();
    ends.push_back(static_cast<char*>(at) + kStackBytes - i % 32 * 128 - i / 32 % 16 * 4096);
  }
  return ends[index];
}

}  // namespace

#if defined(__x86_64__) && defined(__ELF__)

asm(R"(
.text
.hidden fused_rnn_emulator_switch
.globl fused_rnn_emulator_switch
.type fused_rnn_emulator_switch, @function
.p2align 4
fused_rnn_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fused_rnn_emulator_switch, . - fused_rnn_emulator_switch
)");

void prepare_fiber(Fiber& fiber, size_t stack, void (*entry)()) {
  // Six registers and the address `ret` takes; below a return address that is never used, so that
  // the stack has the alignment a function expects.
  uintptr_t* at = reinterpret_cast<uintptr_t*>(stack_end(stack)) - 1;
  at[0] = 0;
  *--at = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--at = 0;
  fiber.stack_pointer = at;
}

#else

void prepare_fiber(Fiber& fiber, size_t stack, void (*entry)()) {
  getcontext(&fiber.context);
  // (The least any stack has below its shifted end.)
  constexpr size_t kUsed = kStackBytes - 32 * 128 - 16 * 4096 - kGuardBytes;
  fiber.context.uc_stack.ss_sp = stack_end(stack) - kUsed;
  fiber.context.uc_stack.ss_size = kUsed;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

#endif

}  // namespace fused_rnn::emulator
