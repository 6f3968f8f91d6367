// Included before every file of csrc/ops (g++ -include). Registers the ops as
// torch.ops.pmf_emulated and makes each call start with no tensors known to the emulator. Calls
// from these files to PyTorch go to runtime/tensors.cpp, which presents CPU tensors as tensors on a
// GPU.
#pragma once

#include <torch/csrc/stable/library.h>

namespace pmf::emulator {

void forget_tensors();

template <void (*kBoxed)(StableIValue*, uint64_t, uint64_t)>
void call_op(StableIValue* stack, uint64_t arguments, uint64_t outputs) {
  forget_tensors();
  kBoxed(stack, arguments, outputs);
}

}  // namespace pmf::emulator

#undef TORCH_BOX
#define TORCH_BOX(func)                                     \
  (&::pmf::emulator::call_op<&torch::stable::detail::boxer< \
       std::remove_pointer_t<std::remove_reference_t<decltype(func)>>, (func)>::boxed_fn>)

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(ns##_emulated, k, m, C10_UID)

// A fragment, because it accepts the expanded name; STABLE_TORCH_LIBRARY would not expand it.
#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) _STABLE_TORCH_LIBRARY_FRAGMENT(ns##_emulated, m, C10_UID)
