// Matrix products on the CPU, in the dtype and by the library that are fast on this processor.
//
// 16 bits: PyTorch has 16-bit products for every processor, but only where there are instructions
// for them are they faster than float32's. Measured with oneDNN kept to plain AVX-512, one thread,
// [2208, 768] x [768, 768], GFLOP/s: float32 145, bfloat16 33, float16 14; bfloat16 widened to
// float32, multiplied and rounded 134.
//
// float32:
// The BLAS in PyTorch's x86 builds, MKL, uses AVX-512 on Intel's processors only; elsewhere it
// uses 256-bit vectors at half the rate. oneDNN, which PyTorch includes for its convolutions,
// generates code for the actual processor. Measured on an AMD EPYC (Zen 5) with two threads and
// [2208, 768] x [768, 768]: MKL 212 GFLOP/s, oneDNN 460. Both accumulate in float32.
#pragma once

#include "ops/torch_shim.h"

namespace pmf {

// The dtype in which to multiply matrices of this dtype: their own, or float32 for float16, and for
// bfloat16 without instructions of its own. The level of the kernels (cpu/common/dispatch.h)
// decides that, so that PMF_CPU_LEVEL makes a processor act like an older one.
ScalarType product_dtype(ScalarType dtype);

// Whether PyTorch's own product of this dtype is the fastest, so that it can write where one likes.
bool multiplied_by_pytorch(ScalarType dtype);

// Whether oneDNN should compute left right here: non-empty float32 matrices in CPU memory.
bool prefers_onednn(const Tensor& left, const Tensor& right);

// left [M, K] right [K, N], any strides, plus a contiguous bias [N]; only where prefers_onednn().
Tensor onednn_product(const Tensor& left, const Tensor& right, const Tensor* bias = nullptr);

// add [M, N] + left [M, K] right [K, N], rounded once; only if prefers_onednn().
Tensor onednn_add_product(const Tensor& add, const Tensor& left, const Tensor& right);

// Keeps the libraries on the current thread while an instance exists. A parallel region needs this
// too: there PyTorch disables MKL's own check, so MKL splits a product for torch.get_num_threads()
// threads (and then gets one), a count that differs between workers; oneDNN chooses its blocking by
// OpenMP's thread count. Either way the order of a sum would depend on the number of threads.
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
