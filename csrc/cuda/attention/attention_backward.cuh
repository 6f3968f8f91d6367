// Shared by the kernels of attention's backward: the ring buffer of streamed tiles, products of a
// warp's sixteen rows with a tile, scores in log-2 units, and the row statistics that one kernel
// computes for the next.
//
// All kernels have the same structure. A warp owns sixteen rows (queries or keys), which stay in
// shared memory, while tiles of kColumns keys or queries stream past:
//
//   scores     [16][kColumns]   = rows times tile^T
//   gradients  [16][kOut]      += derivatives of the scores (accumulators repacked as A fragments)
//                                 times tile
//
// Each gradient is computed by a single warp: no atomics, and a fixed summation order.
#pragma once

#include "cuda/attention/attention_backward_plan.h"
#include "cuda/attention/attention_hidden.cuh"
#include "cuda/attention/attention_sequences.cuh"
#include "cuda/attention/attention_tile.cuh"
#include "pmf/attention_backward.h"

namespace pmf::cuda {

constexpr int kWarpRows = 16;
constexpr int kTunedWidth = 64;  // wider kernels skip columns past the tensors' actual width

// Row statistics, one array each: P = weight 2^(s - top) for scores s in log-2 units, c D, and,
// with tangents, a and r. A row that attends nothing has weight 0 and top inf.
enum Statistic { kTop, kWeight, kD, kA, kR };

template <bool kTangent>
constexpr int kStatistics = int(kTangent ? kBackwardStatisticsWithTangents : kBackwardStatistics);

// One statistics array of a head and sequence.
template <bool kTangent>
__device__ inline float* statistic_of(const BackwardPlan& plan, const AttentionShape& shape,
                                      const Sequence& sequence, int batch, int head, int which) {
  const int64_t row = (int64_t(batch) * shape.heads + head) * kStatistics<kTangent> + which;
  const int64_t start = sequence.query / 16 * 16 + sequence.index * kBackwardOverhang;
  return plan.statistics + (row * plan.padded_queries + start);
}

// The gradient of a row's lse or lse_t; a null pointer means zero.
__device__ inline float lse_gradient(const void* gradients, int64_t row) {
  return gradients == nullptr ? 0.0f : static_cast<const float*>(gradients)[row];
}

// Tensors of a head on the query and key sides. Ordinary kernels use the first two of each.
enum QuerySide { kQ, kG, kQT, kX };  // query, grad, query_t, grad_t
enum KeySide { kK, kV, kKT, kVT };

__device__ inline const ConstView4& query_side(const AttentionBackwardParams& p, int which) {
  return which == kQ ? p.query : which == kG ? p.grad : which == kQT ? p.query_t : p.grad_t;
}
__device__ inline const ConstView4& key_side(const AttentionBackwardParams& p, int which) {
  return which == kK ? p.key : which == kV ? p.value : which == kKT ? p.key_t : p.value_t;
}

// A block's position: gradient column block, row tile, head and batch. It precedes the tiles in
// shared memory and is read from there on each use: no compiler keeps it in registers throughout
// the loops, where the accumulators need them all. Regular kernels also keep the kTensors streamed
// tensors and their statistics here. `found`: see attention_hidden.cuh.
template <int kTensors>
struct BlockPlace {
  WholeHead streamed[kTensors];
  const float* statistics;  // statistics of the query head
  Sequence sequence;
  int column, first, head, batch, key_head;
  uint32_t found[8];
};
static_assert(sizeof(BlockPlace<4>) <= kBackwardPlaceBytes, "the plan counts them");

// The position of this block, given `rows` gradient rows per block and column blocks of `part`
// columns. kByKeys: the gradients are those of keys.
template <int kTensors, bool kByKeys>
__device__ inline BlockPlace<kTensors>& place_block(const AttentionBackwardParams& p,
                                                    const BackwardPlan& plan, int part) {
  auto* const place = reinterpret_cast<BlockPlace<kTensors>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    uint32_t index = blockIdx.x;
    place->column = int(plan.by_parts.divide(index)) * part;
    int block = int(plan.by_row_blocks.divide(index));
    place->sequence = sequence_of<kByKeys>(p.sequences, p.shape, plan.rows, block);
    place->first = block * plan.rows;
    place->head = int(plan.by_heads.divide(index));
    place->batch = int(index);
    index = uint32_t(place->head);
    plan.by_group.divide(index);
    place->key_head = int(index);
  }
  __syncthreads();
  return *place;
}

