// CUDA runtime errors: we report and clear our own, and leave those of other code in place.
//
// The runtime keeps a thread's last error until it is fetched. Our failed calls must not leave one
// for an unrelated later check to find; an error that was pending before is not ours to clear.
#pragma once

#include <cuda_runtime.h>

namespace pmf::cuda {

// Returns the status of call(), without leaving behind an error that was not pending before.
template <class Call>
cudaError_t checked(const Call& call) {
  const bool clean = cudaPeekAtLastError() == cudaSuccess;
  const cudaError_t status = call();
  if (status != cudaSuccess && clean) cudaGetLastError();
  return status;
}

}  // namespace pmf::cuda
