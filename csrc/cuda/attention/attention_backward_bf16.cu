// Attention's backward for bf16, a translation unit of its own to parallelise the build.
#include "cuda/attention/attention_backward_kernels.cuh"

namespace pmf::cuda {

BackwardTable attention_backward_bf16() { return table16<__nv_bfloat16>(); }

}  // namespace pmf::cuda
