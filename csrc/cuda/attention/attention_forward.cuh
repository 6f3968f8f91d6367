// Flash attention, forward and forward with tangents.
//
//   S = c Q K^T + mask   P = softmax(S)   out   = P V
//   tS = c (tQ K^T + Q tK^T)              out_t = (P o tS) V - rowsum(P o tS) o out + P tV
//
// Six products where the forward has two; H V and P tV share one accumulator (the pivot that makes
// this accurate: attention_softmax.cuh). S and tS are made, turned into P and H, and used as the
// next products' A operand without leaving the registers.
//
// Tiling. A warp does one unit at a time, 16 queries (32 without tangents, so that every fragment
// of K and V feeds twice the products), against tiles of 32 keys, or 16 where rows are long. The
// warps of a block share the tiles: K, tK, V, tV in a ring that cp.async fills ahead of them. Where
// the ring holds a whole head, one block does all units of the head and every tensor is read once;
// otherwise a block does one unit a warp and the heads' tiles are read again through L2. Queries
// stay in registers as fragments up to 80 columns and in shared memory beyond. Of values wider than
// kOut each block takes kOut columns.
//
// At 276 tokens both tilings pad to 288, which is 9 tiles of 32 keys and 18 (9) units.
// Bytes: Q, K, V, out once, with tangents twice as many: 8 x 35 KB a head of 276 x 64 in 16 bits,
// which is also the bound (estimated: the six products' FLOPs would take three quarters of that
// time on an H100). Longer sequences are bound by the tensor cores.
#pragma once

#include "cuda/attention/attention_forward_queries.cuh"
#include "cuda/attention/attention_softmax.cuh"

namespace pmf::cuda {

// ---- products -----------------------------------------------------------------------------------

// s += Q K^T and, if kBoth, ts += tQ K^T, whose fragments of K are the same.
template <class C, bool kBoth, int kBlocks, int kTiles>
__device__ inline void score_products(float (&s)[kBlocks][kTiles][4],
                                      float (&ts)[kBlocks][kTiles][4], const UnitQueries<C>& q,
                                      const UnitQueries<C>& qt, const typename C::KeyTile& keys,
                                      int width, int lane) {
  using E = typename C::E;
#pragma unroll(C::kSkips ? 2 : C::kSteps)
  for (int k = 0; k < C::kSteps; ++k) {
    if (C::kSkips && k * E::kDepth >= width) break;
    FragmentA a[kBlocks], at[kBlocks];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      a[m] = q.fragment(m, k, lane);
      if constexpr (kBoth) at[m] = qt.fragment(m, k, lane);
    }
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      FragmentB b[2];
      load_across(b, keys, 8 * j, 2 * k, lane);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        E::multiply(s[m][j], a[m], b[0]);
        E::multiply(s[m][j + 1], a[m], b[1]);
        if constexpr (kBoth) {
          E::multiply(ts[m][j], at[m], b[0]);
          E::multiply(ts[m][j + 1], at[m], b[1]);
        }
      }
    }
  }
}

// out += p times the tile.
template <class C, int kBlocks, int kOutTiles>
__device__ inline void value_product(float (&out)[kBlocks][kOutTiles][4],
                                     const FragmentA (&p)[kBlocks],
                                     const typename C::ValueTile& values, int row, int columns,
                                     int lane) {
#pragma unroll
  for (int n = 0; n < kOutTiles; n += 2) {
    if (C::kSkips && 8 * n >= columns) break;
    FragmentB b[2];
    load_down(b, values, row, 8 * n, lane);
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      C::E::multiply(out[m][n], p[m], b[0]);
      C::E::multiply(out[m][n + 1], p[m], b[1]);
    }
  }
}

// ---- results ------------------------------------------------------------------------------------

