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
  hopper.init(in_cluster(barrier), arrivals);
}
void mbarrier_init_fence() {
  PMF_HERE;
  hopper.init_fence();
}
void mbarrier_arrive(uint32_t barrier, uint32_t bytes) {
  PMF_HERE;
  hopper.arrive(in_cluster(barrier), bytes);
}
void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  PMF_HERE;
  hopper.wait(in_cluster(barrier), parity);
}
uint32_t peer_address(uint32_t address, uint32_t block) {
  PMF_HERE;
  if (block >= machine.launch.cluster) {
    machine.fail("block " + std::to_string(block) + " of a cluster of " +
                 std::to_string(machine.launch.cluster));
  }
  return of_block(address, int(block));
}
void cluster_arrive() {
  PMF_HERE;
  machine.cluster_arrive();
}
void cluster_wait() {
  PMF_HERE;
  machine.cluster_wait();
}
void fence_proxy_async() { machine.lane->proxy_fences += 1; }

void copy_box(uint32_t to, const void* map, uint32_t barrier, Word4 place, uint32_t blocks) {
  PMF_HERE;
  BoxMap box;
  std::memcpy(&box, map, sizeof(box));
  const int32_t at[] = {int32_t(place[0]), int32_t(place[1]), int32_t(place[2]), int32_t(place[3])};
  if (blocks == 0) blocks = 1u << machine.warp->rank;
  for (uint32_t block = 0; blocks != 0; ++block, blocks >>= 1) {
    if ((blocks & 1) == 0) continue;
    hopper.copy(peer_address(to, block), box, peer_address(barrier, block), at);
  }
}

void prefetch(uintptr_t address, uint32_t bytes) {
  PMF_HERE;
  memory.prefetch(address, bytes);
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

}  // namespace pmf::emulator
