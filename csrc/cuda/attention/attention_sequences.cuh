// Maps thread blocks to the rows of packed sequences, and queries to the keys that they see.
#pragma once

#include "cuda/attention/attention_window.h"
#include "cuda/common/cuda.cuh"
#include "pmf/attention.h"

namespace pmf::cuda {

// ---- packed sequences ---------------------------------------------------------------------------

// A sequence's position in the tensors and its length. An unpacked sample is a single sequence.
struct Sequence {
  int index, query, key;  // sequence number, its first rows in the tensors
  int queries, keys;
};

// The sequence that block `block` of a head belongs to; `block` becomes its index in the sequence.
// Blocks cover `rows` query rows or, if kByKeys, key rows.
//
// Sequence s owns the blocks from offset / rows + s on. That suffices for any length and bisection
// needs no prefix sums; surplus blocks start past the sequence's end.
template <bool kByKeys>
__device__ inline Sequence sequence_of(const AttentionSequences& sequences,
                                       const AttentionShape& shape, int rows, int& block) {
  if (sequences.queries == nullptr) return {0, 0, 0, int(shape.queries), int(shape.keys)};
  const int64_t* const offsets = kByKeys ? sequences.keys : sequences.queries;
  int first = 0, last = int(sequences.count) - 1;
  while (first < last) {
    const int middle = last - (last - first) / 2;
    if (offsets[middle] < int64_t{block - middle + 1} * rows) {  // offset / rows + middle <= block
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  const int query = int(sequences.queries[first]), key = int(sequences.keys[first]);
  block -= (kByKeys ? key : query) / rows + first;
  return {first, query, key, int(sequences.queries[first + 1]) - query,
          int(sequences.keys[first + 1]) - key};
}

// The index of a query in lse, lse_t and their gradients.
__device__ inline int64_t statistic_row(const AttentionShape& shape, int batch, int head,
                                        const Sequence& sequence, int query) {
  return (int64_t(batch) * shape.heads + head) * shape.queries + (sequence.query + query);
}

// ---- windows ------------------------------------------------------------------------------------

// Rows [begin, end) on the other side that rows [first, last] see, with a window of `before` rows
// back and `after` rows ahead. `begin` is rounded down to a multiple of `align`.
struct RowRange {
  int begin, end;
};
__device__ inline RowRange rows_in_window(int first, int last, int before, int after, int count,
                                          int align) {
  const int64_t past = int64_t{last} + after + 1, from = int64_t{first} - before;
  const int end = past < 0 ? 0 : past < count ? int(past) : count;
  const int begin = from < 0 ? 0 : from < end ? int(from) : end;
  return {begin / align * align, end};
}

__device__ inline bool hides(const Window& window, int query, int key) {
  return key - query > window.right || query - key > window.left;
}

// Whether some query of a tile does not see some key of the tile.
__device__ inline bool crosses(const Window& window, int query, int queries, int key, int keys) {
  return key + keys - 1 - query > window.right || query + queries - 1 - key > window.left;
}

// Whether no query of a tile sees any key of the tile.
__device__ inline bool outside(const Window& window, int query, int queries, int key, int keys) {
  return key - (query + queries - 1) > window.right || query - (key + keys - 1) > window.left;
}

}  // namespace pmf::cuda
