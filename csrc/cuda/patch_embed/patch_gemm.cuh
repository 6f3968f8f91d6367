// Products of matrices embedded in images (grid_view.cuh): 128 x 128 tiles on tensor cores.
//
//   C[i][j] = sum_k A[i][k] B[k][j]
//
// A and B may each be transposed: with kRows, the depth k runs along the columns of the view (A not
// transposed, B transposed); otherwise along its rows (A transposed, B not). Geometry, swizzles and
// the staged tile are those of gemm_tile.cuh. Only the copy differs: it addresses pixels in images,
// and reads single elements where 16 bytes are not contiguous.
//
// fp32 operands are split into two TF32 numbers, which takes three products (SplitTf32Products).
#pragma once

#include <type_traits>

#include "cuda/common/gemm_tile.cuh"
#include "cuda/common/grid_view.cuh"
#include "cuda/common/shared.cuh"

namespace pmf::cuda {

// ---- products ----------------------------------------------------------------------------------

template <class T>
using PatchProducts = std::conditional_t<sizeof(T) == 2, HalfProducts<T>, SplitTf32Products>;

// ---- slices: global to shared memory -----------------------------------------------------------

// An element of a view, whose elements may be float regardless of T.
template <class T>
__device__ inline T element_at(const GridView& view, int64_t offset) {
  if (view.wide) return from_float<T>(static_cast<const float*>(view.data)[offset]);
  return static_cast<const T*>(view.data)[offset];
}

template <class T>
__device__ inline void store_chunk(unsigned char* place, const Vector<T, kChunk<T>>& chunk) {
  *assume_aligned<kChunkBytes>(reinterpret_cast<uint4*>(place)) =
      *reinterpret_cast<const uint4*>(&chunk);
}

// Copies the chunk of a view at element `offset`: 16 bytes as they are, or 32 bytes of float,
// rounded.
template <class T>
__device__ inline void copy_words(unsigned char* place, const GridView& view, int64_t offset,
                                  bool valid) {
  if (!view.wide || sizeof(T) == sizeof(float)) {
    cp_async_16(place, static_cast<const T*>(view.data) + (valid ? offset : 0), valid);
    return;
  }
  Vector<T, kChunk<T>> chunk{};
  if (valid) {
    constexpr int kHalf = kVectorBytes / sizeof(float);
    const float* from = static_cast<const float*>(view.data) + offset;
#pragma unroll
    for (int h = 0; h < kChunk<T>; h += kHalf) {
      const auto half = load_vector<float, kHalf>(from + h);
#pragma unroll
      for (int e = 0; e < kHalf; ++e) chunk.element[(h + e) % kChunk<T>] = from_float<T>(half[e]);
    }
  }
  store_chunk<T>(place, chunk);
}

// A thread's part of every slice of a view (as SliceCopy). kRows: slices are columns of rows
// `first` to first + kCount; otherwise rows, below `end`, of columns `first` to first + kCount.
template <class T, bool kRows, int kThreads = kTileThreads<PatchProducts<T>::kParts>,
          int kCount = kTile>
class GridCopy {
 public:
  __device__ GridCopy(const GridView& view, int64_t first, int64_t end)
      : view_(view), end_(end), row_(threadIdx.x / kChunks), chunk_(threadIdx.x % kChunks) {
    if constexpr (kRows) {
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        const int64_t row = first + row_ + q * kRowStep;
        fixed_[q] = row < view.row.count ? view.row.offset(row) : kNoRow;
      }
    } else {
      column_ = first + chunk_ * kChunk<T>;
      fixed_[0] = column_ < view.column.count ? view.column.offset(column_) : 0;
    }
  }

  // Starts copying the slice that begins at `depth`.
  __device__ void operator()(unsigned char* slice, int64_t depth) const {
    if constexpr (kRows) {
      const int64_t column = depth + chunk_ * kChunk<T>;
      if (view_.words) {
        const int64_t offset = view_.column.offset(column);
        const bool inside = column < view_.column.count;
#pragma unroll
        for (int q = 0; q < kLoads; ++q) {
          copy_words<T>(slice + place(q), view_, fixed_[q] + offset, inside && fixed_[q] != kNoRow);
        }
      } else {
        gather_columns(slice, column);
      }
    } else {
      const bool inside = column_ < view_.column.count;
#pragma unroll 1
      for (int q = 0; q < kLoads; ++q) {
        const int64_t row = depth + row_ + q * kRowStep;
        const int64_t offset = view_.row.offset(row);
        if (view_.words) {
          copy_words<T>(slice + place(q), view_, fixed_[0] + offset, inside && row < end_);
        } else {
          gather_row(slice + place(q), offset, row < end_);
        }
      }
    }
  }

