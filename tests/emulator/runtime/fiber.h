// Fibers: stacks between which a single host thread switches. x86-64, System V ABI.
#pragma once

#include <cstddef>

namespace pmf::emulator {

// Saves the current stack's position in *from and continues with `to`, on its stack.
extern "C" void pmf_switch_stack(void** from, void* to);

// Stacks of kStackBytes each, separated by guard pages.
class Stacks {
 public:
  static constexpr size_t kStackBytes = 128 * 1024;

  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;

  char* lowest(int i) const { return memory_ + i * kStep + kGuardBytes; }

  // A position at which pmf_switch_stack() enters `entry`, which must never return.
  void* fresh(int i, void (*entry)()) const;

 private:
  static constexpr size_t kGuardBytes = 4096, kStep = kStackBytes + kGuardBytes;

  size_t bytes_;
  char* memory_;
};

}  // namespace pmf::emulator
