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
