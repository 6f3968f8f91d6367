// Introspection: the only C++ symbols that the library exports, for csrc/python/module.cpp.
#pragma once

#include <cstdint>

#include "pmf/attention.h"
#include "pmf/newton_schulz.h"
#include "pmf/patch_embed.h"

#define PMF_EXPORT __attribute__((visibility("default")))

namespace pmf {

struct BuildFacts {
  const char* version;   // version of the distribution
  const char* compiler;  // compiler of the C++ files
  const char* cuda;      // compiled architectures and compiler, or why CUDA was left out
  bool has_cuda;         // whether CUDA kernels are in the library
};

PMF_EXPORT BuildFacts build_facts();

// The CPU level in use, the best one this processor has, and its setter ("auto" for the default).
PMF_EXPORT const char* cpu_level();
PMF_EXPORT const char* best_cpu_level();
PMF_EXPORT bool set_cpu_level(const char* name);

// The cost of one call of an op, computed in advance.
struct Cost {
  double flops = 0;             // FLOPs of the tile products; a multiply-add is two
  double bytes = 0;             // minimum memory traffic: every operand once
  int64_t workspace_bytes = 0;  // scratch memory
};

enum class Pass { forward, backward };

// For the CPU at its current level. `tangent`: the kernel that also carries tangents. Masks and
// causality are not counted as savings.
PMF_EXPORT Cost attention_plan(const AttentionShape& shape, DType dtype, Pass pass, bool tangent,
                               int64_t threads);

// ---- launches of the CUDA ops -------------------------------------------------------------------
// Obtained by dry runs of the ops' own launchers (cuda/common/dry_run.h): no GPU is needed.

// The GPU properties that launches depend on: bytes of shared memory, as in the CUDA runtime.
struct Device {
  int64_t shared_per_block = 0;      // most that a block may request
  int64_t shared_per_processor = 0;  // shared by the blocks resident on an SM
  int processors = 0;
  int major = 0, minor = 0;  // compute capability
};

struct KernelLaunch {
  const void* kernel = nullptr;  // its host function in libpmf.so
  int64_t blocks = 0;            // grid size
  int64_t threads = 0, shared_bytes = 0;
  // The launcher's assumptions; 0 if it has no tile or does not depend on the blocks per SM.
  int64_t tile_rows = 0, tile_columns = 0;
  int64_t blocks_per_processor = 0;
};

using NoteLaunch = void (*)(void* context, const KernelLaunch& launch);

struct CudaPlan {
  Cost cost;
  const char* problem = nullptr;  // one-sentence error; null: none
};

// Each calls note(context, launch) for every launch of a call, in order.
PMF_EXPORT CudaPlan attention_launches(const AttentionShape& shape, DType dtype, Pass pass,
                                       bool tangent, const Device& device, NoteLaunch note,
                                       void* context);
// Pointers in `params` are not dereferenced.
PMF_EXPORT CudaPlan newton_schulz_launches(const NewtonSchulzParams& params, const Device& device,
                                           NoteLaunch note, void* context);
// The products of such a call; those of a wave share one or two launches.
struct PlannedProduct {
  int64_t wave = 0;
  int64_t m = 0, n = 0, k = 0;  // padded
  int64_t matrices = 0;
  bool symmetric = false, right_transposed = false;
  bool adds_left = false, squared = false;  // squared: both factors are the same
  bool warpgroups = false;                  // suits the Hopper kernels
};
using NoteProduct = void (*)(void* context, const PlannedProduct& product);
PMF_EXPORT void newton_schulz_products(const NewtonSchulzParams& params, NoteProduct note,
                                       void* context);
// Assumes contiguous tensors, with biases and position.
PMF_EXPORT CudaPlan patch_embed_launches(const PatchSizes& sizes, Pass pass, const Device& device,
                                         NoteLaunch note, void* context);

}  // namespace pmf
