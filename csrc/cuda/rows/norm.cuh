// RMSNorm of rows with an optional rotation after it; shared by rms_norm and rotary_qk_norm.
//
// The mathematics is in pmf/rms_norm.h. A team of threads (a power of two up to a warp, or a whole
// block) processes a row and keeps it in registers, one or two slots per thread, between the
// summing and the writing pass: every operand is read once. Longer rows (over 4096 16-bit elements,
// 2048 in the backward) are processed in chunks, the last of which stays in registers for the
// second pass.
//
// `Turns` provides, for each row, the orthogonal map applied after the norm: forward(v, column,
// width) applies it to a slot, backward() applies its transpose.
#pragma once

#include "cuda/common/ptx.cuh"
#include "cuda/rows/row_sums.cuh"
#include "pmf/rms_norm.h"

namespace pmf::cuda {

// Slots of each operand held per thread: more would raise register pressure and lower occupancy.
constexpr int kForwardVectors = 2, kBackwardVectors = 1;
constexpr int kMaxTeam = 256;     // threads per row
constexpr int kSmallBlock = 128;  // threads per block if it processes several rows
constexpr int kMaxRowSums = 5;    // most sums computed per row

struct NoTurns {
  struct Turn {
    template <int kWidth>
    __device__ void forward(float (&)[kWidth], int64_t, int64_t) const {}
    template <int kWidth>
    __device__ void backward(float (&)[kWidth], int64_t, int64_t) const {}
  };
  __device__ Turn at(const RowIndex&) const { return {}; }
};

// ---- a team and its row ------------------------------------------------------------------------

// The block shape for rows of `width`, if a thread holds `held` elements of each.
inline dim3 team_block(int64_t width, int held) {
  const int along = team_width((width + held - 1) / held);
  return along < kWarpThreads ? dim3(along, kSmallBlock / along)
                              : dim3(along < kMaxTeam ? along : kMaxTeam);
}

// Sums over a row, bitwise identical in all of its threads.
class TeamSums {
 public:
  static constexpr int kSharedBytes = 2 * kMaxTeam / kWarpThreads * kMaxRowSums * sizeof(float);

  __device__ explicit TeamSums(float* shared) : shared_(shared) {}

  // Must be called by all threads of the block.
  template <int kCount>
  __device__ void operator()(float (&sum)[kCount]) {
    const int along = blockDim.x;
#pragma unroll
    for (int step = kWarpThreads / 2; step > 0; step /= 2) {
      if (step < along) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[i] += shuffle_xor(sum[i], step);
      }
    }
    if (along <= kWarpThreads) return;
    float* const warps = shared_ + turn_ * (kMaxTeam / kWarpThreads * kMaxRowSums);
    turn_ ^= 1;  // the next call writes the other half, as slow warps may still read this one
    if (threadIdx.x % kWarpThreads == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) warps[threadIdx.x / kWarpThreads * kMaxRowSums + i] = sum[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = warps[i];
    for (int w = 1; w < along / kWarpThreads; ++w) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += warps[w * kMaxRowSums + i];
    }
  }

 private:
  float* shared_;
  int turn_ = 0;
};

// This thread's columns in a chunk of a row: kVectors slots, spaced a team's width apart.
template <class Access, int kVectors>
struct Columns {
  int64_t first;  // first column of the chunk

  static __device__ int64_t count() {
    return static_cast<int64_t>(blockDim.x) * kVectors * Access::kWidth;
  }
  __device__ int64_t at(int v) const {
    return first +
           (v * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * Access::kWidth;
  }
};

// A thread's slots of one operand.
template <class Access, int kVectors>
struct Slots {
  typename Access::Slot slot[kVectors];

  __device__ void load(const typename Access::Element* row,
                       const Columns<Access, kVectors>& columns, int64_t width) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) slot[v] = Access::load(row, columns.at(v), width);
  }
};

// Shared memory per block: for the sums within a row or, afterwards, the sums over rows.
template <class Sums>
int64_t norm_shared_bytes(dim3 block) {
  const int64_t sums = Sums::shared_bytes(block);
  return sums > TeamSums::kSharedBytes ? sums : TeamSums::kSharedBytes;
}

