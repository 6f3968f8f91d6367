// Attention's forward for f16; compiled on its own, as kernels take their time.
#include "cuda/attention/attention_forward_kernels.cuh"

namespace pmf::cuda {

ForwardTable attention_forward_f16() { return forward_table16<__half>(); }

}  // namespace pmf::cuda
