// torch.ops.pmf.attention_forward and attention_jvp_forward: validate, allocate, launch.
#include "ops/attention_binding.h"

namespace pmf {
namespace {

void launch(AttentionParams params, const Tensor& like) {
  const bool gpu = takes_cuda_kernel(like);
  const int64_t bytes =
      gpu ? 0 : cpu::attention_forward_workspace_bytes(params, torch_parallel().threads);
  const Workspace workspace(like, bytes);
  params.workspace = workspace.data();
  run(like, "attention", &cpu::attention_forward, PMF_CUDA_KERNEL(attention_forward), params);
}

// The parameters of a call except its tangents; they point to `out` and `lse`.
struct Forward {
  AttentionParams params;
  Offsets offsets;
  Tensor out, lse;

  Forward(const Tensor& query, const Tensor& key, const Tensor& value,
          const AttentionOptions& options)
      : params(shaped<AttentionParams>(check_attention(query, key, value))),
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
    out = empty_in_order_of(query, s.queries, s.value_width);
    lse = torch::stable::new_empty(query, {s.batch, s.heads, s.queries}, statistics_dtype(query));
    params.out = view4(out);
    params.lse = lse.mutable_data_ptr();
  }
};

std::tuple<Tensor, Tensor> attention_forward(Tensor query, Tensor key, Tensor value,
                                             OptionalTensor attn_mask, bool is_causal, double scale,
                                             std::optional<int64_t> window_left,
                                             std::optional<int64_t> window_right,
                                             OptionalTensor cu_seqlens_q,
                                             OptionalTensor cu_seqlens_k, bool allow_tf32) {
  const Forward forward(query, key, value,
                        {attn_mask, is_causal, scale, window_left, window_right, cu_seqlens_q,
                         cu_seqlens_k, allow_tf32});
  launch(forward.params, query);
  return {forward.out, forward.lse};
}

// Tangents may cover the first n samples only; the rest then runs through the plain forward on the
// same buffers. Training needs this: only some samples of a batch have a tangent.
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_jvp_forward(
    Tensor query, Tensor key, Tensor value, OptionalTensor query_t, OptionalTensor key_t,
    OptionalTensor value_t, OptionalTensor attn_mask, bool is_causal, double scale,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, bool allow_tf32) {
  const Forward forward(query, key, value,
                        {attn_mask, is_causal, scale, window_left, window_right, cu_seqlens_q,
                         cu_seqlens_k, allow_tf32});
  AttentionParams params = forward.params;
  const AttentionShape shape = params.shape;
  int64_t samples = -1;
  params.query_t = check_tangent(query_t, query, "query", &samples);
  params.key_t = check_tangent(key_t, key, "key", &samples);
  params.value_t = check_tangent(value_t, value, "value", &samples);
  if (samples < 0) samples = shape.batch;

  const Tensor out_t = empty_in_order_of(torch::stable::narrow(query, 0, 0, samples), shape.queries,
                                         shape.value_width);
  params.shape.batch = samples;
  const Tensor lse_t = torch::stable::new_empty(query, {samples, shape.heads, shape.queries},
                                                statistics_dtype(query));
  params.out_t = view4(out_t);
  params.lse_t = lse_t.mutable_data_ptr();
  launch(params, query);

  if (samples < shape.batch) {
    AttentionParams rest = forward.params;
    rest.shape.batch = shape.batch - samples;
    const int64_t bytes = dtype_bytes(rest.dtype);
    rest.query = from_sample(rest.query, samples, bytes);
    rest.key = from_sample(rest.key, samples, bytes);
    rest.value = from_sample(rest.value, samples, bytes);
    rest.mask.view = from_sample(rest.mask.view, samples, mask_element_bytes(rest.mask));
    rest.out = from_sample(rest.out, samples, bytes);
    rest.lse =
        static_cast<char*>(rest.lse) + samples * shape.heads * shape.queries *
                                           (statistics_dtype(query) == ScalarType::Double ? 8 : 4);
    launch(rest, query);
  }
  return {forward.out, forward.lse, out_t, lse_t};
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) {
  m.impl("attention_forward", TORCH_BOX(&pmf::attention_forward));
  m.impl("attention_jvp_forward", TORCH_BOX(&pmf::attention_jvp_forward));
}
