// Layout of the attention kernels' scratch memory.
#pragma once

#include "cpu/common/tile_gemm-inl.h"

namespace pmf::cpu::PMF_LEVEL {
namespace {

// Hands out consecutive aligned pieces of the workspace; with a null base it only counts.
struct Arena {
  static constexpr int64_t kAlign = 64;
  char* base;
  int64_t used = 0;

  template <typename T>
  void take(T*& pointer, int64_t count, bool present = true) {
    pointer = present ? reinterpret_cast<T*>(base + used) : nullptr;
    if (present) used += round_up(count * static_cast<int64_t>(sizeof(T)), kAlign);
  }
};

}  // namespace
}  // namespace pmf::cpu::PMF_LEVEL
