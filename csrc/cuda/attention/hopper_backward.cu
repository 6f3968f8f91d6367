// Attention's backward on Hopper, on the host: tensor maps, how work is cut, two launches. Compiled
// for sm_90a alone.
#include "cuda/attention/hopper_backward.h"

#include <algorithm>

#include "cuda/attention/hopper_backward.cuh"
#include "cuda/attention/hopper_maps.cuh"
#include "cuda/common/device.h"
#include "cuda/common/hopper_device.cuh"

namespace pmf::cuda {
namespace {

constexpr double kLog2e = 1.4426950408889634;

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

// Columns of a tile: as many as leave both scores, both sums and both factors in 240 registers.
template <typename T>
const HopperBackwardKernel* kernels_of(int64_t width) {
  static const HopperBackwardKernel kernels[] = {
      hopper_backward_kernels<T, 64, 96, 7>(), hopper_backward_kernels<T, 80, 48, 12>(),
      hopper_backward_kernels<T, 96, 48, 9>(), hopper_backward_kernels<T, 128, 48, 6>()};
  for (const HopperBackwardKernel& kernel : kernels) {
    if (kernel.width == width) return &kernel;
  }
  return nullptr;
}

const HopperBackwardKernel* kernels_of(const AttentionBackwardParams& p) {
  if (p.dtype == DType::bf16) return kernels_of<__nv_bfloat16>(p.shape.width);
  return p.dtype == DType::f16 ? kernels_of<__half>(p.shape.width) : nullptr;
}

}  // namespace

bool hopper_backward(const AttentionBackwardParams& params, void* stream, const char*& problem) {
  const AttentionShape& s = params.shape;
  const HopperBackwardKernel* const kernel = kernels_of(params);
  const int64_t all_heads = s.batch * s.heads;
  constexpr int64_t kMostHeads = 1 << 20;
  if (kernel == nullptr || s.width != s.value_width || params.grad_t.data != nullptr ||
      !device_is_hopper() || kernel->shared_bytes > device_shared_limit() || s.queries < 1 ||
      s.keys < 1 || all_heads < 1 || all_heads > kMostHeads) {
    return false;
  }
  HopperBackward launches[2];
  const int consumers = kernel->consumers;
  const int processors = std::max(1, device_processors());
  for (const bool by_keys : {false, true}) {
    HopperBackward& p = launches[by_keys];
    const ConstView4* const queries[] = {&params.query, &params.grad};
    const ConstView4* const keys[] = {&params.key, &params.value};
    p.rows = int(by_keys ? s.keys : s.queries), p.columns = int(by_keys ? s.queries : s.keys);
    for (int side = 0; side < kBackwardSides; ++side) {
      const ConstView4 &row = *(by_keys ? keys : queries)[side],
                       &column = *(by_keys ? queries : keys)[side];
      if (!encode_maps(&p.row[side], row, s.batch, s.heads, p.rows, s.width, kRowBlock) ||
          !encode_maps(&p.column[side], column, s.batch, s.heads, p.columns, s.width,
                       kernel->columns)) {
        return false;
      }
    }
    p.gradient[0] = by_keys ? params.grad_value : params.grad_query;
    p.gradient[1] = params.grad_key;
    p.statistics = static_cast<float*>(params.workspace);
    p.lse = static_cast<const float*>(params.lse);
    p.grad_lse = static_cast<const float*>(params.grad_lse);
    p.padded_queries = int(attention_backward_padded_queries(params));
    p.heads = int(s.heads);
    p.tiles = (p.columns - 1) / kernel->columns + 1;
    p.row_blocks = (p.rows - 1) / kRowBlock + 1;
    // A tile that stays in shared memory is read once, but then a head is one block's work.
    const bool stays = p.tiles <= kernel->slots && all_heads >= 2 * int64_t{processors};
    p.rounds = stays ? (p.row_blocks + consumers - 1) / consumers : 1;
    const int parts = (p.row_blocks - 1) / (consumers * p.rounds) + 1;
    const int64_t items = all_heads * parts;
    if (items > INT32_MAX) return false;
    p.items = int(items);
    p.by_parts = Divisor(uint32_t(parts));
    p.by_heads = Divisor(uint32_t(s.heads));
    p.scale = float(params.scale);
    p.factor = float(params.scale * kLog2e);
  }
  for (const bool by_keys : {false, true}) {
    const HopperBackward& p = launches[by_keys];
    plan_next_launch(consumers * kRowBlock, kernel->columns, 1);
    problem = error_sentence(launch(by_keys ? kernel->keys : kernel->queries,
                                    dim3(unsigned(std::min(p.items, processors))),
                                    dim3(unsigned((1 + consumers) * kGroupThreads)),
                                    kernel->shared_bytes, static_cast<cudaStream_t>(stream), p));
    if (problem != nullptr) break;
  }
  return true;
}

}  // namespace pmf::cuda
