// Muon and Adam steps on CUDA, for lists of parameters that share a device, a dtype and a step
// count, and Newton-Schulz on CUDA. pmf.optim.Muon calls them; its CPU path is written in PyTorch.
#include <map>

#include "cuda/optimizer/optimizer_launchers.h"
#include "ops/newton_schulz_binding.h"

namespace pmf {
namespace {

constexpr int64_t kLongestSide = int64_t{1} << 24;  // 32-bit offsets within a tile's 128 rows

void check_alike(const char* op, const char* name, const Tensor& tensor, const Tensor& first,
                 ScalarType dtype) {
  check_same_device(tensor, first, op, name, "the first parameter");
  check_value(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype),
              ", got ", dtype_name(tensor.scalar_type()));
  check_value(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

// Each list has one tensor per parameter.
void check_list(const char* op, const char* name, const std::vector<Tensor>& tensors,
                const std::vector<Tensor>& params, ScalarType dtype) {
  check_value(tensors.size() == params.size(), op, ": ", name, " must be as many as params, got ",
              tensors.size(), " and ", params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    check_alike(op, name, tensors[i], params[0], dtype);
    check_value(tensors[i].numel() == params[i].numel(), op, ": ", name,
                " must have the parameters' shapes, got ", shape_of(tensors[i]), " and ",
                shape_of(params[i]));
  }
}

struct Lists {
  const std::vector<Tensor>&params, &grads, &momenta, &masters;
};

void check_lists(const char* op, const Lists& lists) {
  const ScalarType dtype = lists.params[0].scalar_type();
  check_list(op, "params", lists.params, lists.params, dtype);
  check_list(op, "grads", lists.grads, lists.params, dtype);
  check_list(op, "momenta", lists.momenta, lists.params, ScalarType::Float);
  if (!lists.masters.empty()) {
    check_list(op, "masters", lists.masters, lists.params, ScalarType::Float);
  }
}

DeviceScalar scalar(const char* op, const char* name, const OptionalTensor& tensor, double value,
                    const Tensor& first) {
  DeviceScalar result;
  result.value = value;
  if (!tensor) return result;
  check_same_device(*tensor, first, op, name, "the first parameter");
  check_value(tensor->numel() == 1, op, ": ", name, " must be one number, got shape ",
              shape_of(*tensor));
  result.dtype = dtype_of(*tensor, op, name);
  check_value(result.dtype == DType::f32 || result.dtype == DType::f64, op, ": ", name,
              " must be float32 or float64, got ", dtype_name(tensor->scalar_type()));
  result.data = tensor->const_data_ptr();
  return result;
}

int64_t* counter(const char* op, const Tensor& step, const Tensor& first) {
  check_same_device(step, first, op, "step", "the first parameter");
  check_value(step.scalar_type() == ScalarType::Long && step.numel() == 1, op,
              ": step must be one int64, got ", dtype_name(step.scalar_type()), " of shape ",
              shape_of(step));
  return static_cast<int64_t*>(step.mutable_data_ptr());
}

float* floats(const std::vector<Tensor>& tensors, size_t i) {
  return tensors.empty() ? nullptr : static_cast<float*>(tensors[i].mutable_data_ptr());
}

DType narrow_dtype(const char* op, ScalarType type) {
  check_value(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
              op, ": on CUDA the dtype must be float32, float16 or bfloat16, got ",
              dtype_name(type));
  return type == ScalarType::Float  ? DType::f32
         : type == ScalarType::Half ? DType::f16
                                    : DType::bf16;
}

// Shared by Newton-Schulz on its own and the Muon step.
NewtonSchulzParams settings_of(const char* op, ScalarType elements,
                               const std::vector<double>& coefficients, const std::string& method,
                               ScalarType dtype, bool allow_tf32) {
  NewtonSchulzParams p;
  p.dtype = narrow_dtype(op, elements);
  p.compute = narrow_dtype(op, dtype);
  check_value(!coefficients.empty() && coefficients.size() % 3 == 0, op,
              ": coefficients must be three numbers for each of at least one step, got ",
              coefficients.size());
  p.allow_tf32 = allow_tf32;
  p.method = method_named(method);
  p.coefficients = coefficients.data();
  p.steps = static_cast<int64_t>(coefficients.size()) / 3;
  return p;
}

NewtonSchulzMatrix matrix_of(const char* op, const Tensor& source, const Tensor& target) {
  check_value(source.size(0) <= kLongestSide && source.size(1) <= kLongestSide, op,
              ": a side of a matrix must be at most ", kLongestSide, ", got ", shape_of(source));
  NewtonSchulzMatrix matrix;
  matrix.source = source.const_data_ptr();
  matrix.target = target.mutable_data_ptr();
  matrix.rows = source.size(0);
  matrix.columns = source.size(1);
  return matrix;
}

void launch(const char* op, const Tensor& first, NewtonSchulzParams& p,
            const std::vector<NewtonSchulzMatrix>& matrices) {
  p.matrices = matrices.data();
  p.count = static_cast<int64_t>(matrices.size());
  int64_t bytes = 0;
#if PMF_WITH_CUDA
  bytes = cuda::newton_schulz_workspace_bytes(p);
#endif
  const Workspace workspace(first, bytes);
  p.workspace = workspace.data();
  run_on_cuda(first, op, PMF_CUDA_KERNEL(newton_schulz), p);
}

void muon_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momenta,
               std::vector<Tensor> masters, Tensor step, OptionalTensor lr, double lr_value,
               OptionalTensor weight_decay, double weight_decay_value, double momentum,
               bool nesterov, bool bias_correction, std::vector<double> scales,
               std::vector<double> coefficients, std::string method, ScalarType dtype,
               bool allow_tf32) {
  constexpr const char* kOp = "muon_step";
  if (params.empty()) return;
  const Tensor& first = params[0];
  check_lists(kOp, {params, grads, momenta, masters});
  check_value(scales.size() == params.size(), kOp, ": scales must be as many as params, got ",
              scales.size(), " and ", params.size());
  NewtonSchulzParams p =
      settings_of(kOp, first.scalar_type(), coefficients, method, dtype, allow_tf32);
  StepParams numbers;
  numbers.step = counter(kOp, step, first);
  numbers.lr = scalar(kOp, "lr", lr, lr_value, first);
  numbers.weight_decay = scalar(kOp, "weight_decay", weight_decay, weight_decay_value, first);
  numbers.momentum = momentum;
  numbers.nesterov = nesterov;
  numbers.bias_correction = bias_correction;
  p.muon = &numbers;
  std::vector<NewtonSchulzMatrix> matrices;
  for (size_t i = 0; i < params.size(); ++i) {
    check_value(params[i].dim() == 2, kOp, ": every parameter must be a matrix, got ",
                shape_of(params[i]));
    if (params[i].numel() == 0) continue;
    NewtonSchulzMatrix matrix = matrix_of(kOp, grads[i], params[i]);
    matrix.momentum = floats(momenta, i);
    matrix.master = floats(masters, i);
    matrix.scale = scales[i];
    matrices.push_back(matrix);
  }
  launch(kOp, first, p, matrices);
}

void adam_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momenta,
               std::vector<Tensor> squares, std::vector<Tensor> masters, Tensor step,
               OptionalTensor lr, double lr_value, OptionalTensor weight_decay,
               double weight_decay_value, double beta1, double beta2, double eps, bool nesterov) {
  constexpr const char* kOp = "adam_step";
  if (params.empty()) return;
  const Tensor& first = params[0];
  check_lists(kOp, {params, grads, momenta, masters});
  check_list(kOp, "squares", squares, params, ScalarType::Float);
  AdamParams p;
  p.dtype = narrow_dtype(kOp, first.scalar_type());
  p.step.step = counter(kOp, step, first);
  p.step.lr = scalar(kOp, "lr", lr, lr_value, first);
  p.step.weight_decay = scalar(kOp, "weight_decay", weight_decay, weight_decay_value, first);
  p.step.momentum = beta1;
  p.step.beta2 = beta2;
  p.step.nesterov = nesterov;
  p.eps = eps;
  std::vector<AdamTensor> tensors(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    tensors[i] = {params[i].mutable_data_ptr(), grads[i].const_data_ptr(), floats(momenta, i),
                  floats(squares, i),           floats(masters, i),        params[i].numel()};
  }
  p.tensors = tensors.data();
  p.count = static_cast<int64_t>(tensors.size());
  int64_t bytes = 0;
#if PMF_WITH_CUDA
  bytes = cuda::adam_workspace_bytes();
#endif
  const Workspace workspace(first, bytes);
  p.workspace = workspace.data();
  run_on_cuda(first, kOp, PMF_CUDA_KERNEL(adam), p);
}

}  // namespace