// Copies a warp's sixteen rows from shared memory to rows [first, ...) of a gradient, counted from
// row `start`, 16 bytes at a time if the view allows it.
template <typename T, int kWidth>
__device__ inline void store_rows(const View4& view, int batch, int head, int start, int first,
                                  int row_count, const SharedTile<T, kWidth>& tile, int tile_row,
                                  int column, int columns, int lane) {
  using Tile = SharedTile<T, kWidth>;
  T* data = static_cast<T*>(view.data) + int64_t(batch) * view.stride[0] +
            int64_t(head) * view.stride[1] + int64_t(start) * view.stride[2];
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

// ---- the ring buffer of streamed tiles ----------------------------------------------------------

// Calls issue(i, slot) for each of `count` tiles, ahead of consume(i, slot). Copies started earlier
// have also landed when the first tile is consumed.
template <bool kRegular, typename Issue, typename Consume>
__device__ inline void stream(int count, int slots, const Issue& issue, const Consume& consume) {
  const TileStream tiles = {count, kRegular ? kBackwardRegularSlots : slots};
  tiles.begin(issue);
  tiles.run(issue, consume);
  tiles.end();
}

// A block's tiles in shared memory: kTensors resident ones of `rows` rows each, then a ring whose
// slots hold kTensors tiles of kColumns rows.
template <typename T, int kWidth, int kTensors, int kColumns>
struct BlockTiles {
  using Tile = SharedTile<T, kWidth>;
  T* shared;
  int rows;

  __device__ Tile own(int which, int row = 0) const {
    return {shared, (which * rows + row) * kWidth};
  }
  __device__ T* ring() const { return shared + kTensors * rows * kWidth; }
  __device__ Tile streamed(int slot, int which) const {
    return {ring() + which * kColumns * kWidth, slot * kTensors * kColumns * kWidth};
  }

  // Loads rows [first, first + count), counted from `start`, of all tensors of one side into tiles
  // that are contiguous from `tile` on.
  template <bool kRegular, typename Views>
  __device__ static void load(const Tile& tile, int count, const Views& views, int batch, int head,
                              int start, int first, int row_count, const AttentionShape& shape) {
    const int thread = threadIdx.x, threads = blockDim.x;
    if constexpr (kRegular) {
      WholeHead heads[kTensors];
#pragma unroll
      for (int i = 0; i < kTensors; ++i) heads[i] = whole_head_of<T>(views(i), batch, head, start);
      load_whole_rows<kTensors, 1>(tile, count, heads, first, row_count, thread, threads);
    } else {
      for (int i = 0; i < kTensors; ++i) {
        const HeadView<T> view = head_of<T>(views(i), batch, head, start);
        if (view.data == nullptr) continue;
        load_rows(Tile{tile.data + i * count * kWidth, tile.start}, count, view, first, row_count,
                  int(i % 2 == 0 ? shape.width : shape.value_width), thread, threads);
      }
    }
  }
};

// ---- products of a warp -------------------------------------------------------------------------

// c += A times columns [k depth, (k + 1) depth) of tile^T, for step k.
template <typename E, bool kSwapped, int kTiles, int kWidth>
__device__ inline void across_step(float (&c)[kTiles][4], const FragmentA& a,
                                   const SharedTile<typename E::Storage, kWidth>& tile, int k,
                                   int lane) {
  if constexpr (kTiles == 1) {
    E::template multiply<kSwapped>(c[0], a, load_across(tile, 0, 2 * k, lane));
  } else {
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      FragmentB b[2];
      load_across(b, tile, 8 * j, 2 * k, lane);
      E::template multiply<kSwapped>(c[j], a, b[0]);
      E::template multiply<kSwapped>(c[j + 1], a, b[1]);
    }
  }
}

// Unroll factor of a product's loop: full in regular kernels; elsewhere as far as registers allow
// loads ahead of their use.
template <typename E, bool kRegular, int kTiles, int kWidth>
constexpr int kUnrolledSteps = kRegular                      ? kWidth / E::kDepth
                               : kWidth == 80 || kTiles <= 2 ? 1
                                                             : 4;

// c += rows [row, row + 16) of `a` times b^T, over `width` columns. kSwapped: see ArithmeticF32.
template <typename E, bool kSwapped, bool kRegular, int kTiles, int kWidth>
__device__ inline void multiply_across(float (&c)[kTiles][4],
                                       const SharedTile<typename E::Storage, kWidth>& a, int row,
                                       const SharedTile<typename E::Storage, kWidth>& b, int width,
                                       int lane) {
  constexpr int kUnrolled = kUnrolledSteps<E, kRegular, kTiles, kWidth>;
#pragma unroll kUnrolled
  for (int k = 0; k < kWidth / E::kDepth; ++k) {
    if (!kRegular && kWidth > kTunedWidth && k * E::kDepth >= width) break;
    across_step<E, kSwapped>(c, load_a(a, row, 2 * k, lane), b, k, lane);
  }
}

