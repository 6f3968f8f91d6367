#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>

// Saves callee-saved registers on the current stack and its stack pointer in *rdi.
asm(R"(
.text
.globl pmf_switch_stack
.hidden pmf_switch_stack
.type pmf_switch_stack, @function
pmf_switch_stack:
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
.size pmf_switch_stack, . - pmf_switch_stack
)");

namespace pmf::emulator {

Stacks::Stacks(int count) : bytes_(count * kStep) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulator: cannot allocate the thread stacks");
  memory_ = static_cast<char*>(memory);
  for (int i = 0; i < count; ++i) mprotect(memory_ + i * kStep, kGuardBytes, PROT_NONE);
}

Stacks::~Stacks() { munmap(memory_, bytes_); }

void* Stacks::fresh(int i, void (*entry)()) const {
  constexpr int kSavedRegisters = 6;
  // After `ret` pops `entry`, the stack looks as if `entry` had been called.
  auto* top = reinterpret_cast<uint64_t*>(lowest(i) + kStackBytes);
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int k = 0; k < kSavedRegisters; ++k) *--top = 0;
  return top;
}

}  // namespace pmf::emulator
