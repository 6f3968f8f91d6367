// What the kernels of attention's backward share: the ring of streamed tiles, products of a warp's
// sixteen rows with a tile, scores in log-2 units, and the row statistics that one kernel leaves
// for the next.
//
// Every kernel is built alike. A warp owns sixteen rows (queries or keys), which stay in shared
// memory; tiles of kColumns keys or queries stream past:
//
//   scores     [16][kColumns]   = rows times tile^T
//   gradients  [16][kOut]      += scores' derivatives (accumulators turned into A fragments) times
//                                 tile
//
// so a gradient is one warp's from beginning to end: no atomics, one fixed order of every sum.
#pragma once

#include "cuda/attention/attention_backward_plan.h"
#include "cuda/attention/attention_tile.cuh"
#include "pmf/attention_backward.h"

namespace pmf::cuda {

constexpr int kWarpRows = 16;
constexpr int kTunedWidth = 64;  // wider kernels skip what lies past the tensors' own width

// Row statistics, one array each: P = weight 2^(s - top) for scores s in log-2 units, c D, and,
// with tangents, a and r. Of a row that attends nothing, weight is 0 and top infinite.
enum Statistic { kTop, kWeight, kD, kA, kR };

template <bool kTangent>
constexpr int kStatistics = int(kTangent ? kBackwardStatisticsWithTangents : kBackwardStatistics);

// One of the arrays of a head.
template <bool kTangent>
__device__ inline float* statistic_of(const BackwardPlan& plan, const AttentionShape& shape,
                                      int batch, int head, int which) {
  const int64_t row = (int64_t(batch) * shape.heads + head) * kStatistics<kTangent> + which;
  return plan.statistics + row * plan.padded_queries;
}

// Which part of the work a block does: columns of the gradients, tile of rows, head and batch. It
// lies in front of the block's tiles and is read from there wherever it is needed: no compiler
// keeps it in registers throughout the loops, where accumulators need them all.
struct BlockPlace {
  int column, first, head, batch, key_head;
};
static_assert(sizeof(BlockPlace) <= kBackwardPlaceBytes, "the plan counts them");

// Of this block, of `heads` heads with `row_count` rows each and gradients `width` wide. Every
// thread of the block calls it.
__device__ inline const BlockPlace& place_block(int64_t width, int part, int64_t row_count,
                                                int rows, int64_t heads, int64_t key_heads) {
  BlockPlace* const place = reinterpret_cast<BlockPlace*>(dynamic_shared());
  if (threadIdx.x == 0) {
    unsigned index = blockIdx.x;
    const unsigned parts = unsigned((width + part - 1) / part);
    const unsigned blocks = unsigned((row_count + rows - 1) / rows);
    place->column = int(index % parts) * part, index /= parts;
    place->first = int(index % blocks) * rows, index /= blocks;
    place->head = int(index % unsigned(heads)), place->batch = int(index / unsigned(heads));
    place->key_head = place->head / int(heads / key_heads);
  }
  __syncthreads();
  return *place;
}

// Sixteen rows of a warp, from shared memory to rows [first, ...) of a gradient, 16 bytes at a time
// where the view allows.
template <typename T, int kWidth>
__device__ inline void store_rows(const View4& view, int batch, int head, int first, int row_count,
                                  const SharedTile<T, kWidth>& tile, int tile_row, int column,
                                  int columns, int lane) {
  using Tile = SharedTile<T, kWidth>;
  T* data =
      static_cast<T*>(view.data) + int64_t(batch) * view.stride[0] + int64_t(head) * view.stride[1];
  const int64_t row_stride = view.stride[2], column_stride = view.stride[3];
  const bool whole =
      column_stride == 1 && columns % Tile::kChunk == 0 &&
      (reinterpret_cast<uintptr_t>(data) | uintptr_t(row_stride * sizeof(T))) % kChunkBytes == 0;
  const int chunks = (columns - column + Tile::kChunk - 1) / Tile::kChunk;
  for (int i = lane; i < kWarpRows * chunks; i += kWarpThreads) {
    const int row = i / chunks, chunk = column / Tile::kChunk + i % chunks;
    if (first + row >= row_count) continue;
    const T* from = tile.at(tile_row + row, chunk);
    T* to =
        data + int64_t(first + row) * row_stride + int64_t(chunk * Tile::kChunk) * column_stride;
    if (whole) {
      store_vector(to, load_vector<T, Tile::kChunk>(from));
    } else {
#pragma unroll
      for (int k = 0; k < Tile::kChunk; ++k) {
        if (chunk * Tile::kChunk + k < columns) to[k * column_stride] = from[k];
      }
    }
  }
}

// ---- the ring of streamed tiles -----------------------------------------------------------------

// Calls issue(i, slot) for each of `count` tiles, some ahead of consume(i, slot). Every thread of
// the block calls it; what was loaded before is there as well when the first tile is consumed.
template <typename Issue, typename Consume>
__device__ inline void stream(int count, int slots, Issue issue, Consume consume) {
  const int ahead = slots - 1;
  const auto start = [&](int i, int slot) {
    if (i < count) issue(i, slot);
    cp_async_commit();
  };
  for (int i = 0; i < ahead; ++i) start(i, i);
  int slot = 0;
  for (int i = 0; i < count; ++i) {
    if (ahead == 0) start(i, 0);
    if (ahead == 2) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();  // tile i is there, and everyone is done with tile i - 1
    if (ahead != 0) start(i + ahead, slot == 0 ? ahead : slot - 1);
    consume(i, slot);
    slot = slot == ahead ? 0 : slot + 1;
    if (ahead == 0) __syncthreads();
  }
  cp_async_commit();  // of what was loaded before, where no tile followed
  cp_async_wait<0>();
  __syncthreads();
}

// ---- products of a warp -------------------------------------------------------------------------

// c += rows [row, row + 16) of `a` times tile^T, over `width` columns. kSwapped: see ArithmeticF32.
template <typename E, bool kSwapped, int kTiles, int kWidth>
__device__ inline void multiply_across(float (&c)[kTiles][4],
                                       const SharedTile<typename E::Storage, kWidth>& a, int row,
                                       const SharedTile<typename E::Storage, kWidth>& tile,
                                       int width, int lane) {
  // At 80, or beside tangents, loads ahead would not fit the registers beside the accumulators.
  constexpr int kUnrolled = kWidth == 80 || kTiles <= 2 ? 1 : 4;
#pragma unroll kUnrolled
  for (int k = 0; k < kWidth / E::kDepth; ++k) {
    if (kWidth > kTunedWidth && k * E::kDepth >= width) break;
    const FragmentA fragment = load_a(a, row, 2 * k, lane);
    if constexpr (kTiles == 1) {
      const FragmentB b = load_across(tile, 0, 2 * k, lane);
      E::template multiply<kSwapped>(c[0], fragment, b);
    } else {
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        FragmentB b[2];
        load_across(b, tile, 8 * j, 2 * k, lane);
        E::template multiply<kSwapped>(c[j], fragment, b[0]);
        E::template multiply<kSwapped>(c[j + 1], fragment, b[1]);
      }
    }
  }
}

