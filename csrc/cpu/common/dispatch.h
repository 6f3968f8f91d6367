// One kernel source compiled for several instruction sets, selected at run time.
//
// CMake compiles every kernel file of csrc/cpu once per level with
//   -DPMF_LEVEL=portable | avx2 | avx512 | avx512_bf16
// and that level's machine flags. All definitions of the file, and those of headers named *-inl.h,
// are in namespace pmf::cpu::PMF_LEVEL. The file ends by naming its entry points, and the dtype of
// their operands:
//   PMF_DISPATCH(params.dtype, void, rms_norm,
//                (const RmsNormParams& params, const ParallelFor& parallel), (params, parallel))
// which defines pmf::cpu::rms_norm (once, in the portable copy) as a jump to the current level.
//
// The levels above avx512 differ from it in bf16 only, and their copies compute no other dtype: the
// others run as at avx512. The highest, amx_bf16, differs from the one below only in products: it
// has copies of the files that compute these, which use PMF_DISPATCH_AMX.
//
// Kernel files must not use inline functions of the standard library that could be emitted out of
// line (std::max, containers): the linker keeps one copy of such a function, and it might be the
// one compiled for AVX-512.
#pragma once

#include "pmf/common.h"

#ifndef PMF_X86  // -DPMF_X86=0 keeps only the portable level
#if defined(__x86_64__) || defined(_M_X64)
#define PMF_X86 1
#else
#define PMF_X86 0
#endif
#endif

#ifndef PMF_AMX  // -DPMF_AMX=1 if the compiler and this build have level amx_bf16
#define PMF_AMX 0
#endif

namespace pmf::cpu {

enum class Level : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };
constexpr int kLevels = PMF_AMX ? 5 : PMF_X86 ? 4 : 1;

// The level that kernels run at: set_level()'s choice, else the environment variable PMF_CPU_LEVEL,
// else the processor's best. Unsupported levels and unknown names are never chosen.
Level level();

// The level whose copies of the kernels compute operands of this dtype.
Level level_for(DType dtype);

// The best level this processor (and its operating system) supports.
Level best_level();

// If `name` is a level that this processor supports, or "" or "auto" for the default, selects it
// from the next call on and returns true; otherwise changes nothing and returns false.
bool set_level(const char* name);

const char* level_name(Level level);

}  // namespace pmf::cpu

#ifdef PMF_LEVEL

#define PMF_CONCAT_(a, b) a##b
#define PMF_CONCAT(a, b) PMF_CONCAT_(a, b)
#define PMF_LEVEL_INDEX_portable 0
#define PMF_LEVEL_INDEX_avx2 1
#define PMF_LEVEL_INDEX_avx512 2
#define PMF_LEVEL_INDEX_avx512_bf16 3
#define PMF_LEVEL_INDEX_amx_bf16 4

#define PMF_LEVEL_INDEX PMF_CONCAT(PMF_LEVEL_INDEX_, PMF_LEVEL)

// These choose what a copy computes, so a compiler flag for the whole build must not set them.
#if defined(__AVX512BF16__) != (PMF_LEVEL_INDEX >= PMF_LEVEL_INDEX_avx512_bf16) || \
    defined(__AMX_BF16__) != (PMF_LEVEL_INDEX >= PMF_LEVEL_INDEX_amx_bf16)
#error "each level needs its own machine flags; leave -mavx512bf16 and -mamx-bf16 out of CXXFLAGS"
#endif

#if PMF_LEVEL_INDEX != 0
#define PMF_DISPATCH_UP_TO(top, dtype, result, name, parameters, arguments)
#elif PMF_X86
#define PMF_DISPATCH_UP_TO(top, dtype, result, name, parameters, arguments)                      \
  namespace pmf::cpu {                                                                           \
  namespace avx2 {                                                                               \
  result name parameters;                                                                        \
  }                                                                                              \
  namespace avx512 {                                                                             \
  result name parameters;                                                                        \
  }                                                                                              \
  namespace avx512_bf16 {                                                                        \
  result name parameters;                                                                        \
  }                                                                                              \
  namespace top {                                                                                \
  result name parameters;                                                                        \
  }                                                                                              \
  result name parameters {                                                                       \
    constexpr decltype(&portable::name) copies[] = {&portable::name, &avx2::name, &avx512::name, \
                                                    &avx512_bf16::name, &top::name};             \
    return copies[static_cast<int>(level_for(dtype))] arguments;                                 \
  }                                                                                              \
  }
#else
#define PMF_DISPATCH_UP_TO(top, dtype, result, name, parameters, arguments) \
  namespace pmf::cpu {                                                      \
  result name parameters { return portable::name arguments; }               \
  }
#endif

#define PMF_DISPATCH(dtype, result, name, parameters, arguments) \
  PMF_DISPATCH_UP_TO(avx512_bf16, dtype, result, name, parameters, arguments)
#if PMF_AMX
#define PMF_DISPATCH_AMX(dtype, result, name, parameters, arguments) \
  PMF_DISPATCH_UP_TO(amx_bf16, dtype, result, name, parameters, arguments)
#else
#define PMF_DISPATCH_AMX PMF_DISPATCH
#endif

#endif  // PMF_LEVEL
