#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "hopper.h"

namespace pmf::emulator {

Memory memory;
uint64_t block_serial = 0, launch_serial = 1;

namespace {

constexpr int kLaneBits = 6;
constexpr uint32_t kLaneMask = (1u << kLaneBits) - 1, kSeveralLanes = kLanes;
constexpr int kPoison = 0xff;  // a NaN in every floating-point type
constexpr size_t kCopyBytes = 16;
constexpr size_t kGranules = kMostCluster * kMostShared / kGranule;

std::string bytes_of(const char* what, size_t bytes, Access access) {
  return std::to_string(bytes) + " bytes of " + what +
         (access == Access::read ? " are read" : " are written");
}

uint32_t stamp() { return machine.warp->clock << kThreadBits | uint32_t(machine.lane->number); }

std::string by(uint32_t stamp) {
  const uint32_t thread = stamp & kThreadMask;
  return thread < kMaxThreads ? "thread " + std::to_string(thread) : "a box copy";
}

std::string copy_of(uint32_t writer) {
  return " an asynchronous copy to it by " + by(writer) + " has not been waited for";
}

// Whether a stamp's action precedes what this lane, or with by_warp its whole warp, does now.
bool knows(uint32_t stamp, bool by_warp) {
  return machine.warp->knows((stamp & kThreadMask) / kLanes, stamp >> kThreadBits,
                             by_warp ? nullptr : machine.lane);
}

[[noreturn]] void shared_problem(size_t granule, const std::string& what) {
  machine.fail("shared memory at " + std::to_string(granule * kGranule) + " is " + what);
}

}  // namespace

void check_alignment(const void* address, size_t bytes, const char* what) {
  const auto rest = reinterpret_cast<uintptr_t>(address) % bytes;
  if (rest != 0) {
    machine.fail(std::string(what) + " needs an address that is a multiple of " +
                 std::to_string(bytes) + ", got one " + std::to_string(rest) + " bytes past it");
  }
}

Memory::Memory() : writer_(kGranules, 0), fence_(kGranules, 0), products_(kGranules, 0) {
  void* space = mmap(nullptr, kSharedSpace, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) throw std::runtime_error("emulator: cannot reserve shared memory");
  shared_begin_ = reinterpret_cast<uintptr_t>(space);
  shared_ = static_cast<unsigned char*>(space) + kSharedStart;
}

// ---- the machine --------------------------------------------------------------------------------

void Memory::begin_launch() {
  launch_serial = block_serial + 1;
  last_ = nullptr;
}

uint32_t Memory::begin_cluster(uint32_t clock, int64_t shared_bytes, unsigned blocks, int warps) {
  constexpr int64_t kApart = 1024;  // tiles in shared memory are aligned to this
  block_serial += 1;
  shared_bytes_ = shared_bytes;
  stride_ = (shared_bytes + kApart - 1) / kApart * kApart;
  const int64_t all_bytes = (blocks - 1) * stride_ + shared_bytes;
  // Stamps of earlier blocks are older than this block's first clock and need no clearing, unless
  // the clock may overflow or the readers' layout changes with the number of warps.
  const size_t readers = (all_bytes + kGranule - 1) / kGranule * warps;
  if (clock > kUnderWay / 2 || warps != warps_ || readers > reader_.size()) {
    warps_ = warps;
    std::fill(writer_.begin(), writer_.end(), 0);
    reader_.assign(std::max(readers, reader_.size()), 0);
    clock = 1;
  }
  first_clock_ = clock;
  if (has_products_) std::fill(products_.begin(), products_.end(), 0);
  has_products_ = false;
  std::memset(shared_, kPoison, all_bytes);
  return clock;
}

void Memory::access(const void* address, size_t bytes, Access access) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const Lane& lane = *machine.lane;
  if (at - reinterpret_cast<uintptr_t>(lane.lowest) < Stacks::kStackBytes) {  // its own stack
    if (!lane.held.empty()) hopper.check_registers(lane, at, bytes, access == Access::write);
    return;
  }
  if (is_shared(at)) return shared_access(at, bytes, access, false, machine.warp->rank);
  if (at - reinterpret_cast<uintptr_t>(machine.launch.call) < machine.launch.call_bytes) {
    if (access == Access::write) machine.fail("a kernel parameter is written");
    return;
  }
  Region* region = last_ != nullptr && at >= last_->begin() && at < last_->end() ? last_ : find(at);
  if (region == nullptr) {
    machine.fail(bytes_of("memory that belongs to no tensor of this call", bytes, access));
  }
  last_ = region;
  region->check(at, bytes, access);
}

