// A dtype's table of backward kernels: which widths are compiled.
#pragma once

#include "cuda/attention/attention_backward_keys.cuh"
#include "cuda/attention/attention_backward_queries.cuh"
#include "cuda/attention/attention_backward_tangents.cuh"

namespace pmf::cuda {

constexpr int kBlockThreads = 192;  // six warps, the most that a plan uses

template <typename E, int kWidth, int kOut, int kColumns, int kBlocks, bool kRegular = false>
constexpr BackwardKernels ordinary_kernels() {
  return {
      kWidth,
      kOut,
      kOut,
      kColumns,
      int(sizeof(typename E::Storage)),
      2,
      kStatistics<false>,
      kBlocks * kBlockThreads / kWarpThreads,
      kRegular,
      attention_backward_queries<E, kWidth, kOut, kColumns, kRegular, kBlockThreads, kBlocks>,
      attention_backward_keys<E, kWidth, kOut, kColumns, false, kRegular, kBlockThreads, kBlocks>};
}

template <typename E, int kWidth, int kOutQueries, int kOutKeys, int kColumns,
          bool kRegular = false>
constexpr BackwardKernels tangent_kernels() {
  return {kWidth,
          kOutQueries,
          kOutKeys,
          kColumns,
          int(sizeof(typename E::Storage)),
          4,
          kStatistics<true>,
          kRegular ? 8 : kBlockThreads / kWarpThreads,
          kRegular,
          attention_backward_tangents<E, kWidth, kOutQueries, kColumns, kRegular, kBlockThreads>,
          attention_backward_keys<E, kWidth, kOutKeys, kColumns, true, kRegular, kBlockThreads, 1>};
}

// 16-bit types: 64 and 80 are tuned. Ordinary regular kernels target two blocks per SM, which
// leaves 168 registers per thread.
template <typename T>
BackwardTable table16() {
  using E = Arithmetic16<T>;
  static const BackwardKernels ordinary[] = {
      ordinary_kernels<E, 64, 64, 32, 2, true>(), ordinary_kernels<E, 80, 80, 32, 2, true>(),
      ordinary_kernels<E, 64, 64, 32, 1>(), ordinary_kernels<E, 128, 128, 32, 1>(),
      ordinary_kernels<E, 256, 128, 32, 1>()};
  static const BackwardKernels tangent[] = {
      tangent_kernels<E, 64, 64, 64, 16, true>(), tangent_kernels<E, 80, 48, 80, 16, true>(),
      tangent_kernels<E, 64, 64, 64, 16>(), tangent_kernels<E, 256, 64, 64, 16>()};
  return {ordinary, tangent};
}

template <typename E>
BackwardTable table32() {
  static const BackwardKernels ordinary[] = {ordinary_kernels<E, 128, 64, 16, 1>(),
                                             ordinary_kernels<E, 256, 64, 16, 1>()};
  static const BackwardKernels tangent[] = {tangent_kernels<E, 128, 64, 64, 16>(),
                                            tangent_kernels<E, 256, 64, 64, 8>()};
  return {ordinary, tangent};
}

}  // namespace pmf::cuda
