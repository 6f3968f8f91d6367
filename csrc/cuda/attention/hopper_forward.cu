// Attention's forward on Hopper, on the host: tensor maps, how work is cut, the launch. Compiled
// for sm_90a alone.
#include "cuda/attention/hopper_forward.h"

#include <algorithm>
#include <cmath>

#include "cuda/attention/hopper_forward.cuh"
#include "cuda/attention/hopper_maps.cuh"
#include "cuda/common/device.h"
#include "cuda/common/hopper_device.cuh"

namespace pmf::cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

struct HopperKernel {
  int width, keys, slots;
  int shared_bytes;
  struct {
    int consumers;
    void (*function)(HopperForward);
  } plain, tangent;
};

// The tiles are the same with and without tangents, so that out is bitwise the same.
template <typename T, int kWidth, int kKeys, int kSlots>
constexpr HopperKernel hopper_kernel() {
  using Plain = HopperSizes<T, kWidth, kKeys, kSlots, false>;
  using Tangent = HopperSizes<T, kWidth, kKeys, kSlots, true>;
  return {kWidth,
          kKeys,
          kSlots,
          Tangent::kSharedBytes,
          {Plain::kConsumers, hopper_forward_kernel<Plain>},
          {Tangent::kConsumers, hopper_forward_kernel<Tangent>}};
}

// Keys a tile: as many as leave S, tS, O, tO, P and H in 240 registers.
template <typename T>
const HopperKernel* kernel_of(int64_t width) {
  static const HopperKernel kernels[] = {
      hopper_kernel<T, 64, 96, 4>(), hopper_kernel<T, 80, 48, 6>(), hopper_kernel<T, 96, 48, 4>(),
      hopper_kernel<T, 128, 48, 3>()};
  for (const HopperKernel& kernel : kernels) {
    if (kernel.width == width) return &kernel;
  }
  return nullptr;
}

const HopperKernel* kernel_of(const AttentionParams& p) {
  if (p.shape.width != p.shape.value_width) return nullptr;
  if (p.dtype == DType::bf16) return kernel_of<__nv_bfloat16>(p.shape.width);
  return p.dtype == DType::f16 ? kernel_of<__half>(p.shape.width) : nullptr;
}

}  // namespace

bool hopper_forward(const AttentionParams& params, void* stream, const char*& problem) {
  const AttentionShape& s = params.shape;
  const HopperKernel* const kernel = kernel_of(params);
  const int64_t all_heads = s.batch * s.heads;
  constexpr int64_t kMostHeads = 1 << 20;
  const bool plain_rows = !params.window.hides() && params.sequences.count == 0 &&
                          (params.lse_stride == 0 || params.lse_stride == s.queries);
  if (kernel == nullptr || !plain_rows || !device_is_hopper() ||
      kernel->shared_bytes > device_shared_limit() || params.scale <= 0 || s.queries < 1 ||
      s.keys < 1 || all_heads < 1 || all_heads > kMostHeads) {
    return false;
  }
  const bool tangent = params.out_t.data != nullptr;
  const auto [consumers, function] = tangent ? kernel->tangent : kernel->plain;
  HopperForward p;
  const auto queries = [&](HopperMaps* maps, const ConstView4& view) {
    return encode_maps(maps, view, s.batch, s.heads, s.queries, s.width, kRowBlock);
  };
  const auto keys = [&](HopperMaps* maps, const ConstView4& view) {
    return encode_maps(maps, view, s.batch, s.key_heads, s.keys, s.width, kernel->keys);
  };
  if (!queries(&p.query, params.query) || !keys(&p.key, params.key) ||
      !keys(&p.value, params.value) ||
      (tangent && (!queries(&p.query_t, params.query_t) || !keys(&p.key_t, params.key_t) ||
                   !keys(&p.value_t, params.value_t)))) {
    return false;
  }
  const int processors = std::max(1, device_processors());
  p.out = params.out, p.out_t = params.out_t;
  p.lse = static_cast<float*>(params.lse), p.lse_t = static_cast<float*>(params.lse_t);
  p.heads = int(s.heads), p.queries = int(s.queries), p.keys = int(s.keys);
  p.tiles = (p.keys - 1) / kernel->keys + 1;
  p.row_blocks = (p.queries - 1) / kRowBlock + 1;
  // Keys that stay in shared memory are read once, but then a head is one block's work.
  const bool stays = p.tiles <= kernel->slots && all_heads >= 2 * int64_t{processors};
  p.rounds = stays ? (p.row_blocks + consumers - 1) / consumers : 1;
  const int parts = (p.row_blocks - 1) / (consumers * p.rounds) + 1;
  const int64_t items = all_heads * parts;
  if (items > INT32_MAX) return false;
  p.items = int(items);
  p.by_parts = Divisor(uint32_t(parts));
  p.by_heads = Divisor(uint32_t(s.heads));
  p.by_group = Divisor(uint32_t(s.heads / s.key_heads));
  p.scale = float(params.scale);
  p.factor = p.scale * kLog2e;
  plan_next_launch(consumers * kRowBlock, kernel->keys, 1);
  problem = error_sentence(launch(function, dim3(unsigned(std::min<int64_t>(items, processors))),
                                  dim3(unsigned((1 + consumers) * kGroupThreads)),
                                  kernel->shared_bytes, static_cast<cudaStream_t>(stream), p));
  return true;
}

}  // namespace pmf::cuda
