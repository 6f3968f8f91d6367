// What Hopper adds: mbarriers, copies of boxes, wgmma, a register file that warps share out.
//
// Copies land at random times, one by one; products compute when they are waited for, from what is
// in shared memory then. In between, whoever touches their operands or sums is found out: memory
// remembers what is being copied and read (memory.h), sums are NaNs of their own (held_sum()), and
// arrays of registers are watched.
#pragma once

#include <cstdint>
#include <cstdio>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "machine.h"
#include "memory.h"

namespace pmf::emulator {

// The bytes of a CUtensorMap, as this emulator encodes them.
struct BoxMap {
  static constexpr uint32_t kMark = 0x70616d21;
  uint32_t mark;
  int32_t rank, element_bytes;
  uint32_t swizzle_bytes;
  uint64_t base;
  uint64_t strides[4];  // of the second dimension and on
  uint32_t sizes[5], box[5];

  uint64_t bytes() const {
    uint64_t n = uint64_t(element_bytes);
    for (int d = 0; d < rank; ++d) n *= box[d];
    return n;
  }
};
static_assert(sizeof(BoxMap) <= 128);

class Hopper {
 public:
  void begin_cluster(int threads_of_block, int warps);
  uint32_t last_clock() const;

  // ---- scheduling
  bool waits(Warp& w);  // for registers
  int under_way() const { return int(copies_.size()); }
  void land_one();
  std::string left_over() const;  // of a block that has ended; empty: nothing
  std::string describe(uint32_t barrier) const;
  int free_registers(const Warp& w) const { return free_registers_[w.rank]; }

  // ---- mbarriers and copies, by one lane
  void init(uint32_t barrier, uint32_t arrivals);
  void init_fence();
  void arrive(uint32_t barrier, uint32_t bytes);
  void wait(uint32_t barrier, uint32_t parity);
  bool over(uint32_t barrier, uint32_t parity);
  void copy(uint32_t to, const BoxMap& map, uint32_t barrier, const int32_t* place);

  // ---- by a warp
  void fence() { products_[machine.warp->number].fenced = true; }
  void multiply(const Product& product, bool holds);
  void commit();
  void wait(int pending);
  float waited_for(float x);
  void set_registers(int count, bool more);
  // An access of a thread to its own stack.
  void check_registers(const Lane& lane, uintptr_t at, size_t bytes, bool write) const;

 private:
  struct Barrier {
    int number = 0, initialiser = 0;
    bool visible = false;  // to copies
    bool landed = false;   // what nobody has waited for yet
    uint32_t arrivals = 0, missing = 0;
    int64_t bytes = 0;  // announced and not come
    uint32_t phase = 0;
    Knowledge now, before;  // of those who have arrived: in this phase, until the last one
  };
  struct BoxCopy {
    BoxMap map;
    int32_t place[5];
    uint32_t to, barrier;
  };
  // Registers of the sums, and all products that have been added to them since they were written.
  struct Chain {
    int columns, under_way;
    std::vector<float> sums;  // [32][columns / 2]
  };
  struct Pending {
    Product product;
    int chain, group;
    uint32_t a[kLanes][4];
  };
  struct Products {
    bool fenced = false;
    int group = 0, first_chain = 0;
    std::deque<Chain> chains;  // the newest ones, from first_chain on
    std::deque<Pending> pending;
    size_t issued = 0;
  };

  Barrier& at(uint32_t barrier);
  void end_phase(Barrier& b);
  void came(Barrier& b, uint64_t bytes);
  Chain& chain(Products& p, int number) { return p.chains[number - p.first_chain]; }
  int chain_of(Products& p, const Product& product);
  void compute(const Pending& op, Chain& sums);
  // Calls piece(byte address, first row, chunk) for each 16 bytes of a factor.
  template <class Piece>
  void pieces(uint64_t descriptor, bool transposed, int first, int rows, const char* name,
              Piece piece);

  std::map<uint32_t, Barrier> barriers_;
  std::vector<BoxCopy> copies_;
  Products products_[kMaxWarps];
  int next_chain_ = 0;                          // of the next block
  std::vector<Product> issued_[kMaxWarps / 4];  // by a warpgroup's warps, all the same
  int registers_[kMaxWarps] = {}, free_registers_[kMostCluster] = {}, warps_ = 0;
};

extern Hopper hopper;

constexpr int kGroup = 4;   // warps of a warpgroup
constexpr int kChunk = 16;  // bytes, which descriptors and swizzles count in

inline std::string hex(uint32_t x) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%x", x);
  return text;
}

// Addresses in the cluster's shared memory have a block's rank plus one in these bits; without it,
// they are the running block's.
constexpr int kRankAt = 24;
inline uint32_t of_block(uint32_t address, int rank) {
  return (address & ((1u << kRankAt) - 1)) | uint32_t(rank + 1) << kRankAt;
}
inline int rank_of(uint32_t address) {
  const int rank = int(address >> kRankAt) - 1;
  return rank < 0 ? machine.warp->rank : rank;
}
inline uint32_t in_cluster(uint32_t address) { return of_block(address, rank_of(address)); }

// The byte from the beginning of its block's shared memory, for messages.
inline uint32_t offset_of(uint32_t address) {
  return (address & ((1u << kRankAt) - 1)) - kSharedWindow;
}
inline unsigned char* shared_at(uint32_t address) {
  return memory.shared(rank_of(address)) + int32_t(offset_of(address));
}

// Bits 4 to 6 of an address, exclusive-or the row in a repeat of eight.
inline uint32_t swizzled(uint32_t address, uint32_t bytes) {
  return address ^ ((address >> 7 & (bytes / 16 - 1)) << 4);
}

}  // namespace pmf::emulator
