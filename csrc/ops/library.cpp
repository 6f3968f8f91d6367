// torch.ops.pmf: every schema of the library. Each op's own file validates, allocates and launches.
#include "ops/torch_shim.h"
#include "pmf/introspection.h"

// clang-format off
STABLE_TORCH_LIBRARY(pmf, m) {
  // Attention, on [B, H, N, D] views; lse and row_t are the row statistics that the backward needs.
  m.def("attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale) -> (Tensor out, Tensor lse)");
  m.def("attention_jvp_forward(Tensor query, Tensor key, Tensor value, Tensor? query_t, Tensor? key_t, Tensor? value_t, Tensor? attn_mask, bool is_causal, float scale) -> (Tensor out, Tensor out_t, Tensor lse, Tensor row_t)");
  m.def("attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? attn_mask, bool is_causal, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("attention_jvp_backward(Tensor? grad, Tensor grad_t, Tensor query, Tensor key, Tensor value, Tensor? query_t, Tensor? key_t, Tensor? value_t, Tensor out, Tensor out_t, Tensor lse, Tensor row_t, Tensor? attn_mask, bool is_causal, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Elementwise pairs. The _jvp forms take tangents of the first n <= B samples.

  // The level the CPU kernels run at; a name asks for it first ("auto": the best this processor has).
  m.def("cpu_level(str request) -> str");
}
// clang-format on

namespace pmf {
namespace {

std::string set_and_get_cpu_level(std::string request) {
  check_value(request.empty() || set_cpu_level(request.c_str()), "cpu_level: '", request,
              "' is no level of this processor; use portable, avx2, avx512 or avx512_bf16 up to ",
              best_cpu_level(), ", or auto");
  return cpu_level();
}

}  // namespace
}  // namespace pmf

// No tensor decides where this runs.
STABLE_TORCH_LIBRARY_IMPL(pmf, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&pmf::set_and_get_cpu_level));
}
