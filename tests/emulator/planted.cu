// Tiny kernels with one bug each, and their correct twins, which the emulator must tell apart.
#include <iterator>

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/shared.cuh"
#include "cuda/common/vector.cuh"

namespace pmf::planted {
namespace {

using namespace pmf::cuda;

constexpr int kThreads = 128, kBlocks = 3;
constexpr int64_t kSharedBytes = kThreads * 32;

struct Buffers {
  const float* input;  // [kBlocks * kThreads * 4]
  float* output;       // the same
};

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline int first() { return static_cast<int>(blockIdx.x) * kThreads; }
__device__ inline float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared()); }

// A value passes from one warp to another through shared memory.
template <bool kBug>
__global__ void missing_barrier(Buffers p) {
  float* const s = shared_floats();
  s[thread()] = p.input[first() + thread()];
  if constexpr (!kBug) __syncthreads();
  p.output[first() + thread()] = s[kThreads - 1 - thread()];
}

// The buffer is filled again while another warp may still read it.
template <bool kBug>
__global__ void missing_second_barrier(Buffers p) {
  float* const s = shared_floats();
  float sum = 0.0f;
  for (int i = 0; i < 3; ++i) {
    s[thread()] = p.input[first() + thread()] + i;
    __syncthreads();
    sum += s[kThreads - 1 - thread()];
    if constexpr (!kBug) __syncthreads();
  }
  p.output[first() + thread()] = sum;
}

// Lanes of one warp pass values through shared memory.
template <bool kBug>
__global__ void missing_warp_barrier(Buffers p) {
  float* const s = shared_floats();
  s[thread()] = p.input[first() + thread()];
  if constexpr (kBug) {
    shuffle_xor(1.0f, 1);  // brings the lanes together, but orders no memory
  } else {
    __syncwarp();
  }
  p.output[first() + thread()] = s[thread() ^ 1];
}

// ldmatrix reads rows that other warps have written.
template <bool kBug>
__global__ void ldmatrix_before_barrier(Buffers p) {
  float* const s = shared_floats();
  for (int k = 0; k < 4; ++k) s[4 * thread() + k] = p.input[first() + thread()];
  if constexpr (!kBug) __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, s + 4 * (thread() ^ 32));
  p.output[first() + thread()] = __uint_as_float(r[0]);
}

template <bool kBug>
__global__ void copy_not_waited_for(Buffers p) {
  float* const s = shared_floats();
  for (int half = 0; half < 2; ++half) {
    cp_async_16(s + 4 * (thread() + half * kThreads), p.input + 4 * first(), thread() % 2 == 0);
    cp_async_commit();
  }
  cp_async_wait<kBug ? 2 : 1>();
  p.output[first() + thread()] = s[4 * thread()];
}

// Waiting makes a thread's own copies visible to itself alone.
template <bool kBug>
__global__ void copy_without_barrier(Buffers p) {
  float* const s = shared_floats();
  cp_async_16(s + 4 * thread(), p.input + 4 * (first() + thread()), thread() % 2 == 0);
  cp_async_commit();
  cp_async_wait<0>();
  if constexpr (!kBug) __syncthreads();
  p.output[first() + thread()] = s[4 * (kThreads - 1 - thread())];
}

// A copy is issued into a tile that another warp still reads.
template <bool kBug>
__global__ void copy_over_readers(Buffers p) {
  float* const s = shared_floats();
  cp_async_16(s + 4 * thread(), p.input + 4 * (first() + thread()));
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const float other = s[4 * (kThreads - 1 - thread())];
  if constexpr (!kBug) __syncthreads();
  cp_async_16(s + 4 * thread(), p.input + 4 * (first() + thread()));
  cp_async_commit();
  cp_async_wait<0>();
  p.output[first() + thread()] = other + s[4 * thread()];
}

template <bool kBug>
__global__ void read_past_the_end(Buffers p) {
  const int i = first() + thread();
  const int last = 4 * kBlocks * kThreads - (kBug ? 0 : 1);
  p.output[i] = p.input[i] + p.input[last - i];
}

