// torch.ops.pmf: every schema of the library. Each op's own file validates, allocates and launches.
#include "ops/torch_shim.h"
#include "pmf/introspection.h"

// clang-format off
STABLE_TORCH_LIBRARY(pmf, m) {
  // Attention, on [B, H, N, D] views; lse is the log-sum-exp of each row, all that the backward needs from the forward.
  // Query i attends keys i - window_left to i + window_right; offsets cut [1, H, T, D] into sequences. allow_tf32: fp32 on CUDA.
  m.def("attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale, int? window_left=None, int? window_right=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, bool allow_tf32=False) -> (Tensor out, Tensor lse)");
  m.def("attention_jvp_forward(Tensor query, Tensor key, Tensor value, Tensor? query_t, Tensor? key_t, Tensor? value_t, Tensor? attn_mask, bool is_causal, float scale, int? window_left=None, int? window_right=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, bool allow_tf32=False) -> (Tensor out, Tensor lse, Tensor out_t, Tensor lse_t)");
  m.def("attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor lse, Tensor? attn_mask, bool is_causal, float scale, int? window_left=None, int? window_right=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? grad_lse=None, bool allow_tf32=False) -> (Tensor, Tensor, Tensor)");
  m.def("attention_jvp_backward(Tensor? grad, Tensor grad_t, Tensor query, Tensor key, Tensor value, Tensor? query_t, Tensor? key_t, Tensor? value_t, Tensor lse, Tensor? attn_mask, bool is_causal, float scale, int? window_left=None, int? window_right=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? grad_lse=None, Tensor? grad_lse_t=None, bool allow_tf32=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Replaces a device's table of tuned plans: rows of 11 numbers, as pmf/plans.py has them; device -1 is that of dry runs.
  m.def("set_attention_plans(int device, int[] rows) -> ()");

  // Elementwise pairs. The _jvp forms take tangents of the first n <= B samples.
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_jvp(Tensor x, Tensor weight, Tensor x_t, Tensor? weight_t, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_jvp_backward(Tensor? grad, Tensor grad_t, Tensor x, Tensor weight, Tensor x_t, Tensor? weight_t, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_jvp(Tensor gate, Tensor up, Tensor gate_t, Tensor up_t) -> (Tensor, Tensor)");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("swiglu_jvp_backward(Tensor? grad, Tensor grad_t, Tensor gate, Tensor up, Tensor gate_t, Tensor up_t) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gated_residual(Tensor x, Tensor branch, Tensor gate) -> Tensor");
  m.def("gated_residual_jvp(Tensor x, Tensor branch, Tensor gate, Tensor x_t, Tensor branch_t, Tensor? gate_t) -> (Tensor, Tensor)");
  m.def("gated_residual_backward(Tensor grad, Tensor branch, Tensor gate) -> (Tensor, Tensor)");
  m.def("gated_residual_jvp_backward(Tensor? grad, Tensor grad_t, Tensor branch, Tensor gate, Tensor branch_t, Tensor? gate_t) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("rotary_qk_norm(Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)");
  m.def("rotary_qk_norm_jvp(Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor cos, Tensor sin, Tensor query_t, Tensor key_t, Tensor? query_weight_t, Tensor? key_weight_t, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("rotary_qk_norm_backward(Tensor grad_query, Tensor grad_key, Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("rotary_qk_norm_jvp_backward(Tensor? grad_query, Tensor? grad_key, Tensor grad_query_t, Tensor grad_key_t, Tensor query, Tensor key, Tensor query_weight, Tensor key_weight, Tensor cos, Tensor sin, Tensor query_t, Tensor key_t, Tensor? query_weight_t, Tensor? key_weight_t, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Patch embedding; `hidden` is W_down's output, saved for the backward.
  m.def("patch_embed(Tensor images, Tensor weight_down, Tensor? bias_down, Tensor weight_up, Tensor? bias_up, Tensor? position, Tensor? prefix) -> (Tensor tokens, Tensor hidden)");
  m.def("patch_embed_jvp(Tensor images, Tensor weight_down, Tensor? bias_down, Tensor weight_up, Tensor? bias_up, Tensor? position, Tensor? prefix, Tensor images_t, Tensor? prefix_t) -> (Tensor tokens, Tensor tokens_t, Tensor hidden, Tensor hidden_t)");
  m.def("patch_embed_backward(Tensor grad, Tensor images, Tensor weight_down, Tensor weight_up, Tensor hidden, bool images_need_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("patch_embed_jvp_backward(Tensor? grad, Tensor grad_t, Tensor images, Tensor images_t, Tensor weight_down, Tensor weight_up, Tensor hidden, Tensor hidden_t, bool images_need_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Tokens to images and their velocity; the backward reads dtype and token shape of `tokens` alone, t is fp32 or fp64.
  m.def("patch_velocity(Tensor tokens, Tensor images, Tensor t, float floor) -> Tensor");
  m.def("patch_velocity_jvp(Tensor tokens, Tensor images, Tensor t, Tensor tokens_t, Tensor images_t, Tensor t_t, float floor) -> (Tensor, Tensor)");
  m.def("patch_velocity_backward(Tensor grad, Tensor tokens, Tensor t, float floor) -> Tensor");

  // Orthogonalisation of every matrix in a list; coefficients are a, b, c of each step, method direct, gram or auto.
  m.def("newton_schulz(Tensor[] matrices, float[] coefficients, str method, ScalarType dtype, bool allow_tf32=False) -> Tensor[]");
  m.def("newton_schulz_segments(int rows, int columns, float[] coefficients, str method, ScalarType dtype, bool allow_tf32=False) -> int[]");

  // a b and c + a b of matrices in CPU memory, by the faster of PyTorch's libraries.
  m.def("product(Tensor left, Tensor right) -> Tensor");
  m.def("add_product(Tensor add, Tensor left, Tensor right) -> Tensor");

  // An optimizer's step on CUDA: `step` is incremented; learning rate and weight decay may be tensors; masters are optional.
  m.def("muon_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] masters, Tensor(d!) step, Tensor? lr, float lr_value, Tensor? weight_decay, float weight_decay_value, float momentum, bool nesterov, bool bias_correction, float[] scales, float[] coefficients, str method, ScalarType dtype, bool allow_tf32) -> ()");
  m.def("adam_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] squares, Tensor(d!)[] masters, Tensor(e!) step, Tensor? lr, float lr_value, Tensor? weight_decay, float weight_decay_value, float beta1, float beta2, float eps, bool nesterov) -> ()");

  // Moving averages a <- a + w (p - a) on CUDA: those of all parameters by the first weight, then by the next.
  m.def("ema_update(Tensor(a!)[] averages, Tensor[] parameters, float[] weights) -> ()");

  // The level the CPU kernels run at; a name sets it first ("auto": the best available).
  m.def("cpu_level(str request) -> str");
  m.def("multiplied_by_pytorch(ScalarType dtype) -> bool");
}
// clang-format on

namespace pmf {
namespace {

std::string set_and_get_cpu_level(std::string request) {
  check_value(request.empty() || set_cpu_level(request.c_str()), "cpu_level: '", request,
              "' is not a level of this processor; use portable, avx2, avx512, avx512_bf16 or "
              "amx_bf16 up to ",
              best_cpu_level(), ", or auto");
  return cpu_level();
}

}  // namespace
}  // namespace pmf

// No tensor argument selects a device.
STABLE_TORCH_LIBRARY_IMPL(pmf, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&pmf::set_and_get_cpu_level));
}
