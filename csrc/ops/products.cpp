// Choose dtype and library of matrix products on the CPU; products.h gives the reasons.
#include "ops/products.h"

#include <cstdlib>
#include <cstring>

#include "cpu/common/dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// oneDNN's entry points in PyTorch's C interface. Weak: a PyTorch without oneDNN lacks them.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attribute,
    const double** scalars, int64_t scalar_count, const char** algorithm, AtenTensorHandle* result);
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise_binary(
    AtenTensorHandle x, AtenTensorHandle other, AtenTensorHandle weight, AtenTensorHandle* bias,
    const char* attribute, AtenTensorHandle* result);
}

// Thread limits of the calling thread. Weak: a PyTorch without MKL or OpenMP lacks them.
extern "C" {
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);  // returns the previous value
__attribute__((weak)) int omp_get_max_threads();
__attribute__((weak)) void omp_set_num_threads(int threads);
}

namespace pmf {
namespace {

// A processor with AVX-512 that MKL does not use. PMF_FLOAT32_PRODUCTS overrides: onednn or
// pytorch.
bool detect() {
#if defined(__x86_64__)
  if (aoti_torch_cpu__linear_pointwise == nullptr ||
      aoti_torch_cpu__linear_pointwise_binary == nullptr) {
    return false;
  }
  if (const char* chosen = std::getenv("PMF_FLOAT32_PRODUCTS")) {
    if (std::strcmp(chosen, "onednn") == 0) return true;
    if (std::strcmp(chosen, "pytorch") == 0) return false;
  }
  unsigned int largest = 0, vendor[3] = {};  // the name's letters come in EBX, EDX, ECX
  if (__get_cpuid(0, &largest, &vendor[0], &vendor[2], &vendor[1]) == 0) return false;
  __builtin_cpu_init();
  return std::memcmp(vendor, "GenuineIntel", sizeof(vendor)) != 0 &&
         __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

bool products_by_onednn() {
  static const bool faster = detect();
  return faster;
}

bool is_float_matrix(const Tensor& x) {
  return x.is_cpu() && x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.numel() > 0;
}

}  // namespace

ScalarType product_dtype(ScalarType dtype) {
  const bool multiplies_bf16 = cpu::level() >= cpu::Level::avx512_bf16;
  const bool narrow =
      dtype == ScalarType::Half || (dtype == ScalarType::BFloat16 && !multiplies_bf16);
  return narrow ? ScalarType::Float : dtype;
}

bool multiplied_by_pytorch(ScalarType dtype) {
  return product_dtype(dtype) == dtype && !(dtype == ScalarType::Float && products_by_onednn());
}

bool prefers_onednn(const Tensor& left, const Tensor& right) {
  return products_by_onednn() && is_float_matrix(left) && is_float_matrix(right);
}

namespace {

// `right` [K, N] as oneDNN's linear layer needs it: transposed, and without gaps between rows or
// columns, because oneDNN handles gaps only in its reference loops, a thousand times slower.
Tensor weight_of(const Tensor& right) {
  const int64_t rows = right.size(0), columns = right.size(1);
  const bool by_rows = right.stride(1) == 1 && right.stride(0) == columns;
  const bool by_columns = right.stride(0) == 1 && right.stride(1) == rows;
  Tensor dense = by_rows || by_columns ? right : torch::stable::contiguous(right);
  return torch::stable::transpose(dense, 0, 1);
}

}  // namespace

Tensor onednn_product(const Tensor& left, const Tensor& right, const Tensor* bias) {
  AtenTensorHandle result = nullptr, handle = bias == nullptr ? nullptr : bias->get();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(
      left.get(), weight_of(right).get(), bias == nullptr ? nullptr : &handle, "none", nullptr, 0,
      nullptr, &result));
  return Tensor(result);
}

Tensor onednn_add_product(const Tensor& add, const Tensor& left, const Tensor& right) {
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise_binary(
      left.get(), add.get(), weight_of(right).get(), nullptr, "add", &result));
  return Tensor(result);
}

SingleThread::SingleThread() {
  // PyTorch sets both counts when a thread first queries its own: trigger that now, not later.
  torch::stable::get_num_threads();
  if (MKL_Set_Num_Threads_Local != nullptr) mkl_ = MKL_Set_Num_Threads_Local(1);
  if (omp_get_max_threads != nullptr && omp_set_num_threads != nullptr) {
    openmp_ = omp_get_max_threads();
    omp_set_num_threads(1);
  }
}

SingleThread::~SingleThread() {
  if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(mkl_);
  if (openmp_ != 0) omp_set_num_threads(openmp_);
}

namespace {

// torch.ops.pmf.product and add_product: called from Python instead of torch.mm and torch.addmm.

void check_matrices(const Tensor& left, const Tensor& right, const char* op) {
  if (!left.is_cpu()) fail(op, ": for tensors on the CPU; on a GPU use torch.mm or torch.addmm");
  check_same_device(left, right, op, "left", "right");
  check_value(left.dim() == 2 && right.dim() == 2 && left.size(1) == right.size(0), op,
              ": needs matrices [M, K] and [K, N], got ", shape_of(left), " and ", shape_of(right));
  check_value(left.scalar_type() == right.scalar_type(), op,
              ": needs matrices of the same dtype, got ", dtype_name(left.scalar_type()), " and ",
              dtype_name(right.scalar_type()));
}

Tensor product(Tensor left, Tensor right) {
  check_matrices(left, right, "product");
  const ScalarType given = left.scalar_type(), dtype = product_dtype(given);
  if (dtype != given)
    return as_dtype(product(as_dtype(left, dtype), as_dtype(right, dtype)), given);
  if (prefers_onednn(left, right)) return onednn_product(left, right);
  Tensor result = torch::stable::new_empty(left, {left.size(0), right.size(1)});
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
  return result;
}

Tensor add_product(Tensor add, Tensor left, Tensor right) {
  check_matrices(left, right, "add_product");
  check_value(add.dim() == 2 && add.size(0) == left.size(0) && add.size(1) == right.size(1),
              "add_product: the addend must be [", left.size(0), ", ", right.size(1), "], got ",
              shape_of(add));
  check_value(add.scalar_type() == left.scalar_type(), "add_product: the addend must be ",
              dtype_name(left.scalar_type()), ", got ", dtype_name(add.scalar_type()));
  check_same_device(left, add, "add_product", "left", "the addend");
  const ScalarType given = left.scalar_type(), dtype = product_dtype(given);
  if (dtype != given) {
    return as_dtype(
        add_product(as_dtype(add, dtype), as_dtype(left, dtype), as_dtype(right, dtype)), given);
  }
  if (prefers_onednn(left, right)) return onednn_add_product(add, left, right);
  Tensor result = torch::stable::new_empty(left, {left.size(0), right.size(1)});
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(result.get(), add.get(), left.get(), right.get(), 1, 1));
  return result;
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) {
  m.impl("product", TORCH_BOX(&pmf::product));
  m.impl("add_product", TORCH_BOX(&pmf::add_product));
}

// No tensor argument selects a device.
STABLE_TORCH_LIBRARY_IMPL(pmf, CompositeExplicitAutograd, m) {
  m.impl("multiplied_by_pytorch", TORCH_BOX(&pmf::multiplied_by_pytorch));
}
