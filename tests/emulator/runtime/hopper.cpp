#include "hopper.h"

#include <algorithm>
#include <cstring>

#include "memory.h"

namespace pmf::emulator {

Hopper hopper;

namespace {

constexpr int kRegisterFile = 65536, kMostRegisters = 248, kRegisterStep = 8;
constexpr int64_t kMostBytes = (1 << 20) - 1;

}  // namespace

// ---- blocks -------------------------------------------------------------------------------------

void Hopper::begin_cluster(int threads, int warps) {
  barriers_.clear();
  for (const BoxCopy& copy : copies_) memory.copy_dropped(shared_at(copy.to), copy.map.bytes());
  copies_.clear();
  // Numbers continue, because registers may still hold sums of earlier blocks.
  for (const Products& p : products_) {
    next_chain_ = std::max(next_chain_, p.first_chain + int(p.chains.size()));
  }
  for (Products& p : products_) {
    p = {};
    p.first_chain = next_chain_;
  }
  for (auto& issued : issued_) issued.clear();
  warps_ = warps;
  const int each = std::min(kRegisterFile / std::max(threads, 1) / kRegisterStep * kRegisterStep,
                            kMostRegisters);
  for (int w = 0; w < warps; ++w) registers_[w] = each;
  for (int& free : free_registers_) free = 0;
}

uint32_t Hopper::last_clock() const {
  uint32_t last = 0;
  for (const auto& [address, b] : barriers_) last = std::max(last, machine.first_clock() + b.phase);
  return last;
}

bool Hopper::waits(Warp& w) {
  if (w.wanted_registers == 0) return false;
  const int more = (w.wanted_registers - registers_[w.number]) * kLanes;
  if (more > free_registers_[w.rank]) return true;
  free_registers_[w.rank] -= more;
  registers_[w.number] = w.wanted_registers;
  w.wanted_registers = 0;
  return false;
}

std::string Hopper::left_over() const {
  if (!copies_.empty()) {
    return "a block ended while a box copy to shared memory at " +
           std::to_string(offset_of(copies_[0].to)) + " was in flight";
  }
  for (const auto& [address, b] : barriers_) {
    if (b.landed) {
      return "a block ended without waiting for the copies counted by " + describe(address);
    }
  }
  for (int w = 0; w < warps_; ++w) {
    if (!products_[w].pending.empty()) {
      return "warp " + std::to_string(w) + " ended without waiting for its products";
    }
    if (w % kGroup > 0 && products_[w].issued != products_[w - 1].issued) {
      return "warps " + std::to_string(w - 1) + " and " + std::to_string(w) +
             " of one warpgroup have issued " + std::to_string(products_[w - 1].issued) + " and " +
             std::to_string(products_[w].issued) + " products";
    }
  }
  return "";
}

// ---- registers ---------------------------------------------------------------------------------

void Hopper::set_registers(int count, bool more) {
  Warp& w = *machine.warp;
  int& own = registers_[w.number];
  if (count < 24 || count > 256 || count % kRegisterStep != 0) {
    machine.fail("setmaxnreg takes 24 to 256 in steps of 8, got " + std::to_string(count));
  }
  if (more ? count < own : count > own) {
    machine.fail(std::string("setmaxnreg.") + (more ? "inc" : "dec") + " cannot go from " +
                 std::to_string(own) + " to " + std::to_string(count) + " registers");
  }
  if (more) {
    w.wanted_registers = count;
  } else {
    free_registers_[w.rank] += (own - count) * kLanes;
    own = count;
  }
}

// ---- mbarriers ----------------------------------------------------------------------------------

std::string Hopper::describe(uint32_t barrier) const {
  const std::string name = "the mbarrier at " + std::to_string(offset_of(barrier));
  const auto found = barriers_.find(barrier);
  if (found == barriers_.end()) return name;
  const Barrier& b = found->second;
  return name + " (phase " + std::to_string(b.phase) + ", " + std::to_string(b.missing) + " of " +
         std::to_string(b.arrivals) + " arrivals and " + std::to_string(b.bytes) +
         " bytes missing)";
}

void Hopper::init(uint32_t barrier, uint32_t arrivals) {
  check_alignment(shared_at(barrier), 8, "an mbarrier");
  memory.access(shared_at(barrier), 8, Access::write);
  if (arrivals < 1 || arrivals > kMostBytes)
    machine.fail("an mbarrier must count 1 to 2^20 - 1 arrivals");
  const auto [place, fresh] = barriers_.try_emplace(barrier);
  if (fresh && barriers_.size() > size_t(kMaxBarriers))
    machine.fail("a block with more than 64 mbarriers, the emulator's limit");
  const int number = fresh ? int(barriers_.size()) - 1 : place->second.number;
  place->second = {};
  place->second.number = number, place->second.initialiser = machine.lane->number;
  place->second.arrivals = place->second.missing = arrivals;
}

void Hopper::init_fence() {
  for (auto& [address, b] : barriers_) b.visible |= b.initialiser == machine.lane->number;
}

Hopper::Barrier& Hopper::at(uint32_t barrier) {
  const auto found = barriers_.find(barrier);
  if (found == barriers_.end()) {
    machine.fail("shared memory at " + std::to_string(offset_of(barrier)) +
                 " is used as an mbarrier but was never initialised");
  }
  if (rank_of(barrier) == machine.warp->rank) memory.access(shared_at(barrier), 8, Access::read);
  return found->second;
}

void Hopper::end_phase(Barrier& b) {
  if (b.missing != 0 || b.bytes != 0) return;
  b.now.of[kMaxWarps + b.number] = machine.first_clock() + b.phase;
  b.before.merge(b.now);
  b.now = {};
  b.phase += 1;
  b.missing = b.arrivals;
}

void Hopper::arrive(uint32_t barrier, uint32_t bytes) {
  Barrier& b = at(barrier);
  if (machine.ended(rank_of(barrier))) {
    machine.fail("an arrival at " + describe(barrier) + " of a block that has ended");
  }
  b.bytes += bytes;
  if (b.bytes > kMostBytes) machine.fail(describe(barrier) + " cannot count 2^20 bytes or more");
  if (b.missing == 0) machine.fail("one arrival too many at " + describe(barrier));
  b.missing -= 1;
  // Excludes what other lanes did since the warp last synchronised.
  b.now.merge(machine.warp->known);
  if (machine.lane->has_acquired) b.now.merge(machine.lane->acquired);
  end_phase(b);
}

bool Hopper::over(uint32_t barrier, uint32_t parity) {
  return (barriers_[barrier].phase & 1) != parity;
}

void Hopper::wait(uint32_t barrier, uint32_t parity) {
  Barrier& b = at(barrier);
  if (parity > 1) machine.fail("an mbarrier's parity is 0 or 1, not " + std::to_string(parity));
  Lane& lane = *machine.lane;
  if (!over(barrier, parity)) machine.wait_for_phase(barrier, parity);
  b.landed = false;
  if (!lane.has_acquired) lane.acquired = {};
  lane.has_acquired = true;
  lane.acquired.merge(b.before);
}

// ---- copies of boxes ----------------------------------------------------------------------------

namespace {

// Calls row(offset in the box, address) for each row of the box; the address is 0 outside the
// tensor.
template <class Row>
void rows_of(const BoxMap& map, const int32_t* place, Row row) {
  const uint64_t row_bytes = uint64_t(map.box[0]) * uint32_t(map.element_bytes);
  uint64_t count = 1;
  for (int d = 1; d < map.rank; ++d) count *= map.box[d];
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t rest = i, address = map.base;
    bool inside = true;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t x = place[d] + int64_t(rest % map.box[d]);
      rest /= map.box[d];
      inside &= x >= 0 && x < int64_t(map.sizes[d]);
      address += uint64_t(x) * map.strides[d - 1];
    }
    row(i * row_bytes, inside ? address : 0);
  }
}