// Sixteen rows of an accumulator, in 16-byte pieces where the view allows. first: the lane's row g.
template <typename T, int kOutTiles>
__device__ inline void store_rows(const float (&out)[kOutTiles][4], T* head, int64_t row_stride,
                                  int64_t column_stride, int first, int rows, int columns,
                                  int lane) {
  constexpr int kChunk = kChunkBytes / int(sizeof(T));
  const int t = lane & 3;
  const bool whole =
      column_stride == 1 && columns % kChunk == 0 &&
      (reinterpret_cast<uintptr_t>(head) | uintptr_t(row_stride * int64_t(sizeof(T)))) %
              kChunkBytes ==
          0;
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

// ---- the ring -----------------------------------------------------------------------------------

// Waits for all groups of copies but the `pending` newest (or for more).
__device__ inline void wait_all_but(int pending) {
  if (pending >= 3) {
    cp_async_wait<3>();
  } else if (pending == 2) {
    cp_async_wait<2>();
  } else if (pending == 1) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
}

// ---- one unit against one tile ------------------------------------------------------------------

template <class C>
struct ForwardUnit {
  using E = typename C::E;
  static constexpr int kM = C::kBlocks;

  UnitQueries<C> q, qt;
  RowState rows[kM];
  float o[kM][C::kOutTiles][4], ot[kM][C::kTangent ? C::kOutTiles : 2][4];

  __device__ void reset() {
#pragma unroll
    for (int m = 0; m < kM; ++m) rows[m] = RowState(), clear(o[m]), clear(ot[m]);
  }

  // `place`: the lane's first score; edge: the tile reaches past the keys or the diagonal.
  __device__ void add_tile(const AttentionParams& p, typename C::T* slot, ScorePlace place,
                           bool edge, float factor, float scale, int column, int lane) {
    const typename C::KeyTile k{slot}, kt{slot + C::kKeyElements};
    typename C::T* const value_tiles = slot + C::kSides * C::kKeyElements;
    const typename C::ValueTile v{value_tiles}, vt{value_tiles + C::kValueElements};
    const int width = int(p.shape.width), columns = int(p.shape.value_width) - column;

    float s[kM][C::kTiles][4], ts[kM][C::kTiles][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) clear(s[m]), clear(ts[m]);
    score_products<C, C::kTangent>(s, ts, q, qt, k, width, lane);
    if constexpr (C::kTangent) {
      if (p.key_t.data != nullptr) score_products<C, false>(ts, ts, q, q, kt, width, lane);
    }
    const bool masked = edge || p.mask.kind != MaskKind::none;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (masked) mask_scores<C::kTangent>(s[m], ts[m], p, place, factor);
      softmax_tile<C::kTangent>(rows[m], s[m], ts[m], masked ? 1.0f : factor, scale);
      place.query += 16;
      rescale(m);
    }

    float sums[kM][2][4];  // of P and of H, alike in all columns
#pragma unroll
    for (int m = 0; m < kM; ++m) clear(sums[m]);
#pragma unroll
    for (int i = 0; i < C::kTiles / E::kTilesPerA; ++i) {
      FragmentA probability[kM], h[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        probability[m] = E::pack_a(s[m] + i * E::kTilesPerA);
        E::multiply(sums[m][0], probability[m], E::ones(true));
        if constexpr (C::kTangent) {
          h[m] = E::pack_a(ts[m] + i * E::kTilesPerA);
          E::multiply(sums[m][1], h[m], E::ones(true));
        }
      }
      value_products(probability, h, v, i * E::kDepth, columns, lane);
      if constexpr (C::kTangent) {
        if (p.value_t.data != nullptr) {
          value_product<C>(ot, probability, vt, i * E::kDepth, columns, lane);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rows[m].sum[r] = fmaf(rows[m].sum[r], rows[m].rescale[r], sums[m][0][2 * r]);
        if constexpr (C::kTangent) rows[m].tangent[r] += sums[m][1][2 * r];
      }
    }
  }

  // Normalises and stores:  out = O / l,  out_t = tO / l - (r / l) out,  lse = ln 2 (m + log2 l).
  // (The pivot has gone into H.) A row that attended nothing: zeros, and lse is -inf.
  __device__ void finish(const AttentionParams& p, const ScorePlace& place, int column, int lane) {
    constexpr float kLn2 = 0.6931471805599453f;
    using T = typename C::T;
    const int queries = int(p.shape.queries);
    int columns = int(p.shape.value_width) - column;
    columns = columns < C::kOut ? columns : C::kOut;
    const auto start = [&](const View4& view) {
      return static_cast<T*>(view.data) + int64_t(place.batch) * view.stride[0] +
             int64_t(place.head) * view.stride[1] + int64_t(column) * view.stride[3];
    };
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int query = place.query + 16 * m;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float sum = rows[m].sum[r];
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        const float residual = rows[m].tangent[r] * inverse;
#pragma unroll
        for (int n = 0; n < C::kOutTiles; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            o[m][n][e] *= inverse;
            if constexpr (C::kTangent) {
              ot[m][n][e] = fmaf(-residual, o[m][n][e], ot[m][n][e] * inverse);
            }
          }
        }
        if (column == 0 && (lane & 3) == 0 && query + 8 * r < queries) {
          const int64_t row =
              (int64_t(place.batch) * p.shape.heads + place.head) * p.shape.queries + query + 8 * r;
          static_cast<float*>(p.lse)[row] =
              sum == 0.0f ? -INFINITY : kLn2 * (rows[m].top[r] + log2_approx(sum));
        }
      }
      store_rows(o[m], start(p.out), p.out.stride[2], p.out.stride[3], query, queries, columns,
                 lane);
      if constexpr (C::kTangent) {
        store_rows(ot[m], start(p.out_t), p.out_t.stride[2], p.out_t.stride[3], query, queries,
                   columns, lane);
      }
    }
  }

 private:
  __device__ void rescale(int m) {
#pragma unroll
    for (int n = 0; n < C::kOutTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        o[m][n][e] *= rows[m].rescale[e / 2];
        if constexpr (C::kTangent) {
          ot[m][n][e] =
              fmaf(-rows[m].delta[e / 2], o[m][n][e], ot[m][n][e] * rows[m].rescale[e / 2]);
        }
      }
    }
  }

  // O += P V and tO += H V, whose fragments of V are the same.
  __device__ void value_products(const FragmentA (&probability)[kM], const FragmentA (&h)[kM],
                                 const typename C::ValueTile& v, int row, int columns, int lane) {
#pragma unroll
    for (int n = 0; n < C::kOutTiles; n += 2) {
      if (C::kSkips && 8 * n >= columns) break;
      FragmentB b[2];
      load_down(b, v, row, 8 * n, lane);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        E::multiply(o[m][n], probability[m], b[0]);
        E::multiply(o[m][n + 1], probability[m], b[1]);
        if constexpr (C::kTangent) {
          E::multiply(ot[m][n], h[m], b[0]);
          E::multiply(ot[m][n + 1], h[m], b[1]);
        }
      }
    }
  }
};

}  // namespace pmf::cuda
