// What the emulator does for a kernel: the interface between the stand-ins for csrc/cuda/common
// (compiled with the kernels, every memory access instrumented) and the runtime (not instrumented).
//
// Operands are passed in vector registers, not through memory, so a lane's values are no accesses.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pmf::emulator {

struct Index {
  unsigned x, y, z;
};

using Word4 = uint32_t __attribute__((vector_size(16)));
using Float4 = float __attribute__((vector_size(16)));

// ---- thread position: constant for the life of a thread, so results may be cached ---------------

__attribute__((const)) Index thread_index();
__attribute__((const)) Index block_index();
__attribute__((const)) Index block_size();
__attribute__((const)) Index grid_size();
__attribute__((const)) unsigned char* shared_memory();

// ---- warp and block collectives -----------------------------------------------------------------

enum class Shuffle { exclusive_or, index };
enum class Element { bf16, f16, tf32 };

uint64_t shuffle(Shuffle how, uint64_t bits, int amount);
uint32_t ballot(bool value);
void sync_warp();
void sync_threads(int barrier, int threads);  // threads 0: all of the block
Word4 load_matrices(const void* row, int count, bool transposed);
Float4 multiply(Element element, Float4 c, Word4 a, uint64_t b);

// ---- memory -------------------------------------------------------------------------------------

void copy_async(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int pending);
void check_aligned(const void* address, int bytes);

// ---- Hopper (runtime/hopper.h), with addresses in the shared state space ------------------------

// The first address in that space.
constexpr uint32_t kSharedWindow = 1024;

uint32_t shared_address(const void* generic);

void mbarrier_init(uint32_t barrier, uint32_t arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(uint32_t barrier, uint32_t bytes);  // also announces `bytes` of copies
// The same address in the shared memory of another block of the cluster.
uint32_t peer_address(uint32_t address, uint32_t block);
void cluster_arrive();
void cluster_wait();
void mbarrier_wait(uint32_t barrier, uint32_t parity);
void fence_proxy_async();
// To the blocks of the cluster whose bits are set in `blocks`; 0: to this one.
void copy_box(uint32_t to, const void* map, uint32_t barrier, Word4 place, uint32_t blocks);
void prefetch(uintptr_t address, uint32_t bytes);  // to the L2 cache

// One wgmma with n columns of sums; A is in registers, or described by `a`.
struct Product {
  Element element;
  int columns;
  bool in_registers, transposed, adds;
  uint64_t a, b;
};
// Until the product has been waited for, `sums` hold values that kernels must not use (see
// held_sum()). With `holds`, the runtime keeps their location and writes the results there.
void wgmma(const Product& product, float* sums, const uint32_t* a, bool holds);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
// A register's value after a wait: the result, if it held a sum that has been waited for.
float waited_for(float x);
constexpr uint32_t kHeldSum = 0xffa00000u;  // a NaN; low bits: chain (14), sum in it (7)
inline bool held_sum(uint32_t bits) { return (bits & kHeldSum) == kHeldSum; }

bool elect_one();
void set_registers(int count, bool more);

// Encodes a tensor map: sizes and a box of up to five dimensions, the first one contiguous. False
// if a driver would reject it.
bool encode_tensor_map(void* map, const void* base, int element_bytes, int rank,
                       const uint64_t* sizes, const uint64_t* stride_bytes, const uint32_t* box,
                       uint32_t swizzle_bytes);

// ---- called by the host -------------------------------------------------------------------------

struct Launch {
  Index grid, block;
  int64_t shared_bytes, allowed_bytes;  // allowed: the maximum that launch() has requested
  void (*thread)(const void* call);     // runs one thread of the kernel
  const void* call;                     // the kernel and its arguments
  size_t call_bytes;
  unsigned cluster = 1;     // adjacent blocks that form a cluster
  bool translated = false;  // from PTX: the kernel reports its own position
};

// Runs a grid. Returns null or an error message, valid until the next launch.
const char* run(const Launch& launch);

// Whether launches run what a test has translated from PTX (runtime/translated.h), and such a
// launch: `kernel` selects the translation; the launch's `thread` and `call` are not used.
struct Parameter {
  const void* address;
  size_t bytes, alignment;
};
bool translating();
const char* run_translated(const void* kernel, Launch launch, const Parameter* parameters,
                           int count);
const char* last_problem();

// Device limits: an A100's shared memory but few SMs, so that small grids take several waves. Tests
// can set others (tests/helpers/emulator.py).
struct Limits {
  int64_t shared_per_block = 163 * 1024;
  int64_t shared_per_processor = 164 * 1024;  // for all blocks on an SM
  int processors = 4;
  bool hopper = false;  // sm_90: has the instructions of cuda/common/hopper.cuh
};
const Limits& limits();
constexpr int64_t kMostShared = 227 * 1024;  // maximum per block on any device
constexpr unsigned kMostCluster = 2;         // blocks of a cluster

}  // namespace pmf::emulator
