// Attention's backward for fp16, a translation unit of its own to parallelise the build.
#include "cuda/attention/attention_backward_kernels.cuh"

namespace pmf::cuda {

BackwardTable attention_backward_f16() { return table16<__half>(); }

}  // namespace pmf::cuda
