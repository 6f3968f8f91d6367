// Fibers: stacks that one processor thread switches between. x86-64, System V.
#pragma once

#include <cstddef>

namespace pmf::emulator {

// Saves where this stack is in *from and goes on with `to`, on its own stack.
extern "C" void pmf_switch_stack(void** from, void* to);

// Stacks of kStackBytes each, with a page between them that must not be touched.
class Stacks {
 public:
  static constexpr size_t kStackBytes = 128 * 1024;

  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;

  char* lowest(int i) const { return memory_ + i * kStep + kGuardBytes; }

  // A position from which pmf_switch_stack() enters `entry`, which must never return.
  void* fresh(int i, void (*entry)()) const;

 private:
  static constexpr size_t kGuardBytes = 4096, kStep = kStackBytes + kGuardBytes;

  size_t bytes_;
  char* memory_;
};

}  // namespace pmf::emulator
