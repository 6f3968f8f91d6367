// The emulator's csrc/cuda/common/tensor_map.cuh.
#pragma once

#include "cuda/common/cuda.cuh"
#include "cuda/common/matrix_descriptor.cuh"

namespace pmf::cuda {

inline bool encode_tensor_map(TensorMap* map, const void* base, const uint64_t (&sizes)[4],
                              const uint64_t (&stride_bytes)[3], int rows, Swizzle swizzle) {
  const auto width = static_cast<uint32_t>(swizzle_bytes(swizzle));
  const uint32_t box[] = {width / 2, static_cast<uint32_t>(rows), 1, 1};
  return emulator::encode_tensor_map(map, base, 2, 4, sizes, stride_bytes, box, width);
}

}  // namespace pmf::cuda