// The part of a row of the box that lies in the tensor: first and last element of the box.
void inside_of(const BoxMap& map, int32_t place, int64_t& first, int64_t& last) {
  first = std::max<int64_t>(0, -int64_t(place));
  last = std::min<int64_t>(map.box[0], int64_t(map.sizes[0]) - place);
}

}  // namespace

void Hopper::copy(uint32_t to, const BoxMap& map, uint32_t barrier, const int32_t* place) {
  if (map.mark != BoxMap::kMark)
    machine.fail("a box copy with a tensor map that was never encoded");
  if (map.rank != 4) {
    machine.fail("a 4-D box copy with a tensor map of rank " + std::to_string(map.rank));
  }
  check_alignment(shared_at(to), 128, "a box copy");
  const Barrier& b = at(barrier);
  if (!b.visible) {
    machine.fail(describe(barrier) +
                 " is used by a copy with no fence.mbarrier_init after its initialisation");
  }
  if (machine.ended(rank_of(to))) machine.fail("a box copy to a block that has ended");
  int64_t first, last;
  inside_of(map, place[0], first, last);
  rows_of(map, place, [&](uint64_t, uint64_t address) {
    if (address == 0 || first >= last) return;
    const auto* from =
        reinterpret_cast<const char*>(address) + (place[0] + first) * int64_t(map.element_bytes);
    memory.access(from, size_t((last - first) * map.element_bytes), Access::read);
  });
  memory.box_issued(shared_at(to), map.bytes(), rank_of(to));
  copies_.push_back({map, {place[0], place[1], place[2], place[3], 0}, to, barrier});
}

