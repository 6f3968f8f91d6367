// The machine: runs one block at a time, with warps in random order and threads as fibers.
#pragma once

#include <string>
#include <vector>

#include "emulator/runtime.h"
#include "fiber.h"

namespace pmf::emulator {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;
// Agents that others wait for: warps, and the copies counted by each mbarrier, which get thread
// numbers as if they were warps.
constexpr int kMaxBarriers = 64, kAgents = kMaxWarps + kMaxBarriers;

// Operations that all lanes of a warp execute together.
enum class Together {
  shuffle,
  ballot,
  sync_warp,
  barrier,
  load_matrices,
  multiply,
  elect,
  set_registers,
  wgmma,
  wgmma_fence,
  wgmma_commit,
  wgmma_wait,
  cluster_arrive,
};

// A vector clock: actions of each agent up to this time are known.
struct Knowledge {
  uint32_t of[kAgents] = {};

  void merge(const Knowledge& other) {
    for (int v = 0; v < kAgents; ++v) of[v] = of[v] < other.of[v] ? other.of[v] : of[v];
  }
};

// An asynchronous copy that this thread has issued and not yet waited for.
struct Copy {
  void* to;
  const void* from;
  bool valid;
  int64_t group;
};

// Registers (an array on a thread's stack) that belong to a pending product (hopper.h).
struct Held {
  char* begin;
  size_t bytes;
  bool sums;  // must not be read either
  int chain;
};

struct Lane {
  void* stack = nullptr;  // where it resumes
  char* lowest = nullptr;
  Index index = {};
  int number = 0;  // index in its block
  bool waits = false, done = false;
  uint32_t mbarrier = 0, parity = 0;  // mbarrier that this lane alone waits for
  std::vector<Copy> copies;
  int64_t group = 0;  // number of the open group of copies
  std::vector<Held> held;
  uint32_t proxy_fences = 0;
  // What this lane, but perhaps no other, has waited for at mbarriers, until the warp synchronises.
  bool has_acquired = false;
  Knowledge acquired;

  // Operands of the operation that it waits for, and the result.
  const void* row = nullptr;
  uint64_t bits = 0, result = 0;
  Word4 a = {}, matrices = {};
  Float4 c = {};
  float* sums = nullptr;
  const uint32_t* factor = nullptr;
};

// Logical clocks determine what is ordered (Lamport 1978; one vector clock per warp as in Fidge and
// Mattern 1988). A warp's clock ticks when its lanes synchronise. An action of another thread of
// warp v at clock c precedes what this warp does now if c <= known.of[v].
struct Warp {
  Lane* lanes = nullptr;
  int number = 0, count = 0, waiting = 0, done = 0, turn = 0;
  int rank = 0;  // of its block in the cluster
  Index block = {};
  bool at_barrier = false, at_cluster_barrier = false;  // the latter: it has arrived
  int barrier = 0;
  int wanted_registers = 0;  // registers per thread that it waits for
  Together kind = {};
  int option = 0, line = 0;
  uint32_t clock = 0;
  Knowledge known;

  // Shares among all lanes what any of them did or knew.
  void tick() {
    known.of[number] = clock++;
    for (int i = 0; i < count; ++i) {
      if (!lanes[i].has_acquired) continue;
      known.merge(lanes[i].acquired);
      lanes[i].has_acquired = false;
    }
  }
  // Whether an agent's action at a clock precedes what `lane` does now; null: what all lanes do.
  bool knows(int agent, uint32_t at, const Lane* lane) const {
    if (at <= known.of[agent]) return true;
    const auto knows = [&](const Lane& l) { return l.has_acquired && at <= l.acquired.of[agent]; };
    if (lane != nullptr) return knows(*lane);
    for (int i = 0; i < count; ++i) {
      if (!knows(lanes[i])) return false;
    }
    return true;
  }
};

// State of bar.sync.
struct NamedBarrier {
  int threads = 0, arrived = 0;
  Knowledge known;
};

class Machine {
 public:
  Machine();

  const char* run(const Launch& launch);
  void seed(uint64_t value) { random_ = (value + 1) * 0x9e3779b97f4a7c15ull; }

  // The running thread's; null on the host.
  Lane* lane = nullptr;
  Warp* warp = nullptr;
  const void* place = nullptr;  // position in the kernel, for messages
  int aligned_line = 0;         // line of the next .aligned PTX instruction to arrive; 0: any

  // Sets the position for kernels compiled by g++; translated kernels set it themselves.
  void called_from(const void* address) {
    if (!launch.translated) place = address;
  }

  Launch launch = {};
  std::string problem;
  int64_t launches = 0;            // since the process started
  int64_t products = 0;            // mma instructions executed by all warps since then
  int64_t warpgroup_products = 0;  // the same of wgmma
  int64_t prefetched = 0;          // bytes brought to the L2 cache since then

  // Ends the launch and does not return: no fiber runs again.
  [[noreturn]] void fail(const std::string& text);

  // Refuses a launch that cannot be made.
  const char* refuse(const std::string& why);

  // Waits until all lanes of the warp have arrived; the last one runs `all`.
  template <class All>
  void together(Together kind, int option, All all) {
    arrive(kind, option);
    if (warp->waiting < warp->count) {
      next_lane();
    } else {
      all();
      warp->waiting = 0;
      for (int i = 0; i < warp->count; ++i) warp->lanes[i].waits = false;
      if (kind != Together::barrier && random(kYieldOneIn) == 0) yield();
    }
  }

  void barrier(int id, int threads);
  void cluster_arrive();
  void cluster_wait();
  void yield();
  void wait_for_phase(uint32_t mbarrier, uint32_t parity);

  uint32_t first_clock() const { return first_clock_; }
  Warp& warp_number(int w) { return warps_[w]; }
  bool ended(int rank) const;  // a block of the cluster
  unsigned random(unsigned below);

 private:
  static constexpr unsigned kYieldOneIn = 16, kLandOneIn = 4;

  void arrive(Together kind, int option);
  void next_lane();
  // The first lane from `first` on that can continue; null: none.
  static Lane* runnable(Warp& w, int first);
  void resume(Lane& next);
  void run_cluster(int64_t first_block);
  void meet(int id, int threads);
  void run_warps();
  void to_host();
  std::string stuck() const;
  static void thread_entry();

  Stacks stacks_;
  void* host_ = nullptr;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  static constexpr int kClusterBarrier = 16;
  NamedBarrier named_[kMostCluster][kClusterBarrier + 1];
  uint32_t first_clock_ = 1;  // the block's first; older clocks precede the block
  uint64_t random_ = 1;
};

extern Machine machine;

const char* together_name(Together kind);

}  // namespace pmf::emulator
