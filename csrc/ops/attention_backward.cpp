// torch.ops.pmf.attention_backward and attention_jvp_backward: validate, allocate, launch.
#include "pmf/attention_backward.h"

#include "ops/attention_binding.h"

namespace pmf {
namespace {

// Checks a gradient of out or out_t and returns its view.
ConstView4 check_grad(const Tensor& grad, const Tensor& query, const AttentionShape& shape,
                      const char* name) {
  check_value(grad.dim() == 4 && grad.size(0) == shape.batch && grad.size(1) == shape.heads &&
                  grad.size(2) == shape.queries && grad.size(3) == shape.value_width,
              "attention_backward: ", name, " must have the output's shape [", shape.batch, ", ",
              shape.heads, ", ", shape.queries, ", ", shape.value_width, "], got ", shape_of(grad));
  check_value(grad.scalar_type() == query.scalar_type(), "attention_backward: ", name,
              " must have query's dtype ", dtype_name(query.scalar_type()), ", got ",
              dtype_name(grad.scalar_type()));
  check_same_device(query, grad, "attention_backward", "query", name);
  return const_view4(grad);
}

// A contiguous gradient of lse or lse_t; `kept` owns the memory that the pointer refers to.
const void* check_lse_grad(const OptionalTensor& grad, const Tensor& lse, const char* name,
                           Tensor* kept) {
  if (!grad) return nullptr;
  bool fits = grad->dim() == lse.dim() && grad->scalar_type() == lse.scalar_type();
  for (int64_t d = 0; fits && d < lse.dim(); ++d) fits = grad->size(d) == lse.size(d);
  check_value(fits, "attention_backward: ", name, " must have lse's shape ", shape_of(lse),
              " and dtype, got ", shape_of(*grad));
  check_same_device(lse, *grad, "attention_backward", "lse", name);
  *kept = torch::stable::contiguous(*grad);
  return kept->const_data_ptr();
}

// What both backwards share; allocates the gradients of query, key and value.
struct Backward {
  AttentionBackwardParams params;
  Offsets offsets;
  Tensor lse, grad_lse, grad_lse_t, grad_query, grad_key, grad_value;

  Backward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& saved_lse,
           const AttentionOptions& options)
      : params(shaped<AttentionBackwardParams>(check_attention(query, key, value))),
        offsets(options, params.shape, query) {
    params.dtype = dtype_of(query, "attention", "query");
    params.scale = options.scale;
    params.window = window_of(options);
    params.sequences = offsets.view;
    params.allow_tf32 = options.allow_tf32;
    params.mask = check_mask(options.mask, params.shape, query);
    params.query = const_view4(query);
    params.key = const_view4(key);
    params.value = const_view4(value);

    const AttentionShape& s = params.shape;
    check_value(saved_lse.dim() == 3 && saved_lse.size(0) == s.batch &&
                    saved_lse.size(1) == s.heads && saved_lse.size(2) == s.queries &&
                    saved_lse.scalar_type() == statistics_dtype(query),
                "attention_backward: lse must be the forward's, [", s.batch, ", ", s.heads, ", ",
                s.queries, "] ", dtype_name(statistics_dtype(query)), ", got ", shape_of(saved_lse),
                " ", dtype_name(saved_lse.scalar_type()));
    check_same_device(query, saved_lse, "attention_backward", "query", "lse");
    lse = torch::stable::contiguous(saved_lse);
    params.lse = lse.const_data_ptr();
    grad_query = empty_in_order_of(query, s.queries, s.width);
    grad_key = empty_in_order_of(key, s.keys, s.width);
    grad_value = empty_in_order_of(value, s.keys, s.value_width);
    params.grad_query = view4(grad_query);
    params.grad_key = view4(grad_key);
    params.grad_value = view4(grad_value);
  }

  void launch() {
    const int64_t bytes = takes_cuda_kernel(lse) ? cuda::attention_backward_workspace_bytes(params)
                                                 : cpu::attention_backward_workspace_bytes(
                                                       params, torch_parallel().threads);
    const Workspace workspace(lse, bytes);
    params.workspace = workspace.data();
    run(lse, "attention_backward", &cpu::attention_backward, PMF_CUDA_KERNEL(attention_backward),
        params);
  }
};

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    Tensor grad, Tensor query, Tensor key, Tensor value, Tensor lse, OptionalTensor attn_mask,
    bool is_causal, double scale, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor grad_lse, bool allow_tf32) {
  Backward backward(query, key, value, lse,
                    {attn_mask, is_causal, scale, window_left, window_right, cu_seqlens_q,
                     cu_seqlens_k, allow_tf32});
  backward.params.grad = check_grad(grad, query, backward.params.shape, "grad");
  backward.params.grad_lse = check_lse_grad(grad_lse, backward.lse, "grad_lse", &backward.grad_lse);
  backward.launch();
  return {backward.grad_query, backward.grad_key, backward.grad_value};
}

// Allocates the gradient of a tangent; for an absent tangent, an empty tensor that costs no work.
Tensor tangent_grad(const OptionalTensor& tangent, const Tensor& primal, View4* view) {
  if (!tangent) return torch::stable::new_empty(primal, {0});
  const Tensor grad = empty_in_order_of(*tangent, primal.size(2), primal.size(3));
  *view = view4(grad);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_jvp_backward(
    OptionalTensor grad, Tensor grad_t, Tensor query, Tensor key, Tensor value,
    OptionalTensor query_t, OptionalTensor key_t, OptionalTensor value_t, Tensor lse,
    OptionalTensor attn_mask, bool is_causal, double scale, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor grad_lse, OptionalTensor grad_lse_t, bool allow_tf32) {
  Backward backward(query, key, value, lse,
                    {attn_mask, is_causal, scale, window_left, window_right, cu_seqlens_q,
                     cu_seqlens_k, allow_tf32});
  AttentionBackwardParams& params = backward.params;
  if (grad) params.grad = check_grad(*grad, query, params.shape, "grad");
  params.grad_t = check_grad(grad_t, query, params.shape, "grad_t");
  params.grad_lse = check_lse_grad(grad_lse, backward.lse, "grad_lse", &backward.grad_lse);
  params.grad_lse_t = check_lse_grad(grad_lse_t, backward.lse, "grad_lse_t", &backward.grad_lse_t);
  int64_t samples = -1;
  params.query_t = check_tangent(query_t, query, "query", &samples);
  params.key_t = check_tangent(key_t, key, "key", &samples);
  params.value_t = check_tangent(value_t, value, "value", &samples);
  check_value(samples < 0 || samples == params.shape.batch,
              "attention_jvp: the gradient through a tangent needs tangents of all ",
              params.shape.batch, " samples, got ", samples,
              "; pass detach_tangent=True or call attention_jvp on these samples alone");
  const Tensor grad_query_t = tangent_grad(query_t, query, &params.grad_query_t);
  const Tensor grad_key_t = tangent_grad(key_t, key, &params.grad_key_t);
  const Tensor grad_value_t = tangent_grad(value_t, value, &params.grad_value_t);
  backward.launch();
  return {backward.grad_query, backward.grad_key, backward.grad_value,
          grad_query_t,        grad_key_t,        grad_value_t};
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) {
  m.impl("attention_backward", TORCH_BOX(&pmf::attention_backward));
  m.impl("attention_jvp_backward", TORCH_BOX(&pmf::attention_jvp_backward));
}
