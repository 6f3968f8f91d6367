// Tensor maps of attention's tensors, on the host.
#pragma once

#include "cuda/attention/hopper_tile.cuh"
#include "cuda/common/dry_run.h"
#include "cuda/common/tensor_map.cuh"

namespace pmf::cuda {

// A tensor [batch, heads, rows, width] in boxes of so many rows. Strides that no address needs are
// the row's. False, if a map cannot say so.
inline bool encode_maps(HopperMaps* maps, const ConstView4& view, int64_t batch, int64_t heads,
                        int64_t rows, int64_t width, int box_rows) {
  const int64_t sizes[] = {width, rows, heads, batch};
  uint64_t size[4], stride[3];
  for (int d = 0; d < 4; ++d) size[d] = uint64_t(sizes[d]);
  for (int d = 1; d < 4; ++d) {
    const int64_t bytes = 2 * view.stride[3 - d];
    if (sizes[d] > 1 && bytes <= 0) return false;  // all rows the same one, or backwards
    stride[d - 1] = sizes[d] > 1 ? uint64_t(bytes) : 2 * uint64_t(width);
  }
  if (dry_run != nullptr) return true;
  const int64_t tail = width % kPieceColumns;
  return encode_tensor_map(&maps->piece, view.data, size, stride, box_rows, Swizzle::bytes128) &&
         (tail == 0 || encode_tensor_map(&maps->tail, view.data, size, stride, box_rows,
                                         tail == 16 ? Swizzle::bytes32 : Swizzle::bytes64));
}

}  // namespace pmf::cuda
