// Shared by attention.cpp and attention_backward.cpp: argument checks and views.
#pragma once

#include <algorithm>

#include "cuda/attention/attention_launchers.h"
#include "ops/torch_shim.h"
#include "ops/views.h"
#include "pmf/attention.h"

namespace pmf {

// The view from sample `first` on; `bytes` is the element size.
template <class View>
View from_sample(View view, int64_t first, int64_t bytes) {
  using Bytes = std::conditional_t<std::is_same_v<View, ConstView4>, const char, char>;
  if (view.data != nullptr)
    view.data = static_cast<Bytes*>(view.data) + first * view.stride[0] * bytes;
  return view;
}

// An uninitialised [B, H, N, D] tensor in the memory order of `like`, so that [B, N, H, D] buffers
// viewed as [B, H, N, D] get outputs in the same layout without a copy. pmf/ops repeats this
// comparison for the shapes that it gives to torch.compile.
inline Tensor empty_in_order_of(const Tensor& like, int64_t tokens, int64_t width) {
  const int64_t batch = like.size(0), heads = like.size(1);
  if (like.stride(2) > like.stride(1)) {
    return torch::stable::transpose(torch::stable::new_empty(like, {batch, tokens, heads, width}),
                                    1, 2);
  }
  return torch::stable::new_empty(like, {batch, heads, tokens, width});
}

// Checks query, key and value and returns the problem's sizes.
inline AttentionShape check_attention(const Tensor& query, const Tensor& key, const Tensor& value) {
  for (const auto& [tensor, name] :
       {std::pair(&query, "query"), std::pair(&key, "key"), std::pair(&value, "value")}) {
    check_value(tensor->dim() == 4, "attention: ", name, " must be [batch, heads, N, D], got ",
                shape_of(*tensor));
    check_value(tensor->scalar_type() == query.scalar_type(),
                "attention: query, key and value must have the same dtype, got ",
                dtype_name(query.scalar_type()), " query and ", dtype_name(tensor->scalar_type()),
                " ", name);
    check_value(tensor->size(3) >= 1 && tensor->size(3) <= kAttentionMaxWidth, "attention: ", name,
                " must be [..., N, D] with 1 <= D <= ", kAttentionMaxWidth, ", got ",
                shape_of(*tensor));
    check_same_device(query, *tensor, "attention", "query", name);
  }
  dtype_of(query, "attention", "query");
  check_value(!takes_cuda_kernel(query) || query.scalar_type() != ScalarType::Double,
              "attention: the CUDA kernels take float32, bfloat16 and float16; convert, or call "
              "pmf.reference.attention, which takes float64 as well");

  AttentionShape shape;
  shape.batch = query.size(0), shape.heads = query.size(1), shape.queries = query.size(2),
  shape.width = query.size(3);
  shape.key_heads = key.size(1), shape.keys = key.size(2), shape.value_width = value.size(3);
  check_value(key.size(3) == shape.width,
              "attention: query and key must have the same width, got query ", shape_of(query),
              " and key ", shape_of(key));
  check_value(value.size(2) == shape.keys,
              "attention: key and value must have the same length, got key ", shape_of(key),
              " and value ", shape_of(value));
  check_value(key.size(0) == shape.batch && value.size(0) == shape.batch,
              "attention: query, key and value must have the same batch size, got ",
              shape_of(query), ", ", shape_of(key), " and ", shape_of(value));
  check_value(
      value.size(1) == shape.key_heads &&
          (shape.key_heads == 0 ? shape.heads == 0 : shape.heads % shape.key_heads == 0),
      "attention: key and value must have the same number of heads, a divisor of query's, got ",
      shape_of(query), ", ", shape_of(key), " and ", shape_of(value));
  return shape;
}

// A mask that broadcasts to [B, H, Nq, Nk]: boolean (true attends) or added to the scaled scores.
inline AttentionMask check_mask(const OptionalTensor& mask, const AttentionShape& shape,
                                const Tensor& query) {
  AttentionMask result;
  if (!mask) return result;
  const ScalarType type = mask->scalar_type();
  check_value(type == ScalarType::Bool || type == ScalarType::Float || type == query.scalar_type(),
              "attention: attn_mask must be bool, float32 or query's ",
              dtype_name(query.scalar_type()), ", got ", dtype_name(type));
  check_same_device(query, *mask, "attention", "query", "attn_mask");
  result.kind = type == ScalarType::Bool ? MaskKind::boolean : MaskKind::additive;
  if (result.kind == MaskKind::additive) result.dtype = dtype_of(*mask, "attention", "attn_mask");

  const int64_t sizes[4] = {shape.batch, shape.heads, shape.queries, shape.keys};
  const int64_t absent = 4 - mask->dim();  // leading dimensions that the mask omits
  bool fits = absent >= 0;
  for (int64_t d = 0; fits && d < mask->dim(); ++d) {
    const int64_t size = mask->size(d);
    fits = size == 1 || size == sizes[absent + d];
    result.view.stride[absent + d] = size == 1 ? 0 : mask->stride(d);
  }
  check_value(fits, "attention: attn_mask ", shape_of(*mask),
              " must broadcast to [batch, heads, queries, keys] = [", sizes[0], ", ", sizes[1],
              ", ", sizes[2], ", ", sizes[3], "]");
  result.view.data = mask->const_data_ptr();
  return result;
}

template <class Params>
Params shaped(const AttentionShape& shape) {
  Params params;
  params.shape = shape;
  return params;
}

// The non-tensor arguments of the raw ops.
struct AttentionOptions {
  OptionalTensor mask;
  bool is_causal;
  double scale;
  std::optional<int64_t> window_left, window_right;
  OptionalTensor cu_seqlens_q, cu_seqlens_k;
  bool allow_tf32;
};

inline AttentionWindow window_of(const AttentionOptions& options) {
  const auto side = [](const std::optional<int64_t>& keys) {
    return keys ? std::clamp(*keys, -kUnbounded, kUnbounded) : kUnbounded;
  };
  AttentionWindow window{side(options.window_left), side(options.window_right)};
  if (options.is_causal) window.right = std::min<int64_t>(window.right, 0);
  return window;
}

// Checks that packed offsets ascend from 0 to `rows`; returns them as int64 on the CPU.
inline Tensor check_offsets(const Tensor& offsets, const char* name, int64_t rows,
                            const Tensor& query) {
  const ScalarType type = offsets.scalar_type();
  check_value(offsets.dim() == 1 && offsets.size(0) >= 1 &&
                  (type == ScalarType::Int || type == ScalarType::Long),
              "attention_varlen: ", name, " must be int32 or int64 [sequences + 1], got ",
              shape_of(offsets), " ", dtype_name(type));
  check_value(offsets.is_cpu() || offsets.device() == query.device(), "attention_varlen: ", name,
              " must be on the CPU or with query on ", device_of(query), ", got ",
              device_of(offsets));
  const Tensor whole = torch::stable::contiguous(
      torch::stable::to(offsets, ScalarType::Long, std::nullopt,
                        torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  const auto* at = static_cast<const int64_t*>(whole.const_data_ptr());
  const int64_t last = whole.size(0) - 1;
  check_value(at[0] == 0 && at[last] == rows, "attention_varlen: ", name,
              " must begin with 0 and end with the number of rows, ", rows, ", got ", at[0], " to ",
              at[last]);
  for (int64_t i = 0; i < last; ++i) {
    check_value(at[i] <= at[i + 1], "attention_varlen: ", name, " must ascend, got ", at[i],
                " before ", at[i + 1], " at ", i);
  }
  return whole;
}

// Copies offsets to memory that the kernels for query's device can read.
inline Tensor offsets_for(const Tensor& query, const Tensor& offsets) {
  if (!takes_cuda_kernel(query)) return offsets;
  Tensor there = torch::stable::new_empty(query, {offsets.size(0)}, ScalarType::Long);
  torch::stable::copy_(there, offsets, /*non_blocking=*/true);
  return there;
}

// The sequences and the tensors that own their offsets while a kernel runs.
struct Offsets {
  Tensor queries, keys;
  AttentionSequences view;

  Offsets(const AttentionOptions& options, const AttentionShape& shape, const Tensor& query) {
    if (!options.cu_seqlens_q && !options.cu_seqlens_k) return;
    check_value(
        options.cu_seqlens_q && options.cu_seqlens_k && !options.mask && shape.batch == 1,
        "attention_varlen: packed sequences need offsets of queries and keys, a batch of one, and "
        "no attn_mask");
    queries = check_offsets(*options.cu_seqlens_q, "cu_seqlens_q", shape.queries, query);
    keys = check_offsets(*options.cu_seqlens_k, "cu_seqlens_k", shape.keys, query);
    check_value(
        queries.size(0) == keys.size(0),
        "attention_varlen: cu_seqlens_q and cu_seqlens_k must have the same number of sequences, "
        "got ",
        queries.size(0) - 1, " and ", keys.size(0) - 1);
    queries = offsets_for(query, queries), keys = offsets_for(query, keys);
    view.count = queries.size(0) - 1;
    view.queries = static_cast<const int64_t*>(queries.const_data_ptr());
    view.keys = static_cast<const int64_t*>(keys.const_data_ptr());
  }
};

// A tangent is shaped like its primal or like the first n samples of it; `samples` is -1 until the
// first tangent sets n. Absent tangents are zero.
inline ConstView4 check_tangent(const OptionalTensor& tangent, const Tensor& primal,
                                const char* name, int64_t* samples) {
  if (!tangent) return {};
  bool fits = tangent->dim() == 4 && tangent->size(0) <= primal.size(0);
  for (int d = 1; fits && d < 4; ++d) fits = tangent->size(d) == primal.size(d);
  check_value(fits, "attention_jvp: ", name, "_t must have ", name, "'s shape ", shape_of(primal),
              ", got ", shape_of(*tangent));
  check_value(tangent->scalar_type() == primal.scalar_type(), "attention_jvp: ", name,
              "_t must have ", name, "'s dtype ", dtype_name(primal.scalar_type()), ", got ",
              dtype_name(tangent->scalar_type()));
  check_same_device(primal, *tangent, "attention_jvp", name, "its tangent");
  check_value(*samples < 0 || *samples == tangent->size(0),
              "attention_jvp: all tangents must cover the same first samples, got ", *samples,
              " and ", tangent->size(0));
  *samples = tangent->size(0);
  return const_view4(*tangent);
}

}  // namespace pmf