template <bool kBug>
__global__ void write_past_the_end(Buffers p) {
  const int rows = 4 * kBlocks * kThreads;
  for (int i = first() + thread(); i < rows + kBug; i += kBlocks * kThreads) p.output[i] = 1.0f;
}

template <bool kBug>
__global__ void write_to_an_input(Buffers p) {
  const int i = first() + thread();
  float* const to = kBug ? const_cast<float*>(p.input) : p.output;
  to[i] = p.input[i] + 1.0f;
}

template <bool kBug>
__global__ void shared_never_written(Buffers p) {
  float* const s = shared_floats();
  if (thread() < kThreads - kBug) s[thread()] = p.input[first() + thread()];
  __syncthreads();
  p.output[first() + thread()] = s[thread() ^ 5];
}

template <bool kBug>
__global__ void global_never_written(Buffers p) {
  const int i = first() + thread();
  if constexpr (!kBug) p.output[i] = 1.0f;
  p.output[i] += p.input[i];
}

// The launch requests kSharedBytes.
template <bool kBug>
__global__ void more_shared_than_asked_for(Buffers p) {
  float* const s = shared_floats();
  const int place = kBug && thread() == 77 ? kSharedBytes / 4 : thread();
  s[place] = p.input[first() + thread()];
  p.output[first() + thread()] = s[place];
}

// Half of the threads skip the barrier.
template <bool kBug>
__global__ void divergent_barrier(Buffers p) {
  if (!kBug || thread() < 64) __syncthreads();
  p.output[first() + thread()] = p.input[first() + thread()];
}

// Lanes of one warp diverge at a barrier.
template <bool kBug>
__global__ void early_return(Buffers p) {
  const int i = first() + thread();
  if (kBug && thread() == 100) return;
  __syncthreads();
  p.output[i] = p.input[i];
}

template <bool kBug>
__global__ void shuffle_without_all_lanes(Buffers p) {
  const int i = first() + thread();
  float x = p.input[i];
  if (!kBug || thread() % 4 != 3) x += shuffle_xor(x, 1);
  p.output[i] = x;
}

template <bool kBug>
__global__ void different_collectives(Buffers p) {
  const int i = first() + thread();
  float x = p.input[i];
  x += !kBug || thread() < 16 ? shuffle_xor(x, 1) : shuffle_idx(x, 0);
  p.output[i] = x;
}

template <bool kBug>
__global__ void wrong_shuffle_distance(Buffers p) {
  const int i = first() + thread();
  p.output[i] = shuffle_xor(p.input[i], kBug ? 32 : 16);
}

template <bool kBug>
__global__ void named_barrier_too_small(Buffers p) {
  float* const s = shared_floats();
  s[thread()] = p.input[first() + thread()];
  // Warps 0 and 1 wait for each other, as do 2 and 3; with the bug, no warp waits for another.
  barrier_sync(1 + thread() / 64, kBug ? 32 : 64);
  p.output[first() + thread()] = s[thread() ^ 32];
}

template <bool kBug>
__global__ void misaligned_vector(Buffers p) {
  const int i = 4 * (first() + thread());
  if (i + 8 <= 4 * kBlocks * kThreads) {
    store_vector(p.output + i, load_vector<float, 4>(p.input + i + (kBug ? 2 : 0)));
  }
}

template <bool kBug>
__global__ void misaligned_load(Buffers p) {
  const float* const from = p.input + 2 * thread() + kBug;
  p.output[first() + thread()] = static_cast<float>(*reinterpret_cast<const uint64_t*>(from));
}

template <bool kBug>
__global__ void misaligned_store(Buffers p) {
  auto* const halves = reinterpret_cast<uint16_t*>(p.output);
  *reinterpret_cast<float*>(halves + 4 * (first() + thread()) + kBug) = p.input[thread()];
}

