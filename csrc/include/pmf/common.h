// Common parts of the kernel contracts: element types, strided views and the thread pool.
//
// Independent of torch, CUDA and instruction sets. A kernel receives raw pointers, strides
// and a ParallelFor; it allocates nothing and validates nothing (csrc/ops does both).
#pragma once

#include <cstdint>

namespace pmf {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

constexpr int64_t dtype_bytes(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// A read-only four-dimensional strided tensor. Strides count elements and may be 0 (broadcast) or
// negative; null `data` means "absent".
struct ConstView4 {
  const void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

// Its writable counterpart. Strides must address every element once.
struct View4 {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

// A thread pool seen through one function pointer. run(self, begin, end, grain, body, ctx) calls
// body(ctx, first, last) on disjoint ranges that cover [begin, end), possibly concurrently, and
// returns when all of them have returned. `threads` is the largest useful number of ranges:
// a kernel that needs scratch memory per worker splits its work into `threads` numbered shares and
// runs body over the share numbers, so that results do not depend on which thread runs which.
struct ParallelFor {
  void (*run)(void* self, int64_t begin, int64_t end, int64_t grain,
              void (*body)(void* ctx, int64_t begin, int64_t end), void* ctx) = nullptr;
  void* self = nullptr;
  int64_t threads = 1;

  // Forced inline: kernel files are compiled for several instruction sets, and the linker would
  // keep a single copy of an ordinary inline function.
  __attribute__((always_inline)) void operator()(int64_t begin, int64_t end, int64_t grain,
                                                 void (*body)(void* ctx, int64_t begin,
                                                              int64_t end),
                                                 void* ctx) const {
    if (end <= begin) return;
    if (run == nullptr || threads <= 1) {
      body(ctx, begin, end);
    } else {
      run(self, begin, end, grain, body, ctx);
    }
  }
};

}  // namespace pmf