// A product and its tangent, c += a b^T and ct += at b^T + a bt^T, from the same fragments; an
// absent tangent counts as zero. kSwapped also swaps the last two terms, so that kernels with A and
// B in exchanged roles sum in the same order.
template <typename E, bool kSwapped, bool kRegular, int kTiles, int kWidth>
__device__ inline void multiply_across(float (&c)[kTiles][4], float (&ct)[kTiles][4],
                                       const SharedTile<typename E::Storage, kWidth>& a,
                                       const SharedTile<typename E::Storage, kWidth>& at,
                                       bool has_at, int row,
                                       const SharedTile<typename E::Storage, kWidth>& b,
                                       const SharedTile<typename E::Storage, kWidth>& bt,
                                       bool has_bt, int width, int lane) {
  constexpr int kUnrolled = kUnrolledSteps<E, kRegular, kTiles, kWidth>;
#pragma unroll kUnrolled
  for (int k = 0; k < kWidth / E::kDepth; ++k) {
    if (!kRegular && kWidth > kTunedWidth && k * E::kDepth >= width) break;
    const FragmentA fragment = load_a(a, row, 2 * k, lane);
    if constexpr (kRegular) {
      const FragmentA tangent = load_a(at, row, 2 * k, lane);
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        FragmentB f[2], ft[2];
        load_across(f, b, 8 * j, 2 * k, lane);
        load_across(ft, bt, 8 * j, 2 * k, lane);
#pragma unroll
        for (int x = 0; x < 2; ++x) E::template multiply<kSwapped>(c[j + x], fragment, f[x]);
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          E::template multiply<kSwapped>(ct[j + x], kSwapped ? fragment : tangent,
                                         kSwapped ? ft[x] : f[x]);
        }
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          E::template multiply<kSwapped>(ct[j + x], kSwapped ? tangent : fragment,
                                         kSwapped ? f[x] : ft[x]);
        }
      }
    } else {
      across_step<E, kSwapped>(c, fragment, b, k, lane);
      if (kSwapped && has_bt) across_step<E, kSwapped>(ct, fragment, bt, k, lane);
      if (has_at) across_step<E, kSwapped>(ct, load_a(at, row, 2 * k, lane), b, k, lane);
      if (!kSwapped && has_bt) across_step<E, kSwapped>(ct, fragment, bt, k, lane);
    }
  }
}

// One term of multiply_down(): out += p times a tile.
template <int kTiles, int kOutTiles>
struct DownTerm {
  float (&out)[kOutTiles][4];
  const float (&p)[kTiles][4];
};
template <int kTiles, int kOutTiles>
__device__ inline DownTerm<kTiles, kOutTiles> down(float (&out)[kOutTiles][4],
                                                   const float (&p)[kTiles][4]) {
  return {out, p};
}

// For each term, out += p times columns [column, column + kOut) of the tile, whose fragments are
// read once; columns past `width` are skipped. kFinite: inf and NaN read as zero
// (attention_hidden.cuh).
template <typename E, bool kFinite, bool kRegular, int kWidth, int kTiles, int kOutTiles,
          typename... Terms>
__device__ inline void multiply_down(const SharedTile<typename E::Storage, kWidth>& tile,
                                     int column, int width, int lane,
                                     const DownTerm<kTiles, kOutTiles>& first,
                                     const Terms&... others) {
  using T = typename E::Storage;
  const auto load = [&](FragmentB(&b)[2], int k, int n) {
    load_down(b, tile, k * E::kDepth, column + 8 * n, lane);
    if constexpr (kFinite) b[0] = finite<T>(b[0]), b[1] = finite<T>(b[1]);
  };
  if constexpr (sizeof(T) == 4) {
    // In fp32, each tile is summed separately first: tensor cores truncate every term to the
    // exponent of the largest, and adding a thousand keys one by one to large sums would lose more
    // than the products do.
    const auto add = [&](const auto& term) {
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        if (column + 8 * n >= width) break;
        float part[2][4];
        clear(part);
#pragma unroll
        for (int k = 0; k < kTiles / E::kTilesPerA; ++k) {
          const FragmentA a = E::pack_a(term.p + k * E::kTilesPerA);
          FragmentB b[2];
          load(b, k, n);
          E::template multiply<>(part[0], a, b[0]);
          E::template multiply<>(part[1], a, b[1]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          term.out[n][e] += part[0][e], term.out[n + 1][e] += part[1][e];
        }
      }
    };
    add(first);
    (add(others), ...);
  } else {
#pragma unroll
    for (int k = 0; k < kTiles / E::kTilesPerA; ++k) {
      const FragmentA a[] = {E::pack_a(first.p + k * E::kTilesPerA),
                             E::pack_a(others.p + k * E::kTilesPerA)...};
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        if (!kRegular && kWidth > kTunedWidth && column + 8 * n >= width) break;
        FragmentB b[2];
        load(b, k, n);
        int i = 0;
        const auto add = [&](const auto& term) {
          E::template multiply<>(term.out[n], a[i], b[0]);
          E::template multiply<>(term.out[n + 1], a[i], b[1]);
          ++i;
        };
        add(first);
        (add(others), ...);
      }
    }
  }
}

