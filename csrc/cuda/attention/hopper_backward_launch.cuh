// Shared by the launchers of the Hopper attention backward.
#pragma once

#include "cuda/attention/hopper_backward_block.cuh"
#include "cuda/attention/hopper_launch.cuh"

namespace pmf::cuda {

constexpr double kBackwardLog2e = 1.4426950408889634;

// Sets all but the gradients of a launch whose tiles have `tile` rows, in a ring of `slots`.
// `queries`, `keys`: the sides. False if these kernels cannot process the tensors.
template <int kSides>
bool prepare(HopperBackwardOf<kSides>& p, const AttentionBackwardParams& params,
             const ConstView4* const (&queries)[kSides], const ConstView4* const (&keys)[kSides],
             bool by_keys, int tile, int slots, int consumers) {
  const AttentionShape& s = params.shape;
  p.rows = int(by_keys ? s.keys : s.queries), p.columns = int(by_keys ? s.queries : s.keys);
  for (int side = 0; side < kSides; ++side) {
    const ConstView4 &row = *(by_keys ? keys : queries)[side],
                     &column = *(by_keys ? queries : keys)[side];
    if (!encode_maps(&p.row[side], row, s.batch, s.heads, p.rows, s.width, kRowBlock) ||
        !encode_maps(&p.column[side], column, s.batch, s.heads, p.columns, s.width, tile)) {
      return false;
    }
  }
  p.statistics = static_cast<float*>(params.workspace);
  p.lse = static_cast<const float*>(params.lse);
  p.grad_lse = static_cast<const float*>(params.grad_lse);
  p.grad_lse_t = static_cast<const float*>(params.grad_lse_t);
  p.padded_queries = int(attention_backward_padded_queries(params));
  p.scale = float(params.scale);
  p.factor = float(params.scale * kBackwardLog2e);
  return cut_into_items(p, s, p.rows, p.columns, tile, slots, consumers);
}

}  // namespace pmf::cuda