void Hopper::land_one() {
  const size_t which = machine.random(unsigned(copies_.size()));
  const BoxCopy copy = copies_[which];
  copies_.erase(copies_.begin() + int64_t(which));
  Barrier& b = barriers_[copy.barrier];
  const uint32_t stamp =
      (machine.first_clock() + b.phase) << kThreadBits | uint32_t(kMaxThreads + b.number * kLanes);
  const BoxMap& map = copy.map;
  int64_t first, last;
  inside_of(map, copy.place[0], first, last);
  const uint32_t row_bytes = map.box[0] * uint32_t(map.element_bytes);
  std::vector<unsigned char> values(row_bytes);
  rows_of(map, copy.place, [&](uint64_t offset, uint64_t address) {
    std::fill(values.begin(), values.end(), 0);
    if (address != 0 && first < last) {
      std::memcpy(values.data() + first * map.element_bytes,
                  reinterpret_cast<const char*>(address) +
                      (copy.place[0] + first) * int64_t(map.element_bytes),
                  size_t((last - first) * map.element_bytes));
    }
    for (uint32_t c = 0; c < row_bytes; c += kChunk) {
      const uint32_t at = swizzled(copy.to + uint32_t(offset) + c, map.swizzle_bytes);
      memory.box_landed(shared_at(at), values.data() + c, kChunk, stamp);
    }
  });
  b.bytes -= int64_t(map.bytes());
  b.landed = true;
  end_phase(b);
}

bool encode_tensor_map(void* to, const void* base, int element_bytes, int rank,
                       const uint64_t* sizes, const uint64_t* stride_bytes, const uint32_t* box,
                       uint32_t swizzle_bytes) {
  BoxMap map = {};
  map.mark = BoxMap::kMark;
  map.rank = rank, map.element_bytes = element_bytes, map.swizzle_bytes = swizzle_bytes;
  map.base = reinterpret_cast<uint64_t>(base);
  // A device also accepts rows narrower than the swizzle, with gaps in shared memory.
  bool possible = reinterpret_cast<uintptr_t>(to) % 64 == 0 && map.base % kChunk == 0 &&
                  rank >= 3 && rank <= 5 && box[0] * uint32_t(element_bytes) == swizzle_bytes;
  for (int d = 0; d < rank; ++d) {
    possible &= sizes[d] >= 1 && sizes[d] <= uint64_t{1} << 32 && box[d] >= 1 && box[d] <= 256;
    map.sizes[d] = uint32_t(sizes[d]), map.box[d] = box[d];
    if (d == 0) continue;
    const uint64_t stride = stride_bytes[d - 1];
    possible &= stride % kChunk == 0 && stride < uint64_t{1} << 40;
    map.strides[d - 1] = stride;
  }
  if (possible) std::memcpy(to, &map, sizeof(map));
  return possible;
}

}  // namespace pmf::emulator
