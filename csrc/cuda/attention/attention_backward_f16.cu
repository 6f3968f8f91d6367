// Attention's backward for f16; compiled on its own, as kernels take their time.
#include "cuda/attention/attention_backward_kernels.cuh"

namespace pmf::cuda {

BackwardTable attention_backward_f16() { return table16<__half>(); }

}  // namespace pmf::cuda
