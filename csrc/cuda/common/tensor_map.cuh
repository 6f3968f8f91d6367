// Encodes tensor maps (matrix_descriptor.cuh) on the host through the driver, whose function is
// looked up by name so that the library loads on machines without a driver.
#pragma once

#include <cuda.h>

#include "cuda/common/cuda.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/matrix_descriptor.cuh"

namespace pmf::cuda {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// Null if there is no driver or it is too old.
inline EncodeTensorMap tensor_map_encoder() {
  static const EncodeTensorMap found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    constexpr unsigned kSince = 12000;
    const cudaError_t status = checked([&] {
      return cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSince,
                                              cudaEnableDefault, &result);
    });
    const bool there = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<EncodeTensorMap>(function) : nullptr;
  }();
  return found;
}

// Encodes a map of 16-bit elements [batch][head][row][column], with sizes and strides (in bytes;
// columns are contiguous) from the innermost dimension outwards. The box is `rows` rows, as wide as
// the swizzle. False if the driver lacks tensor maps or rejects the strides or addresses.
inline bool encode_tensor_map(TensorMap* map, const void* base, const uint64_t (&sizes)[4],
                              const uint64_t (&stride_bytes)[3], int rows, Swizzle swizzle) {
  const EncodeTensorMap encode = tensor_map_encoder();
  if (encode == nullptr) return false;
  cuuint64_t size[4], stride[3];
  for (int d = 0; d < 4; ++d) size[d] = sizes[d];
  for (int d = 0; d < 3; ++d) stride[d] = stride_bytes[d];
  const cuuint32_t box[] = {cuuint32_t(swizzle_bytes(swizzle) / 2), cuuint32_t(rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUtensorMapSwizzle mode = swizzle == Swizzle::bytes128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                  : swizzle == Swizzle::bytes64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                : CU_TENSOR_MAP_SWIZZLE_32B;
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  return encode(reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 4,
                const_cast<void*>(base), size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                mode, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace pmf::cuda
