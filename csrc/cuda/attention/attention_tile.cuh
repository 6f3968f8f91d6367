// Attention's shared-memory tiles and the tensor-core fragments read from them.
//
// A tile is row-major with rows of kWidth elements (zero-padded beyond the tensor's width), divided
// into 16-byte chunks. ldmatrix reads one chunk of eight rows at a time, without bank conflicts if
// the eight chunks lie in different banks, so chunk c of row r is stored at position c ^ s(r).
//
// Fragments of mma m16n8k16 (16-bit) and m16n8k8 (TF32); lane = 4 g + t:
//
//   A  [16][k]  rows g, g + 8       C  [16][8]  rows g, g + 8, columns 2t, 2t + 1
//   B  [k][8]   column g
//
// A warp's accumulators (C) become the A operand of its next product without leaving registers: two
// C tiles form one 16-bit A fragment; one C tile forms one TF32 A fragment, provided that product
// reads its rows of B in the order 0, 2, 4, 6, 1, 3, 5, 7, as load_down() does.
#pragma once

#include "cuda/common/cuda.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/shared.cuh"
#include "cuda/common/vector.cuh"
#include "pmf/attention.h"

namespace pmf::cuda {

constexpr int kChunkBytes = 16;

// ---- arithmetic ---------------------------------------------------------------------------------

struct FragmentA {
  uint32_t x[4];
};
struct FragmentB {
  uint32_t x[2];
};

// mma on a 16-bit type.
template <typename T>
struct Arithmetic16 {
  using Storage = T;
  static constexpr int kDepth = 16;  // the K extent of one mma
  static constexpr int kTilesPerA = 2;

  __device__ static FragmentA pack_a(const float (*c)[4]) {
    return {{pack2<T>(c[0][0], c[0][1]), pack2<T>(c[0][2], c[0][3]), pack2<T>(c[1][0], c[1][1]),
             pack2<T>(c[1][2], c[1][3])}};
  }
  // 1 in every element of this lane's column if `one`, else 0.
  __device__ static FragmentB ones(bool one) {
    const uint32_t pair = one ? pack2<T>(1.0f, 1.0f) : 0u;
    return {{pair, pair}};
  }
  template <bool kSwapped = false>
  __device__ static void multiply(float (&c)[4], const FragmentA& a, const FragmentB& b) {
    mma_m16n8k16<T>(c, a.x, b.x);
  }
};

// fp32 rounded to TF32 (11 significant bits), used if PyTorch's precision setting allows it.
struct ArithmeticTf32 {
  using Storage = float;
  static constexpr int kDepth = 8;
  static constexpr int kTilesPerA = 1;

  __device__ static FragmentA pack_a(const float (*c)[4]) {
    return {{__float_as_uint(c[0][0]), __float_as_uint(c[0][2]), __float_as_uint(c[0][1]),
             __float_as_uint(c[0][3])}};
  }
  __device__ static FragmentB ones(bool one) {
    const uint32_t x = one ? __float_as_uint(1.0f) : 0u;
    return {{x, x}};
  }
  template <bool kSwapped = false>
  __device__ static void multiply(float (&c)[4], const FragmentA& a, const FragmentB& b) {
    uint32_t ra[4], rb[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) ra[i] = round_tf32(__uint_as_float(a.x[i]));
#pragma unroll
    for (int i = 0; i < 2; ++i) rb[i] = round_tf32(__uint_as_float(b.x[i]));
    mma_m16n8k8_tf32(c, ra, rb);
  }
};

// Full fp32 precision: each factor is split into two TF32 numbers, x = high + low, exact to 2^-22.
// Of the four partial products only low * low is dropped (Markidis et al. 2018).
struct ArithmeticF32 : ArithmeticTf32 {
  // kSwapped: A and B are exchanged relative to another kernel whose sums must match bitwise.
  template <bool kSwapped = false>
  __device__ static void multiply(float (&c)[4], const FragmentA& a, const FragmentB& b) {
    uint32_t ah[4], al[4], bh[2], bl[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a.x[i], ah[i], al[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) split(b.x[i], bh[i], bl[i]);
    mma_m16n8k8_tf32(c, kSwapped ? ah : al, kSwapped ? bl : bh);
    mma_m16n8k8_tf32(c, kSwapped ? al : ah, kSwapped ? bh : bl);
    mma_m16n8k8_tf32(c, ah, bh);
  }

 private:
  __device__ static void split(uint32_t x, uint32_t& high, uint32_t& low) {
    high = round_tf32(__uint_as_float(x));
    low = round_tf32(__uint_as_float(x) - __uint_as_float(high));
  }
};

// ---- tiles --------------------------------------------------------------------------------------

template <typename T, int kWidth>
struct SharedTile {
  static constexpr int kChunk = kChunkBytes / int(sizeof(T));  // elements
  static constexpr int kChunks = kWidth / kChunk;
  // Rows collide in banks if kChunks times their distance is a multiple of 8 chunks: 128 bytes.
  static constexpr int kSpread = kChunks % 8 == 0   ? 8
                                 : kChunks % 4 == 0 ? 4
                                 : kChunks % 2 == 0 ? 2
                                                    : 1;
  static_assert(kWidth % kChunk == 0, "rows are whole chunks");