// Row sums of the rounded p and q on the tensor cores: p times a matrix with ones in even columns,
// q times one with ones in odd columns. sums[2h] and sums[2h + 1] belong to row g + 8h.
template <typename E>
__device__ inline void add_row_sums(float (&sums)[4], const FragmentA& p, const FragmentA& q,
                                    int lane) {
  const bool odd = (lane >> 2) % 2 == 1;
  E::template multiply<>(sums, p, E::ones(!odd));
  E::template multiply<>(sums, q, E::ones(odd));
}

// Keys that the block's queries [first, first + plan.rows) see, starting at a tile boundary.
template <bool kRegular, int kColumns>
__device__ inline RowRange seen_keys(const BackwardPlan& plan, const Sequence& sequence,
                                     int first) {
  if constexpr (kRegular) return {0, sequence.keys};
  const int end = first + plan.rows < sequence.queries ? first + plan.rows : sequence.queries;
  return rows_in_window(first, end - 1, plan.window.left, plan.window.right, sequence.keys,
                        kColumns);
}

// ---- scores -------------------------------------------------------------------------------------

// The position of a lane's accumulator element [0][0].
struct ScorePlace {
  int batch, head, query, key;
};

// Converts raw scores to log-2 units: c log2(e) S plus mask, or -inf where masked. There the
// `others`, which depend on the scores, become 0, so that the contents of a masked key cannot reach
// the result. Accumulator rows are queries or, if kTransposed, keys. `edge`: the tile crosses the
// end of the keys or of the window. kRegular: no mask and no window.
template <bool kTransposed, bool kRegular, int kTiles, typename... Others>
__device__ inline void finish_scores(float (&s)[kTiles][4], const AttentionBackwardParams& p,
                                     const BackwardPlan& plan, const Sequence& sequence,
                                     const ScorePlace& place, bool edge, Others&... others) {
  const float& factor = plan.factor;
  const bool masked = !kRegular && p.mask.kind != MaskKind::none;
  if (!masked) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] *= factor;
    }
    if (!edge) return;
  }
  const int64_t* stride = p.mask.view.stride;
  const int64_t head = int64_t(place.batch) * stride[0] + int64_t(place.head) * stride[1];
  const int queries = sequence.queries, keys = sequence.keys;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = 8 * (e / 2), column = 8 * j + e % 2;
      const int query = place.query + (kTransposed ? column : row);
      const int key = place.key + (kTransposed ? row : column);
      float bias = 0.0f;
      if (key >= keys || (!kRegular && (query >= queries || hides(plan.window, query, key)))) {
        bias = -INFINITY;
      } else if (masked) {
        bias = mask_bias(p.mask, head + int64_t(query) * stride[2] + int64_t(key) * stride[3]);
      }
      if (masked) s[j][e] = fmaf(s[j][e], factor, bias);
      if (bias == -INFINITY) {
        s[j][e] = -INFINITY;
        ((others[j][e] = 0.0f), ...);
      }
    }
  }
}

// Zeroes `others` wherever the probability s is 0.
template <int kTiles, typename... Others>
__device__ inline void forget_hidden(const float (&s)[kTiles][4], Others&... others) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (s[j][e] == 0.0f) ((others[j][e] = 0.0f), ...);
    }
  }
}

// Whether a tile row is all zeros; all lanes of a quad get the same answer.
template <typename T, int kWidth>
__device__ inline bool zero_row(const SharedTile<T, kWidth>& tile, int row, int lane) {
  uint32_t bits = 0;
  for (int chunk = lane & 3; chunk < SharedTile<T, kWidth>::kChunks; chunk += 4) {
    const uint4 w = *reinterpret_cast<const uint4*>(tile.at(row, chunk));
    bits |= w.x | w.y | w.z | w.w;
  }
  bits |= shuffle_xor(bits, 1);
  bits |= shuffle_xor(bits, 2);
  return (bits & (sizeof(T) == 2 ? 0x7fff7fffu : 0x7fffffffu)) == 0;
}

// Writes a warp's rows of a gradient: rounds them into the warp's own rows of a tile that is no
// longer needed, then stores them.
template <typename T, int kWidth, int kOutTiles>
__device__ inline void write_gradient(const float (&out)[kOutTiles][4],
                                      const SharedTile<T, kWidth>& tile, int tile_row,
                                      const View4& view, int batch, int head, int start, int first,
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
    store_rows(view, batch, head, start, first, row_count, tile, tile_row, column, end, lane);
  }
}

}  // namespace pmf::cuda
