// The only interface of this library to PyTorch: the stable ABI (torch/csrc/stable),
// which keeps one binary valid for every PyTorch from TORCH_TARGET_VERSION on. No other file
// includes torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>  // matrix products
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "pmf/common.h"

#if PMF_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/common/device.h"

// Only libtorch_cuda defines it; weak, so that the library also loads with a PyTorch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace pmf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- errors -------------------------------------------------------------------------------------
// A one-sentence error. PyTorch's check macro would prepend file and line.

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  return text.str();
}

// Raises Python's ValueError.
template <class... Parts>
void check_value(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument(sentence(parts...));
}

// Raises Python's RuntimeError.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error(sentence(parts...));
}

// Formats a shape: "[2, 12, 276, 64]".
inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "]";
  return text.str();
}

// ---- element types ------------------------------------------------------------------------------

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

// The kernels' enum for a tensor's element type; `op` and `name` appear in the error.
inline DType dtype_of(const Tensor& tensor, const char* op, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      check_value(false, op, ": ", name, " must be float32, bfloat16, float16 or float64, got ",
                  dtype_name(tensor.scalar_type()));
      return DType::f32;
  }
}

// Row statistics and accumulated gradients are kept in float32, or float64 for float64 inputs.
inline ScalarType statistics_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor as_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// ---- devices ------------------------------------------------------------------------------------

#if PMF_WITH_CUDA
#define PMF_CUDA_KERNEL(name) &::pmf::cuda::name  // declared in cuda/*/*_launchers.h
#else
#define PMF_CUDA_KERNEL(name) nullptr
#endif

// Launches a kernel of cuda/*/*_launchers.h on the tensor's device, on PyTorch's current stream:
//   run_on_cuda(x, "swiglu", PMF_CUDA_KERNEL(swiglu), params);
// `Launch` is const char* (*)(const Params&, void* stream), or std::nullptr_t without a kernel.
template <class Launch, class Params>
void run_on_cuda(const Tensor& tensor, const char* op, Launch launch, const Params& params) {
#if PMF_WITH_CUDA
  const int32_t device = tensor.get_device_index();
  if (const char* problem = cuda::device_problem(device)) fail(op, ": ", problem);
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    fail(op, ": this PyTorch was built without CUDA");
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (const char* problem = launch(params, stream)) fail(op, ": ", problem);
#else
  fail(op, ": this build of pmf has no CUDA kernels (", PMF_CUDA_FACTS,
       "); install the CUDA toolkit, so that nvcc is found, and reinstall pmf with PMF_CUDA=on, or "
       "move the tensors to the CPU");
#endif
}

// Whether the op's CUDA kernel handles these tensors.
inline bool takes_cuda_kernel(const Tensor& tensor) { return tensor.is_cuda(); }

// Formats a device: "cpu", "cuda:0".
inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : sentence("cuda:", tensor.get_device_index());
}

inline void check_same_device(const Tensor& first, const Tensor& second, const char* op,
                              const char* first_name, const char* second_name) {
  check_value(first.device() == second.device(), op, ": ", first_name, " and ", second_name,
              " must be on the same device, got ", device_of(first), " and ", device_of(second));
}

// ---- threads and scratch memory -----------------------------------------------------------------

// PyTorch's own thread pool, controlled by torch.set_num_threads().
inline ParallelFor torch_parallel() {
  ParallelFor parallel;
  parallel.run = [](void*, int64_t begin, int64_t end, int64_t grain,
                    void (*body)(void*, int64_t, int64_t), void* ctx) {
    torch::stable::parallel_for(begin, end, grain,
                                [&](int64_t first, int64_t last) { body(ctx, first, last); });
  };
  parallel.threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return parallel;
}

// Runs the kernel on the tensor's device:
//   run(x, "swiglu", &cpu::swiglu, PMF_CUDA_KERNEL(swiglu), params);
template <class Cpu, class Launch, class Params>
void run(const Tensor& tensor, const char* op, Cpu cpu, Launch launch, const Params& params) {
  if (takes_cuda_kernel(tensor)) return run_on_cuda(tensor, op, launch, params);
  cpu(params, torch_parallel());
}

constexpr int64_t kWorkspaceAlignment = 64;  // a cache line, and a 512-bit vector

// Uninitialised scratch memory from PyTorch's allocator, freed with the object.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes)
      : storage_(torch::stable::new_empty(like, {bytes + kWorkspaceAlignment}, ScalarType::Byte)) {}

  void* data() const {
    const auto address = reinterpret_cast<uintptr_t>(storage_.mutable_data_ptr());
    return reinterpret_cast<void*>((address + kWorkspaceAlignment - 1) / kWorkspaceAlignment *
                                   kWorkspaceAlignment);
  }

 private:
  Tensor storage_;
};

}  // namespace pmf

// Registers a file's functions for both devices, which share the checks:
//   PMF_IMPLEMENT(m) { m.impl("swiglu", TORCH_BOX(&pmf::swiglu)); }
#define PMF_IMPLEMENT(m)                                            \
  static void pmf_implement(torch::stable::detail::StableLibrary&); \
  STABLE_TORCH_LIBRARY_IMPL(pmf, CPU, m) { pmf_implement(m); }      \
  STABLE_TORCH_LIBRARY_IMPL(pmf, CUDA, m) { pmf_implement(m); }     \
  static void pmf_implement(torch::stable::detail::StableLibrary& m)