std::vector<Tensor> newton_schulz_by_kernels(const std::vector<Tensor>& matrices,
                                             const std::vector<double>& coefficients,
                                             const std::string& method, ScalarType dtype,
                                             bool allow_tf32) {
  constexpr const char* kOp = "newton_schulz";
  std::vector<Tensor> results, sources;
  std::map<ScalarType, std::vector<NewtonSchulzMatrix>> by_dtype;
  for (const Tensor& matrix : matrices) {
    check_value(matrix.dim() == 2, kOp, ": every matrix must have two dimensions, got ",
                shape_of(matrix));
    check_same_device(matrix, matrices[0], kOp, "every matrix", "the first");
    sources.push_back(torch::stable::contiguous(matrix));
    results.push_back(torch::stable::new_empty(matrix, {matrix.size(0), matrix.size(1)}));
    if (matrix.numel() == 0) continue;
    by_dtype[matrix.scalar_type()].push_back(matrix_of(kOp, sources.back(), results.back()));
  }
  for (const auto& [type, group] : by_dtype) {
    NewtonSchulzParams p = settings_of(kOp, type, coefficients, method, dtype, allow_tf32);
    launch(kOp, matrices[0], p, group);
  }
  return results;
}

}  // namespace pmf

PMF_IMPLEMENT(m) {
  m.impl("muon_step", TORCH_BOX(&pmf::muon_step));
  m.impl("adam_step", TORCH_BOX(&pmf::adam_step));
}
