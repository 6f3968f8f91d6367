// What the emulator does for a kernel: the doors between csrc/cuda/common's stand-ins (compiled
// with the kernels, every access to memory watched) and the runtime (not watched).
//
// Operands travel in vector registers, never through memory: what a lane holds is no access.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pmf::emulator {

struct Index {
  unsigned x, y, z;
};

using Word4 = uint32_t __attribute__((vector_size(16)));
using Float4 = float __attribute__((vector_size(16)));

// ---- who am I: the same for the life of a thread, so that answers may be kept -------------------

__attribute__((const)) Index thread_index();
__attribute__((const)) Index block_index();
__attribute__((const)) Index block_size();
__attribute__((const)) Index grid_size();
__attribute__((const)) unsigned char* shared_memory();

// ---- together -----------------------------------------------------------------------------------

enum class Shuffle { exclusive_or, down, index };
enum class Element { bf16, f16, tf32 };

uint64_t shuffle(Shuffle how, uint64_t bits, int amount);
uint32_t ballot(bool value);
void sync_warp();
void sync_threads(int barrier, int threads);  // threads 0: the whole block
Word4 load_matrices(const void* row, int count, bool transposed);
Float4 multiply(Element element, Float4 c, Word4 a, uint64_t b);

// ---- memory -------------------------------------------------------------------------------------

void copy_async(void* to, const void* from, bool valid);
void commit_copies();
void wait_for_copies(int pending);
void check_aligned(const void* address, int bytes);
uint32_t atomic_load(const void* address);  // and the store that follows: nothing comes between
void atomic_store(void* address, uint32_t bits);

// ---- Hopper (runtime/hopper.h): shared memory by the addresses of its own space -----------------

// Where it begins there.
constexpr uint32_t kSharedWindow = 1024;

uint32_t shared_address(const void* generic);

void mbarrier_init(uint32_t barrier, uint32_t arrivals);
void mbarrier_init_fence();
void mbarrier_arrive(uint32_t barrier, uint32_t bytes);  // announces so many
void mbarrier_wait(uint32_t barrier, uint32_t parity);
void fence_proxy_async();
void copy_box(uint32_t to, const void* map, uint32_t barrier, Word4 place);

// One wgmma: n columns of sums; where A's descriptor is not used, A is in registers.
struct Product {
  Element element;
  int columns;
  bool in_registers, transposed, adds;
  uint64_t a, b;
};
// `sums` become what no kernel may use (see held_sum()) until it has waited; with `holds` the
// runtime knows where they are, and puts the results there.
void wgmma(const Product& product, float* sums, const uint32_t* a, bool holds);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
// What a register holds after a wait: the result, if it held a sum that has been waited for.
float waited_for(float x);
constexpr uint32_t kHeldSum = 0xffa00000u;  // a NaN; of its last 21 bits 14 say which, 7 where
inline bool held_sum(uint32_t bits) { return (bits & kHeldSum) == kHeldSum; }

bool elect_one();
void set_registers(int count, bool more);
void barrier_arrive(int barrier, int threads);

// A tensor map: sizes and a box of up to five dimensions, the first one contiguous. False, if no
// driver would encode it.
bool encode_tensor_map(void* map, const void* base, int element_bytes, int rank,
                       const uint64_t* sizes, const uint64_t* stride_bytes, const uint32_t* box,
                       uint32_t swizzle_bytes);

// ---- from the host ------------------------------------------------------------------------------

struct Launch {
  Index grid, block;
  int64_t shared_bytes, allowed_bytes;  // allowed: what launch() has asked the device for
  void (*thread)(const void* call);     // one thread of the kernel
  const void* call;                     // the kernel and its arguments
  size_t call_bytes;
  bool translated = false;  // from PTX: the kernel says itself where it is
};

// Runs a grid. Null, or what went wrong, valid until the next launch.
const char* run(const Launch& launch);

// Whether kernels are to be what a test has translated from PTX (runtime/translated.h), and their
// launch: `kernel` says which, and launch's thread and call are not used.
struct Parameter {
  const void* address;
  size_t bytes, alignment;
};
bool translating();
const char* run_translated(const void* kernel, Launch launch, const Parameter* parameters,
                           int count);
const char* last_problem();

// What a device has: an A100's shared memory, but few multiprocessors, so that small grids make
// several waves. A test may set other ones (tests/helpers/emulator.py).
struct Limits {
  int64_t shared_per_block = 163 * 1024;
  int64_t shared_per_processor = 164 * 1024;  // of all blocks on a multiprocessor
  int processors = 4;
};
const Limits& limits();
constexpr int64_t kMostShared = 227 * 1024;  // of one block, on any device

}  // namespace pmf::emulator
