// FlashAttention-style forward, without and with tangents.
//
//   S = c Q K^T + mask   P = softmax(S)   out   = P V
//   tS = c (tQ K^T + Q tK^T)              out_t = (P o tS) V - rowsum(P o tS) o out + P tV
//
// Six products where the plain forward has two; H V and P tV share one accumulator
// (attention_softmax.cuh explains the pivot that keeps this accurate). S and tS are computed,
// turned into P and H and used as the A operands of the next products without leaving registers.
//
// Tiling. A warp processes one unit of 16 queries (32 without tangents, so that each K and V
// fragment feeds twice as many products) against key tiles of 32, or 16 if rows are long. The warps
// of a block share the tiles of K, tK, V, tV in a three-slot ring filled ahead by cp.async. Queries
// stay in shared memory: the registers saved allow twelve warps per SM, which hide each other's
// latency. Other query blocks of the same head re-read its tiles from L2. Each block computes kOut
// value columns; wider values take several blocks.
//
// Regular calls (ForwardKernel::regular) have their own kernels, without the branches for masks,
// absent tangents and rows that are not 16-byte aligned. In the other kernels, masked elements may
// be NaN: see attention_hidden.cuh.
//
// At 276 tokens both tilings pad to 288, which is 9 key tiles of 32 and 18 (9) units. Bytes: Q, K,
// V, out once, and twice as much with tangents: 8 x 35 KB per 276 x 64 head in 16 bits. That is
// also the bound (estimated: the six products' FLOPs would take three quarters of that time on an
// H100). Longer sequences are bound by the tensor cores.
#pragma once

#include "cuda/attention/attention_forward_queries.cuh"
#include "cuda/attention/attention_hidden.cuh"
#include "cuda/attention/attention_softmax.cuh"

namespace pmf::cuda {

// ---- products -----------------------------------------------------------------------------------

// s += Q K^T and, if kBoth, ts += tQ K^T from the same K fragments.
template <class C, bool kBoth, int kBlocks, int kTiles>
__device__ inline void score_products(float (&s)[kBlocks][kTiles][4],
                                      float (&ts)[kBlocks][kTiles][4], const UnitQueries<C>& q,
                                      const UnitQueries<C>& qt, const typename C::KeyTile& keys,
                                      int width, int lane) {
  using E = typename C::E;
  // In fp16, wide tiles would spill on sm_90; on sm_80, where no device has the shared memory for
  // them, they would spill this way.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool kShort = C::kKeys > 32 && !C::kTangent && std::is_same_v<typename C::T, __half>;
#else
  constexpr bool kShort = false;
#endif
#pragma unroll(C::kSkips || kShort ? 2 : C::kSteps)
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

// out += p V and, if kBoth, out_t += p_t V from the same V fragments, for a tile V. kFinite: inf
// and NaN in V read as zero.
template <class C, bool kBoth, bool kFinite, int kBlocks, int kDepths, int kOutTiles,
          int kTangentTiles>
__device__ inline void value_products(float (&out)[kBlocks][kOutTiles][4],
                                      float (&out_t)[kBlocks][kTangentTiles][4],
                                      const FragmentA (&p)[kBlocks][kDepths],
                                      const FragmentA (&p_t)[kBlocks][kDepths],
                                      const typename C::ValueTile& values, int columns, int lane) {
  using E = typename C::E;
  const auto load = [&](FragmentB(&b)[2], int k, int n) {
    if constexpr (kFinite) __syncwarp();  // as in add_not_finite
    load_down(b, values, k * E::kDepth, 8 * n, lane);
    if constexpr (kFinite) b[0] = finite<typename C::T>(b[0]), b[1] = finite<typename C::T>(b[1]);
  };
  if constexpr (sizeof(typename C::T) == 4) {
    // In fp32, each tile is summed separately first: tensor cores truncate every term to the
    // exponent of the largest, and adding a thousand keys one by one to large sums would lose more
    // than the products do.
#pragma unroll
    for (int n = 0; n < kOutTiles; n += 2) {
      if (C::kSkips && 8 * n >= columns) break;
      float part[kBlocks][2][4], part_t[kBlocks][2][4];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) clear(part[m]), clear(part_t[m]);
#pragma unroll
      for (int k = 0; k < kDepths; ++k) {
        FragmentB b[2];
        load(b, k, n);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            E::multiply(part[m][j], p[m][k], b[j]);
            if constexpr (kBoth) E::multiply(part_t[m][j], p_t[m][k], b[j]);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            out[m][n + j][e] += part[m][j][e];
            if constexpr (kBoth) out_t[m][n + j][e] += part_t[m][j][e];
          }
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kDepths; ++k) {
#pragma unroll
      for (int n = 0; n < kOutTiles; n += 2) {
        if (C::kSkips && 8 * n >= columns) break;
        FragmentB b[2];
        load(b, k, n);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          E::multiply(out[m][n], p[m][k], b[0]);
          E::multiply(out[m][n + 1], p[m][k], b[1]);
          if constexpr (kBoth) {
            E::multiply(out_t[m][n], p_t[m][k], b[0]);
            E::multiply(out_t[m][n + 1], p_t[m][k], b[1]);
          }
        }
      }
    }
  }
}

