// Host side of the Hopper products: tensor maps and the launch. Compiled only for sm_90a.
#include "cuda/newton_schulz/hopper_products.h"

#include "cuda/common/hopper_device.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_map.cuh"
#include "cuda/newton_schulz/hopper_updates.cuh"

namespace pmf::cuda::ns {
namespace {

// A map of the matrices [rows, columns] of a bucket. False if the driver lacks tensor maps.
bool encode_map(TensorMap* map, const void* data, int rows, int columns, int matrices) {
  if (dry_run != nullptr) return true;
  const uint64_t row = 2 * uint64_t(columns), matrix = row * uint64_t(rows);
  return encode_tensor_map(map, data, {uint64_t(columns), uint64_t(rows), uint64_t(matrices), 1},
                           {row, matrix, matrix * uint64_t(matrices)}, kBoxSide, Swizzle::bytes128);
}

// False if the device or its driver cannot run the products.
template <typename Wave>
bool fill(Wave& wave, const std::vector<Product>& products) {
  if (!device_is_hopper() || device_shared_limit() < kHopperSharedBytes) return false;
  for (const Product& p : products) {
    HopperProduct& to = wave.products[wave.count++];
    to.product = p;
    to.first_square = wave.squares;
    to.down = (p.m + kHopperSquare - 1) / kHopperSquare;
    to.across = (p.n + kHopperSquare - 1) / kHopperSquare;
    const int each = p.symmetric ? to.down * (to.down + 1) / 2 : to.down * to.across;
    wave.squares += each * p.matrices;
    const int rows = p.right_transposed ? p.n : p.k, columns = p.right_transposed ? p.k : p.n;
    if (!encode_map(&to.left, p.left, p.m, p.k, p.matrices) ||
        !encode_map(&to.right, p.right, rows, columns, p.matrices)) {
      return false;
    }
  }
  return true;
}

// One persistent cluster for every two multiprocessors, or for every square.
template <typename Kernel, typename Wave, typename... More>
cudaError_t launch_wave(Kernel kernel, cudaStream_t stream, const Wave& wave, const More&... more) {
  constexpr int kCluster = kHopperCluster;
  plan_next_launch(kHopperRows, kHopperSquare, 1);
  const int clusters = std::min(wave.squares, std::max(1, device_processors() / kCluster));
  return launch_clusters(kernel, kHopperCluster, dim3(unsigned(kCluster * clusters)),
                         dim3(kHopperThreads), kHopperSharedBytes, stream, wave, more...);
}

}  // namespace

bool hopper_products(const std::vector<Product>& products, DType compute, cudaStream_t stream,
                     cudaError_t& status) {
  HopperWave wave{};
  if (!fill(wave, products)) return false;
  status = launch_wave(
      compute == DType::bf16 ? hopper_product_kernel<__nv_bfloat16> : hopper_product_kernel<__half>,
      stream, wave);
  return true;
}

bool hopper_updates(const std::vector<Product>& products, const TargetTable& targets, DType compute,
                    cudaStream_t stream, cudaError_t& status) {
  HopperLastWave wave{};
  if (!fill(wave, products)) return false;
  status = launch_wave(
      compute == DType::bf16 ? hopper_update_kernel<__nv_bfloat16> : hopper_update_kernel<__half>,
      stream, wave, targets);
  return true;
}

}  // namespace pmf::cuda::ns
