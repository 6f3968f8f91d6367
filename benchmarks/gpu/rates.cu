// Rates and latencies, per cycle of one multiprocessor, of the instructions that the kernels use.
// Prints one JSON object; machine_rates.py builds and runs it.
//
// Each kernel repeats one instruction kRounds times in `chains` independent chains, with one block
// per multiprocessor. Cycles are those of the multiprocessor's own clock, for the slowest warp of
// block 0.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

constexpr int kRounds = 4096;
constexpr int kChains = 8;
constexpr int kSchedulers = 4;  // per multiprocessor
constexpr int kWarp = 32;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

struct Mma {
  template <int kIndependent>
  static __device__ float run(uint32_t) {
    float d[kIndependent][4] = {};
    const uint32_t a[4] = {}, b[2] = {};
#pragma unroll 4
    for (int i = 0; i < kRounds / kIndependent; ++i)
      for (int c = 0; c < kIndependent; ++c) mma(d[c], a, b);
    float sum = 0;
    for (int c = 0; c < kIndependent; ++c) sum += d[c][0];
    return sum;
  }
};

struct Ldmatrix {
  template <int kIndependent>
  static __device__ float run(uint32_t shared) {
    uint32_t place[kIndependent];
    for (int c = 0; c < kIndependent; ++c) place[c] = shared + threadIdx.x % kWarp * 16;
#pragma unroll 4
    for (int i = 0; i < kRounds / kIndependent; ++i)
      for (int c = 0; c < kIndependent; ++c) {
        uint32_t r0, r1, r2, r3;  // all zero, so the next address is the same
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
                     : "r"(place[c]));
        place[c] += r0;
      }
    uint32_t sum = 0;
    for (int c = 0; c < kIndependent; ++c) sum += place[c];
    return static_cast<float>(sum);
  }
};

struct Exp2 {
  template <int kIndependent>
  static __device__ float run(uint32_t) {
    float x[kIndependent];
    for (int c = 0; c < kIndependent; ++c) x[c] = -0.5f;
#pragma unroll 4
    for (int i = 0; i < kRounds / kIndependent; ++i)
      for (int c = 0; c < kIndependent; ++c)
        asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[c]));
    float sum = 0;
    for (int c = 0; c < kIndependent; ++c) sum += x[c];
    return sum;
  }
};

struct Fma {
  template <int kIndependent>
  static __device__ float run(uint32_t) {
    float x[kIndependent];
    for (int c = 0; c < kIndependent; ++c) x[c] = 1.0f + c;
#pragma unroll 4
    for (int i = 0; i < kRounds / kIndependent; ++i)
      for (int c = 0; c < kIndependent; ++c)
        asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(x[c]) : "f"(0.5f));
    float sum = 0;
    for (int c = 0; c < kIndependent; ++c) sum += x[c];
    return sum;
  }
};

template <class Instruction, int kIndependent>
__global__ void repeat(float* out, long long* cycles) {
  extern __shared__ uint4 zeros[];
  if (threadIdx.x < kWarp) zeros[threadIdx.x] = uint4{};
  __syncthreads();
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(zeros));
  const long long begin = clock64();
  const float sum = Instruction::template run<kIndependent>(shared);
  const long long end = clock64();
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (blockIdx.x == 0) cycles[threadIdx.x] = end - begin;
}

// Cycles between instructions of a scheduler with so many warps each; also the clock in Hz.
template <class Instruction, int kIndependent>
double cycles_each(int warps_a_scheduler, int processors, double* clock = nullptr) {
  const int threads = kSchedulers * warps_a_scheduler * kWarp;
  float* out;
  long long* cycles;
  check(cudaMalloc(&out, sizeof(float) * processors * threads));
  check(cudaMalloc(&cycles, sizeof(long long) * threads));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<long long> found(threads);
  double best = 1e30;
  for (int run = 0; run < 5; ++run) {
    check(cudaEventRecord(begin));
    repeat<Instruction, kIndependent><<<processors, threads, 1024>>>(out, cycles);
    check(cudaGetLastError());
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    check(cudaMemcpy(found.data(), cycles, sizeof(long long) * threads, cudaMemcpyDeviceToHost));
    const double taken = static_cast<double>(*std::max_element(found.begin(), found.end()));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    if (clock != nullptr) *clock = taken / (milliseconds * 1e-3);
    best = std::min(best, taken / kRounds / warps_a_scheduler);
  }
  check(cudaFree(out));
  check(cudaFree(cycles));
  return best;
}

#if defined(PMF_WGMMA)
// d += A B, m64n64k16 by a warpgroup.
__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%"
      "24,"
      "%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}

// A matrix of zeros in shared memory that serves as both operands.
__device__ uint64_t zero_matrix() {
  extern __shared__ __align__(1024) uint4 zeros[];
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) zeros[i] = uint4{};
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  const uint64_t address = (__cvta_generic_to_shared(zeros) & 0x3ffff) >> 4;
  return address | (uint64_t{8} << 16) | (uint64_t{16} << 32);  // no swizzle
}

