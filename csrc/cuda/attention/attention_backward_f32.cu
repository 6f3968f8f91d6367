// Attention's backward for fp32: TF32 if the caller allows it, otherwise full precision with three
// TF32 products per fp32 product (ArithmeticF32).
#include "cuda/attention/attention_backward_kernels.cuh"

namespace pmf::cuda {

BackwardTable attention_backward_tf32() { return table32<ArithmeticTf32>(); }
BackwardTable attention_backward_f32() { return table32<ArithmeticF32>(); }

}  // namespace pmf::cuda