// ---- forward -----------------------------------------------------------------------------------

// For every row: y = R (w n), ty = R (w tn + tw n) with tn = g - a n.
template <class Access, bool kTangent, class Turns>
__device__ inline void norm_rows(const RmsNormParams& p, const Turns& turns, int64_t rows,
                                 float* shared) {
  using T = typename Access::Element;
  constexpr int kWidth = Access::kWidth, kVectors = kForwardVectors;
  using Chunk = Columns<Access, kVectors>;
  const int64_t width = p.shape.width, chunk = Chunk::count();
  const float mean = 1.0f / static_cast<float>(width), eps = static_cast<float>(p.eps);
  const T* const weight = static_cast<const T*>(p.weight);
  const T* const weight_t = static_cast<const T*>(p.weight_t);
  TeamSums add_up(shared);
  // A team past the last row repeats that row: the sums need all threads.
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * blockDim.y; start < rows;
       start += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t own = start + threadIdx.y;
    const RowIndex row(p.shape, own < rows ? own : rows - 1);
    const T* const x_row = row.in<T>(p.x);
    const T* const x_t_row = kTangent ? row.in<T>(p.x_t) : nullptr;
    T* const y_row = row.in<T>(p.y);
    T* const y_t_row = kTangent ? row.in<T>(p.y_t) : nullptr;
    const auto turn = turns.at(row);
    Slots<Access, kVectors> x, x_t;
    float sum[2] = {};
#pragma unroll 1
    for (Chunk columns{0}; columns.first < width; columns.first += chunk) {
      x.load(x_row, columns, width);
      if constexpr (kTangent) x_t.load(x_t_row, columns, width);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          sum[0] = fmaf(x.slot[v][k], x.slot[v][k], sum[0]);
          if constexpr (kTangent) sum[1] = fmaf(x.slot[v][k], x_t.slot[v][k], sum[1]);
        }
      }
    }
    add_up(sum);
    const float s = 1.0f / sqrtf(sum[0] * mean + eps), a = s * s * (sum[1] * mean);
    if (own >= rows) continue;
    const int64_t last = (width - 1) / chunk * chunk;
#pragma unroll 1
    for (Chunk columns{last}; columns.first >= 0; columns.first -= chunk) {
      if (columns.first < last) {
        x.load(x_row, columns, width);
        if constexpr (kTangent) x_t.load(x_t_row, columns, width);
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = columns.at(v);
        const auto w = Access::load(weight, column, width);
        float y[kWidth];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) y[k] = x.slot[v][k] * s * w[k];
        turn.forward(y, column, width);
        Access::store(y_row, column, width, y);
        if constexpr (kTangent) {
          const auto w_t = Access::load(weight_t, column, width);
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            const float n = x.slot[v][k] * s;
            y[k] = fmaf(w_t[k], n, fmaf(-a, n, x_t.slot[v][k] * s) * w[k]);
          }
          turn.forward(y, column, width);
          Access::store(y_t_row, column, width, y);
        }
      }
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------

template <class Access, bool kTangent>
using WeightSums = ColumnSums<Access, kBackwardVectors, kTangent ? 2 : 1>;

// Pointers to the first elements of a row's operands.
template <typename T, bool kTangent>
struct BackwardRow {
  const T *x, *x_t, *grad, *grad_t;
  T *grad_x, *grad_x_t;

  __device__ BackwardRow(const RmsNormBackwardParams& p, const RowIndex& row)
      : x(row.in<T>(p.x)),
        x_t(kTangent ? row.in<T>(p.x_t) : nullptr),
        grad(row.in<T>(p.grad)),
        grad_t(kTangent ? row.in<T>(p.grad_t) : nullptr),
        grad_x(row.in<T>(p.grad_x)),
        grad_x_t(kTangent ? row.in<T>(p.grad_x_t) : nullptr) {}
};

