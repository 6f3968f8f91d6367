// The machine: one block at a time, its warps in random order, its threads as fibers.
#pragma once

#include <string>
#include <vector>

#include "emulator/runtime.h"
#include "fiber.h"

namespace pmf::emulator {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;

// What all lanes of a warp do together.
enum class Together { shuffle, ballot, sync_warp, barrier, load_matrices, multiply };

// An asynchronous copy that this thread has issued and not waited for.
struct Copy {
  void* to;
  const void* from;
  bool valid;
  int64_t group;
};

struct Lane {
  void* stack = nullptr;  // where it goes on
  char* lowest = nullptr;
  Index index = {};
  int number = 0;  // in its block
  bool waits = false, done = false;
  std::vector<Copy> copies;
  int64_t group = 0;  // of copies, now open

  // Operands of what it waits for, and the result.
  const void* row = nullptr;
  uint64_t bits = 0, result = 0;
  Word4 a = {}, matrices = {};
  Float4 c = {};
};

// Logical clocks decide what is ordered (Lamport 1978; vector clocks per warp as in Fidge and
// Mattern 1988). A warp's clock ticks when its lanes synchronise. What another thread of warp v did
// at clock c comes before what this warp does now if c <= known[v].
struct Warp {
  Lane* lanes = nullptr;
  int number = 0, count = 0, waiting = 0, done = 0, turn = 0;
  bool at_barrier = false;
  int barrier = 0, barrier_threads = 0;
  Together kind = {};
  int option = 0, line = 0;
  uint32_t clock = 0;
  uint32_t known[kMaxWarps] = {};

  void tick() { known[number] = clock++; }
};

class Machine {
 public:
  Machine();

  const char* run(const Launch& launch);
  void seed(uint64_t value) { random_ = (value + 1) * 0x9e3779b97f4a7c15ull; }

  // Of the thread that runs now; null on the host.
  Lane* lane = nullptr;
  Warp* warp = nullptr;
  const void* place = nullptr;  // in the kernel: for messages
  int aligned_line = 0;         // of the PTX instruction that is about to arrive; 0: any

  // A kernel that g++ compiled called the runtime from there; translated ones say it themselves.
  void called_from(const void* address) {
    if (!launch.translated) place = address;
  }

  Launch launch = {};
  Index block = {};
  std::string problem;
  int64_t launches = 0;  // since the process began

  // Ends the launch. Never returns: no fiber runs again.
  [[noreturn]] void fail(const std::string& text);

  // A launch that cannot be made.
  const char* refuse(const std::string& why);

  // Waits until every lane of the warp is here; the last one runs `all`.
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
  void yield();

 private:
  static constexpr unsigned kYieldOneIn = 16;

  void arrive(Together kind, int option);
  void next_lane();
  void resume(Lane& next);
  void run_block(int64_t number);
  void run_warps();
  void to_host();
  std::string stuck() const;
  unsigned random(unsigned below);
  static void thread_entry();

  Stacks stacks_;
  void* host_ = nullptr;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  uint32_t first_clock_ = 1;  // of the block: whatever is older lies before it
  uint64_t random_ = 1;
};

extern Machine machine;

const char* together_name(Together kind);

}  // namespace pmf::emulator
