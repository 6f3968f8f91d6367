// The functions of emulator/runtime.h that the Hopper kernels call, on either backend.
#include <cstring>

#include "hopper.h"

#define PMF_HERE machine.called_from(__builtin_return_address(0))

namespace pmf::emulator {

namespace {

void whole_warp(const char* what) {
  if (machine.warp->count != kLanes) machine.fail(std::string(what) + " needs a warp of 32 lanes");
}

}  // namespace

uint32_t shared_address(const void* generic) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(generic) - memory.shared() +
                               kSharedWindow);
}

void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  PMF_HERE;
  hopper.init(barrier, arrivals);
}
void mbarrier_init_fence() {
  PMF_HERE;
  hopper.init_fence();
}
void mbarrier_arrive(uint32_t barrier, uint32_t bytes) {
  PMF_HERE;
  hopper.arrive(barrier, bytes);
}
void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  PMF_HERE;
  hopper.wait(barrier, parity);
}
void fence_proxy_async() { machine.lane->proxy_fences += 1; }

void copy_box(uint32_t to, const void* map, uint32_t barrier, Word4 place) {
  PMF_HERE;
  BoxMap box;
  std::memcpy(&box, map, sizeof(box));
  const int32_t at[] = {int32_t(place[0]), int32_t(place[1]), int32_t(place[2]), int32_t(place[3])};
  hopper.copy(to, box, barrier, at);
}

void wgmma(const Product& product, float* sums, const uint32_t* a, bool holds) {
  PMF_HERE;
  whole_warp("wgmma");
  machine.lane->sums = sums, machine.lane->factor = a;
  machine.together(Together::wgmma, product.columns << 1 | int(product.adds),
                   [&] { hopper.multiply(product, holds); });
}
void wgmma_fence() {
  PMF_HERE;
  machine.together(Together::wgmma_fence, 0, [] { hopper.fence(); });
}
void wgmma_commit() {
  PMF_HERE;
  machine.together(Together::wgmma_commit, 0, [] { hopper.commit(); });
}
void wgmma_wait(int pending) {
  PMF_HERE;
  machine.together(Together::wgmma_wait, pending, [=] { hopper.wait(pending); });
}
float waited_for(float x) { return hopper.waited_for(x); }

bool elect_one() {
  PMF_HERE;
  // No lane in particular, but the same one throughout a launch.
  machine.together(Together::elect, 0, [] {});
  return machine.lane->number % kLanes == int(machine.launches * 7 % kLanes);
}

void set_registers(int count, bool more) {
  PMF_HERE;
  machine.together(Together::set_registers, count << 1 | int(more),
                   [=] { hopper.set_registers(count, more); });
  while (machine.warp->wanted_registers != 0) machine.yield();
}

void barrier_arrive(int barrier, int threads) {
  PMF_HERE;
  machine.barrier(barrier, threads, false);
}

}  // namespace pmf::emulator
