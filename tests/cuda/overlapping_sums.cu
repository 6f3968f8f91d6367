// The accumulators of one product are half of another's: ptxas serialises the products.
#include "cuda/common/hopper.cuh"

namespace pmf::planted {

using namespace pmf::cuda;

__global__ void overlapping_sums(float* out, uint64_t a, uint64_t b) {
  float d[12][4] = {};
  float (&half)[6][4] = *reinterpret_cast<float (*)[6][4]>(&d[6]);
  hold(d);
  wgmma_fence();
  wgmma<__nv_bfloat16, false>(d, a, b, true);
  wgmma<__nv_bfloat16, false>(half, a + 2, b + 2, true);
  wgmma_commit();
  wgmma_wait<0>();
  hold(d);
  for (int j = 0; j < 12; ++j) {
    for (int i = 0; i < 4; ++i) out[128 * (4 * j + i) + threadIdx.x] = d[j][i];
  }
}

}  // namespace pmf::planted
