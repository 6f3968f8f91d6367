// One wrapper per sm_90a instruction without a C++ equivalent: copies of boxes of a tensor (TMA),
// the barriers in shared memory that track them (mbarrier), and products by a warpgroup (wgmma),
// four warps with 16 rows each. Addresses in shared memory are 32-bit (shared_address()). Compiled
// only for sm_90a.
//
// Accumulators of wgmma, and A in registers, have the layout of mma (ptx.cuh), 16 rows per warp:
//
//   d[j]  columns 8 j to 8 j + 7 of the sums        a  16 columns of A
//
// The tensor cores own both from the product until the wait that covers it. The order is: write
// accumulators or A, wgmma_fence(), products, wgmma_commit(), wgmma_wait<>(), read. hold() keeps
// the compiler from moving accesses across these points.
#pragma once

#include "cuda/common/cuda.cuh"
#include "cuda/common/matrix_descriptor.cuh"
#include "cuda/common/ptx.cuh"

namespace pmf::cuda {

// The block's shared memory, aligned to 1024 bytes, the period of the swizzle.
__device__ inline unsigned char* swizzled_shared() {
  extern __shared__ __align__(1024) unsigned char swizzled_bytes[];
  return swizzled_bytes;
}

// ---- mbarrier: eight bytes in shared memory, 8-byte aligned -------------------------------------
// A phase ends when `arrivals` threads have arrived and all announced bytes have been copied; the
// next phase begins at once. Waiting for parity 0 waits for the end of the first, third, ... phase;
// waiting for parity 1 for that of the second, fourth, ..., and returns at once in the first.

__device__ inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the barriers that this thread has initialised visible to copies.
__device__ inline void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives and announces the bytes that copies will transfer.
__device__ inline void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// The address of another block of the cluster that corresponds to `address` in this one.
__device__ inline uint32_t peer_address(uint32_t address, uint32_t block) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}

// Arrives at a barrier of any block of the cluster, by its peer_address().
__device__ inline void mbarrier_arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}

// A barrier among all threads of the cluster's blocks.
__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  do {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}\n"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (over == 0);
}

// ---- the asynchronous proxy ---------------------------------------------------------------------

// Makes this thread's writes to shared memory visible to copies and products.
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies the map's box at (column, row, head, batch) to `to`, a multiple of 128, with zeros outside
// the tensor. The barrier counts all bytes of the box as they arrive.
__device__ inline void copy_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column,
                                int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// The same, to the same address in all blocks of the cluster whose bits are set in `blocks`,
// counted by the barrier at the same address there.
__device__ inline void copy_box_to_blocks(uint32_t to, const TensorMap* map, uint32_t barrier,
                                          int column, int row, int head, int batch,
                                          uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(blocks)
      : "memory");
}

// Starts bringing global memory to the L2 cache. Both numbers are multiples of 16.
__device__ inline void prefetch_to_l2(uintptr_t address, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
}

// ---- wgmma --------------------------------------------------------------------------------------

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Commits the products issued since the last commit as a group.
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most the kPending newest groups are in flight.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Emits no instruction; accesses to these registers do not move across it.
template <int kCount>
__device__ inline void hold(float (&x)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
  }
}
__device__ inline void hold(uint32_t (&x)[4]) {
  asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])::"memory");
}
__device__ inline void hold(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }

// d = A B, or d += A B if `adds`: m64 n(8 kTiles) k16, by the whole warpgroup. B is described as
// B[n][k], or as B[k][n] if kTransposed; A is described as A[m][k], or is in registers.

// clang-format off
#define PMF_SUM(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define PMF_SUMS_2 PMF_SUM(0), PMF_SUM(1)
#define PMF_SUMS_4 PMF_SUMS_2, PMF_SUM(2), PMF_SUM(3)
#define PMF_SUMS_6 PMF_SUMS_4, PMF_SUM(4), PMF_SUM(5)
#define PMF_SUMS_8 PMF_SUMS_6, PMF_SUM(6), PMF_SUM(7)
#define PMF_SUMS_10 PMF_SUMS_8, PMF_SUM(8), PMF_SUM(9)
#define PMF_SUMS_12 PMF_SUMS_10, PMF_SUM(10), PMF_SUM(11)
#define PMF_SUMS_16 PMF_SUMS_12, PMF_SUM(12), PMF_SUM(13), PMF_SUM(14), PMF_SUM(15)
#define PMF_SUMS_32 PMF_SUMS_16, \
  PMF_SUM(16), PMF_SUM(17), PMF_SUM(18), PMF_SUM(19), PMF_SUM(20), PMF_SUM(21), PMF_SUM(22), \
  PMF_SUM(23), PMF_SUM(24), PMF_SUM(25), PMF_SUM(26), PMF_SUM(27), PMF_SUM(28), PMF_SUM(29), \
  PMF_SUM(30), PMF_SUM(31)
