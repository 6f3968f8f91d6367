// The interface for tests, called through ctypes: the order of warps, the number of launches, and
// memory for kernels that no op calls.
#include "memory.h"
#include "sums.h"

#define PMF_EXPORT extern "C" __attribute__((visibility("default")))

namespace pmf::emulator {
namespace {
Limits now;
}  // namespace

const Limits& limits() { return now; }

PMF_EXPORT void pmf_emulator_limits(int64_t shared_per_block, int64_t shared_per_processor,
                                    int processors, bool hopper) {
  now = {shared_per_block, shared_per_processor, processors, hopper};
}

PMF_EXPORT void pmf_emulator_tensor_cores(int fraction_bits, int blocks) {
  tensor_cores = {fraction_bits, blocks};
}

// Each seed gives a different order of warps and blocks.
PMF_EXPORT void pmf_emulator_seed(uint64_t seed) { machine.seed(seed); }

PMF_EXPORT int64_t pmf_emulator_launches() { return machine.launches; }

PMF_EXPORT int64_t pmf_emulator_products() { return machine.products; }
PMF_EXPORT int64_t pmf_emulator_warpgroup_products() { return machine.warpgroup_products; }
PMF_EXPORT int64_t pmf_emulator_prefetched() { return machine.prefetched; }

PMF_EXPORT int64_t pmf_emulator_last_shared_bytes() { return machine.launch.shared_bytes; }

PMF_EXPORT void pmf_emulator_forget_tensors() { memory.forget(); }

PMF_EXPORT void pmf_emulator_add_tensor(void* data, size_t bytes, bool writable, bool initialised) {
  const auto at = reinterpret_cast<uintptr_t>(data);
  memory.region(at, bytes).allow(at, bytes, writable, initialised);
}

}  // namespace pmf::emulator
