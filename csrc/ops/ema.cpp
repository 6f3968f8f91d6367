// torch.ops.pmf.ema_update: validate and launch. The mathematics is in pmf/ema.h.
#include "pmf/ema.h"

#include <algorithm>

#include "cuda/optimizer/optimizer_launchers.h"
#include "ops/torch_shim.h"

namespace pmf {
namespace {

constexpr const char* kOp = "ema_update";

void check_average(const Tensor& average, const Tensor& parameter, const Tensor& first) {
  check_same_device(parameter, first, kOp, "a parameter", "the first");
  check_same_device(average, first, kOp, "an average", "the first parameter");
  check_value(average.scalar_type() == ScalarType::Float, kOp, ": averages must be float32, got ",
              dtype_name(average.scalar_type()));
  check_value(dtype_of(parameter, kOp, "a parameter") != DType::f64, kOp,
              ": parameters must be float32, bfloat16 or float16, got float64");
  check_value(average.is_contiguous() && parameter.is_contiguous(), kOp,
              ": parameters and averages must be contiguous");
  check_value(average.numel() == parameter.numel(), kOp,
              ": averages must have their parameters' shapes, got ", shape_of(average), " and ",
              shape_of(parameter));
}

// `averages` lists all parameters' averages for weights[0], then those for weights[1], ...
void ema_update(std::vector<Tensor> averages, std::vector<Tensor> parameters,
                std::vector<double> weights) {
  const size_t count = parameters.size();
  check_value(averages.size() == count * weights.size(), kOp, ": ", count, " parameters and ",
              weights.size(), " weights need as many averages as their product, got ",
              averages.size());
  if (count == 0) return;
  if (!takes_cuda_kernel(parameters[0])) fail(kOp, ": tensors must be on a GPU");
  for (size_t i = 0; i < averages.size(); ++i) {
    check_average(averages[i], parameters[i % count], parameters[0]);
  }
  for (size_t first = 0; first < weights.size(); first += kMaxAverages) {
    EmaParams p;
    p.averages = static_cast<int>(std::min<size_t>(kMaxAverages, weights.size() - first));
    std::vector<EmaTensor> tensors(count);
    for (size_t i = 0; i < count; ++i) {
      tensors[i].parameter = parameters[i].const_data_ptr();
      tensors[i].dtype = dtype_of(parameters[i], kOp, "a parameter");
      tensors[i].size = parameters[i].numel();
      for (int a = 0; a < p.averages; ++a) {
        Tensor& average = averages[(first + static_cast<size_t>(a)) * count + i];
        tensors[i].averages[a] = static_cast<float*>(average.mutable_data_ptr());
      }
    }
    for (int a = 0; a < p.averages; ++a) {
      p.weights[a] = static_cast<float>(weights[first + static_cast<size_t>(a)]);
    }
    p.tensors = tensors.data();
    p.count = static_cast<int64_t>(count);
    run_on_cuda(parameters[0], kOp, PMF_CUDA_KERNEL(ema), p);
  }
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) { m.impl("ema_update", TORCH_BOX(&pmf::ema_update)); }
