// One 128 x 128 tile of a matrix product on tensor cores, for one block of 128 or 256 threads.
//
//   C[i][j] = sum_k A[i][k] B[k][j],   A [m, k] row by row; B [k, n] row by row, or its transpose
//
// Tiling: four warps, two by two, compute 64 x 64 of C each, in 4 x 8 fragments of 16 x 8: 128 fp32
// accumulators per thread, so that every byte read from shared memory feeds 21 FLOPs (16-bit). In
// full fp32, eight warps compute 32 x 64 each, because sums outside the tensor cores also take
// registers. The depth is processed in slices of 64 bytes (32 16-bit or 16 32-bit elements), four
// in flight: slices of A and B are 8 KB each, 64 KB in all, so that two blocks fit an SM of an A100
// or H100 and one fits an SM with 99 KB.
//
// In shared memory, the position of a 16-byte chunk within its line is exclusive-or'd with the row,
// so that the eight rows read by an ldmatrix, and the chunks written by a warp, lie in different
// banks. The depth must be a multiple of a slice, and rows 16-byte aligned; rows of A and columns
// of B past the end read as zeros.
//
// Bound: the tensor cores. A tile of depth k moves 512 k bytes (16-bit) for 32768 k FLOPs, 64 FLOPs
// per byte from L2.
#pragma once

#include "cuda/common/ptx.cuh"
#include "cuda/common/vector.cuh"

namespace pmf::cuda {

// A thread's registers of A [16 kParts, d] and B [d, 64] for one step of depth d: 16 for 16-bit
// elements, 8 for 32-bit. Those of C are c[i][j], from row 16 i and column 8 j of its warp's part
// on.
template <int kParts>
struct Fragments {
  uint32_t a[kParts][4], b[8][2];
};

// ---- how elements are stored and multiplied ----------------------------------------------------

// 16-bit operands: exact products, sums in fp32.
//
// Each Products type defines kParts, the number of 16-row fragments that a warp computes, and
// kBlocks, the number of blocks per SM that registers are limited for.
template <class T>
struct HalfProducts {
  using Element = T;
  static constexpr int kParts = 4, kBlocks = 2;
  static __device__ T round(float value) { return from_float<T>(value); }
  static __device__ void multiply(float (&c)[kParts][8][4], Fragments<kParts>& f) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) mma_m16n8k16<T>(c[i][j], f.a[i], f.b[j]);
    }
  }
};

// 32-bit operands that are rounded to TF32 (11-bit significand) when they are stored.
struct Tf32Products {
  using Element = float;
  static constexpr int kParts = 4, kBlocks = 2;
  static __device__ float round(float value) { return __uint_as_float(round_tf32(value)); }
  static __device__ void multiply(float (&c)[kParts][8][4], Fragments<kParts>& f) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) mma_m16n8k8_tf32(c[i][j], f.a[i], f.b[j]);
    }
  }
};

// Full fp32 operands, each split into a large and a small TF32 number. The product of the small
// numbers, 2^-22 of the whole, is dropped, which leaves three products (Ootomo and Yokota,
// "Recovering single precision accuracy from Tensor Cores", 2022). As in their work, sums are
// accumulated outside the tensor cores, which truncate every sum at the precision of its largest
// term, so that errors of hundreds of steps would add up in the same direction. Here only the sum
// within a slice, 16 deep, is truncated; slices are added in ordinary fp32.
struct SplitTf32Products {
  using Element = float;
  static constexpr int kParts = 2, kBlocks = 1;
  static __device__ float round(float value) { return value; }
  // Leaves the large part in `value` and returns the small one.
  static __device__ uint32_t split(uint32_t& value) {
    const float whole = __uint_as_float(value);
    value = round_tf32(whole);
    return round_tf32(whole - __uint_as_float(value));
  }
  // Multiplies both halves of a slice, which load_a(a, half) and load_b(b, half, j) load, b from
  // column 8 j on.
  template <class LoadA, class LoadB>
  static __device__ void multiply_slice(float (&c)[kParts][8][4], const LoadA& load_a,
                                        const LoadB& load_b) {
    uint32_t a[2][kParts][4], small_a[2][kParts][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      load_a(a[half], half);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
#pragma unroll
        for (int q = 0; q < 4; ++q) small_a[half][i][q] = split(a[half][i][q]);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t b[2][2][2], small_b[2][2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_b(b[half], half, j);
#pragma unroll
        for (int x = 0; x < 2; ++x) {
#pragma unroll
          for (int q = 0; q < 2; ++q) small_b[half][x][q] = split(b[half][x][q]);
        }
      }
#pragma unroll
      for (int x = 0; x < 2; ++x) {
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          float part[4] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            mma_m16n8k8_tf32(part, small_a[half][i], b[half][x]);
            mma_m16n8k8_tf32(part, a[half][i], small_b[half][x]);
            mma_m16n8k8_tf32(part, a[half][i], b[half][x]);
          }
#pragma unroll
          for (int q = 0; q < 4; ++q) c[i][j + x][q] += part[q];
        }
      }
    }
  }
};

