// The emulator's csrc/cuda/common/hopper.cuh: the same functions, by calls of the runtime.
#pragma once

#include "cuda/common/matrix_descriptor.cuh"
#include "cuda/common/ptx.cuh"

namespace pmf::cuda {

inline unsigned char* swizzled_shared() { return emulator::shared_memory(); }

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  emulator::mbarrier_init(barrier, arrivals);
}
inline void mbarrier_init_fence() { emulator::mbarrier_init_fence(); }
inline void mbarrier_arrive(uint32_t barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  emulator::mbarrier_arrive(barrier, bytes);
}
inline uint32_t peer_address(uint32_t address, uint32_t block) {
  return emulator::peer_address(address, block);
}
inline void mbarrier_arrive_in_cluster(uint32_t barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void cluster_sync() {
  emulator::cluster_arrive();
  emulator::cluster_wait();
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  emulator::mbarrier_wait(barrier, parity);
}

inline void fence_proxy_async() { emulator::fence_proxy_async(); }
inline void copy_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row,
                     int head, int batch) {
  emulator::copy_box(
      to, map, barrier,
      emulator::Word4{uint32_t(column), uint32_t(row), uint32_t(head), uint32_t(batch)}, 0);
}
inline void copy_box_to_blocks(uint32_t to, const TensorMap* map, uint32_t barrier, int column,
                               int row, int head, int batch, uint16_t blocks) {
  emulator::copy_box(
      to, map, barrier,
      emulator::Word4{uint32_t(column), uint32_t(row), uint32_t(head), uint32_t(batch)}, blocks);
}

inline void prefetch_to_l2(uintptr_t address, uint32_t bytes) {
  emulator::prefetch(address, bytes);
}

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
inline void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
template <typename Registers>
inline void hold(Registers&) {}

template <typename T>
constexpr emulator::Element kElement =
    std::is_same_v<T, __half> ? emulator::Element::f16 : emulator::Element::bf16;

template <typename T, bool kTransposed, int kTiles>
inline void wgmma(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool adds) {
  emulator::wgmma({kElement<T>, 8 * kTiles, false, kTransposed, adds, a, b}, &d[0][0], nullptr,
                  true);
}
template <typename T, bool kTransposed, int kTiles>
inline void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
  emulator::wgmma({kElement<T>, 8 * kTiles, true, kTransposed, adds, 0, b}, &d[0][0], a, true);
}

inline bool elect_one() { return emulator::elect_one(); }
template <int kCount>
inline void registers_down_to() {
  emulator::set_registers(kCount, false);
}
template <int kCount>
inline void registers_up_to() {
  emulator::set_registers(kCount, true);
}

}  // namespace pmf::cuda