void Memory::access_by_warp(const void* address, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (!is_shared(at)) machine.fail("ldmatrix reads shared memory only");
  shared_access(at, bytes, Access::read, true, machine.warp->rank);
}

// ---- shared memory ------------------------------------------------------------------------------

void Memory::shared_access(uintptr_t address, size_t bytes, Access access, bool by_warp, int rank) {
  const auto offset = static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(shared(rank)));
  if (offset < 0 || offset + static_cast<int64_t>(bytes) > shared_bytes_) {
    machine.fail(bytes_of("shared memory", bytes, access) + " at " + std::to_string(offset) +
                 ", but the launch requested " + std::to_string(shared_bytes_) + " bytes");
  }
  const int64_t from = offset + rank * stride_;
  const size_t first = from / kGranule, last = (from + bytes - 1) / kGranule;
  access == Access::read ? shared_read(first, last, by_warp) : shared_write(first, last);
}

void Memory::shared_read(size_t first, size_t last, bool by_warp) {
  const Warp& warp = *machine.warp;
  const uint32_t own = stamp(), lane = uint32_t(machine.lane->number) % kLanes;
  const uint32_t now = warp.clock << kLaneBits;
  const uint32_t mine = now | (by_warp ? kSeveralLanes : lane);
  for (size_t g = first; g <= last; ++g) {
    const uint32_t writer = writer_[g], clock = writer >> kThreadBits;
    if (writer != own || by_warp) {
      const bool same = (writer & kThreadMask) == (own & kThreadMask) && !by_warp;
      if (clock < first_clock_) shared_problem(g, "read but was never written");
      if (clock == kUnderWay) shared_problem(g, "read while" + copy_of(writer));
      if (!same && !knows(writer, by_warp)) {
        shared_problem(g, "read after " + by(writer) + " wrote it, with no barrier between");
      }
    }
    uint32_t& reader = reader_[g * warps_ + warp.number];
    reader = (reader & ~kLaneMask) == now && reader != mine ? now | kSeveralLanes : mine;
  }
}

void Memory::shared_write(size_t first, size_t last) {
  const Warp& warp = *machine.warp;
  const uint32_t own = stamp(), lane = uint32_t(machine.lane->number) % kLanes;
  for (size_t g = first; g <= last; ++g) {
    const uint32_t writer = writer_[g], clock = writer >> kThreadBits;
    if (writer != own && clock >= first_clock_) {
      const bool same = (writer & kThreadMask) == (own & kThreadMask);
      if (clock == kUnderWay) shared_problem(g, "written while" + copy_of(writer));
      if (!same && !knows(writer, false)) {
        shared_problem(g, "written after " + by(writer) + " wrote it, with no barrier between");
      }
    }
    const uint32_t* readers = &reader_[g * warps_];
    for (int v = 0; v < warps_; ++v) {
      const bool own_lane = v == warp.number && (readers[v] & kLaneMask) == lane;
      if (!own_lane && !warp.knows(v, readers[v] >> kLaneBits, machine.lane)) {
        shared_problem(
            g, "written after warp " + std::to_string(v) + " read it, with no barrier between");
      }
    }
    if (products_[g] != 0) shared_problem(g, "written while a product reads it");
    writer_[g] = own;
    fence_[g] = machine.lane->proxy_fences + 1;
  }
}

void Memory::copy_issued(void* to) {
  if (!is_shared(reinterpret_cast<uintptr_t>(to)))
    machine.fail("cp.async writes shared memory only");
  access(to, kCopyBytes, Access::write);
  const size_t first = (static_cast<unsigned char*>(to) - shared_) / kGranule;
  for (size_t g = first; g < first + kCopyBytes / kGranule; ++g)
    writer_[g] |= kUnderWay << kThreadBits;
  std::memset(to, kPoison, kCopyBytes);
}

