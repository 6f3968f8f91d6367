// What the host tells attention's kernels of windows and packed sequences.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pmf/attention.h"

namespace pmf::cuda {

// AttentionWindow in 32 bits: differences of two rows fit, sums with a side need not.
struct Window {
  int left = INT32_MAX, right = INT32_MAX;

  Window() = default;
  explicit Window(const AttentionWindow& window)
      : left(clamped(window.left)), right(clamped(window.right)) {}

 private:
  static int clamped(int64_t side) { return int(std::clamp<int64_t>(side, -INT32_MAX, INT32_MAX)); }
};

// One sequence of a call for which blocks are planned: of packed ones, one of mean length.
inline AttentionShape planned_shape(const AttentionShape& shape,
                                    const AttentionSequences& sequences) {
  AttentionShape one = shape;
  if (sequences.queries != nullptr) {
    const int64_t count = std::max<int64_t>(1, sequences.count);
    one.queries = (shape.queries + count - 1) / count;
    one.keys = (shape.keys + count - 1) / count;
  }
  return one;
}

// Blocks of `rows` rows that cover `total` rows of a head: attention_sequences.cuh says where each
// sequence's begin.
inline int64_t row_blocks(int64_t total, int64_t rows, const AttentionSequences& sequences) {
  if (sequences.queries == nullptr) return (total + rows - 1) / rows;
  return total == 0 ? 0 : total / rows + sequences.count;
}

}  // namespace pmf::cuda