// Multiplies a slice of depth 2 d, which load_a(a, half) and load_b(b, half, j) load, b from column
// 8 j on.
template <class Products, class LoadA, class LoadB>
__device__ inline void multiply_slice(float (&c)[Products::kParts][8][4], const LoadA& load_a,
                                      const LoadB& load_b) {
  if constexpr (std::is_same_v<Products, SplitTf32Products>) {
    Products::multiply_slice(c, load_a, load_b);
  } else {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      Fragments<Products::kParts> f;
      load_a(f.a, half);
      load_b(f.b, half, 0);
      Products::multiply(c, f);
    }
  }
}

// ---- geometry ----------------------------------------------------------------------------------

constexpr int kTile = 128;  // rows and columns of C
constexpr int kWarpColumns = 64;
template <int kParts>
constexpr int kTileThreads = kTile / (16 * kParts) * 2 * kWarpThreads;
constexpr int kChunkBytes = 16;  // of a cp.async, or of a row of ldmatrix
constexpr int kSliceBytes = 64;  // of a row of A in one slice of the depth
constexpr int kStages = 4;       // slices in shared memory
constexpr int kOperandBytes = kTile * kSliceBytes;
constexpr int kTileSharedBytes = kStages * 2 * kOperandBytes;

template <class Element>
constexpr int kChunk = kChunkBytes / sizeof(Element);  // elements
template <class Element>
constexpr int kDepth = kSliceBytes / sizeof(Element);

// An operand's tile in memory, from `data` on; only `rows` of it exist.
template <class Element>
struct Operand {
  const Element* data;
  int64_t stride;  // elements between rows
  int rows;        // rows of A or of transposed B; columns of B otherwise
};

// ---- slices: global to shared memory -----------------------------------------------------------

// Byte offset of a chunk in a slice of A or of transposed B: 128 rows of four chunks.
__device__ inline int row_chunk(int row, int chunk) {
  return row * kSliceBytes + ((chunk ^ (row >> 1 & 3)) * kChunkBytes);
}

// Byte offset of a chunk in a slice of B not transposed: kDepth rows of 128 columns. 32-bit
// elements are read one by one, four rows by eight columns per warp: two adjacent chunks in each of
// four rows.
template <class Element>
__device__ inline int column_chunk(int row, int chunk) {
  const int turn = sizeof(Element) == 2 ? row & 7 : (row & 3) << 1;
  return row * (kTile * static_cast<int>(sizeof(Element))) + (chunk ^ turn) * kChunkBytes;
}

