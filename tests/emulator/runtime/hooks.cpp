// The functions that g++ -fsanitize=thread calls before every memory access, in place of the
// sanitizer's runtime.
#include "machine.h"
#include "memory.h"

namespace {

using pmf::emulator::Access;
using pmf::emulator::check_alignment;
using pmf::emulator::machine;
using pmf::emulator::memory;

// `alignment`: that of the accessed type, which a device requires.
inline void access(const void* address, size_t bytes, size_t alignment, Access kind,
                   const void* place) {
  if (machine.lane == nullptr) return;  // an access by the host
  machine.place = place;
  check_alignment(address, alignment, kind == Access::read ? "a load" : "a store");
  memory.access(address, bytes, kind);
}

}  // namespace

#define PMF_HOOK(name, bytes, alignment, kind)                                    \
  extern "C" void name(const void* address) {                                     \
    access(address, bytes, alignment, Access::kind, __builtin_return_address(0)); \
  }
#define PMF_HOOKS(bytes)                                 \
  PMF_HOOK(__tsan_read##bytes, bytes, bytes, read)       \
  PMF_HOOK(__tsan_write##bytes, bytes, bytes, write)     \
  PMF_HOOK(__tsan_unaligned_read##bytes, bytes, 1, read) \
  PMF_HOOK(__tsan_unaligned_write##bytes, bytes, 1, write)

PMF_HOOKS(1)
PMF_HOOKS(2)
PMF_HOOKS(4)
PMF_HOOKS(8)
PMF_HOOKS(16)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(const void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(const void*, const void*) {}
void __tsan_vptr_read(const void*) {}
void __tsan_read_range(const void* address, size_t bytes) {
  access(address, bytes, 1, Access::read, __builtin_return_address(0));
}
void __tsan_write_range(const void* address, size_t bytes) {
  access(address, bytes, 1, Access::write, __builtin_return_address(0));
}
}
