// Attention's forward for bf16, a translation unit of its own to parallelise the build.
#include "cuda/attention/attention_forward_kernels.cuh"

namespace pmf::cuda {

ForwardTable attention_forward_bf16() { return forward_table16<__nv_bfloat16>(); }

}  // namespace pmf::cuda