// Both operands in shared memory, two products in flight.
__global__ void wgmma(float* out, long long* cycles) {
  const uint64_t matrix = zero_matrix();
  float d[32] = {};
  const long long begin = clock64();
#pragma unroll 4
  for (int i = 0; i < kRounds; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    multiply(d, matrix, matrix);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  const long long end = clock64();
  float sum = 0;
  for (float x : d) sum += x;
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (blockIdx.x == 0) cycles[threadIdx.x] = end - begin;
}

// The cycles in which a warpgroup issues kCount products, without waiting for them. (In a loop the
// compiler would wait for each.)
template <int kCount>
__global__ void issue(float* out, long long* cycles) {
  const uint64_t matrix = zero_matrix();
  float d[32] = {};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  const long long begin = clock64();
#pragma unroll
  for (int i = 0; i < kCount; ++i) multiply(d, matrix, matrix);
  const long long end = clock64();
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  float sum = 0;
  for (float x : d) sum += x;
  out[threadIdx.x] = sum;
  if (threadIdx.x == 0) *cycles = end - begin;
}

// How many products a warp can issue ahead of the tensor cores, of kCount at most: one more takes
// as long to issue as to compute.
template <int... kCount>
int queued_products(double cycles_each, std::integer_sequence<int, kCount...>) {
  constexpr int kMost = sizeof...(kCount);
  void (*const kernels[])(float*, long long*) = {issue<kCount + 1>...};
  float* out;
  long long *cycles, before = 0;
  check(cudaMalloc(&out, sizeof(float) * 128));
  check(cudaMalloc(&cycles, sizeof(long long)));
  int count = 0;
  for (bool queued = true; queued && count < kMost; ++count) {
    long long best = INT64_MAX;
    for (int run = 0; run < 5; ++run) {
      long long taken;
      kernels[count]<<<1, 128, 16384>>>(out, cycles);
      check(cudaGetLastError());
      check(cudaMemcpy(&taken, cycles, sizeof(taken), cudaMemcpyDeviceToHost));
      best = std::min(best, taken);
    }
    queued = count == 0 || best - before < 0.75 * cycles_each;
    before = best;
    if (!queued) break;
  }
  check(cudaFree(out));
  check(cudaFree(cycles));
  return count;
}

// Cycles per m64n64k16 on a multiprocessor, with one and two warpgroups.
double wgmma_cycles(int groups, int processors) {
  const int threads = groups * 128;
  float* out;
  long long* cycles;
  check(cudaMalloc(&out, sizeof(float) * processors * threads));
  check(cudaMalloc(&cycles, sizeof(long long) * threads));
  std::vector<long long> found(threads);
  double best = 1e30;
  for (int run = 0; run < 5; ++run) {
    wgmma<<<processors, threads, 16384>>>(out, cycles);
    check(cudaGetLastError());
    check(cudaMemcpy(found.data(), cycles, sizeof(long long) * threads, cudaMemcpyDeviceToHost));
    const double taken = static_cast<double>(*std::max_element(found.begin(), found.end()));
    best = std::min(best, taken / kRounds / groups);
  }
  check(cudaFree(out));
  check(cudaFree(cycles));
  return best;
}
#endif

// Bytes per second read and written by repeated copies of `bytes` bytes.
double copy_rate(size_t bytes, int repeats) {
  void *from, *to;
  check(cudaMalloc(&from, bytes));
  check(cudaMalloc(&to, bytes));
  check(cudaMemset(from, 0, bytes));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    check(cudaEventRecord(begin));
    for (int i = 0; i < repeats; ++i)
      check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice));
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    best = std::max(best, 2.0 * bytes * repeats / (milliseconds * 1e-3));
  }
  check(cudaFree(from));
  check(cudaFree(to));
  return best;
}

int main() {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0));
  const int processors = properties.multiProcessorCount;
  std::printf("{\n \"what\": \"measured on %s\",\n \"processors\": %d,\n", properties.name,
              processors);
  double clock = 0;
  for (int warps : {1, 2, 4}) {
    const double cycles = cycles_each<Mma, kChains>(warps, processors, &clock);
    std::printf(" \"hmma_cycles_of_%d_warps\": %.3f,\n", warps, cycles);
    if (warps == 4) std::printf(" \"hmma_cycles\": %.3f,\n \"clock_hz\": %.4g,\n", cycles, clock);
  }
  std::printf(" \"hmma_latency\": %.2f,\n", cycles_each<Mma, 1>(1, processors));
  // An ldmatrix.x4 reads 4 rows of shared memory, which the four schedulers share.
  std::printf(" \"shared_row_cycles\": %.3f,\n",
              cycles_each<Ldmatrix, kChains>(4, processors) / kSchedulers / 4);
  std::printf(" \"ldsm_latency\": %.2f,\n", cycles_each<Ldmatrix, 1>(1, processors));
  std::printf(" \"mufu_cycles\": %.3f,\n", cycles_each<Exp2, kChains>(4, processors));
  std::printf(" \"mufu_latency\": %.2f,\n", cycles_each<Exp2, 1>(1, processors));
  std::printf(" \"fma_cycles\": %.3f,\n", cycles_each<Fma, kChains>(4, processors));
  std::printf(" \"usual_latency\": %.2f,\n", cycles_each<Fma, 1>(1, processors));
#if defined(PMF_WGMMA)
  for (int groups : {1, 2}) {
    const double cycles = wgmma_cycles(groups, processors);
    std::printf(" \"wgmma_m64n64k16_cycles_of_%d_groups\": %.2f,\n", groups, cycles);
    if (groups == 2) {
      std::printf(" \"wgmma_column_cycles\": %.4f,\n", cycles / 64);
      constexpr std::make_integer_sequence<int, 24> kCounts;
      std::printf(" \"wgmma_queue\": %d,\n", queued_products(cycles, kCounts));
    }
  }
#endif
  std::printf(" \"l2_bytes\": %.4g,\n", copy_rate(size_t{4} << 20, 200));
  std::printf(" \"memory_bytes\": %.4g\n}\n", copy_rate(size_t{1} << 30, 4));
  return 0;
}