  T* data;
  // Offset of the tile from `data`, in elements: the part that changes from tile to tile in a ring
  // buffer. Kept apart so that the compiler recomputes fragment addresses from it instead of
  // holding dozens of them in registers.
  int start = 0;

  static constexpr int64_t bytes(int rows) { return int64_t(rows) * kWidth * sizeof(T); }

  // Offset of 16-byte chunk `chunk` of `row`.
  __device__ static constexpr int offset(int row, int chunk) {
    return row * kWidth + (chunk ^ ((row / (8 / kSpread)) & (kSpread - 1))) * kChunk;
  }
  // Whether each chunk's eight rows lie in different banks; the banks span 128 bytes, eight chunks.
  __device__ static constexpr bool conflict_free() {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      unsigned banks = 0;
      for (int row = 0; row < 8; ++row) banks |= 1u << (offset(row, chunk) / kChunk % 8);
      if (banks != 0xffu) return false;
    }
    return true;
  }
  __device__ T* at(int row, int chunk) const { return data + start + offset(row, chunk); }

  // at(row + rows, chunk + even), given offset(row, chunk) with chunk 0 or 1, `rows` a multiple of
  // 8 and `even` of 2. Only the offset varies between lanes; the rest is constant. If rows are 128
  // bytes or more, tiles start at multiples of 128 bytes.
  __device__ T* from(int offset, int rows, int even) const {
    static_assert(conflict_free(), "ldmatrix takes one pass");
    if constexpr (kSpread == 8) {
      return data + ((start + offset) ^ even % 8 * kChunk) +
             (even / 8 * 8 * kChunk + rows * kWidth);
    } else {
      static_assert(kSpread <= 2,
                    "of the widths in use, only rows of 160 bytes are no power of two");
      return data + (start + offset) + (even * kChunk + rows * kWidth);
    }
  }
  __device__ T& element(int row, int column) const {
    return at(row, column / kChunk)[column % kChunk];
  }
};

// ---- one head of a tensor -----------------------------------------------------------------------

template <typename T>
struct HeadView {
  const T* data;  // null if absent
  int64_t row_stride, column_stride;
};

// A view of one head, starting at row `row`.
template <typename T>
__device__ inline HeadView<T> head_of(const ConstView4& view, int batch, int head, int row) {
  const T* data = static_cast<const T*>(view.data);
  if (data != nullptr) {
    data += int64_t(batch) * view.stride[0] + int64_t(head) * view.stride[1] +
            int64_t(row) * view.stride[2];
  }
  return {data, view.stride[2], view.stride[3]};
}

// Whether rows of `columns` elements consist of aligned 16-byte chunks.
template <typename T>
__device__ inline bool whole_rows(const HeadView<T>& head, int columns) {
  return head.column_stride == 1 && columns % (kChunkBytes / int(sizeof(T))) == 0 &&
         (reinterpret_cast<uintptr_t>(head.data) |
          uintptr_t(head.row_stride * int64_t(sizeof(T)))) %
                 kChunkBytes ==
             0;
}

// Loads rows [first, first + rows) of one head into a tile with all `threads` threads, padding with
// zeros past the tensor's rows and columns. Uses 16-byte asynchronous copies if the view allows
// them; the caller commits and waits.
template <typename T, int kWidth>
__device__ inline void load_rows(const SharedTile<T, kWidth>& tile, int rows,
                                 const HeadView<T>& head, int first, int row_count, int columns,
                                 int thread, int threads) {
  using Tile = SharedTile<T, kWidth>;
  const bool whole = whole_rows(head, columns);
  for (int i = thread; i < rows * Tile::kChunks; i += threads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const int column = chunk * Tile::kChunk;
    const bool inside = first + row < row_count && column < columns;
    const T* from =
        head.data + int64_t(first + row) * head.row_stride + int64_t(column) * head.column_stride;
    if (whole) {
      cp_async_16(tile.at(row, chunk), inside ? from : head.data, inside);
    } else {
      Vector<T, Tile::kChunk> vector;
#pragma unroll
      for (int k = 0; k < Tile::kChunk; ++k) {
        const bool valid = inside && column + k < columns;
        vector.element[k] = valid ? from[k * head.column_stride] : from_float<T>(0.0f);
      }
      *reinterpret_cast<Vector<T, Tile::kChunk>*>(tile.at(row, chunk)) = vector;
    }
  }
}

// One head of a tensor whose rows are aligned 16-byte chunks with a row stride below 2^31 bytes.
struct WholeHead {
  const char* data;
  int row_bytes;  // row stride
};

template <typename T>
__device__ inline WholeHead whole_head_of(const ConstView4& view, int batch, int head, int row) {
  const HeadView<T> from = head_of<T>(view, batch, head, row);
  return {reinterpret_cast<const char*>(from.data), int(from.row_stride * int64_t(sizeof(T)))};
}

// The head as load_whole_rows() (kWhole) or load_rows() reads it.
template <bool kWhole, typename T>
__device__ inline auto streamed_head(const ConstView4& view, int batch, int head, int row) {
  if constexpr (kWhole) {
    return whole_head_of<T>(view, batch, head, row);
  } else {
    return head_of<T>(view, batch, head, row);
  }
}

// load_rows() for every kStep-th of several tensors, all as wide as their tiles, which are
// contiguous in shared memory. A thread copies the same chunk of each row it handles and advances
// one pointer per tensor, which leaves little address arithmetic.
template <int kTensors, int kStep, typename T, int kWidth>
__device__ inline void load_whole_rows(const SharedTile<T, kWidth>& tile, int rows,
                                       const WholeHead* heads, int first, int row_count, int thread,
                                       int threads) {
  using Tile = SharedTile<T, kWidth>;
  const int step = threads / Tile::kChunks, chunk = thread % Tile::kChunks;
  const int start = thread / Tile::kChunks;
  if (start >= step) return;  // threads left over after whole rows are assigned
  constexpr int kCopies = (kTensors + kStep - 1) / kStep;
  const char* from[kCopies];
  int moves[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    const WholeHead& head = heads[i * kStep];
    from[i] = head.data + (int64_t{first + start} * head.row_bytes + chunk * kChunkBytes);
    moves[i] = step * head.row_bytes;
  }
  // Rows left to fill, and how many of those exist in the tensor.
  int left = rows - start, existing = row_count - first - start;
#pragma unroll 1
  for (; left > 0; left -= step, existing -= step) {
    T* const to = tile.at(rows - left, chunk);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      cp_async_16(to + i * rows * kWidth, from[i], existing > 0);
      from[i] += moves[i];
    }
  }
}

