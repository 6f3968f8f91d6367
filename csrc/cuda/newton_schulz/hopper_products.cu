// Host side of the Hopper products: tensor maps and the launch. Compiled only for sm_90a.
#include "cuda/newton_schulz/hopper_products.h"

#include "cuda/common/hopper_device.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_map.cuh"
#include "cuda/newton_schulz/hopper_products.cuh"

namespace pmf::cuda::ns {
namespace {

// A map of the matrices [rows, columns] of a bucket. False if the driver lacks tensor maps.
bool encode_map(TensorMap* map, const void* data, int rows, int columns, int matrices) {
  if (dry_run != nullptr) return true;
  const uint64_t row = 2 * uint64_t(columns), matrix = row * uint64_t(rows);
  return encode_tensor_map(map, data, {uint64_t(columns), uint64_t(rows), uint64_t(matrices), 1},
                           {row, matrix, matrix * uint64_t(matrices)}, kBoxSide, Swizzle::bytes128);
}

}  // namespace

bool hopper_products(const std::vector<Product>& products, DType compute, cudaStream_t stream,
                     cudaError_t& status) {
  if (!device_is_hopper() || device_shared_limit() < kHopperSharedBytes) return false;
  HopperWave wave{};
  for (const Product& p : products) {
    HopperProduct& to = wave.products[wave.count++];
    to.product = p;
    to.first_item = wave.items;
    to.down = (p.m + kHopperSquare - 1) / kHopperSquare;
    to.across = (p.n + kHopperSquare - 1) / kHopperSquare;
    const int squares = p.symmetric ? to.down * (to.down + 1) / 2 : to.down * to.across;
    wave.items += 2 * squares * p.matrices;
    const int rows = p.right_transposed ? p.n : p.k, columns = p.right_transposed ? p.k : p.n;
    if (!encode_map(&to.left, p.left, p.m, p.k, p.matrices) ||
        !encode_map(&to.right, p.right, rows, columns, p.matrices)) {
      return false;
    }
  }
  plan_next_launch(kHopperRows, kHopperSquare, 1);
  const int blocks = std::min(wave.items, std::max(1, device_processors()));
  const auto kernel =
      compute == DType::bf16 ? hopper_product_kernel<__nv_bfloat16> : hopper_product_kernel<__half>;
  status = launch(kernel, dim3(unsigned(blocks)), dim3(kHopperThreads), kHopperSharedBytes, stream,
                  wave);
  return true;
}

}  // namespace pmf::cuda::ns