// A thread's part of every slice of an operand: kLoads chunks, a fixed number of rows apart.
// Offsets are computed once. Rows and columns that do not exist read as zeros, with the address of
// one that does. kRows, for A or transposed B: slices are columns [k, k + kDepth) of 128 rows;
// otherwise rows [k, k + kDepth) of 128 columns.
template <class Element, bool kRows, int kThreads>
class SliceCopy {
 public:
  __device__ explicit SliceCopy(const Operand<Element>& operand)
      : operand_(operand), first_(threadIdx.x / kChunks), chunk_(threadIdx.x % kChunks) {
    const int limit = operand.rows;
    if constexpr (kRows) {
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        const int row = first_ + q * kRowStep;
        valid_[q] = row < limit;
        offset_[q] =
            (valid_[q] ? row : 0) * static_cast<int>(operand.stride) + chunk_ * kChunk<Element>;
      }
    } else {
      const bool valid = chunk_ * kChunk<Element> < limit;
#pragma unroll
      for (int q = 0; q < kLoads; ++q) {
        valid_[q] = valid;
        offset_[q] = (first_ + q * kRowStep) * static_cast<int>(operand.stride) +
                     (valid ? chunk_ * kChunk<Element> : 0);
      }
    }
  }

  // Starts copying the next slice to `slice`.
  __device__ void operator()(unsigned char* slice) {
#pragma unroll
    for (int q = 0; q < kLoads; ++q) {
      const int row = first_ + q * kRowStep;
      const int place = kRows ? row_chunk(row, chunk_) : column_chunk<Element>(row, chunk_);
      cp_async_16(slice + place, operand_.data + offset_[q], valid_[q]);
    }
    operand_.data += kRows ? kDepth<Element> : kDepth<Element> * operand_.stride;
  }

 private:
  static constexpr int kChunks = (kRows ? kSliceBytes : kTile * sizeof(Element)) / kChunkBytes;
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kLoads = kOperandBytes / kChunkBytes / kThreads;  // cp.async
  Operand<Element> operand_;
  int first_, chunk_;
  int offset_[kLoads];  // elements, within a tile's rows
  bool valid_[kLoads];
};

// ---- fragments: shared memory to registers -----------------------------------------------------
// Each loads half a slice, 32 bytes deep: the depth of one mma, 16 16-bit or 8 32-bit elements. For
// either width, the matrices of 8 rows of 16 bytes that ldmatrix distributes are the quarters of a
// fragment.

template <int kParts>
__device__ inline void load_a(uint32_t (&a)[kParts][4], const unsigned char* slice, int half,
                              int warp_row) {
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    ldmatrix_x4(a[i], slice + row_chunk(warp_row + 16 * i + lane % 16, 2 * half + lane / 16));
  }
}

template <int kColumns>
__device__ inline void load_b_transposed(uint32_t (&b)[kColumns][2], const unsigned char* slice,
                                         int half, int warp_column) {
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int j = 0; j < kColumns; j += 2) {
    uint32_t pair[4];
    const int row = warp_column + 8 * j + lane % 8 + lane / 16 * 8;
    ldmatrix_x4(pair, slice + row_chunk(row, 2 * half + lane / 8 % 2));
    b[j][0] = pair[0], b[j][1] = pair[1];
    b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
  }
}

template <class Element, int kColumns>
__device__ inline void load_b(uint32_t (&b)[kColumns][2], const unsigned char* slice, int half,
                              int warp_column) {
  const int lane = threadIdx.x % kWarpThreads;
  if constexpr (sizeof(Element) == 2) {
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      uint32_t pair[4];
      const int chunk = warp_column / 8 + j + lane / 16;
      ldmatrix_x4_trans(pair, slice + column_chunk<Element>(16 * half + lane % 16, chunk));
      b[j][0] = pair[0], b[j][1] = pair[1];
      b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
    }
  } else {
    const int row = 8 * half + lane % 4;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = warp_column + 8 * j + lane / 4, place = column % 4 * 4;
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        b[j][q] = *reinterpret_cast<const uint32_t*>(
            slice + column_chunk<Element>(row + 4 * q, column / 4) + place);
      }
    }
  }
}

// ---- the main loop -----------------------------------------------------------------------------

// The first row and column of this thread's warp within the tile.
template <int kParts = 4>
__device__ inline int warp_row() {
  return threadIdx.x / kWarpThreads % (8 / kParts) * (16 * kParts);
}
template <int kParts = 4>
__device__ inline int warp_column() {
  return threadIdx.x / (8 / kParts * kWarpThreads) * kWarpColumns;
}