// ---- the ring buffer of streamed tiles ----------------------------------------------------------

// Streams tiles through a ring buffer of one to three slots: issue(i, slot) starts the copies of
// tile i ahead of consume(i, slot). All threads of the block call both.
struct TileStream {
  int count, slots;

  // Copies started before begin() have also landed when the first tile is consumed.
  template <typename Issue>
  __device__ void begin(const Issue& issue) const {
    for (int i = 0; i < slots - 1; ++i) start(i, i, issue);
  }

  template <typename Issue, typename Consume>
  __device__ void run(const Issue& issue, const Consume& consume) const {
    int slot = 0;
    for (int i = 0; i < count; ++i) step(i, slot, issue, consume);
  }

  // Waits until no copy is in flight and the ring can be reused.
  __device__ void end() const {
    cp_async_commit();  // copies started before begin(), if there were no tiles
    cp_async_wait<0>();
    __syncthreads();
  }

 private:
  template <typename Issue>
  __device__ void start(int i, int slot, const Issue& issue) const {
    if (i < count) issue(i, slot);
    cp_async_commit();
  }

  template <typename Issue, typename Consume>
  __device__ void step(int i, int& slot, const Issue& issue, const Consume& consume) const {
    const int ahead = slots - 1;
    if (ahead == 0) start(i, 0, issue);
    if (ahead == 2) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();  // tile i has landed, and all threads are done with tile i - 1
    if (ahead != 0) start(i + ahead, slot == 0 ? ahead : slot - 1, issue);
    consume(i, slot);
    slot = slot == ahead ? 0 : slot + 1;
    if (ahead == 0) __syncthreads();
  }
};

// ---- fragments ----------------------------------------------------------------------------------

// A = tile[row .. row + 16][k .. k + depth], with column k given in chunks.
template <typename T, int kWidth>
__device__ inline FragmentA load_a(const SharedTile<T, kWidth>& tile, int row, int chunk,
                                   int lane) {
  FragmentA a;
  ldmatrix_x4(a.x, tile.from(tile.offset(lane & 15, lane >> 4), row, chunk));
  return a;
}

// Two fragments of B = tile^T, columns n .. n + 15: B[k][n] = tile[n][k].
template <typename T, int kWidth>
__device__ inline void load_across(FragmentB (&b)[2], const SharedTile<T, kWidth>& tile, int n,
                                   int chunk, int lane) {
  uint32_t x[4];
  ldmatrix_x4(x,
              tile.from(tile.offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1), n, chunk));
  b[0] = {{x[0], x[1]}}, b[1] = {{x[2], x[3]}};
}

