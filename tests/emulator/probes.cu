// One collective instruction on operands that a test gives lane by lane.
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/shared.cuh"

#define PMF_EXPORT extern "C" __attribute__((visibility("default")))

namespace pmf::planted {
namespace {

using namespace pmf::cuda;

enum Kind { kBf16, kF16, kTf32 };

struct Fragments {
  const uint32_t* a;  // [32][4]
  const uint32_t* b;  // [32][2]
  float* c;           // [32][4]
};

template <Kind kKind>
__global__ void mma_probe(Fragments p) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = p.a[4 * lane + i], c[i] = p.c[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = p.b[2 * lane + i];
  if constexpr (kKind == kBf16) mma_m16n8k16<__nv_bfloat16>(c, a, b);
  if constexpr (kKind == kF16) mma_m16n8k16<__half>(c, a, b);
  if constexpr (kKind == kTf32) mma_m16n8k8_tf32(c, a, b);
  for (int i = 0; i < 4; ++i) p.c[4 * lane + i] = c[i];
}

constexpr int kRows = 32, kRowElements = 8;

struct Rows {
  const uint16_t* elements;  // [32][8]
  const int* of_lane;        // [32]: the row whose address a lane gives
  uint32_t* result;          // [32][4]
};

template <int kCount, bool kTransposed>
__global__ void ldmatrix_probe(Rows p) {
  const int lane = static_cast<int>(threadIdx.x);
  auto* const s = reinterpret_cast<uint16_t*>(dynamic_shared());
  for (int i = lane; i < kRows * kRowElements; i += kWarpThreads) s[i] = p.elements[i];
  __syncwarp();
  const uint16_t* row = s + p.of_lane[lane] * kRowElements;
  uint32_t r[kCount];
  if constexpr (kCount == 4) {
    kTransposed ? ldmatrix_x4_trans(r, row) : ldmatrix_x4(r, row);
  } else {
    ldmatrix_x2(r, row);
  }
  for (int i = 0; i < kCount; ++i) p.result[4 * lane + i] = r[i];
}

struct Numbers {
  const float* x;    // [32]
  uint32_t* result;  // [32][4]
};

// What each lane gets from the others, and its own value rounded to TF32.
__global__ void lanes_probe(Numbers p) {
  const int lane = static_cast<int>(threadIdx.x);
  const float x = p.x[lane];
  p.result[4 * lane] = __float_as_uint(shuffle_xor(x, 5));
  p.result[4 * lane + 1] = __float_as_uint(shuffle_idx(x, (lane + 3) % kWarpThreads));
  p.result[4 * lane + 2] = any_lane(lane == 5 && x > 0.0f);
  p.result[4 * lane + 3] = round_tf32(x);
}

struct Copies {
  const float* from;  // two times [32][4]
  float* to;
};

// What a lane finds at the destinations of its copies, after waiting for the first of two groups
// (zeros if the lane is odd) and after waiting for both. It had written to both before.
__global__ void copy_probe(Copies p) {
  const int lane = static_cast<int>(threadIdx.x), own = 4 * lane, next = own + 4 * kWarpThreads;
  auto* const s = reinterpret_cast<float*>(dynamic_shared());
  for (int i = 0; i < 4; ++i) s[own + i] = s[next + i] = -1.0f;
  cp_async_16(s + own, p.from + own, lane % 2 == 0);
  cp_async_commit();
  cp_async_16(s + next, p.from + next);
  cp_async_commit();
  cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) p.to[own + i] = s[own + i];
  cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) p.to[next + i] = s[next + i];
}

// One number's functions, and two numbers in a register.
__global__ void numbers_probe(Numbers p) {
  const int lane = static_cast<int>(threadIdx.x);
  const float x = p.x[lane];
  uint32_t* const result = p.result + 5 * lane;  // [32][5]
  result[0] = __float_as_uint(exp2_approx(x));
  result[1] = __float_as_uint(log2_approx(x));
  result[2] = __float_as_uint(rcp_approx(x));
  result[3] = pack2<__nv_bfloat16>(x, 2.0f);
  result[4] = pack2<__half>(x, 2.0f);
}

const char* sentence(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

PMF_EXPORT const char* pmf_probe_mma(int kind, const uint32_t* a, const uint32_t* b, float* c) {
  void (*const kernels[])(Fragments) = {&mma_probe<kBf16>, &mma_probe<kF16>, &mma_probe<kTf32>};
  return sentence(launch(kernels[kind], 1, kWarpThreads, 0, nullptr, Fragments{a, b, c}));
}

PMF_EXPORT const char* pmf_probe_ldmatrix(int count, bool transposed, const uint16_t* elements,
                                          const int* of_lane, uint32_t* result) {
  const auto kernel = count == 2   ? &ldmatrix_probe<2, false>
                      : transposed ? &ldmatrix_probe<4, true>
                                   : &ldmatrix_probe<4, false>;
  return sentence(launch(kernel, 1, kWarpThreads, kRows * kRowElements * sizeof(uint16_t), nullptr,
                         Rows{elements, of_lane, result}));
}

PMF_EXPORT const char* pmf_probe_lanes(const float* x, uint32_t* result) {
  return sentence(launch(&lanes_probe, 1, kWarpThreads, 0, nullptr, Numbers{x, result}));
}

PMF_EXPORT const char* pmf_probe_copy(const float* from, float* to) {
  constexpr int64_t kShared = 2 * kWarpThreads * 4 * sizeof(float);
  return sentence(launch(&copy_probe, 1, kWarpThreads, kShared, nullptr, Copies{from, to}));
}

PMF_EXPORT const char* pmf_probe_numbers(const float* x, uint32_t* result) {
  return sentence(launch(&numbers_probe, 1, kWarpThreads, 0, nullptr, Numbers{x, result}));
}

// Requests more shared memory, threads or blocks than a launch may have.
PMF_EXPORT const char* pmf_probe_launch(unsigned grid, unsigned block, int64_t shared_bytes,
                                        const float* x, uint32_t* result) {
  return sentence(launch(&lanes_probe, grid, block, shared_bytes, nullptr, Numbers{x, result}));
}

}  // namespace pmf::planted
