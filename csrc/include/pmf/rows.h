// Tensors as rows: common to the elementwise contracts (rms_norm, swiglu, gated_residual).
//
// A tensor [..., W] is a set of rows of W contiguous elements; one stride per leading dimension
// gives the start of each row. Leading dimensions that can be traversed as one are merged before a
// kernel sees them (csrc/ops/row_binding.h), so most calls have a single one.
#pragma once

#include "pmf/common.h"

namespace pmf {

constexpr int kMaxLeading = 6;

struct RowShape {
  int leading = 0;                 // dimensions in use
  int64_t size[kMaxLeading] = {};  // outermost first
  int64_t width = 0;               // W, elements per row

  int64_t rows() const {
    int64_t product = 1;
    for (int d = 0; d < leading; ++d) product *= size[d];
    return product;
  }
};

// Strides count elements; 0 repeats a row (a broadcast vector has only zeros). An absent
// operand that must read as zero is a row of zeros with zero strides: kernels need no extra case.
struct ConstRows {
  const void* data = nullptr;
  int64_t stride[kMaxLeading] = {};
};

struct Rows {
  void* data = nullptr;
  int64_t stride[kMaxLeading] = {};
};

// Sums over rows (the gradient of a weight) have two stages whose order does not depend on the
// number of threads: each run of rows is summed into one vector, and the vectors are then added in
// order. The kernel and the code that sizes its workspace both use this plan.
struct RowSums {
  int64_t runs = 0;      // runs per group, one vector each
  int64_t run_rows = 1;  // rows per run; the last one may be shorter
  int64_t pitch = 0;     // stride between vectors, in elements

  static constexpr int64_t kMaxRuns = 64, kMinRunRows = 16, kPitchStep = 32;
  // A GPU runs about a thousand blocks at once; a run worth a block has some thousand elements.
  static constexpr int64_t kGpuRuns = 1024, kGpuRunElements = 1 << 14;

  RowSums(int64_t rows, int64_t width) : RowSums(rows, width, rows, kMaxRuns, kMinRunRows) {}

  // The runs are divided among `groups` groups of `rows` rows each.
  static RowSums on_gpu(int64_t groups, int64_t rows, int64_t width) {
    return RowSums(rows, width, groups * rows, kGpuRuns, kGpuRunElements / (width + 1) + 1);
  }

 private:
  RowSums(int64_t rows, int64_t width, int64_t all_rows, int64_t max_runs, int64_t min_rows) {
    run_rows = (all_rows + max_runs - 1) / max_runs;
    if (run_rows < min_rows) run_rows = min_rows;
    runs = (rows + run_rows - 1) / run_rows;
    pitch = (width + kPitchStep - 1) / kPitchStep * kPitchStep;
  }
};

}  // namespace pmf
