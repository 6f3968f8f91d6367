// float32 matrix products on the CPU, by the library that is fast on this processor.
//
// The BLAS in PyTorch's x86 builds, MKL, uses AVX-512 on Intel's processors only; elsewhere it
// uses 256-bit vectors at half the rate. oneDNN, which PyTorch includes for its convolutions,
// generates code for the actual processor. Measured on an AMD EPYC (Zen 5) with two threads and
// [2208, 768] x [768, 768]: MKL 212 GFLOP/s, oneDNN 460. Both accumulate in float32.
#pragma once

#include "ops/torch_shim.h"

namespace pmf {

// Whether oneDNN multiplies float32 matrices on this processor; it allocates its results itself.
bool products_by_onednn();

// Whether oneDNN should compute left right here: non-empty float32 matrices in CPU memory.
bool prefers_onednn(const Tensor& left, const Tensor& right);

// left [M, K] right [K, N], any strides; only where prefers_onednn().
Tensor onednn_product(const Tensor& left, const Tensor& right);

// add [M, N] + left [M, K] right [K, N], added before the one rounding; only where
// prefers_onednn().
Tensor onednn_add_product(const Tensor& add, const Tensor& left, const Tensor& right);

// While one of these lives, the libraries stay on the thread that created it. Needed inside a
// parallel region too: PyTorch switches off MKL's own check for one, so that MKL divides a product
// there as for torch.get_num_threads() threads (of which it then gets one), by a count that differs
// from worker to worker; and oneDNN chooses its blocks by OpenMP's count. With either, the order of
// a sum depends on the number of threads.
class SingleThread {
 public:
  SingleThread();
  ~SingleThread();
  SingleThread(const SingleThread&) = delete;
  SingleThread& operator=(const SingleThread&) = delete;

 private:
  int mkl_ = 0, openmp_ = 0;  // previous values; 0: MKL's default, or no OpenMP
};

}  // namespace pmf
