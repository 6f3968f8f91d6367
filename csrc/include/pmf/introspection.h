// Introspection: the only C++ symbols that the library exports, for csrc/python/module.cpp.
#pragma once

#include <cstdint>

#include "pmf/attention.h"
#include "pmf/newton_schulz.h"
#include "pmf/patch_embed.h"

#define PMF_EXPORT __attribute__((visibility("default")))

namespace pmf {

struct BuildFacts {
  const char* version;   // of the distribution
  const char* compiler;  // of the C++ files
  const char* cuda;      // architectures compiled and by what, or why CUDA was left out
  bool has_cuda;         // whether CUDA kernels are in the library
};

PMF_EXPORT BuildFacts build_facts();

// The CPU level in force, the best one this processor has, and setting it ("auto" for the default).
PMF_EXPORT const char* cpu_level();
PMF_EXPORT const char* best_cpu_level();
PMF_EXPORT bool set_cpu_level(const char* name);

// The cost of one call of an op, computed in advance.
struct Cost {
  double flops = 0;             // of the tile products, a multiply and an add counted as two
  double bytes = 0;             // that must move at least: every operand once
  int64_t workspace_bytes = 0;  // scratch memory
};

enum class Pass { forward, backward };

// On the CPU at the level in force. tangent: the kernel that also carries tangents. Masks and
// causality are not counted as savings.
PMF_EXPORT Cost attention_plan(const AttentionShape& shape, DType dtype, Pass pass, bool tangent,
                               int64_t threads);

// ---- launches of the CUDA ops -------------------------------------------------------------------
// From the ops' own launchers in a dry run (cuda/dry_run.h): no GPU is needed.

// The GPU properties that launches depend on: bytes of shared memory, as in the CUDA runtime.
struct Device {
  int64_t shared_per_block = 0;      // available to a block
  int64_t shared_per_processor = 0;  // shared by the blocks on one multiprocessor
  int processors = 0;
  int major = 0, minor = 0;  // compute capability
};

struct KernelLaunch {
  const void* kernel = nullptr;  // its host function in libpmf.so
  int64_t blocks = 0;            // of the grid
  int64_t threads = 0, shared_bytes = 0;
  // The launcher's assumptions; 0 if it has no tile, or accepts any number of blocks.
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
// Addresses in params are not used.
PMF_EXPORT CudaPlan newton_schulz_launches(const NewtonSchulzParams& params, const Device& device,
                                           NoteLaunch note, void* context);
// Contiguous tensors, with biases and position.
PMF_EXPORT CudaPlan patch_embed_launches(const PatchSizes& sizes, Pass pass, const Device& device,
                                         NoteLaunch note, void* context);

}  // namespace pmf