// c = A B for a tile of depth `depth`. All threads of the block call this; `shared` has
// kTileSharedBytes bytes and is free for other uses on return.
template <class Products, bool kTransposed>
__device__ inline void multiply_tile(float (&c)[Products::kParts][8][4],
                                     const Operand<typename Products::Element>& left,
                                     const Operand<typename Products::Element>& right, int depth,
                                     unsigned char* shared) {
  using Element = typename Products::Element;
  constexpr int kParts = Products::kParts, kThreads = kTileThreads<kParts>;
  const int slices = depth / kDepth<Element>;
  SliceCopy<Element, true, kThreads> copy_left(left);
  SliceCopy<Element, kTransposed, kThreads> copy_right(right);
  const auto stage_of = [&](int slice) { return shared + slice % kStages * 2 * kOperandBytes; };
  const auto copy = [&](int slice) {
    if (slice < slices) {
      copy_left(stage_of(slice));
      copy_right(stage_of(slice) + kOperandBytes);
    }
    cp_async_commit();  // empty past the end, to keep the number of groups in flight constant
  };
  // Warps past the last row or column only copy.
  const int row = warp_row<kParts>(), column = warp_column<kParts>();
  const bool active = row < left.rows && column < right.rows;
  const auto load_left = [&](uint32_t (&a)[kParts][4], int slice, int half) {
    load_a(a, stage_of(slice), half, row);
  };
  const auto load_right = [&](auto& b, int slice, int half, int j) {
    const unsigned char* const from = stage_of(slice) + kOperandBytes;
    if constexpr (kTransposed) {
      load_b_transposed(b, from, half, column + 8 * j);
    } else {
      load_b<Element>(b, from, half, column + 8 * j);
    }
  };
  // Waits until the oldest slice in flight has landed for all threads, and all threads have read
  // the slice that the next copy overwrites.
  const auto arrive = [] {
    cp_async_wait<kStages - 2>();
    __syncthreads();
  };

#pragma unroll
  for (int i = 0; i < kParts; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int q = 0; q < 4; ++q) c[i][j][q] = 0;
    }
  }
  for (int slice = 0; slice < kStages - 1; ++slice) copy(slice);
  arrive();
  if constexpr (sizeof(Element) == 2) {  // loads the next fragments while these multiply
    Fragments<kParts> first, second;
    const auto load = [&](Fragments<kParts>& fragments, int slice, int half) {
      if (!active) return;
      load_left(fragments.a, slice, half);
      load_right(fragments.b, slice, half, 0);
    };
    const auto multiply = [&](Fragments<kParts>& fragments) {
      if (active) Products::multiply(c, fragments);
    };
    load(first, 0, 0);
    for (int slice = 0; slice < slices; ++slice) {
      load(second, slice, 1);
      copy(slice + kStages - 1);
      multiply(first);
      arrive();
      if (slice + 1 < slices) load(first, slice + 1, 0);
      multiply(second);
    }
  } else {  // no double buffering: the small parts need the registers
    for (int slice = 0; slice < slices; ++slice) {
      copy(slice + kStages - 1);
      if (active) {
        multiply_slice<Products>(
            c, [&](auto& a, int half) { load_left(a, slice, half); },
            [&](auto& b, int half, int j) { load_right(b, slice, half, j); });
      }
      arrive();
    }
  }
  cp_async_wait<0>();
}

// ---- the tile in shared memory -----------------------------------------------------------------

// The place of an element of an fp32 tile, whose width is a multiple of 32. These accesses have no
// bank conflicts: fragments written in pairs; rows in units of 16 bytes; elements of a row by
// consecutive lanes; and 8 rows x 4 columns (of one chunk) or 2 rows (8 apart) x 16 columns by a
// warp.
__device__ inline int staged_place(int row, int column, int width) {
  const int turn = ((row & 3) << 1 | (row >> 2 & 1)) ^ (row >> 1 & 4);
  return row * width + (((column >> 2) ^ turn) << 2) + (column & 3);
}

// The 128 x 128 tile of C in fp32, 64 KB, in place of the slices, from which threads read it in any
// order that suits the store.
struct StagedTile {
  float* data;

  __device__ explicit StagedTile(unsigned char* shared) : data(reinterpret_cast<float*>(shared)) {}

  __device__ float* at(int row, int column) const {
    return data + staged_place(row, column, kTile);
  }

  // Called by all threads after multiply_tile; on return, every thread may read every element.
  template <int kParts>
  __device__ void store(const float (&c)[kParts][8][4]) const {
    const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int row = warp_row<kParts>() + 16 * i + lane / 4,
                  column = warp_column<kParts>() + 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(at(row, column)) = make_float2(c[i][j][0], c[i][j][1]);
        *reinterpret_cast<float2*>(at(row + 8, column)) = make_float2(c[i][j][2], c[i][j][3]);
      }
    }
    __syncthreads();
  }
};

}  // namespace pmf::cuda