// out += p times columns [column, column + kOut) of the tile; columns past `width` are left out.
template <typename E, int kTiles, int kOutTiles, int kWidth>
__device__ inline void multiply_down(float (&out)[kOutTiles][4], const float (&p)[kTiles][4],
                                     const SharedTile<typename E::Storage, kWidth>& tile,
                                     int column, int width, int lane) {
  // In fp32 a tile's products are added up by themselves: a thousand keys one by one into large
  // sums would lose more than the products do.
  if constexpr (sizeof(typename E::Storage) == 4) {
#pragma unroll
    for (int n = 0; n < kOutTiles; n += 2) {
      if (column + 8 * n >= width) break;
      float part[2][4];
      clear(part);
#pragma unroll
      for (int k = 0; k < kTiles / E::kTilesPerA; ++k) {
        const FragmentA a = E::pack_a(p + k * E::kTilesPerA);
        FragmentB b[2];
        load_down(b, tile, k * E::kDepth, column + 8 * n, lane);
        E::template multiply<>(part[0], a, b[0]);
        E::template multiply<>(part[1], a, b[1]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][e] += part[0][e], out[n + 1][e] += part[1][e];
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kTiles / E::kTilesPerA; ++k) {
    const FragmentA a = E::pack_a(p + k * E::kTilesPerA);
#pragma unroll
    for (int n = 0; n < kOutTiles; n += 2) {
      if (kWidth > kTunedWidth && column + 8 * n >= width) break;
      FragmentB b[2];
      load_down(b, tile, k * E::kDepth, column + 8 * n, lane);
      E::template multiply<>(out[n], a, b[0]);
      E::template multiply<>(out[n + 1], a, b[1]);
    }
  }
}

// Sums of the rounded rows of p and of q, by the tensor cores: p times a matrix whose even columns
// are ones, q times one whose odd columns are. sums[2h] and sums[2h + 1] are those of row g + 8h.
template <typename E>
__device__ inline void add_row_sums(float (&sums)[4], const FragmentA& p, const FragmentA& q,
                                    int lane) {
  const bool odd = (lane >> 2) % 2 == 1;
  E::template multiply<>(sums, p, E::ones(!odd));
  E::template multiply<>(sums, q, E::ones(odd));
}

// ---- scores -------------------------------------------------------------------------------------

// Where a lane's accumulator [0][0] lies.
struct ScorePlace {
  int batch, head, query, key;
};

// Raw scores to log-2 units: c log2(e) S plus mask, -inf where the query may not attend.
// Accumulator rows are queries, or, kTransposed, keys. `edge`: the tile reaches past the keys or
// the diagonal.
template <bool kTransposed, int kTiles>
__device__ inline void finish_scores(float (&s)[kTiles][4], const AttentionBackwardParams& p,
                                     const ScorePlace& place, float factor, bool edge) {
  if (p.mask.kind == MaskKind::none) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] *= factor;
    }
    if (!edge) return;
  }
  const int64_t* stride = p.mask.view.stride;
  const int64_t head = int64_t(place.batch) * stride[0] + int64_t(place.head) * stride[1];
  const int queries = int(p.shape.queries), keys = int(p.shape.keys);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = 8 * (e / 2), column = 8 * j + e % 2;
      const int query = place.query + (kTransposed ? column : row);
      const int key = place.key + (kTransposed ? row : column);
      float bias = 0.0f;
      if (key >= keys || query >= queries || (p.is_causal && key > query)) {
        bias = -INFINITY;
      } else if (p.mask.kind != MaskKind::none) {
        bias = mask_bias(p.mask, head + int64_t(query) * stride[2] + int64_t(key) * stride[3]);
      }
      if (p.mask.kind != MaskKind::none) s[j][e] = fmaf(s[j][e], factor, bias);
      if (bias == -INFINITY) s[j][e] = -INFINITY;
    }
  }
}

// A warp's rows of a gradient: rounded into its own rows of a tile that nobody reads any more, then
// stored.
template <typename T, int kWidth, int kOutTiles>
__device__ inline void write_gradient(const float (&out)[kOutTiles][4],
                                      const SharedTile<T, kWidth>& tile, int tile_row,
                                      const View4& view, int batch, int head, int first,
                                      int row_count, int column, int width, int lane) {
  const int g = lane >> 2, t = lane & 3;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kOutTiles; ++n) {
    if (column + 8 * n >= kWidth) break;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Vector<T, 2> pair;
      pair.element[0] = from_float<T>(out[n][2 * h]);
      pair.element[1] = from_float<T>(out[n][2 * h + 1]);
      T* to = &tile.element(tile_row + g + 8 * h, column + 8 * n + 2 * t);
      *reinterpret_cast<Vector<T, 2>*>(to) = pair;
    }
  }
  __syncwarp();
  const int end = column + 8 * kOutTiles < width ? column + 8 * kOutTiles : width;
  if (column < width) {
    store_rows(view, batch, head, first, row_count, tile, tile_row, column, end, lane);
  }
}

}  // namespace pmf::cuda
