// What the library tells about itself: the only C++ symbols it exports, for csrc/python/module.cpp.
#pragma once

#include <cstdint>

#include "pmf/attention.h"

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

// What one call of an attention kernel costs, before it is made.
struct AttentionPlan {
  double flops;             // of the tile products, a multiply and an add counted as two
  double bytes;             // that must move at least: every operand once
  int64_t workspace_bytes;  // scratch memory at the level in force
};

enum class AttentionPass { forward, backward };

// tangent: the kernel that also carries tangents. Masks and causality are not counted as savings.
PMF_EXPORT AttentionPlan attention_plan(const AttentionShape& shape, DType dtype,
                                        AttentionPass pass, bool tangent, int64_t threads);

}  // namespace pmf
