// Attention's backward for bf16; compiled on its own, as kernels take their time.
#include "cuda/attention/attention_backward_kernels.cuh"

namespace pmf::cuda {

BackwardTable attention_backward_bf16() { return table16<__nv_bfloat16>(); }

}  // namespace pmf::cuda
