#include "machine.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <utility>

#include "hopper.h"
#include "memory.h"
#include "place.h"

namespace pmf::emulator {

Machine machine;

namespace {
const std::string kFound = "the emulator found: ";
}

const char* together_name(Together kind) {
  switch (kind) {
    case Together::shuffle:
      return "a shuffle";
    case Together::ballot:
      return "a ballot";
    case Together::sync_warp:
      return "__syncwarp()";
    case Together::barrier:
      return "a block barrier";
    case Together::load_matrices:
      return "ldmatrix";
    case Together::multiply:
      return "mma";
    case Together::elect:
      return "elect.sync";
    case Together::set_registers:
      return "setmaxnreg";
    case Together::wgmma:
      return "wgmma.mma_async";
    case Together::wgmma_fence:
      return "wgmma.fence";
    case Together::wgmma_commit:
      return "wgmma.commit_group";
    case Together::wgmma_wait:
      return "wgmma.wait_group";
    case Together::cluster_arrive:
      return "barrier.cluster.arrive";
  }
  return "";
}

Machine::Machine() : stacks_(kMaxThreads), lanes_(kMaxThreads), warps_(kMaxWarps) {
  for (int i = 0; i < kMaxThreads; ++i) lanes_[i].lowest = stacks_.lowest(i);
  for (int w = 0; w < kMaxWarps; ++w) {
    warps_[w].number = w;
    warps_[w].lanes = &lanes_[w * kLanes];
  }
}

// xorshift64* (Vigna 2016).
unsigned Machine::random(unsigned below) {
  random_ ^= random_ >> 12;
  random_ ^= random_ << 25;
  random_ ^= random_ >> 27;
  return static_cast<unsigned>((random_ * 0x2545f4914f6cdd1dull >> 33) % below);
}

// ---- fibers -------------------------------------------------------------------------------------

void Machine::thread_entry() {
  machine.launch.thread(machine.launch.call);
  machine.lane->done = true;
  machine.warp->done += 1;
  machine.next_lane();
}

void Machine::resume(Lane& next) {
  void** from = lane == nullptr ? &host_ : &lane->stack;
  lane = &next;
  pmf_switch_stack(from, next.stack);
}

void Machine::to_host() {
  Lane* left = lane;
  lane = nullptr;
  pmf_switch_stack(&left->stack, host_);
}

void Machine::yield() {
  Lane* self = lane;
  warp->turn = static_cast<int>(self - warp->lanes);
  to_host();
}

void Machine::fail(const std::string& text) {
  std::ostringstream out;
  out << kFound << text;
  if (lane != nullptr) {
    const Index block = warp->block;
    out << " (block " << block.x << ", " << block.y << ", " << block.z << "; thread "
        << lane->index.x << ", " << lane->index.y << ", " << lane->index.z << "; "
        << describe_place(place) << ")";
  }
  problem = out.str();
  void* abandoned = nullptr;
  lane = nullptr;
  pmf_switch_stack(&abandoned, host_);
  __builtin_unreachable();
}

// ---- warps --------------------------------------------------------------------------------------

void Machine::arrive(Together kind, int option) {
  Warp& w = *warp;
  const int line = std::exchange(aligned_line, 0);
  if (w.waiting > 0 && (w.kind != kind || w.option != option)) {
    fail(std::string("lanes of one warp diverge: one is at ") + together_name(kind) +
         " while others are at " + together_name(w.kind) +
         (w.kind == kind ? " with different options" : ""));
  }
  if (w.waiting > 0 && w.line != line) {
    fail(std::string("lanes of one warp are at ") + together_name(kind) + " on lines " +
         std::to_string(w.line) + " and " + std::to_string(line) +
         " of the PTX, but all must execute the same instruction");
  }
  w.kind = kind, w.option = option, w.line = line;
  w.waiting += 1;
  lane->waits = true;
}

// Resumes a lane that has not yet reached the point where the others wait.
void Machine::next_lane() {
  Warp& w = *warp;
  if (w.done == w.count) return to_host();
  if (w.waiting > 0 && w.waiting + w.done == w.count) {
    fail(std::string("lanes of a warp are missing at ") + together_name(w.kind) + ": " +
         std::to_string(w.done) + " of " + std::to_string(w.count) + " have ended");
  }
  Lane* const next = runnable(w, static_cast<int>(lane - w.lanes) + 1);
  if (next == nullptr) return to_host();  // the remaining lanes wait for phases of mbarriers
  resume(*next);
}

Lane* Machine::runnable(Warp& w, int first) {
  for (int i = first; i < first + w.count; ++i) {
    Lane& l = w.lanes[i < w.count ? i : i - w.count];
    if (l.waits || l.done) continue;
    if (l.mbarrier == 0 || hopper.over(l.mbarrier, l.parity)) return &l;
  }
  return nullptr;
}

void Machine::wait_for_phase(uint32_t mbarrier, uint32_t parity) {
  Lane* const self = lane;
  self->mbarrier = mbarrier, self->parity = parity;
  while (!hopper.over(mbarrier, parity)) next_lane();
  self->mbarrier = 0;
}

void Machine::barrier(int id, int threads) {
  const int all = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  if (threads == 0) threads = all;
  if (threads % kLanes != 0 && threads != all) {
    fail("barrier_sync() takes whole warps, got " + std::to_string(threads) + " threads");
  }
  if (id < 0 || id > 15) fail("barriers are numbered 0 to 15, got " + std::to_string(id));
  meet(id, threads);
}

void Machine::cluster_arrive() {
  together(Together::cluster_arrive, 0, [&] {
    if (warp->at_cluster_barrier) fail("a warp arrives twice at the cluster's barrier");
    warp->at_cluster_barrier = true;
  });
}

void Machine::cluster_wait() {
  if (!warp->at_cluster_barrier) fail("a warp waits at the cluster's barrier without arriving");
  const Index size = launch.block;
  meet(kClusterBarrier, static_cast<int>(size.x * size.y * size.z * launch.cluster));
  warp->at_cluster_barrier = false;
}

bool Machine::ended(int rank) const {
  return std::all_of(warps_.begin(), warps_.end(), [=](const Warp& w) {
    return w.count == 0 || w.rank != rank || w.done == w.count;
  });
}

void Machine::meet(int id, int threads) {
  const bool everywhere = id == kClusterBarrier;
  together(Together::barrier, id << 16 | threads, [&] {
    NamedBarrier& b = named_[everywhere ? 0 : warp->rank][id];
    if (b.arrived > 0 && b.threads != threads) {
      fail("one warp uses barrier " + std::to_string(id) + " for " + std::to_string(b.threads) +
           " threads and another for " + std::to_string(threads));
    }
    b.threads = threads;
    b.arrived += warp->count;
    warp->tick();
    b.known.merge(warp->known);
    warp->at_barrier = true, warp->barrier = id;
    if (b.arrived < threads) return;
    if (b.arrived > threads) {
      fail(std::to_string(b.arrived) + " threads arrive at barrier " + std::to_string(id) +
           ", which expects " + std::to_string(threads));
    }
    for (Warp& w : warps_) {
      if (w.count == 0 || !w.at_barrier || w.barrier != id) continue;
      if (!everywhere && w.rank != warp->rank) continue;
      w.known.merge(b.known);
      w.at_barrier = false;
    }
    b = {};
  });
  while (warp->at_barrier) yield();  // only the last lane to arrive; the others run after it
}

// ---- blocks -------------------------------------------------------------------------------------

std::string Machine::stuck() const {
  std::ostringstream out;
  const bool at_barriers = std::all_of(warps_.begin(), warps_.end(), [](const Warp& w) {
    return w.count == 0 || w.at_barrier || w.done == w.count;
  });
  out << (at_barriers ? "a barrier that not all threads reach:" : "threads that wait forever:");
  for (const Warp& w : warps_) {
    if (w.count == 0) continue;
    out << (w.number ? ", " : " ") << "warp " << w.number;
    if (w.at_barrier) {
      out << " waits at barrier " << w.barrier;
    } else if (const Lane* l = std::find_if(w.lanes, w.lanes + w.count,
                                            [](const Lane& l) { return l.mbarrier != 0; });
               l != w.lanes + w.count) {
      out << " waits at " << hopper.describe(l->mbarrier) << " for parity " << l->parity;
    } else if (w.wanted_registers != 0) {
      out << " waits for " << w.wanted_registers << " registers per thread, but "
          << hopper.free_registers(w) << " of the block's are free";
    } else {
      out << " has ended";
    }
  }
  return out.str();
}

void Machine::run_warps() {
  for (;;) {
    Warp* ready[kMaxWarps];
    unsigned count = 0, unfinished = 0;
    for (Warp& w : warps_) {
      if (w.done == w.count) continue;
      unfinished += 1;
      if (!w.at_barrier && !hopper.waits(w) && runnable(w, w.turn)) ready[count++] = &w;
    }
    if (unfinished == 0) {
      const std::string left = hopper.left_over();
      if (!left.empty()) problem = kFound + left;
      return;
    }
    if (hopper.under_way() > 0 && (count == 0 || random(kLandOneIn) == 0)) {
      hopper.land_one();
      continue;
    }
    if (count == 0) {
      problem = kFound + stuck();
      return;
    }
    warp = ready[random(count)];
    resume(*runnable(*warp, warp->turn));
    if (!problem.empty()) return;
  }
}

void Machine::run_cluster(int64_t first_block) {
  const Index g = launch.grid, size = launch.block;
  const int each = static_cast<int>(size.x * size.y * size.z);
  const int threads = each * static_cast<int>(launch.cluster);
  const int warps = (threads + kLanes - 1) / kLanes;
  for (Lane& l : lanes_) {
    for (const Copy& copy : l.copies) memory.copy_dropped(copy.to);
    l.copies.clear();
    l.group = 0;
    l.held.clear();
    l.proxy_fences = 0;
    l.has_acquired = false;
  }
  first_clock_ = memory.begin_cluster(first_clock_, launch.shared_bytes, launch.cluster, warps);
  for (int i = 0; i < threads; ++i) {
    Lane& l = lanes_[i];
    l.stack = stacks_.fresh(i, &thread_entry);
    l.number = i;
    const unsigned own = static_cast<unsigned>(i % each);
    l.index = {own % size.x, own / size.x % size.y, own / size.x / size.y};
    l.waits = l.done = false;
    l.mbarrier = 0;
  }
  for (Warp& w : warps_) {
    const int rest = threads - w.number * kLanes;
    w.count = rest < 0 ? 0 : rest < kLanes ? rest : kLanes;
    w.waiting = w.done = 0;
    w.turn = w.count == 0 ? 0 : static_cast<int>(random(static_cast<unsigned>(w.count)));
    w.rank = w.number * kLanes / each;
    const int64_t block = first_block + w.rank;
    w.block = {static_cast<unsigned>(block % g.x), static_cast<unsigned>(block / g.x % g.y),
               static_cast<unsigned>(block / g.x / g.y)};
    w.at_barrier = w.at_cluster_barrier = false;
    w.wanted_registers = 0;
    w.clock = first_clock_;
    for (uint32_t& known : w.known.of) known = first_clock_ - 1;
  }
  for (auto& of_block : named_) {
    for (NamedBarrier& b : of_block) b = {};
  }
  hopper.begin_cluster(each, warps);
  run_warps();
  for (const Warp& w : warps_) first_clock_ = first_clock_ > w.clock ? first_clock_ : w.clock + 1;
  const uint32_t phases = hopper.last_clock();
  first_clock_ = first_clock_ > phases ? first_clock_ : phases + 1;
}

const char* Machine::refuse(const std::string& why) {
  problem = why;
  return problem.c_str();
}

const char* Machine::run(const Launch& what) {
  launch = what;
  launches += 1;
  problem.clear();
  lane = nullptr;
  aligned_line = 0;
  const Index g = what.grid, b = what.block;
  const uint64_t threads = uint64_t{b.x} * b.y * b.z;
  std::ostringstream out;
  if (threads < 1 || threads > kMaxThreads || b.z > 64) {
    out << "a block of " << b.x << " x " << b.y << " x " << b.z << " threads";
  } else if (what.cluster > 1 && (what.cluster > kMostCluster || g.x % what.cluster != 0 ||
                                  threads % kLanes != 0 || threads * what.cluster > kMaxThreads)) {
    out << "clusters of " << what.cluster << " blocks of " << threads << " threads in rows of "
        << g.x;
  } else if (g.x < 1 || g.y < 1 || g.z < 1 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    out << "a grid of " << g.x << " x " << g.y << " x " << g.z << " blocks";
  } else if (what.shared_bytes < 0 || what.shared_bytes > what.allowed_bytes) {
    out << "a block with " << what.shared_bytes << " bytes of shared memory; the limit is "
        << what.allowed_bytes;
  } else if (constexpr size_t kMostParameters = 32764; what.call_bytes > kMostParameters) {
    out << "a kernel with " << what.call_bytes << " bytes of parameters; the limit is "
        << kMostParameters;
  }
  if (!out.str().empty()) return refuse("the emulator cannot launch " + out.str());
  memory.begin_launch();
  const int64_t clusters = int64_t{g.x} * g.y * g.z / what.cluster;
  const int64_t first =
      random(static_cast<unsigned>(clusters < 0x7fffffff ? clusters : 0x7fffffff));
  for (int64_t i = 0; i < clusters && problem.empty(); ++i) {
    run_cluster((first + i) % clusters * what.cluster);
  }
  lane = nullptr;
  return problem.empty() ? nullptr : problem.c_str();
}

}  // namespace pmf::emulator
