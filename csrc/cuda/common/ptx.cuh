// One wrapper per PTX instruction without a C++ equivalent: tensor cores, asynchronous copies and
// warp-level collectives. Fragment layouts follow the PTX ISA, section "Matrix instructions"; lane
// = 4 g + t:
//
//   m16n8k16  a[0] A[g][2t, 2t + 1]      a[1] A[g + 8][2t, ...]     a[2], a[3]: columns + 8
//             b[0] B[2t, 2t + 1][g]      b[1] B[2t + 8, 2t + 9][g]
//   m16n8k8   a[0] A[g][t]  a[1] A[g + 8][t]  a[2] A[g][t + 4]  a[3] A[g + 8][t + 4]
//             b[0] B[t][g]  b[1] B[t + 4][g]
//   both      c[0], c[1] C[g][2t, 2t + 1]     c[2], c[3] C[g + 8][2t, 2t + 1]
//
// All lanes of a warp must execute the collectives (ldmatrix, mma, shuffles, any_lane) together.
#pragma once

#include "cuda/common/cuda.cuh"

namespace pmf::cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- ldmatrix: loads matrices of 8 rows of 16 bytes from shared memory --------------------------
// Lane 8 i + r supplies the address of row r of matrix i, a multiple of 16. For 16-bit elements,
// r[i] of lane 4 g + t receives elements 2t, 2t + 1 of row g or, transposed, rows 2t, 2t + 1 of
// column g. x2 uses the addresses of lanes 0 to 15.

__device__ inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- mma: C += A B on the tensor cores, sums in fp32 --------------------------------------------

template <typename T>
__device__ inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Operands must come from round_tf32(), because the low 13 bits of their registers are ignored.
__device__ inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bits of the nearest TF32 number (10 bits of mantissa; ties away from zero).
__device__ inline uint32_t round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// ---- cp.async: copies from global to shared memory that bypass registers ------------------------
// Both addresses must be multiples of 16. If not `valid`, writes 16 zero bytes and does not read
// `from`, which must still be an address. The data is visible to this thread after cp_async_wait,
// and to others after a subsequent barrier.

__device__ inline void cp_async_16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Commits the copies issued since the last commit, perhaps none, as a group.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the kPending newest groups of this thread are in flight.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- approximate functions: about 2 ulp; denormal results flush to 0 ----------------------------

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- two 16-bit numbers in a register, the first in the lower half ------------------------------

template <typename T>
__device__ inline uint32_t pack2(float first, float second);

template <>
__device__ inline uint32_t pack2<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ inline uint32_t pack2<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Emits no instruction. The compiler knows nothing of the result: it computes what depends on it
// anew, rather than keep it in registers.
__device__ inline int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- warp collectives and named barriers --------------------------------------------------------

template <typename T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kWholeWarp, value, mask);
}

template <typename T>
__device__ inline T shuffle_idx(T value, int lane) {
  return __shfl_sync(kWholeWarp, value, lane);
}

// Whether `value` holds in any lane.
__device__ inline bool any_lane(bool value) { return __any_sync(kWholeWarp, value) != 0; }

// A named barrier among `threads` threads, a multiple of the warp size; id 0 is __syncthreads().
__device__ inline void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace pmf::cuda
