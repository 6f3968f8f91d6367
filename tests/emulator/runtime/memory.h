// Shadow memory: what is known of every byte that a kernel may touch, and the check of each access.
//
// Shared memory and the tensors that a kernel writes keep, for each two bytes, who wrote and who
// read them last; a stamp is a thread and its warp's clock (machine.h). Two accesses to the same
// place, one of them a write, must be ordered by a barrier; blocks of one launch are ordered by
// nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "machine.h"

namespace pmf::emulator {

constexpr int kThreadBits = 12, kGranule = 2;
constexpr uint32_t kThreadMask = (1u << kThreadBits) - 1;
// The clock of a copy under way: later than everything.
constexpr uint32_t kUnderWay = (1u << (32 - kThreadBits)) - 1;

enum class Access { read, write };

// A piece of global memory: a tensor's storage.
class Region {
 public:
  Region(uintptr_t begin, size_t bytes);

  uintptr_t begin() const { return begin_; }
  uintptr_t end() const { return begin_ + bytes_; }

  // Elements [address, address + bytes) belong to a tensor.
  void allow(uintptr_t address, size_t bytes, bool writable, bool initialised);

  void check(uintptr_t address, size_t bytes, Access access, bool ordered = true);

 private:
  enum : uint8_t { kReadable = 1, kWritable = 2, kInitialised = 4 };

  // Who touched two bytes last: block << 32 | clock << 10 | thread.
  struct Trace {
    uint64_t writer, reader, other_reader;  // the second: of another block than the first
  };

  void check_order(uintptr_t address, size_t bytes, Access access);

  uintptr_t begin_;
  size_t bytes_;
  // Zeros that cost nothing until they are touched: a tensor may be far larger than what is used of
  // it.
  std::unique_ptr<uint8_t[], void (*)(void*)> flags_;  // a byte each
  std::unique_ptr<Trace[], void (*)(void*)> traces_{nullptr, nullptr};
};

class Memory {
 public:
  Memory();

  // ---- tensors, from the host
  void forget();  // all tensors: between two calls of ops
  Region& region(uintptr_t begin, size_t bytes);
  Region* find(uintptr_t address);

  // ---- the machine
  void begin_launch();
  uint32_t begin_block(uint32_t clock, int64_t shared_bytes, int warps);  // the block's first clock
  unsigned char* shared() const { return shared_; }

  // ---- accesses of the running thread
  void access(const void* address, size_t bytes, Access access);
  // By the whole warp at once: not even the same thread's own earlier write is seen without a
  // barrier.
  void access_by_warp(const void* address, size_t bytes);
  void atomic(const void* address, size_t bytes);  // races with no other atomic operation
  void copy_issued(void* to);
  void copy_landed(void* to);
  // Of a block that has ended.
  void copy_dropped(void* to, size_t bytes = 16);

  // ---- by the asynchronous proxy (hopper.h)
  void box_issued(unsigned char* to, size_t bytes);
  // By the copies of an mbarrier's phase, whose thread and clock this stamp has.
  void box_landed(unsigned char* to, const unsigned char* values, size_t bytes, uint32_t stamp);
  // A product of the running warp reads from here on, until it is waited for.
  void product_begins(const unsigned char* from, size_t bytes);
  void product_ends(const unsigned char* from, size_t bytes);

 private:
  bool is_shared(uintptr_t address) const { return address - shared_begin_ < kSharedSpace; }
  void shared_access(uintptr_t address, size_t bytes, Access access, bool by_warp);
  void shared_read(size_t first, size_t last, bool by_warp);
  void shared_write(size_t first, size_t last);

  // Room on both sides, so that an address just outside is told from a wild one.
  static constexpr size_t kSharedSpace = 512 * 1024, kSharedStart = 128 * 1024;

  unsigned char* shared_;
  uintptr_t shared_begin_;  // of the space
  int64_t shared_bytes_ = 0;
  int warps_ = 0;
  uint32_t first_clock_ = 1;
  std::vector<uint32_t> writer_;    // of each granule: clock << kThreadBits | thread
  std::vector<uint32_t> reader_;    // of each granule and warp: clock << kLaneBits | lane
  std::vector<uint32_t> fence_;     // the writer's fence.proxy.async that shows it to products
  std::vector<uint16_t> products_;  // that read each granule now
  bool has_products_ = false;

  std::vector<std::unique_ptr<Region>> regions_;  // by address, apart from each other
  Region* last_ = nullptr;
};

// Ends the launch unless the address is a multiple of `bytes`; `what` needs it.
void check_alignment(const void* address, size_t bytes, const char* what);

extern Memory memory;
extern uint64_t block_serial, launch_serial;  // of blocks; the first of this launch

}  // namespace pmf::emulator
