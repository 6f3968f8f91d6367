// The emulator's csrc/cuda/common/launch.cuh.
#pragma once

#include <tuple>
#include <utility>

#include "cuda/common/cuda.cuh"
#include "cuda/common/dry_run.h"

namespace pmf::cuda {

constexpr int kSharedWithoutAsking = 48 * 1024;

// A kernel and its arguments, as its type declares them.
template <class... Parameters>
struct KernelCall {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;

  template <size_t... kIndex>
  void call(std::index_sequence<kIndex...>) const {
    kernel(std::get<kIndex>(arguments)...);
  }
  static void thread(const void* self) {
    static_cast<const KernelCall*>(self)->call(std::index_sequence_for<Parameters...>());
  }
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes,
                   cudaStream_t, const Arguments&... arguments) {
  using Call = KernelCall<Parameters...>;
  const Call call{kernel, {arguments...}};
  const int64_t allowed =
      shared_bytes > kSharedWithoutAsking ? emulator::kSharedLimit : kSharedWithoutAsking;
  const char* problem = emulator::run({{grid.x, grid.y, grid.z},
                                       {block.x, block.y, block.z},
                                       shared_bytes,
                                       allowed,
                                       &Call::thread,
                                       &call,
                                       sizeof(call)});
  return problem == nullptr ? cudaSuccess : cudaErrorLaunchFailure;
}

inline int64_t device_shared_limit() { return emulator::kSharedLimit; }
inline int64_t device_shared_per_processor() { return emulator::kSharedPerProcessor; }
inline int device_processors() { return emulator::kProcessors; }

}  // namespace pmf::cuda
