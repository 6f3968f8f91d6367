// Shadow memory: the state of every byte that a kernel may access, and checks of each access.
//
// For every two bytes of shared memory and of tensors written by a kernel, the last writer and
// readers are recorded; a stamp is a thread and its warp's clock (machine.h). Two accesses to the
// same place, at least one a write, must be ordered by a barrier; nothing orders the blocks of a
// launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "machine.h"

namespace pmf::emulator {

constexpr int kThreadBits = 12, kGranule = 2;
constexpr uint32_t kThreadMask = (1u << kThreadBits) - 1;
// The clock of a pending copy, later than any other.
constexpr uint32_t kUnderWay = (1u << (32 - kThreadBits)) - 1;

enum class Access { read, write };

// A region of global memory: a tensor's storage.
class Region {
 public:
  Region(uintptr_t begin, size_t bytes);

  uintptr_t begin() const { return begin_; }
  uintptr_t end() const { return begin_ + bytes_; }

  // Declares that bytes [address, address + bytes) belong to a tensor.
  void allow(uintptr_t address, size_t bytes, bool writable, bool initialised);

  void check(uintptr_t address, size_t bytes, Access access);

 private:
  enum : uint8_t { kReadable = 1, kWritable = 2, kInitialised = 4 };

  // The last accesses to two bytes: block << 32 | clock << kThreadBits | thread.
  struct Trace {
    uint64_t writer, reader, other_reader;  // other_reader: of another block than reader
  };

  void check_order(uintptr_t address, size_t bytes, Access access);

  uintptr_t begin_;
  size_t bytes_;
  // Zero pages that take no memory until touched: a tensor may be far larger than the part that is
  // used.
  std::unique_ptr<uint8_t[], void (*)(void*)> flags_;  // one per byte
  std::unique_ptr<Trace[], void (*)(void*)> traces_{nullptr, nullptr};
};

class Memory {
 public:
  Memory();

  // ---- tensors, from the host
  void forget();  // all tensors, between calls of ops
  Region& region(uintptr_t begin, size_t bytes);
  Region* find(uintptr_t address);

  // ---- the machine
  void begin_launch();
  // Returns its first clock.
  uint32_t begin_cluster(uint32_t clock, int64_t shared_bytes, unsigned blocks, int warps);
  unsigned char* shared(int rank) const { return shared_ + rank * stride_; }
  unsigned char* shared() const { return shared(machine.warp->rank); }  // of the running block

  // ---- accesses of the running thread
  void access(const void* address, size_t bytes, Access access);
  // An access by the whole warp at once: a barrier must separate it even from the same thread's own
  // earlier write.
  void access_by_warp(const void* address, size_t bytes);
  void copy_issued(void* to);
  void copy_landed(void* to);
  // For a block that has ended.
  void copy_dropped(void* to, size_t bytes = 16);

  // ---- accesses by the asynchronous proxy (hopper.h)
  void box_issued(unsigned char* to, size_t bytes, int rank);
  // `stamp` has the thread and clock of the copies in an mbarrier's phase.
  void box_landed(unsigned char* to, const unsigned char* values, size_t bytes, uint32_t stamp);
  // A product of the running warp reads from now until it has been waited for.
  void product_begins(const unsigned char* from, size_t bytes);
  void product_ends(const unsigned char* from, size_t bytes);

  // To the L2 cache: 16-byte pieces, each with a part of a tensor.
  void prefetch(uintptr_t address, size_t bytes);

 private:
  bool is_shared(uintptr_t address) const { return address - shared_begin_ < kSharedSpace; }
  void shared_access(uintptr_t address, size_t bytes, Access access, bool by_warp, int rank);
  void shared_read(size_t first, size_t last, bool by_warp);
  void shared_write(size_t first, size_t last);

  // Space on both sides, to tell addresses just out of bounds from wild ones.
  static constexpr size_t kSharedStart = 128 * 1024;
  static constexpr size_t kSharedSpace = 2 * kSharedStart + kMostCluster * kMostShared;

  unsigned char* shared_;
  uintptr_t shared_begin_;                 // start of that space
  int64_t shared_bytes_ = 0, stride_ = 0;  // of a block, from one block of a cluster to the next
  int warps_ = 0;
  uint32_t first_clock_ = 1;
  std::vector<uint32_t> writer_;    // per granule: clock << kThreadBits | thread
  std::vector<uint32_t> reader_;    // per granule and warp: clock << kLaneBits | lane
  std::vector<uint32_t> fence_;     // fence.proxy.async that makes the write visible to products
  std::vector<uint16_t> products_;  // number of products reading each granule
  bool has_products_ = false;

  std::vector<std::unique_ptr<Region>> regions_;  // by address, without overlaps
  Region* last_ = nullptr;
};

// Ends the launch unless the address is a multiple of `bytes`, as `what` requires.
void check_alignment(const void* address, size_t bytes, const char* what);

extern Memory memory;
extern uint64_t block_serial, launch_serial;  // blocks so far; the launch's first

}  // namespace pmf::emulator
