// Attention's forward for fp32: in TF32 where the caller allows, otherwise in full precision by
// three TF32 products for each (ArithmeticF32).
#include "cuda/attention/attention_forward_kernels.cuh"

namespace pmf::cuda {

ForwardTable attention_forward_tf32() { return forward_table32<ArithmeticTf32>(); }
ForwardTable attention_forward_f32() { return forward_table32<ArithmeticF32>(); }

}  // namespace pmf::cuda
