// What the library tells about itself: the only C++ symbols it exports, for csrc/python/module.cpp.
#pragma once

#include <cstdint>

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

}  // namespace pmf
