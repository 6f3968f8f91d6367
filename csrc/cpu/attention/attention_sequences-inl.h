// Packed sequences, one at a time: each is a separate attention problem on views of its rows.
//
// Work is distributed over all sequences at once, but each result is bit-identical to that of the
// sequence alone.
#pragma once

#include "cpu/common/simd-inl.h"
#include "pmf/attention_backward.h"

namespace pmf::cpu::PMF_LEVEL {

// ---- Rows ---------------------------------------------------------------------------------------

inline ConstView4 skip_rows(ConstView4 view, int64_t rows, DType dtype) {
  if (view.data == nullptr) return view;
  view.data = static_cast<const char*>(view.data) + rows * view.stride[2] * dtype_bytes(dtype);
  return view;
}
inline View4 skip_rows(View4 view, int64_t rows, DType dtype) {
  if (view.data == nullptr) return view;
  view.data = static_cast<char*>(view.data) + rows * view.stride[2] * dtype_bytes(dtype);
  return view;
}

// Row statistics, starting at row `rows`.
inline const void* skip_statistics(const void* data, int64_t rows, DType dtype) {
  if (data == nullptr) return data;
  return static_cast<const char*>(data) + rows * (dtype == DType::f64 ? 8 : 4);
}
inline void* skip_statistics(void* data, int64_t rows, DType dtype) {
  return const_cast<void*>(skip_statistics(static_cast<const void*>(data), rows, dtype));
}

// The stride of a head in lse, in elements.
template <typename Params>
inline int64_t lse_stride(const Params& params) {
  return params.lse_stride == 0 ? params.shape.queries : params.lse_stride;
}

// ---- Sequences ----------------------------------------------------------------------------------

template <typename View, int kCount>
inline void skip_rows_of(View* const (&views)[kCount], int64_t rows, DType dtype) {
  for (View* view : views) *view = skip_rows(*view, rows, dtype);
}

inline void skip_to(AttentionParams& p, int64_t query, int64_t key) {
  skip_rows_of({&p.query, &p.query_t}, query, p.dtype);
  skip_rows_of({&p.out, &p.out_t}, query, p.dtype);
  skip_rows_of({&p.key, &p.value, &p.key_t, &p.value_t}, key, p.dtype);
  p.lse = skip_statistics(p.lse, query, p.dtype);
  p.lse_t = skip_statistics(p.lse_t, query, p.dtype);
}

inline void skip_to(AttentionBackwardParams& p, int64_t query, int64_t key) {
  skip_rows_of({&p.query, &p.query_t, &p.grad, &p.grad_t}, query, p.dtype);
  skip_rows_of({&p.grad_query, &p.grad_query_t}, query, p.dtype);
  skip_rows_of({&p.key, &p.value, &p.key_t, &p.value_t}, key, p.dtype);
  skip_rows_of({&p.grad_key, &p.grad_value, &p.grad_key_t, &p.grad_value_t}, key, p.dtype);
  p.lse = skip_statistics(p.lse, query, p.dtype);
  p.grad_lse = skip_statistics(p.grad_lse, query, p.dtype);
  p.grad_lse_t = skip_statistics(p.grad_lse_t, query, p.dtype);
}

// The number of problems in a call: its sequences, or one that covers all samples.
template <typename Params>
inline int64_t problem_count(const Params& params) {
  return params.sequences.queries == nullptr ? 1 : params.sequences.count;
}

template <typename Params>
inline Params problem_of(const Params& params, int64_t index) {
  if (params.sequences.queries == nullptr) return params;
  const int64_t* const queries = params.sequences.queries + index;
  const int64_t* const keys = params.sequences.keys + index;
  Params one = params;
  one.lse_stride = lse_stride(params);
  one.shape.queries = queries[1] - queries[0];
  one.shape.keys = keys[1] - keys[0];
  one.sequences = {};
  skip_to(one, queries[0], keys[0]);
  return one;
}

// ---- Windows ------------------------------------------------------------------------------------

// Keys [begin, end) that any query in [first, last] sees; `begin` is rounded down to `align`.
struct KeyRange {
  int64_t begin, end;
};
inline KeyRange keys_in_window(const AttentionWindow& window, int64_t first, int64_t last,
                               int64_t keys, int64_t align) {
  const int64_t end = max64(0, min64(keys, last + window.right + 1));
  const int64_t begin = max64(0, min64(end, first - window.left));
  return {begin / align * align, end};
}

// Whether the window hides some key of a tile from some query of the tile.
template <typename Place>
inline bool crosses_window(const AttentionWindow& window, const Place& place) {
  return place.key + place.keys - 1 > place.query + window.right ||
         place.key < place.query + place.queries - 1 - window.left;
}

}  // namespace pmf::cpu::PMF_LEVEL