// A thread's slots of a row's operands; turn_back() maps a gradient back to before the rotation.
template <class Access, bool kTangent>
struct BackwardSlots {
  static constexpr int kWidth = Access::kWidth, kVectors = kBackwardVectors;
  using Chunk = Columns<Access, kVectors>;
  using Row = BackwardRow<typename Access::Element, kTangent>;
  Slots<Access, kVectors> x, x_t, grad, grad_t;

  __device__ void load(const Row& row, const Chunk& columns, int64_t width) {
    x.load(row.x, columns, width);
    grad.load(row.grad, columns, width);
    if constexpr (kTangent) {
      x_t.load(row.x_t, columns, width);
      grad_t.load(row.grad_t, columns, width);
    }
  }
  template <class Turn>
  static __device__ void turn_back(const Slots<Access, kVectors>& from, const Turn& turn, int v,
                                   int64_t column, int64_t width, float (&to)[kWidth]) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) to[k] = from.slot[v][k];
    turn.backward(to, column, width);
  }
};

template <class Access, bool kTangent>
using BackwardChunk = typename BackwardSlots<Access, kTangent>::Chunk;

// A row's coefficients in the gradients of pmf/rms_norm.h.
struct RowFactors {
  float s, a, b, along;  // along = 3 a b - c - d, or -mean(w Y n) without a tangent
};

template <class Access, bool kTangent, class Turn>
__device__ inline RowFactors sum_backward_row(
    const RmsNormBackwardParams& p, const BackwardRow<typename Access::Element, kTangent>& row,
    const Turn& turn, BackwardSlots<Access, kTangent>& slots, TeamSums& add_up) {
  using T = typename Access::Element;
  using Chunk = BackwardChunk<Access, kTangent>;
  constexpr int kWidth = Access::kWidth, kVectors = kBackwardVectors;
  const int64_t width = p.shape.width, chunk = Chunk::count();
  const float mean = 1.0f / static_cast<float>(width);
  // products with x and x_t to sum: x x, v x, x tx, u x, u tx with u = w T, v = w Y + tw T
  float sum[kTangent ? kMaxRowSums : 2] = {};
#pragma unroll 1
  for (Chunk columns{0}; columns.first < width; columns.first += chunk) {
    slots.load(row, columns, width);
#pragma unroll
    for (int q = 0; q < kVectors; ++q) {
      const int64_t column = columns.at(q);
      const auto w = Access::load(static_cast<const T*>(p.weight), column, width);
      float y[kWidth], t[kWidth];
      slots.turn_back(slots.grad, turn, q, column, width, y);
      typename Access::Slot w_t{};
      if constexpr (kTangent) {
        slots.turn_back(slots.grad_t, turn, q, column, width, t);
        w_t = Access::load(static_cast<const T*>(p.weight_t), column, width);
      }
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float x = slots.x.slot[q][k];
        float v = w[k] * y[k];
        if constexpr (kTangent) {
          const float x_t = slots.x_t.slot[q][k], u = w[k] * t[k];
          v = fmaf(w_t[k], t[k], v);
          sum[2] = fmaf(x, x_t, sum[2]);
          sum[3] = fmaf(u, x, sum[3]);
          sum[4] = fmaf(u, x_t, sum[4]);
        }
        sum[0] = fmaf(x, x, sum[0]);
        sum[1] = fmaf(v, x, sum[1]);
      }
    }
  }
  add_up(sum);
  RowFactors f{};
  f.s = 1.0f / sqrtf(sum[0] * mean + static_cast<float>(p.eps));
  const float d = f.s * (sum[1] * mean);
  if constexpr (kTangent) {
    f.a = f.s * f.s * (sum[2] * mean);
    f.b = f.s * (sum[3] * mean);
    f.along = 3.0f * f.a * f.b - f.s * (sum[4] * mean) - d;
  } else {
    f.along = -d;
  }
  return f;
}

