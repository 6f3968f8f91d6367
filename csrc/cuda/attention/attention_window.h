// Host-side preparation of windows and packed sequences for attention's kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pmf/attention.h"

namespace pmf::cuda {

// AttentionWindow in 32 bits. Differences of two rows fit; a row plus a side may overflow.
struct Window {
  int left = INT32_MAX, right = INT32_MAX;

  Window() = default;
  explicit Window(const AttentionWindow& window)
      : left(clamped(window.left)), right(clamped(window.right)) {}

 private:
  static int clamped(int64_t side) { return int(std::clamp<int64_t>(side, -INT32_MAX, INT32_MAX)); }
};

// The shape that launches are planned for: a single sequence or, if packed, one of the mean length.
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

// The number of thread blocks of `rows` rows that cover the `total` rows of a head. See
// attention_sequences.cuh for where each packed sequence's blocks begin.
inline int64_t row_blocks(int64_t total, int64_t rows, const AttentionSequences& sequences) {
  if (sequences.queries == nullptr) return (total + rows - 1) / rows;
  return total == 0 ? 0 : total / rows + sequences.count;
}

}  // namespace pmf::cuda
