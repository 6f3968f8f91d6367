// The emulator's csrc/cuda/common/launch.cuh.
#pragma once

#include <tuple>
#include <utility>

#include "cuda/common/cuda.cuh"
#include "cuda/common/dry_run.h"

namespace pmf::cuda {

constexpr int kSharedWithoutAsking = 48 * 1024;

inline int64_t device_shared_limit() { return emulator::limits().shared_per_block; }
inline int64_t device_shared_per_processor() { return emulator::limits().shared_per_processor; }
inline int device_processors() { return emulator::limits().processors; }

// A kernel and its arguments, converted to the parameter types.
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

  template <size_t... kIndex>
  const char* run_translated(const emulator::Launch& launch, std::index_sequence<kIndex...>) const {
    const emulator::Parameter parameters[] = {
        {&std::get<kIndex>(arguments), sizeof(Parameters), alignof(Parameters)}...};
    return emulator::run_translated(reinterpret_cast<const void*>(kernel), launch, parameters,
                                    sizeof...(Parameters));
  }
};

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block,
                            int64_t shared_bytes, cudaStream_t, const Arguments&... arguments) {
  using Call = KernelCall<Parameters...>;
  const Call call{kernel, {arguments...}};
  const int64_t allowed =
      shared_bytes > kSharedWithoutAsking ? device_shared_limit() : kSharedWithoutAsking;
  const emulator::Launch shape = {{grid.x, grid.y, grid.z},
                                  {block.x, block.y, block.z},
                                  shared_bytes,
                                  allowed,
                                  &Call::thread,
                                  &call,
                                  sizeof(call),
                                  cluster};
  const char* problem = emulator::translating()
                            ? call.run_translated(shape, std::index_sequence_for<Parameters...>())
                            : emulator::run(shape);
  return problem == nullptr ? cudaSuccess : cudaErrorLaunchFailure;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  return launch_clusters(kernel, 1, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace pmf::cuda
