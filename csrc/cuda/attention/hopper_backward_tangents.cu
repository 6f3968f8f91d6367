// Host side of the Hopper attention backward through both outputs. Compiled only for sm_90a.
#include "cuda/attention/hopper_backward_tangents.cuh"

#include <algorithm>

#include "cuda/attention/hopper_backward.h"
#include "cuda/attention/hopper_backward_launch.cuh"

namespace pmf::cuda {
namespace {

// One of the three launches.
struct HopperTangentKernel {
  bool by_keys;
  int columns, slots, consumers;
  int shared_bytes;
  void (*kernel)(HopperBackwardOf<kTangentSides>);
};

template <class C>
constexpr HopperTangentKernel hopper_tangent_kernel() {
  return {C::kByKeys,    C::kColumns,     C::kSlots,
          C::kConsumers, C::kSharedBytes, hopper_backward_tangents_kernel<C>};
}

constexpr int kWidthOfTangents = 64, kLaunches = 3;

// In order. A ring holds 288 keys or queries.
template <typename T>
const HopperTangentKernel (&kernels_of()) [kLaunches] {
  static const HopperTangentKernel kernels[] = {
      hopper_tangent_kernel<HopperTangentSizes<T, kWidthOfTangents, 96, 3, false, true>>(),
      hopper_tangent_kernel<HopperTangentSizes<T, kWidthOfTangents, 32, 9, false, false>>(),
      hopper_tangent_kernel<HopperTangentSizes<T, kWidthOfTangents, 32, 9, true, false>>()};
  return kernels;
}

}  // namespace

bool hopper_backward_tangents(const AttentionBackwardParams& params, void* stream,
                              const char*& problem) {
  const AttentionShape& s = params.shape;
  const bool half = params.dtype == DType::f16;
  if (!(half || params.dtype == DType::bf16) || s.width != kWidthOfTangents ||
      s.value_width != kWidthOfTangents || params.scale <= 0) {
    return false;
  }
  const auto& kernels = half ? kernels_of<__half>() : kernels_of<__nv_bfloat16>();
  const ConstView4* const queries[] = {&params.query, &params.grad, &params.query_t,
                                       &params.grad_t};
  const ConstView4* const keys[] = {&params.key, &params.value, &params.key_t, &params.value_t};
  const View4 of_queries[] = {params.grad_query, params.grad_query_t, View4(), View4()};
  const View4 of_keys[] = {params.grad_key, params.grad_value, params.grad_key_t,
                           params.grad_value_t};
  HopperBackwardOf<kTangentSides> launches[kLaunches];
  for (int i = 0; i < kLaunches; ++i) {
    const HopperTangentKernel& k = kernels[i];
    if (!hopper_runs(k.shared_bytes, s) ||
        !prepare(launches[i], params, queries, keys, k.by_keys, k.columns, k.slots, k.consumers)) {
      return false;
    }
    std::copy_n(k.by_keys ? of_keys : of_queries, kTangentSides, launches[i].gradient);
  }
  for (int i = 0; i < kLaunches && problem == nullptr; ++i) {
    const HopperTangentKernel& k = kernels[i];
    problem = launch_items(k.kernel, launches[i], k.columns, k.consumers, k.shared_bytes, stream);
  }
  return true;
}

}  // namespace pmf::cuda
