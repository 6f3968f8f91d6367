// The runtime's device functions: thread position, warp collectives, asynchronous copies.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "emulator/numbers.h"
#include "memory.h"

namespace pmf::emulator {
namespace {

constexpr int kVectorBytes = 16;

// Records the call's position in the kernel, for messages.
#define PMF_HERE machine.called_from(__builtin_return_address(0))

// The lane that a shuffle reads from.
int source_lane(Shuffle how, int lane, int amount) {
  switch (how) {
    case Shuffle::exclusive_or:
      return lane ^ amount;
    case Shuffle::index:
      return amount;
  }
  return lane;
}

}  // namespace

Index thread_index() { return machine.lane->index; }
Index block_index() { return machine.warp->block; }
Index block_size() { return machine.launch.block; }
Index grid_size() { return machine.launch.grid; }
unsigned char* shared_memory() { return memory.shared(); }

// ---- warp and block collectives -----------------------------------------------------------------

uint64_t shuffle(Shuffle how, uint64_t bits, int amount) {
  PMF_HERE;
  Lane* self = machine.lane;
  const int own = self->number % kLanes, from = source_lane(how, own, amount);
  if (from < 0 || from >= machine.warp->count) {
    machine.fail("a shuffle reads lane " + std::to_string(from) + " of a warp of " +
                 std::to_string(machine.warp->count));
  }
  self->bits = bits;
  self->result = static_cast<uint64_t>(from);
  machine.together(Together::shuffle, static_cast<int>(how), [] {
    const Warp& w = *machine.warp;
    for (int i = 0; i < w.count; ++i) w.lanes[i].result = w.lanes[w.lanes[i].result].bits;
  });
  return self->result;
}

uint32_t ballot(bool value) {
  PMF_HERE;
  Lane* self = machine.lane;
  self->bits = value;
  machine.together(Together::ballot, 0, [] {
    const Warp& w = *machine.warp;
    uint64_t all = 0;
    for (int i = 0; i < w.count; ++i) all |= w.lanes[i].bits << i;
    for (int i = 0; i < w.count; ++i) w.lanes[i].result = all;
  });
  return static_cast<uint32_t>(self->result);
}

void sync_warp() {
  PMF_HERE;
  machine.together(Together::sync_warp, 0, [] { machine.warp->tick(); });
}

void sync_threads(int barrier, int threads) {
  PMF_HERE;
  machine.barrier(barrier, threads);
}

// ---- memory -------------------------------------------------------------------------------------

void check_aligned(const void* address, int bytes) {
  PMF_HERE;
  if (machine.lane != nullptr) check_alignment(address, bytes, "a vector");
}

void copy_async(void* to, const void* from, bool valid) {
  PMF_HERE;
  check_alignment(to, kVectorBytes, "cp.async");
  check_alignment(from, kVectorBytes, "cp.async");
  if (valid) memory.access(from, kVectorBytes, Access::read);
  memory.copy_issued(to);
  machine.lane->copies.push_back({to, from, valid, machine.lane->group});
}

void commit_copies() { machine.lane->group += 1; }

void wait_for_copies(int pending) {
  PMF_HERE;
  Lane& lane = *machine.lane;
  size_t landed = 0;
  for (const Copy& copy : lane.copies) {
    if (copy.group >= lane.group - pending) break;
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, kVectorBytes);
    } else {
      std::memset(copy.to, 0, kVectorBytes);
    }
    memory.copy_landed(copy.to);
    landed += 1;
  }
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + landed);
}

// ---- the host -----------------------------------------------------------------------------------

const char* run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return machine.run(launch);
}

const char* last_problem() { return machine.problem.c_str(); }

}  // namespace pmf::emulator