 private:
  static constexpr int kChunks = (kRows ? kSliceBytes : kCount * sizeof(T)) / kChunkBytes;
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kLoads = (kRows ? kCount : kDepth<T>) / kRowStep;
  static constexpr int64_t kNoRow = -1;

  __device__ int place(int q) const {
    const int row = row_ + q * kRowStep;
    return kRows ? row_chunk(row, chunk_) : column_chunk<T>(row, chunk_);
  }
  // A chunk of the same columns in each of kLoads rows.
  __device__ void gather_columns(unsigned char* slice, int64_t column) const {
    Vector<T, kChunk<T>> chunks[kLoads] = {};
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) {
      if (column + e < view_.column.count) {
        const int64_t offset = view_.column.offset(column + e);
#pragma unroll
        for (int q = 0; q < kLoads; ++q) {
          if (fixed_[q] != kNoRow) chunks[q].element[e] = element_at<T>(view_, fixed_[q] + offset);
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kLoads; ++q) store_chunk<T>(slice + place(q), chunks[q]);
  }
  __device__ void gather_row(unsigned char* to, int64_t offset, bool valid) const {
    Vector<T, kChunk<T>> chunk{};
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e) {
      if (valid && column_ + e < view_.column.count) {
        chunk.element[e] = element_at<T>(view_, offset + view_.column.offset(column_ + e));
      }
    }
    store_chunk<T>(to, chunk);
  }

  const GridView& view_;
  int64_t end_;
  int row_, chunk_;
  int64_t column_ = 0;
  int64_t fixed_[kRows ? kLoads : 1];  // offsets of rows, or of the first column
};

// ---- fragments ---------------------------------------------------------------------------------

// Loads A from a slice of its transpose: kDepth rows of 128 columns.
template <class T, int kParts>
__device__ inline void load_a_transposed(uint32_t (&a)[kParts][4], const unsigned char* slice,
                                         int half, int warp_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    if constexpr (sizeof(T) == 2) {
      const int row = 16 * half + lane / 16 * 8 + lane % 8;
      ldmatrix_x4_trans(a[i], slice + column_chunk<T>(row, warp_row / 8 + 2 * i + lane / 8 % 2));
    } else {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int row = 8 * half + lane % 4 + q / 2 * 4;
        const int column = warp_row + 16 * i + lane / 4 + q % 2 * 8;
        a[i][q] = *reinterpret_cast<const uint32_t*>(slice + column_chunk<T>(row, column / 4) +
                                                     column % 4 * 4);
      }
    }
  }
}

// ---- the product -------------------------------------------------------------------------------

// Up to two pairs of factors: those of value and tangent. The products are either two results, or
// partial sums of one result over runs of the depth.
struct PatchProduct {
  GridView left[2], right[2], out[2];
  GridView add[2][2];         // to each result, with contiguous columns; null: none
  int64_t tiles[2] = {0, 0};  // row tiles of each result
  int64_t column_tiles = 0;
  int64_t runs[2] = {1, 0};  // of each pair's depth
  int64_t run_depth = int64_t{1} << 62;
  int64_t run_stride = 0;  // elements of out[0] between runs
};

constexpr int kHeld = 8;  // neighbouring columns of a row that a thread stores

// Stores kHeld values as elements of type E.
template <class E>
__device__ inline void store_values(const GridView& out, int64_t row_offset, int64_t column,
                                    const float (&value)[kHeld]) {
  constexpr int kGroup = kVectorBytes / sizeof(E);
  E* const data = static_cast<E*>(out.data) + row_offset;
#pragma unroll
  for (int g = 0; g < kHeld; g += kGroup) {
    if (out.words) {
      float group[kGroup];
#pragma unroll
      for (int e = 0; e < kGroup; ++e) group[e] = value[g + e];
      if (column + g < out.column.count) {
        store_vector<E, kGroup>(data + out.column.offset(column + g), group);
      }
    } else {
#pragma unroll
      for (int e = g; e < g + kGroup; ++e) {
        if (column + e < out.column.count) {
          data[out.column.offset(column + e)] = from_float<E>(value[e]);
        }
      }
    }
  }
}