// One fragment, columns n .. n + 7.
template <typename T, int kWidth>
__device__ inline FragmentB load_across(const SharedTile<T, kWidth>& tile, int n, int chunk,
                                        int lane) {
  FragmentB b;
  ldmatrix_x2(b.x, tile.from(tile.offset(lane & 7, (lane >> 3) & 1), n, chunk));
  return b;
}

// Two fragments of B = tile, columns n .. n + 15: B[k][n] = tile[k][n].
template <typename T, int kWidth>
__device__ inline void load_down(FragmentB (&b)[2], const SharedTile<T, kWidth>& tile, int k, int n,
                                 int lane) {
  if constexpr (sizeof(T) == 2) {
    uint32_t x[4];
    ldmatrix_x4_trans(x, tile.from(tile.offset(lane & 15, lane >> 4), k, n / tile.kChunk));
    b[0] = {{x[0], x[1]}}, b[1] = {{x[2], x[3]}};
  } else {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        b[i].x[h] = __float_as_uint(tile.element(k + 2 * t + h, n + 8 * i + g));
      }
    }
  }
}

// ---- scores and rows ----------------------------------------------------------------------------

constexpr float kLog2eFloat = 1.4426950408889634f;
constexpr float kLargestFloat = 3.4028234663852886e38f;

// A mask element in log-2 units. The largest finite values stay finite, so that a row masked with
// nothing else still averages.
__device__ inline float mask_bias(const AttentionMask& mask, int64_t offset) {
  if (mask.kind == MaskKind::boolean) {
    return static_cast<const uint8_t*>(mask.view.data)[offset] != 0 ? 0.0f : -INFINITY;
  }
  float x;
  if (mask.dtype == DType::f32) {
    x = static_cast<const float*>(mask.view.data)[offset];
  } else if (mask.dtype == DType::bf16) {
    x = to_float(static_cast<const __nv_bfloat16*>(mask.view.data)[offset]);
  } else {
    x = to_float(static_cast<const __half*>(mask.view.data)[offset]);
  }
  const float y = x * kLog2eFloat;
  return y < -kLargestFloat && x >= -kLargestFloat ? -kLargestFloat : y;
}

template <int kTiles>
__device__ inline void clear(float (&c)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[j][e] = 0.0f;
  }
}

// Reductions over the four lanes that hold a row of an accumulator.
__device__ inline float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
__device__ inline float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

// Transposes across a quad: lane t holds w[0..3]; afterwards w[c] is what lane c held as w[t].
__device__ inline void transpose_quad(uint32_t (&w)[4], int lane) {
  const bool odd = (lane & 1) != 0, high = (lane & 2) != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = shuffle_xor(odd ? w[i] : w[i + 1], 1);
    w[i] = odd ? other : w[i];
    w[i + 1] = odd ? w[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = shuffle_xor(high ? w[i] : w[i + 2], 2);
    w[i] = high ? other : w[i];
    w[i + 2] = high ? w[i + 2] : other;
  }
}

// Sixteen rows of an accumulator, in 16-byte pieces where the view allows, and anyway if kWhole.
// first: the lane's row g.
template <bool kWhole, typename T, int kOutTiles>
__device__ inline void store_rows(const float (&out)[kOutTiles][4], T* head, int64_t row_stride,
                                  int64_t column_stride, int first, int rows, int columns,
                                  int lane) {
  const int t = lane & 3;
  const bool whole = kWhole || whole_rows(HeadView<T>{head, row_stride, column_stride}, columns);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first + 8 * h;
    T* to = head + int64_t(row) * row_stride;
    if (sizeof(T) == 2 && whole) {
      // Lane t's pairs of four chunks become one chunk of its own.
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 4) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int from = n + i < kOutTiles ? n + i : n;
          if constexpr (sizeof(T) == 2) w[i] = pack2<T>(out[from][2 * h], out[from][2 * h + 1]);
        }
        transpose_quad(w, lane);
        const int column = 8 * (n + t);
        if (row < rows && column < columns) {
          __stwb(assume_aligned<16>(reinterpret_cast<uint4*>(to + column)),
                 make_uint4(w[0], w[1], w[2], w[3]));
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        const int column = 8 * n + 2 * t;
        if (row >= rows || column >= columns) continue;
        if (whole) {
          const float pair[2] = {out[n][2 * h], out[n][2 * h + 1]};
          store_vector(to + column, pair);
        } else {
          to[column * column_stride] = from_float<T>(out[n][2 * h]);
          if (column + 1 < columns) {
            to[(column + 1) * column_stride] = from_float<T>(out[n][2 * h + 1]);
          }
        }
      }
    }
  }
}

}  // namespace pmf::cuda
