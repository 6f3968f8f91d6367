// One 128 x 128 tile of a matrix product on tensor cores, for one block of 128 or 256 threads.
//
//   C[i][j] = sum_k A[i][k] B[k][j],   A [m, k] row by row; B [k, n] row by row, or its transpose
//
// Tiling: four warps, two by two, own 64 x 64 of C each, in 4 x 8 fragments of 16 x 8: 128 fp32
// accumulators a thread, so that every byte read from shared memory feeds 21 FLOPs (16-bit). In
// full fp32 eight warps own 32 x 64 each, as sums outside the tensor cores take registers, too. The
// depth passes in slices of 64 bytes (32 elements of 16 bits, 16 of 32), four of them in flight: a
// slice of A and one of B are 8 KB each, the whole 64 KB, so that two blocks fit an SM of A100 and
// H100 and one fits an SM with 99 KB.
//
// Every address in shared memory is a 16-byte chunk whose place within its line is exclusive-or'd
// with the row, so that the eight rows an ldmatrix reads, and the chunks a warp writes, lie in
// different banks. The depth must be a multiple of a slice's, rows 16-byte aligned; rows of A and
// columns of B past the end read as zeros.
//
// Bound: the tensor cores' rate. A tile of depth k moves 512 k bytes (16-bit) for 32768 k FLOPs, 64
// FLOPs a byte from L2.
#pragma once

#include "cuda/common/ptx.cuh"
#include "cuda/common/vector.cuh"

namespace pmf::cuda {

// What a thread holds of A [16 kParts, d] and B [d, 64] for one step of depth d: 16 for elements of
// 16 bits, 8 for 32. Those of C are c[i][j]: rows 16 i and columns 8 j on, of its warp's part.
template <int kParts>
struct Fragments {
  uint32_t a[kParts][4], b[8][2];
};

// ---- how elements are stored and multiplied ----------------------------------------------------

// Operands of 16 bits, products exact, sums in fp32.
//
// A Products says how many fragments of 16 rows its warps own one above the other, and how many
// blocks a multiprocessor's registers are cut for.
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

// Operands of 32 bits that are rounded to TF32 (11 bits of significand) when they are stored.
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

// Full fp32 operands, each split into two TF32 numbers of which the product of the small ones,
// 2^-22 of the whole, is left out: three products for one (Ootomo and Yokota, "Recovering single
// precision accuracy from Tensor Cores", 2022; theirs is also the sum outside: tensor cores cut
// every sum where its largest term ends, toward zero, so that hundreds of steps would lose in the
// same direction. Here a slice's products, 16 deep, are cut, and slices are added up as any fp32
// sum).
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
  // Both halves of a slice, which load_a(a, half) and load_b(b, half, j) read, b from column 8 j
  // on.
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

// A slice of depth 2 d from what load_a(a, half) and load_b(b, half, j) read, b from column 8 j on.
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
constexpr int kChunkBytes = 16;  // what cp.async and a row of ldmatrix move
constexpr int kSliceBytes = 64;  // of a row of A: a slice of the depth
constexpr int kStages = 4;       // slices in shared memory
constexpr int kOperandBytes = kTile * kSliceBytes;
constexpr int kTileSharedBytes = kStages * 2 * kOperandBytes;

template <class Element>
constexpr int kChunk = kChunkBytes / sizeof(Element);  // elements
template <class Element>
constexpr int kDepth = kSliceBytes / sizeof(Element);

// An operand's tile in memory: `rows` of it exist, from `data` on.
template <class Element>
struct Operand {
  const Element* data;
  int64_t stride;  // elements from row to row
  int rows;        // of A, or of B transposed; columns of B as it is
};

// ---- slices: global to shared memory -----------------------------------------------------------

// Byte offset of a chunk in a slice of A, or of B transposed: 128 rows of four chunks.
__device__ inline int row_chunk(int row, int chunk) {
  return row * kSliceBytes + ((chunk ^ (row >> 1 & 3)) * kChunkBytes);
}

// Byte offset of a chunk in a slice of B as it is: kDepth rows of 128 columns. 32-bit elements are
// read one by one, four rows by eight columns a warp: two neighbouring chunks of each of four rows.
template <class Element>
__device__ inline int column_chunk(int row, int chunk) {
  const int turn = sizeof(Element) == 2 ? row & 7 : (row & 3) << 1;
  return row * (kTile * static_cast<int>(sizeof(Element))) + (chunk ^ turn) * kChunkBytes;
}

// A thread's part of every slice of an operand: kLoads chunks, a fixed number of rows apart.
// Offsets are worked out once; a row or column that does not exist is read as zeros, from an
// address that does. kRows: A, or B transposed, whose slices are columns [k, k + kDepth) of 128
// rows; else rows [k, k + kDepth) of 128 columns.
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
// Half a slice, 32 bytes deep: the depth of one mma, 16 elements of 16 bits or 8 of 32. The 8 x 16
// byte matrices that ldmatrix hands out are the quarters of a fragment for either width.

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

// Where this thread's warp begins within the tile.
template <int kParts = 4>
__device__ inline int warp_row() {
  return threadIdx.x / kWarpThreads % (8 / kParts) * (16 * kParts);
}
template <int kParts = 4>
__device__ inline int warp_column() {
  return threadIdx.x / (8 / kParts * kWarpThreads) * kWarpColumns;
}

// c = A B for a tile of depth `depth`. All threads of the block; `shared` is kTileSharedBytes, free
// for other uses when this returns.
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
    cp_async_commit();  // an empty group past the end keeps the count of those in flight
  };
  // A warp beyond the last row or column only copies.
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
  // This thread's share of the oldest slice in flight has landed; then everyone's has, and everyone
  // has read what the next copy overwrites.
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
  if constexpr (sizeof(Element) == 2) {  // the next fragments arrive while these multiply
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
  } else {  // the small parts need the registers
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

// C's 128 x 128 in fp32, 64 KB, over the slices: from here threads read it in whatever order suits
// the store. Conflict-free: fragments written by pairs; rows by 16 bytes; a row's elements by
// consecutive lanes; and 8 rows x 4 columns (of one chunk) or 2 x 16 (8 rows apart) by a warp.
struct StagedTile {
  float* data;

  __device__ explicit StagedTile(unsigned char* shared) : data(reinterpret_cast<float*>(shared)) {}

  __device__ float* at(int row, int column) const {
    const int turn = ((row & 3) << 1 | (row >> 2 & 1)) ^ (row >> 1 & 4);
    return data + row * kTile + (((column >> 2) ^ turn) << 2) + (column & 3);
  }

  // All threads, after multiply_tile; then every thread may read every element.
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