// Stores a tile of the result, 16 threads per row.
template <class T>
__device__ inline void store_tile(const GridView& out, const GridView (&add)[2], int64_t run_offset,
                                  int64_t first_row, int64_t first_column, const StagedTile& tile) {
  constexpr int kAcross = kTile / kHeld;
  const int held = threadIdx.x % kAcross * kHeld;
  const int64_t column = first_column + held;
  for (int r = threadIdx.x / kAcross; r < kTile; r += blockDim.x / kAcross) {
    const int64_t row = first_row + r;
    if (row >= out.row.count) return;
    float value[kHeld];
#pragma unroll
    for (int e = 0; e < kHeld; ++e) value[e] = *tile.at(r, held + e);
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      if (add[a].data == nullptr) continue;
      const T* const from = static_cast<const T*>(add[a].data) + add[a].row.offset(row) + column;
#pragma unroll
      for (int e = 0; e < kHeld; ++e) {
        if (column + e < out.column.count) value[e] += to_float(from[e]);
      }
    }
    const int64_t offset = out.row.offset(row) + run_offset;
    if (out.wide) {
      store_values<float>(out, offset, column, value);
    } else {
      store_values<T>(out, offset, column, value);
    }
  }
}

// blockIdx.x selects the tile of the result, column tiles fastest; blockIdx.y the run.
template <class T, bool kLeftRows, bool kRightRows>
__global__ void __launch_bounds__(kTileThreads<PatchProducts<T>::kParts>, PatchProducts<T>::kBlocks)
    patch_product_kernel(const __grid_constant__ PatchProduct p) {
  unsigned char* const shared = dynamic_shared();
  const int64_t row_tile = blockIdx.x / p.column_tiles;
  const int64_t first_column = (blockIdx.x - row_tile * p.column_tiles) * kTile;
  const bool second_result = row_tile >= p.tiles[0], second_run = blockIdx.y >= p.runs[0];
  const int pair = second_result || second_run ? 1 : 0;
  const int64_t first_row = (row_tile - (second_result ? p.tiles[0] : 0)) * kTile;
  const GridView &left = p.left[pair], &right = p.right[pair];
  const int64_t whole = kLeftRows ? left.column.count : left.row.count;
  const int64_t begin = (blockIdx.y - (second_run ? p.runs[0] : 0)) * p.run_depth;
  const int64_t end = begin + p.run_depth < whole ? begin + p.run_depth : whole;
  const int slices = static_cast<int>((end - begin + kDepth<T> - 1) / kDepth<T>);

  const GridCopy<T, kLeftRows> copy_left(left, first_row, end);
  const GridCopy<T, kRightRows> copy_right(right, first_column, end);
  const auto stage_of = [&](int slice) { return shared + slice % kStages * 2 * kOperandBytes; };
  const auto copy = [&](int slice) {
    if (slice < slices) {
      copy_left(stage_of(slice), begin + slice * static_cast<int64_t>(kDepth<T>));
      copy_right(stage_of(slice) + kOperandBytes, begin + slice * static_cast<int64_t>(kDepth<T>));
    }
    cp_async_commit();  // empty past the end, to keep the number of groups in flight constant
  };
  constexpr int kParts = PatchProducts<T>::kParts;
  float c[kParts][8][4] = {};
  for (int slice = 0; slice < kStages - 1; ++slice) copy(slice);
  for (int slice = 0; slice < slices; ++slice) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // all copies of the slice have landed; the previous slice has been read
    copy(slice + kStages - 1);
    const unsigned char* const stage = stage_of(slice);
    multiply_slice<PatchProducts<T>>(
        c,
        [&](auto& a, int half) {
          if constexpr (kLeftRows) {
            load_a(a, stage, half, warp_row<kParts>());
          } else {
            load_a_transposed<T>(a, stage, half, warp_row<kParts>());
          }
        },
        [&](auto& b, int half, int j) {
          if constexpr (kRightRows) {
            load_b_transposed(b, stage + kOperandBytes, half, warp_column<kParts>() + 8 * j);
          } else {
            load_b<T>(b, stage + kOperandBytes, half, warp_column<kParts>() + 8 * j);
          }
        });
  }
  cp_async_wait<0>();
  __syncthreads();  // the tile overwrites the slices
  const StagedTile tile(shared);
  tile.store(c);
  const int result = second_result ? 1 : 0;
  store_tile<T>(p.out[result], p.add[result], blockIdx.y * p.run_stride, first_row, first_column,
                tile);
}

}  // namespace pmf::cuda