// Adds what value_products<kFinite> left out and no mask hides: out += q V wherever an inf or NaN
// in V meets a p > 0.
template <class C, int kBlocks, int kDepths, int kOutTiles>
__device__ inline void add_not_finite(float (&out)[kBlocks][kOutTiles][4],
                                      const FragmentA (&p)[kBlocks][kDepths],
                                      const FragmentA (&q)[kBlocks][kDepths],
                                      const typename C::ValueTile& values, int columns, int lane) {
  using E = typename C::E;
#pragma unroll
  for (int n = 0; n < kOutTiles; n += 2) {
    if (C::kSkips && 8 * n >= columns) break;
    __syncwarp();  // keeps loads from moving ahead, for which registers do not suffice
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      float met[2][4], product[2][4];
      clear(met);
      clear(product);
#pragma unroll
      for (int k = 0; k < kDepths; ++k) {
        FragmentB b[2];
        load_down(b, values, k * E::kDepth, 8 * n, lane);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          E::multiply(met[j], p[m][k], where_not_finite<E>(b[j]));
          E::multiply(product[j], q[m][k], b[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (met[j][e] > 0.0f) out[m][n + j][e] += product[j][e];
        }
      }
    }
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

  // `place`: the lane's first score. `edge`: the tile may cross the end of the keys or of the
  // window. `hides`: the values hold an inf or NaN that may be masked.
  __device__ void add_tile(const AttentionParams& p, const ForwardPlan& plan,
                           const Sequence& sequence, typename C::T* ring, int slot,
                           ScorePlace place, bool edge, bool hides, const float& scale, int column,
                           int lane) {
    const float& factor = plan.factor;
    const int start = slot * C::kSlotElements;
    typename C::T* const values = ring + C::kSides * C::kKeyElements;
    const typename C::KeyTile k{ring, start}, kt{ring + C::kKeyElements, start};
    const typename C::ValueTile v{values, start}, vt{values + C::kValueElements, start};
    const int width = int(p.shape.width), columns = int(p.shape.value_width) - column;
    const bool has_kt = C::kRegular || p.key_t.data != nullptr;
    const bool has_vt = C::kRegular || p.value_t.data != nullptr;

    float s[kM][C::kTiles][4], ts[kM][C::kTiles][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) clear(s[m]), clear(ts[m]);
    score_products<C, C::kTangent>(s, ts, q, qt, k, width, lane);
    if constexpr (C::kTangent) {
      if (has_kt) score_products<C, false>(ts, ts, q, q, kt, width, lane);
    }
    const bool masked = edge || (!C::kRegular && p.mask.kind != MaskKind::none);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (masked) {
        mask_scores<C::kTangent, C::kRegular>(s[m], ts[m], p, plan.window, sequence, place, factor);
      }
      softmax_tile<C::kTangent>(rows[m], s[m], ts[m], masked ? 1.0f : factor, scale);
      place.query += 16;
      rescale(m);
    }

    constexpr int kDepths = C::kTiles / E::kTilesPerA;
    FragmentA probability[kM][kDepths], h[kM][kDepths];
    float sums[kM][2][4];  // row sums of P and H, the same in all columns
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      clear(sums[m]);
#pragma unroll
      for (int i = 0; i < kDepths; ++i) {
        probability[m][i] = E::pack_a(s[m] + i * E::kTilesPerA);
        E::multiply(sums[m][0], probability[m][i], E::ones(true));
        if constexpr (C::kTangent) {
          h[m][i] = E::pack_a(ts[m] + i * E::kTilesPerA);
          E::multiply(sums[m][1], h[m][i], E::ones(true));
        }
      }
    }
    if (!C::kRegular && hides) {
      value_products<C, C::kTangent, true>(o, ot, probability, h, v, columns, lane);
      add_not_finite<C>(o, probability, probability, v, columns, lane);
      if constexpr (C::kTangent) {
        add_not_finite<C>(ot, probability, h, v, columns, lane);
        if (has_vt) {
          value_products<C, false, true>(ot, ot, probability, h, vt, columns, lane);
          add_not_finite<C>(ot, probability, probability, vt, columns, lane);
        }
      }
    } else {
      value_products<C, C::kTangent, false>(o, ot, probability, h, v, columns, lane);
      if constexpr (C::kTangent) {
        if (has_vt) value_products<C, false, false>(ot, ot, probability, h, vt, columns, lane);
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

  // Normalises and stores: out = O / l, out_t = tO / l - (r / l) out, lse = ln 2 (m + log2 l),
  // lse_t = p + r / l. (H already includes the pivot p.) A row that attended nothing yields zeros,
  // and lse is -inf.
  __device__ void finish(const AttentionParams& p, const Sequence& sequence, int batch, int head,
                         int first, int column, int lane) {
    constexpr float kLn2 = 0.6931471805599453f;
    using T = typename C::T;
    const int queries = sequence.queries;
    int columns = int(p.shape.value_width) - column;
    columns = columns < C::kOut ? columns : C::kOut;
    const auto start = [&](const View4& view) {
      return static_cast<T*>(view.data) + int64_t(batch) * view.stride[0] +
             int64_t(head) * view.stride[1] + int64_t(sequence.query) * view.stride[2] +
             int64_t(column) * view.stride[3];
    };
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int query = first + 16 * m;
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
          const int64_t row = statistic_row(p.shape, batch, head, sequence, query + 8 * r);
          static_cast<float*>(p.lse)[row] =
              sum == 0.0f ? -INFINITY : kLn2 * (rows[m].top[r] + log2_approx(sum));
          if (C::kTangent && p.lse_t != nullptr) {
            static_cast<float*>(p.lse_t)[row] = sum == 0.0f ? 0.0f : rows[m].pivot[r] + residual;
          }
        }
      }
      store_rows<C::kRegular>(o[m], start(p.out), p.out.stride[2], p.out.stride[3], query, queries,
                              columns, lane);
      if constexpr (C::kTangent) {
        store_rows<C::kRegular>(ot[m], start(p.out_t), p.out_t.stride[2], p.out_t.stride[3], query,
                                queries, columns, lane);
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
};

}  // namespace pmf::cuda
