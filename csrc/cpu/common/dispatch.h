// One kernel source compiled for several instruction sets, selected at run time.
//
// CMake compiles every kernel file of csrc/cpu once per level with
//   -DPMF_LEVEL=portable | avx2 | avx512 | avx512_bf16
// and that level's machine flags. All definitions of the file, and those of headers named *-inl.h,
// are in namespace pmf::cpu::PMF_LEVEL. The file ends by naming its entry points:
//   PMF_DISPATCH(void, rms_norm, (const RmsNormParams& params, const ParallelFor& parallel),
//                (params, parallel))
// which defines pmf::cpu::rms_norm (once, in the portable copy) as a jump to the current level.
//
// The highest level, amx_bf16, differs only in products of bf16: it has copies of the files that
// compute these, for bf16 only, which name their entry points with PMF_DISPATCH_AMX. Everything
// else runs there as at avx512_bf16.
//
// Kernel files must not use inline functions of the standard library that could be emitted out of
// line (std::max, containers): the linker keeps one copy of such a function, and it might be the
// one compiled for AVX-512.
#pragma once

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

#if PMF_CONCAT(PMF_LEVEL_INDEX_, PMF_LEVEL) != 0
#define PMF_DISPATCH(result, name, parameters, arguments)
#elif PMF_X86
#define PMF_DISPATCH(result, name, parameters, arguments) \
  PMF_DISPATCH_UP_TO(&avx512_bf16::name, result, name, parameters, arguments)
#define PMF_DISPATCH_UP_TO(top, result, name, parameters, arguments)                            \
  namespace pmf::cpu {                                                                          \
  namespace avx2 {                                                                              \
  result name parameters;                                                                       \
  }                                                                                             \
  namespace avx512 {                                                                            \
  result name parameters;                                                                       \
  }                                                                                             \
  namespace avx512_bf16 {                                                                       \
  result name parameters;                                                                       \
  }                                                                                             \
  result name parameters {                                                                      \
    constexpr decltype(&portable::name) table[] = {&portable::name, &avx2::name, &avx512::name, \
                                                   &avx512_bf16::name};                         \
    const Level at = level();                                                                   \
    return (at == Level::amx_bf16 ? top : table[static_cast<int>(at)]) arguments;               \
  }                                                                                             \
  }
#else
#define PMF_DISPATCH(result, name, parameters, arguments)     \
  namespace pmf::cpu {                                        \
  result name parameters { return portable::name arguments; } \
  }
#endif

#if defined(PMF_DISPATCH_UP_TO) && PMF_AMX
#define PMF_DISPATCH_AMX(when, result, name, parameters, arguments)                             \
  namespace pmf::cpu::amx_bf16 {                                                                \
  result name parameters;                                                                       \
  }                                                                                             \
  PMF_DISPATCH_UP_TO(((when) ? &amx_bf16::name : &avx512_bf16::name), result, name, parameters, \
                     arguments)
#else
#define PMF_DISPATCH_AMX(when, result, name, parameters, arguments) \
  PMF_DISPATCH(result, name, parameters, arguments)
#endif

#endif  // PMF_LEVEL
