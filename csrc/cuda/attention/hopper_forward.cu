// Host side of the Hopper attention forward: chooses the kernel, cuts the work into items and
// launches. Compiled only for sm_90a.
#include "cuda/attention/hopper_forward.h"

#include "cuda/attention/hopper_forward.cuh"
#include "cuda/attention/hopper_launch.cuh"

namespace pmf::cuda {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

struct HopperVariant {
  int slots, shared_bytes;
  struct {
    int consumers;
    void (*function)(HopperForward);
  } plain, tangent;
};

template <typename T, int kWidth, int kKeys, int kSlots, bool kLimited>
constexpr HopperVariant hopper_variant() {
  using Plain = HopperSizes<T, kWidth, kKeys, kSlots, false, kLimited>;
  using Tangent = HopperSizes<T, kWidth, kKeys, kSlots, true, kLimited>;
  return {kSlots,
          Tangent::kSharedBytes,
          {Plain::kConsumers, hopper_forward_kernel<Plain>},
          {Tangent::kConsumers, hopper_forward_kernel<Tangent>}};
}

struct HopperKernel {
  int width, keys;
  HopperVariant whole, limited;
};

// Tiles are the same in all variants, so that out is bitwise identical with and without tangents,
// and so are results of packed sequences and of one call per sequence. With limits, the consumers'
// spare tiles take the place of one slot.
template <typename T, int kWidth, int kKeys, int kSlots>
constexpr HopperKernel hopper_kernel() {
  return {kWidth, kKeys, hopper_variant<T, kWidth, kKeys, kSlots, false>(),
          hopper_variant<T, kWidth, kKeys, kSlots - 1, true>()};
}

// Keys per tile: the most for which S, tS, O, tO, P and H fit in 240 registers.
template <typename T>
const HopperKernel* kernel_of(int64_t width) {
  static const HopperKernel kernels[] = {
      hopper_kernel<T, 64, 96, 4>(), hopper_kernel<T, 80, 48, 6>(), hopper_kernel<T, 96, 48, 4>(),
      hopper_kernel<T, 128, 48, 3>()};
  return kernel_of_width(kernels, width);
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
  const bool limited = params.window.hides() || params.sequences.queries != nullptr;
  // A head's rows of lse have another length only on a CPU.
  const bool own_rows = params.lse_stride == 0 || params.lse_stride == s.queries;
  if (kernel == nullptr || !own_rows || params.scale <= 0) return false;
  const HopperVariant& variant = limited ? kernel->limited : kernel->whole;
  if (!hopper_runs(variant.shared_bytes, s)) return false;
  const bool tangent = params.out_t.data != nullptr;
  const auto [consumers, function] = tangent ? variant.tangent : variant.plain;
  HopperForward p = {};
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
  p.out = params.out, p.out_t = params.out_t;
  p.lse = static_cast<float*>(params.lse), p.lse_t = static_cast<float*>(params.lse_t);
  p.queries = int(s.queries), p.keys = int(s.keys);
  p.sequences = params.sequences;
  p.window = Window(params.window);
  const bool cut =
      limited ? cut_into_parts(p, s, params.sequences, consumers)
              : cut_into_items(p, s, p.queries, p.keys, kernel->keys, variant.slots, consumers);
  if (!cut) return false;
  p.by_group = Divisor(uint32_t(s.heads / s.key_heads));
  p.scale = float(params.scale);
  p.factor = p.scale * kLog2e;
  problem = launch_items(function, p, kernel->keys, consumers, variant.shared_bytes, stream);
  return true;
}

}  // namespace pmf::cuda