template <bool kBug>
__global__ void misaligned_copy(Buffers p) {
  float* const s = shared_floats();
  cp_async_16(s + 4 * thread(), p.input + (kBug ? 1 : 4) * (first() + thread()));
  cp_async_commit();
  p.output[first() + thread()] = 0.0f;
}

template <bool kBug>
__global__ void misaligned_ldmatrix(Buffers p) {
  float* const s = shared_floats();
  for (int k = 0; k < 4; ++k) s[4 * thread() + k] = p.input[first() + thread()];
  __syncthreads();
  uint32_t r[2];
  ldmatrix_x2(r, s + (kBug ? 2 : 4) * (thread() % 16));
  p.output[first() + thread()] = __uint_as_float(r[1]);
}

// Two blocks write the same place.
template <bool kBug>
__global__ void blocks_write_one_place(Buffers p) {
  p.output[(kBug ? 0 : first()) + thread()] = p.input[first() + thread()];
}

// A block reads what the next one writes.
template <bool kBug>
__global__ void blocks_read_what_others_write(Buffers p) {
  const int i = first() + thread(), other = (i + kThreads) % (kBlocks * kThreads);
  p.output[i] = 0.0f;
  p.output[i + kBlocks * kThreads] = p.output[kBug ? other : i];
}

// Threads of one block pass a value through global memory.
template <bool kBug>
__global__ void missing_barrier_for_global(Buffers p) {
  p.output[first() + thread()] = p.input[first() + thread()];
  if constexpr (!kBug) __syncthreads();
  p.output[first() + thread() + kBlocks * kThreads] = p.output[first() + kThreads - 1 - thread()];
}

// ---- by name ------------------------------------------------------------------------------------

struct Planted {
  const char* name;
  void (*bug)(Buffers);
  void (*twin)(Buffers);
};

#define PMF_PLANTED(name) \
  Planted { #name, &name<true>, &name<false> }

const Planted kAll[] = {
    PMF_PLANTED(missing_barrier),
    PMF_PLANTED(missing_second_barrier),
    PMF_PLANTED(missing_warp_barrier),
    PMF_PLANTED(ldmatrix_before_barrier),
    PMF_PLANTED(copy_not_waited_for),
    PMF_PLANTED(copy_without_barrier),
    PMF_PLANTED(copy_over_readers),
    PMF_PLANTED(read_past_the_end),
    PMF_PLANTED(write_past_the_end),
    PMF_PLANTED(write_to_an_input),
    PMF_PLANTED(shared_never_written),
    PMF_PLANTED(global_never_written),
    PMF_PLANTED(more_shared_than_asked_for),
    PMF_PLANTED(divergent_barrier),
    PMF_PLANTED(early_return),
    PMF_PLANTED(shuffle_without_all_lanes),
    PMF_PLANTED(different_collectives),
    PMF_PLANTED(wrong_shuffle_distance),
    PMF_PLANTED(named_barrier_too_small),
    PMF_PLANTED(misaligned_load),
    PMF_PLANTED(misaligned_store),
    PMF_PLANTED(misaligned_vector),
    PMF_PLANTED(misaligned_copy),
    PMF_PLANTED(misaligned_ldmatrix),
    PMF_PLANTED(blocks_write_one_place),
    PMF_PLANTED(blocks_read_what_others_write),
    PMF_PLANTED(missing_barrier_for_global),
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* pmf_planted_name(int i) {
  return i < static_cast<int>(std::size(kAll)) ? kAll[i].name : nullptr;
}

// Runs one of them on buffers of 4 * 3 * 128 floats. Null, or what the emulator found.
extern "C" __attribute__((visibility("default"))) const char* pmf_planted_run(int i, bool bug,
                                                                              const float* input,
                                                                              float* output) {
  const cudaError_t status = launch(bug ? kAll[i].bug : kAll[i].twin, kBlocks, kThreads,
                                    kSharedBytes, nullptr, Buffers{input, output});
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace pmf::planted