#define PMF_NAMES_2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PMF_NAMES_4 PMF_NAMES_2 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PMF_NAMES_6 PMF_NAMES_4 \
  ", %16, %17, %18, %19, %20, %21, %22, %23"
#define PMF_NAMES_8 PMF_NAMES_6 \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PMF_NAMES_10 PMF_NAMES_8 \
  ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PMF_NAMES_12 PMF_NAMES_10 \
  ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PMF_NAMES_16 PMF_NAMES_12 \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PMF_NAMES_32 PMF_NAMES_16 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// The operands after the sums: A (a descriptor or registers), the descriptor of B, and `adds`.
#define PMF_SHARED_4 "%16, %17", "%18"
#define PMF_SHARED_6 "%24, %25", "%26"
#define PMF_SHARED_12 "%48, %49", "%50"
#define PMF_SHARED_32 "%128, %129", "%130"
#define PMF_REGISTERS_2 "{%8, %9, %10, %11}, %12", "%13"
#define PMF_REGISTERS_4 "{%16, %17, %18, %19}, %20", "%21"
#define PMF_REGISTERS_6 "{%24, %25, %26, %27}, %28", "%29"
#define PMF_REGISTERS_8 "{%32, %33, %34, %35}, %36", "%37"
#define PMF_REGISTERS_10 "{%40, %41, %42, %43}, %44", "%45"
#define PMF_REGISTERS_16 "{%64, %65, %66, %67}, %68", "%69"
#define PMF_WGMMA(tiles, n, type, factors, adds_at, options, ...)                              \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds_at ", 0;\n"                     \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type               \
               " {" PMF_NAMES_##tiles "}, " factors ", adds, 1, 1, " options ";\n}\n"          \
               : PMF_SUMS_##tiles : __VA_ARGS__, "l"(b), "r"(int(adds)))
#define PMF_EXPAND(macro, ...) macro(__VA_ARGS__)
#define PMF_OF_TYPE(tiles, n, factors, options, ...)                                           \
  if constexpr (kTiles == tiles) {                                                             \
    if constexpr (std::is_same_v<T, __half>) {                                                 \
      PMF_EXPAND(PMF_WGMMA, tiles, n, f16, factors, options, __VA_ARGS__);                     \
    } else {                                                                                   \
      PMF_EXPAND(PMF_WGMMA, tiles, n, bf16, factors, options, __VA_ARGS__);                    \
    }                                                                                          \
  }
// clang-format on

template <typename T, bool kTransposed, int kTiles>
__device__ inline void wgmma(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool adds) {
  static_assert(kTiles == 32 || (!kTransposed && (kTiles == 4 || kTiles == 6 || kTiles == 12)),
                "what the kernels use");
  PMF_OF_TYPE(4, 32, PMF_SHARED_4, "0, 0", "l"(a))
  PMF_OF_TYPE(6, 48, PMF_SHARED_6, "0, 0", "l"(a))
  PMF_OF_TYPE(12, 96, PMF_SHARED_12, "0, 0", "l"(a))
  if constexpr (kTransposed) {
    PMF_OF_TYPE(32, 256, PMF_SHARED_32, "0, 1", "l"(a))
  } else {
    PMF_OF_TYPE(32, 256, PMF_SHARED_32, "0, 0", "l"(a))
  }
}

template <typename T, bool kTransposed, int kTiles>
__device__ inline void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
  static_assert(kTransposed
                    ? kTiles == 2 || kTiles == 4 || kTiles == 8 || kTiles == 10 || kTiles == 16
                    : kTiles == 6,
                "what the kernels use");
#define PMF_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
  PMF_OF_TYPE(6, 48, PMF_REGISTERS_6, "0", PMF_A)
  PMF_OF_TYPE(2, 16, PMF_REGISTERS_2, "1", PMF_A)
  PMF_OF_TYPE(4, 32, PMF_REGISTERS_4, "1", PMF_A)
  PMF_OF_TYPE(8, 64, PMF_REGISTERS_8, "1", PMF_A)
  PMF_OF_TYPE(10, 80, PMF_REGISTERS_10, "1", PMF_A)
  PMF_OF_TYPE(16, 128, PMF_REGISTERS_16, "1", PMF_A)
#undef PMF_A
}

#undef PMF_OF_TYPE
#undef PMF_EXPAND
#undef PMF_WGMMA

// ---- threads together ---------------------------------------------------------------------------

// True in one lane of the warp, always the same one.
__device__ inline bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// Set the register count of each of the warpgroup's threads: _down_to releases registers, _up_to
// waits until enough are free.
template <int kCount>
__device__ inline void registers_down_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void registers_up_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace pmf::cuda
