// Host side of the Hopper attention backward: chooses the kernels and makes the launch, or both.
// Compiled only for sm_90a.
#include "cuda/attention/hopper_backward.h"

#include "cuda/attention/hopper_backward_heads.cuh"
#include "cuda/attention/hopper_backward_launch.cuh"

namespace pmf::cuda {
namespace {

struct HopperBackwardKernel {
  int width, columns, slots, consumers;
  int shared_bytes;
  void (*queries)(HopperBackward);
  void (*keys)(HopperBackward);
};

template <typename T, int kWidth, int kColumns, int kSlots>
constexpr HopperBackwardKernel hopper_backward_kernels() {
  using Queries = HopperBackwardSizes<T, kWidth, kColumns, kSlots, false>;
  using Keys = HopperBackwardSizes<T, kWidth, kColumns, kSlots, true>;
  return {kWidth,
          kColumns,
          kSlots,
          Keys::kConsumers,
          Keys::kSharedBytes,
          hopper_backward_kernel<Queries>,
          hopper_backward_kernel<Keys>};
}

// The tile's columns: the most for which S, B, both factors and both sums fit in 240 registers.
template <typename T>
const HopperBackwardKernel* kernels_of(int64_t width) {
  static const HopperBackwardKernel kernels[] = {
      hopper_backward_kernels<T, 64, 96, 7>(), hopper_backward_kernels<T, 80, 48, 12>(),
      hopper_backward_kernels<T, 96, 48, 9>(), hopper_backward_kernels<T, 128, 48, 6>()};
  return kernel_of_width(kernels, width);
}

const HopperBackwardKernel* kernels_of(const AttentionBackwardParams& p) {
  if (p.dtype == DType::bf16) return kernels_of<__nv_bfloat16>(p.shape.width);
  return p.dtype == DType::f16 ? kernels_of<__half>(p.shape.width) : nullptr;
}

// Whole heads in shared memory: self-attention of width 64, with enough heads for all blocks.
template <typename T>
using HeadSizes = HopperHeadSizes<T, 64, 96, 3>;

template <class C>
bool backward_of_heads(const AttentionBackwardParams& params, void* stream, const char*& problem) {
  const AttentionShape& s = params.shape;
  // Each consumer needs row blocks of its own.
  const bool fits = s.width == C::kWidth && s.queries == s.keys &&
                    s.queries > kRowBlock * (C::kConsumers - 1) && s.queries <= C::kMostRows;
  if (!fits || s.batch * s.heads < 2 * int64_t{std::max(1, device_processors())} ||
      !hopper_runs(C::kSharedBytes, s)) {
    return false;
  }
  HopperBackwardHeads p;
  const ConstView4* const queries[] = {&params.query, &params.grad};
  const ConstView4* const keys[] = {&params.key, &params.value};
  for (int side = 0; side < kBackwardSides; ++side) {
    for (const bool by_keys : {false, true}) {
      if (!encode_maps(by_keys ? &p.keys[side] : &p.queries[side],
                       by_keys ? *keys[side] : *queries[side], s.batch, s.heads, s.keys, s.width,
                       C::kColumns)) {
        return false;
      }
    }
  }
  p.grad_query = params.grad_query, p.grad_key = params.grad_key, p.grad_value = params.grad_value;
  p.lse = static_cast<const float*>(params.lse);
  p.grad_lse = static_cast<const float*>(params.grad_lse);
  p.heads = int(s.heads), p.rows = int(s.keys);
  p.tiles = (p.rows - 1) / C::kColumns + 1, p.row_blocks = (p.rows - 1) / kRowBlock + 1;
  p.items = int(s.batch * s.heads);
  p.by_heads = Divisor(uint32_t(s.heads));
  p.scale = float(params.scale);
  p.factor = float(params.scale * kBackwardLog2e);
  problem = launch_items(hopper_backward_heads_kernel<C>, p, C::kColumns, C::kConsumers,
                         C::kSharedBytes, stream);
  return true;
}

}  // namespace

bool hopper_backward(const AttentionBackwardParams& params, void* stream, const char*& problem) {
  const AttentionShape& s = params.shape;
  const HopperBackwardKernel* const kernel = kernels_of(params);
  if (kernel == nullptr || s.width != s.value_width || params.scale <= 0 ||
      !hopper_runs(kernel->shared_bytes, s)) {
    return false;
  }
  if (params.dtype == DType::bf16
          ? backward_of_heads<HeadSizes<__nv_bfloat16>>(params, stream, problem)
          : backward_of_heads<HeadSizes<__half>>(params, stream, problem)) {
    return true;
  }
  const ConstView4* const queries[] = {&params.query, &params.grad};
  const ConstView4* const keys[] = {&params.key, &params.value};
  const int consumers = kernel->consumers;
  HopperBackward launches[2];
  for (const bool by_keys : {false, true}) {
    HopperBackward& p = launches[by_keys];
    if (!prepare(p, params, queries, keys, by_keys, kernel->columns, kernel->slots, consumers)) {
      return false;
    }
    p.gradient[0] = by_keys ? params.grad_value : params.grad_query;
    p.gradient[1] = params.grad_key;
  }
  for (const bool by_keys : {false, true}) {
    problem = launch_items(by_keys ? kernel->keys : kernel->queries, launches[by_keys],
                           kernel->columns, consumers, kernel->shared_bytes, stream);
    if (problem != nullptr) break;
  }
  return true;
}

}  // namespace pmf::cuda