// Writes the gradients of x and x_t for one chunk and accumulates those of the weights.
template <class Access, bool kTangent, class Turn>
__device__ inline void write_backward_row(
    const RmsNormBackwardParams& p, const BackwardRow<typename Access::Element, kTangent>& row,
    const Turn& turn, const RowFactors& f, const BackwardChunk<Access, kTangent>& columns,
    const BackwardSlots<Access, kTangent>& slots, WeightSums<Access, kTangent>& weights) {
  using T = typename Access::Element;
  constexpr int kWidth = Access::kWidth, kVectors = kBackwardVectors;
  const int64_t width = p.shape.width;
#pragma unroll
  for (int q = 0; q < kVectors; ++q) {
    const int64_t column = columns.at(q);
    const auto w = Access::load(static_cast<const T*>(p.weight), column, width);
    float y[kWidth], t[kWidth], dx_t[kWidth];
    slots.turn_back(slots.grad, turn, q, column, width, y);
    typename Access::Slot w_t{};
    if constexpr (kTangent) {
      slots.turn_back(slots.grad_t, turn, q, column, width, t);
      w_t = Access::load(static_cast<const T*>(p.weight_t), column, width);
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float n = slots.x.slot[q][k] * f.s;
      float& dw = weights.sum[0][q][k];
      dw = fmaf(n, y[k], dw);
      float dx = fmaf(f.along, n, w[k] * y[k]);
      if constexpr (kTangent) {
        const float g = slots.x_t.slot[q][k] * f.s, u = w[k] * t[k];
        dw = fmaf(fmaf(-f.a, n, g), t[k], dw);
        weights.sum[1][q][k] = fmaf(n, t[k], weights.sum[1][q][k]);
        dx_t[k] = fmaf(-f.b, n, u) * f.s;
        dx = fmaf(w_t[k], t[k], fmaf(-f.a, u, fmaf(-f.b, g, dx)));
      }
      y[k] = dx * f.s;
    }
    Access::store(row.grad_x, column, width, y);
    if constexpr (kTangent) Access::store(row.grad_x_t, column, width, dx_t);
  }
}

// Processes one run of rows; its weight gradients become vectors number `run` of the workspace.
template <class Access, bool kTangent, class Turns>
__device__ inline void norm_rows_backward(const RmsNormBackwardParams& p, const Turns& turns,
                                          const RowSums& sums, int64_t run, int64_t rows,
                                          float* shared) {
  using Chunk = BackwardChunk<Access, kTangent>;
  constexpr int kKinds = kTangent ? 2 : 1;
  const int64_t width = p.shape.width, chunk = Chunk::count();
  const int64_t first = run * sums.run_rows, last_column = (width - 1) / chunk * chunk;
  const int64_t end = first + sums.run_rows < rows ? first + sums.run_rows : rows;
  float* const vectors = static_cast<float*>(p.workspace) + run * kKinds * sums.pitch;
  const auto put = [&](int kind, int64_t column, float total) {
    vectors[kind * sums.pitch + column] = total;
  };
  TeamSums add_up(shared);
  WeightSums<Access, kTangent> weights;
  for (int64_t start = first; start < end; start += blockDim.y) {
    const int64_t own = start + threadIdx.y;
    const RowIndex index(p.shape, own < end ? own : end - 1);
    const auto turn = turns.at(index);
    const BackwardRow<typename Access::Element, kTangent> row(p, index);
    BackwardSlots<Access, kTangent> slots;
    const RowFactors f = sum_backward_row<Access, kTangent>(p, row, turn, slots, add_up);
    if (own >= end) continue;
#pragma unroll 1
    for (Chunk columns{last_column}; columns.first >= 0; columns.first -= chunk) {
      if (columns.first < last_column) slots.load(row, columns, width);
      if (last_column > 0) {  // registers cannot hold the sums of several chunks
        weights.load(start == first ? nullptr : vectors, sums.pitch, columns.first, width);
      }
      write_backward_row<Access, kTangent>(p, row, turn, f, columns, slots, weights);
      if (last_column > 0) weights.finish(columns.first, width, nullptr, put);
    }
  }
  if (last_column == 0) weights.finish(0, width, shared, put);
}

}  // namespace pmf::cuda