void Memory::copy_landed(void* to) {
  const size_t first = (static_cast<unsigned char*>(to) - shared_) / kGranule;
  std::fill_n(&writer_[first], kCopyBytes / kGranule, stamp());
}

void Memory::copy_dropped(void* to, size_t bytes) {
  const size_t first = (static_cast<unsigned char*>(to) - shared_) / kGranule;
  std::fill_n(&writer_[first], bytes / kGranule, 0);
}

// ---- the asynchronous proxy ---------------------------------------------------------------------

void Memory::box_issued(unsigned char* to, size_t bytes, int rank) {
  shared_access(reinterpret_cast<uintptr_t>(to), bytes, Access::write, false, rank);
  const size_t first = (to - shared_) / kGranule;
  for (size_t g = first; g < first + bytes / kGranule; ++g) {
    writer_[g] |= kUnderWay << kThreadBits;
    fence_[g] = 0;
  }
  std::memset(to, kPoison, bytes);
}

void Memory::box_landed(unsigned char* to, const unsigned char* values, size_t bytes,
                        uint32_t stamp) {
  std::memcpy(to, values, bytes);
  std::fill_n(&writer_[(to - shared_) / kGranule], bytes / kGranule, stamp);
}

void Memory::product_begins(const unsigned char* from, size_t bytes) {
  shared_access(reinterpret_cast<uintptr_t>(from), bytes, Access::read, true, machine.warp->rank);
  has_products_ = true;
  const size_t first = (from - shared_) / kGranule;
  for (size_t g = first; g < first + bytes / kGranule; ++g) {
    const uint32_t thread = writer_[g] & kThreadMask;
    if (fence_[g] != 0 && thread < kMaxThreads &&
        machine.warp_number(int(thread) / kLanes).lanes[thread % kLanes].proxy_fences < fence_[g]) {
      shared_problem(g, "read by a product after " + by(thread) +
                            " wrote it, with no fence.proxy.async between");
    }
    products_[g] += 1;
  }
}

void Memory::product_ends(const unsigned char* from, size_t bytes) {
  const size_t first = (from - shared_) / kGranule;
  const Warp& warp = *machine.warp;
  for (size_t g = first; g < first + bytes / kGranule; ++g) {
    products_[g] -= 1;
    reader_[g * warps_ + warp.number] = warp.clock << kLaneBits | kSeveralLanes;
  }
}

void Memory::prefetch(uintptr_t address, size_t bytes) {
  constexpr size_t kPiece = 16;
  check_alignment(reinterpret_cast<const void*>(address), kPiece, "a prefetch");
  if (bytes == 0 || bytes % kPiece != 0) {
    machine.fail("a prefetch of " + std::to_string(bytes) +
                 " bytes, which are no whole pieces of " + std::to_string(kPiece));
  }
  for (uintptr_t piece = address; piece < address + bytes; piece += kPiece) {
    if (find(piece) == nullptr && find(piece + kPiece - 1) == nullptr) {
      machine.fail("memory that belongs to no tensor of this call is prefetched");
    }
  }
  machine.prefetched += int64_t(bytes);
}

// ---- global memory ------------------------------------------------------------------------------

void Memory::forget() {
  regions_.clear();
  last_ = nullptr;
}

Region* Memory::find(uintptr_t address) {
  auto after = std::upper_bound(
      regions_.begin(), regions_.end(), address,
      [](uintptr_t a, const std::unique_ptr<Region>& r) { return a < r->begin(); });
  if (after == regions_.begin()) return nullptr;
  Region* region = std::prev(after)->get();
  return address < region->end() ? region : nullptr;
}

