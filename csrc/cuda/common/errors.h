// Errors of the CUDA runtime: ours are ours to report, and those of others stay theirs.
//
// The runtime keeps a thread's last error until somebody takes it. A call of ours that fails leaves
// one, which must not wait there for whoever asks next; one that was there before is not ours to
// take.
#pragma once

#include <cuda_runtime.h>

namespace pmf::cuda {

// The status of call(), which leaves no error behind that was not there before.
template <class Call>
cudaError_t checked(const Call& call) {
  const bool clean = cudaPeekAtLastError() == cudaSuccess;
  const cudaError_t status = call();
  if (status != cudaSuccess && clean) cudaGetLastError();
  return status;
}

}  // namespace pmf::cuda
