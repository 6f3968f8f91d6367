// Checks on tensor layout that attention's launchers make before they choose a kernel.
#pragma once

#include "pmf/common.h"

namespace pmf::cuda {

// Whether a tensor [.., .., rows, width] can be read in aligned 16-byte chunks with 32-bit row
// strides. Strides of dimensions of size 1 are ignored.
template <class View>
bool whole_chunks(const View& view, int64_t batch, int64_t heads, int64_t rows, int64_t bytes) {
  constexpr int64_t kChunk = 16, kFar = int64_t{1} << 31;
  const int64_t sizes[] = {batch, heads, rows};
  bool whole = reinterpret_cast<uintptr_t>(view.data) % kChunk == 0 && view.stride[3] == 1;
  for (int d = 0; d < 3; ++d) {
    whole = whole && (sizes[d] <= 1 || view.stride[d] * bytes % kChunk == 0);
  }
  return whole && view.stride[2] * bytes < kFar && view.stride[2] * bytes > -kFar;
}

}  // namespace pmf::cuda