Region& Memory::region(uintptr_t begin, size_t bytes) {
  Region* found = find(begin);
  if (found != nullptr && found->begin() == begin && found->end() == begin + bytes) return *found;
  // Storages do not overlap: an overlapping one is older; its memory was freed and reused.
  const auto overlaps = [&](const std::unique_ptr<Region>& r) {
    return r->begin() < begin + bytes && begin < r->end();
  };
  regions_.erase(std::remove_if(regions_.begin(), regions_.end(), overlaps), regions_.end());
  last_ = nullptr;
  auto place = std::upper_bound(
      regions_.begin(), regions_.end(), begin,
      [](uintptr_t a, const std::unique_ptr<Region>& r) { return a < r->begin(); });
  return **regions_.insert(place, std::make_unique<Region>(begin, bytes));
}

Region::Region(uintptr_t begin, size_t bytes)
    : begin_(begin),
      bytes_(bytes),
      flags_(static_cast<uint8_t*>(std::calloc(bytes + 1, 1)), &std::free) {
  if (!flags_) throw std::runtime_error("emulator: out of memory for a tensor's state");
}

void Region::allow(uintptr_t address, size_t bytes, bool writable, bool initialised) {
  uint8_t* flags = &flags_[address - begin_];
  const uint8_t more =
      kReadable | (writable ? kWritable : 0) | (initialised ? uint8_t{kInitialised} : 0);
  if (!initialised) {
    for (size_t i = 0; i < bytes; ++i) {
      if ((flags[i] & kInitialised) == 0) *reinterpret_cast<uint8_t*>(address + i) = kPoison;
    }
  }
  for (size_t i = 0; i < bytes; ++i) flags[i] |= more;
  if (writable && !traces_) {
    void* traces = std::calloc(bytes_ / kGranule + 2, sizeof(Trace));
    if (traces == nullptr)
      throw std::runtime_error("emulator: out of memory for a tensor's access records");
    traces_ = {static_cast<Trace*>(traces), &std::free};
  }
}

void Region::check(uintptr_t address, size_t bytes, Access access) {
  if (address + bytes > end()) {
    machine.fail(bytes_of("memory beyond a tensor's end", bytes, access));
  }
  uint8_t* flags = &flags_[address - begin_];
  uint8_t all = 0xff;
  for (size_t i = 0; i < bytes; ++i) all &= flags[i];
  if (access == Access::read) {
    if ((all & kReadable) == 0)
      machine.fail(bytes_of("memory outside a tensor's elements", bytes, access));
    if ((all & kInitialised) == 0)
      machine.fail(bytes_of("uninitialised global memory", bytes, access));
  } else {
    if ((all & kWritable) == 0) {
      machine.fail(
          bytes_of((all & kReadable) != 0 ? "an input" : "memory outside a tensor's elements",
                   bytes, access));
    }
    for (size_t i = 0; i < bytes; ++i) flags[i] |= kInitialised;
  }
  if (traces_) check_order(address, bytes, access);
}

void Region::check_order(uintptr_t address, size_t bytes, Access access) {
  const uint64_t own = block_serial << 32 | stamp();
  // Whether the access recorded in `trace` precedes the current one.
  const auto ordered = [&](uint64_t trace) {
    if (trace >> 32 < launch_serial) return true;
    if (trace >> 32 != block_serial) return false;
    const auto stamp = static_cast<uint32_t>(trace);
    return int(stamp & kThreadMask) == machine.lane->number || knows(stamp, false);
  };
  const auto check_ordered = [&](uint64_t trace, const char* did) {
    if (ordered(trace)) return;
    const bool other = trace >> 32 != block_serial;
    machine.fail(std::string("global memory is ") + (access == Access::read ? "read" : "written") +
                 " after " + (other ? "another block" : by(uint32_t(trace))) + " " + did + " it, " +
                 (other ? "and nothing orders the blocks of a launch" : "with no barrier between"));
  };
  const size_t first = (address - begin_) / kGranule,
               last = (address + bytes - 1 - begin_) / kGranule;
  for (size_t g = first; g <= last; ++g) {
    Trace& trace = traces_[g];
    check_ordered(trace.writer, "wrote");
    if (access == Access::read) {
      if (trace.reader >> 32 != block_serial) trace.other_reader = trace.reader;
      trace.reader = own;
    } else {
      check_ordered(trace.reader, "read");
      check_ordered(trace.other_reader, "read");
      trace.writer = own;
    }
  }
}

}  // namespace pmf::emulator
