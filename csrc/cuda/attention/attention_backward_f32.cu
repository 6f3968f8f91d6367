// Attention's backward for fp32: in TF32 where the caller allows, otherwise in full precision by
// three TF32 products for each (ArithmeticF32).
#include "cuda/attention/attention_backward_kernels.cuh"

namespace pmf::cuda {

BackwardTable attention_backward_tf32() { return table32<ArithmeticTf32>(); }
BackwardTable attention_backward_f32() { return table32<ArithmeticF32>(); }

}  // namespace pmf::cuda
