// Attention's forward for fp16, a translation unit of its own to parallelise the build.
#include "cuda/attention/attention_forward_kernels.cuh"

namespace pmf::cuda {

ForwardTable attention_forward_f16() { return forward_table16<__half>(); }

}  // namespace pmf::cuda
