// Attention's forward for fp32: TF32 if the caller allows it, otherwise full precision with three
// TF32 products per fp32 product (ArithmeticF32).
#include "cuda/attention/attention_forward_kernels.cuh"

namespace pmf::cuda {

ForwardTable attention_forward_tf32() { return forward_table32<ArithmeticTf32>(); }
ForwardTable attention_forward_f32() { return forward_table32<ArithmeticF32>(); }

}  // namespace pmf::cuda
