// Selects the kernels' instruction-set level. Compiled once, for the baseline instruction set.
#include "cpu/common/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if PMF_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pmf::cpu {
namespace {

constexpr const char* kNames[5] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
constexpr int kUnset = -1;

// The level requested by set_level(), or kUnset.
std::atomic<int> chosen{kUnset};

// Whether the processor has AMX for bf16, and the operating system lets this process use it. Linux
// saves the 8 KB of tile registers only for processes that asked; old kernels and some sandboxes
// refuse. The permission holds for all threads, and forked processes.
bool has_amx() {
#if PMF_AMX
  unsigned int a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned int kBf16 = 1u << 22, kTile = 1u << 24, kRegisters = 3u << 17;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0) {
    return false;
  }
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (a & kRegisters) == kRegisters && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

int detect() {
#if PMF_X86
  // __builtin_cpu_supports also checks that the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (!avx2) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (!avx512) return 1;
  if (!__builtin_cpu_supports("avx512bf16")) return 2;
  return has_amx() ? 4 : 3;
#else
  return 0;
#endif
}

int best() {
  static const int value = detect();
  return value;
}

// The level called `name` if this processor supports it, otherwise kUnset.
int find(const char* name) {
  for (int i = 0; i < kLevels; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return i <= best() ? i : kUnset;
  }
  return kUnset;
}

// Read at first use: the environment of a running process does not change.
int initial() {
  static const int value = [] {
    const char* name = std::getenv("PMF_CPU_LEVEL");
    const int wanted = name == nullptr ? kUnset : find(name);
    return wanted == kUnset ? best() : wanted;
  }();
  return value;
}

}  // namespace

Level level() {
  const int value = chosen.load(std::memory_order_relaxed);
  return static_cast<Level>(value == kUnset ? initial() : value);
}

Level level_for(DType dtype) {
  const Level at = level();
  return dtype == DType::bf16 || at < Level::avx512 ? at : Level::avx512;
}

Level best_level() { return static_cast<Level>(best()); }

bool set_level(const char* name) {
  const bool automatic = name[0] == '\0' || std::strcmp(name, "auto") == 0;
  const int value = automatic ? kUnset : find(name);
  if (!automatic && value == kUnset) return false;
  chosen.store(value, std::memory_order_relaxed);
  return true;
}

const char* level_name(Level level) { return kNames[static_cast<int>(level)]; }

}  // namespace pmf::cpu
