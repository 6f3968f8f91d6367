// One panel of queries against one head: the tile loop of flash attention with tangents.
//
// Queries lie on the vector lanes. A panel is up to kTileN query vectors (48 queries in fp32 with
// AVX-512); for every tile of at most kTileKeys keys it computes
//
//   S^T  = K Q^T                 [keys, lanes]   A = K rows, broadcast;  B = Q, packed [D][lanes]
//   tS^T = K tQ^T + tK Q^T       one accumulator for both
//   softmax_tile                 P^T, H^T [keys, lanes]: already the B of what follows
//   tO^T = a tO^T - delta a O^T + V^T H^T + tV^T P^T        A = V rows, read down the keys
//   O^T  = a O^T + V^T P^T       [Dv, lanes]
//
// so that nothing is transposed inside the loop, and row maxima, sums and pivots need no horizontal
// operations. tO comes first because it reads the old O. The rescaling by a and delta happens when
// the accumulators are loaded.
//
// FLOPs: 2 Nq Nk D for each of six products (two without tangents; products with an absent tangent
// are skipped). Bytes: K, tK, V, tV once from L2 per tile and panel (16 kTileKeys D in fp32, at
// most 2 B per cycle); S, tS, P, H, Q, tQ, O, tO stay in L1 and L2 (100 KB at D = 64). Bound: the
// FMA units, two vectors per cycle: 64 FLOP per cycle and core in fp32, 128 in bf16.
//
// With AMX (1024 FLOP per cycle) a vector of scores at D = 64 costs 4 cycles of products, 12 with
// tangents, 2 (6) of tile stores, about 2 (3) of rescaling, and 8 (14) of softmax, which is then
// the bound. V is packed transposed, because A's units must be contiguous along keys; sums of a
// tile are added to O by vectors, together with the rescaling.
#pragma once

#include "cpu/attention/attention_hidden-inl.h"
#include "cpu/attention/attention_softmax-inl.h"

namespace pmf::cpu::PMF_LEVEL {

// Tiles begin, and packed keys end, at multiples of kKeyStep keys.
constexpr int64_t kKeyStep = kAmx ? 2 * kDepthStep : kTileM;
constexpr int64_t kTileKeys = kAmx ? 96 : 64;

// A worker's buffers; null for tensors that the call does not have.
template <typename Unit>
struct AttentionBuffers {
  using Float = Accumulator<Unit>;
  Unit *k, *kt;      // [keys rounded up to kKeyStep][depth]
  Unit *v, *vt;      // [ceil(keys / kDepth)][value_padded]; for AMX transposed, and padded
  Unit *q, *qt;      // [depth rounded up to kLanes][lanes]
  Float *s, *ts;     // [kTileKeys][lanes]
  Unit *p, *h;       // [kTileKeys / kDepth][lanes]; alias s and ts if a unit is a Float
  Float *o, *ot;     // [value_padded][lanes]
  Float* bias;       // [kTileKeys rounded up to kLanes][lanes]
  Unit* stage_in;    // [lanes][depth rounded up]
  Float* stage_out;  // [lanes][value_padded]
  uint8_t* spoiled;  // [keys], kValue and kValueTangent flags; null if nothing is hidden
  bool any_spoiled;  // whether this head has any such key
};

// The sizes of a panel, in units for packed tensors.
struct PanelShape {
  int64_t depth;         // ceil(D / kDepth), rounded up to kDepthStep
  int64_t value_rows;    // Dv rounded up to kTileM: rows of O that are computed
  int64_t value_padded;  // Dv rounded up to kTileM and kLanes: rows of O that are allocated
  int64_t value_stride, value_depth_stride;  // between neighbouring values, and units along keys
  KeyRange keys;                             // those that any query of this panel attends to
};

template <int kN, typename Unit>
PMF_INLINE TileProduct<Unit> score_product(const Unit* keys, const Unit* queries, int64_t depth) {
  return {keys, depth, 1, queries, kN * kLanes<Accumulator<Unit>>, depth};
}

// dst = rescale * (dst - delta * other) + sum of products; if `first`, dst = sum of products.
template <int kN, bool kDelta, int kProducts, typename Unit, typename Float = Accumulator<Unit>>
inline void output_tile(Float* dst, const Float* other, bool first, const Vec<Float> (&rescale)[kN],
                        const Vec<Float> (&delta)[kN], int64_t rows,
                        const TileProduct<Unit> (&products)[kProducts]) {
  constexpr int kStep = kLanes<Float>;
  tile_gemm<kTileM, kN>(
      rows, products,
      [&](auto& c, int64_t row) {
        PMF_UNROLL for (int i = 0; i < kTileM; ++i) {
          PMF_UNROLL for (int j = 0; j < kN; ++j) {
            const int64_t at = ((row + i) * kN + j) * kStep;
            if (first) {
              c[i][j] = Vec<Float>{};
            } else if constexpr (kDelta) {
              c[i][j] = rescale[j] * fma(-delta[j], load(other + at), load(dst + at));
            } else {
              c[i][j] = rescale[j] * load(dst + at);
            }
          }
        }
      },
      [dst](auto& c, int64_t row) {
        PMF_UNROLL for (int i = 0; i < kTileM; ++i) {
          PMF_UNROLL for (int j = 0; j < kN; ++j) {
            store(dst + ((row + i) * kN + j) * kStep, c[i][j]);
          }
        }
      });
}

// o[x][lane] += weight[lane] values[x] for the values that are not finite, in lanes with nonzero
// `seen`.
template <int kN, typename Unit, typename Float = Accumulator<Unit>>
inline void add_spoiled_row(Float* o, const Unit* values, int64_t count,
                            const Vec<Float> (&weight)[kN], const Vec<Float> (&seen)[kN]) {
  for (int64_t x = 0; x < count; ++x) {
    const Float value = unit_number(values[x], 0);
    if (is_finite(value)) continue;
    PMF_UNROLL for (int j = 0; j < kN; ++j) {
      Float* at = o + (x * kN + j) * kLanes<Float>;
      store(at, seen[j] == Float(0) ? load(at) : fma(weight[j], splat(value), load(at)));
    }
  }
}

// Adds back the values that attention_hidden-inl.h zeroed, for queries with a nonzero weight.
template <int kN, typename Unit>
__attribute__((noinline)) void add_spoiled(const AttentionParams& params,
                                           const AttentionBuffers<Unit>& w,
                                           const Packer<Unit>& packer, const TilePlace& place,
                                           bool tangent_scores) {
  using Float = Accumulator<Unit>;
  constexpr int kStep = kLanes<Float>;
  constexpr int kDepth = UnitTraits<Unit>::kDepth;
  const AttentionShape& n = params.shape;
  Unit* const values = reinterpret_cast<Unit*>(w.stage_out);
  const auto fetch = [&](ConstView4 view, int64_t key) {
    view = skip_rows(view, key, params.dtype);
    packer.depth_rows(values, n.value_width, view, place.batch, place.head * n.key_heads / n.heads,
                      1, n.value_width);
  };
  for (int64_t i = 0; i < place.keys; ++i) {
    const uint8_t spoiled = w.spoiled[place.key + i];
    if (spoiled == 0) continue;
    Vec<Float> p[kN], h[kN];
    bool seen = false;
    PMF_UNROLL for (int j = 0; j < kN; ++j) {
      const int64_t at = (i / kDepth * kN + j) * kStep;
      p[j] = unit_numbers(w.p + at, i % kDepth);
      h[j] = tangent_scores ? unit_numbers(w.h + at, i % kDepth) : Vec<Float>{};
      for (int lane = 0; lane < kStep; ++lane) seen |= p[j][lane] != Float(0);
    }
    if (!seen) continue;
    if ((spoiled & kValue) != 0) {
      fetch(params.value, place.key + i);
      add_spoiled_row<kN>(w.o, values, n.value_width, p, p);
      if (tangent_scores) add_spoiled_row<kN>(w.ot, values, n.value_width, h, p);
    }
    if ((spoiled & kValueTangent) != 0) {
      fetch(params.value_t, place.key + i);
      add_spoiled_row<kN>(w.ot, values, n.value_width, p, p);
    }
  }
}

// The tile loop: computes o, ot (unnormalised) and state. `place` gives the panel's queries.
template <int kN, typename Unit>
inline void attention_tiles(const AttentionParams& params, const AttentionBuffers<Unit>& buffers,
                            const Packer<Unit>& packer, const PanelShape& shape, TilePlace place,
                            Accumulator<Unit> scale, RowState<kN, Accumulator<Unit>>& state) {
  using Float = Accumulator<Unit>;
  constexpr int kDepth = UnitTraits<Unit>::kDepth;
  constexpr int64_t kLanesW = kN * kLanes<Float>;
  const AttentionBuffers<Unit>& w = buffers;
  const bool tangent_scores = w.qt != nullptr || w.kt != nullptr;
  const bool tangent_values = w.vt != nullptr;
  const int64_t rows = shape.value_rows;
  state.reset();

  // Tiles of equal size: 276 keys are five tiles of 56, not four of 64 and one of 20.
  const int64_t begin = shape.keys.begin, end = shape.keys.end;
  const int64_t tiles = ceil_div(end - begin, kTileKeys);
  const int64_t step = tiles == 0 ? 0 : round_up(ceil_div(end - begin, tiles), kKeyStep);
  for (int64_t key = begin; key < end; key += step) {
    const bool first = key == begin;
    const int64_t keys = min64(step, end - key);
    place.key = key;
    place.keys = keys;

    const Unit* k = w.k + key * shape.depth;
    const Unit* kt = w.kt == nullptr ? nullptr : w.kt + key * shape.depth;
    store_product<kN, 1>(w.s, keys, {score_product<kN>(k, w.q, shape.depth)});
    if (w.qt != nullptr && w.kt != nullptr) {
      store_product<kN, 2>(
          w.ts, keys,
          {score_product<kN>(k, w.qt, shape.depth), score_product<kN>(kt, w.q, shape.depth)});
    } else if (w.qt != nullptr) {
      store_product<kN, 1>(w.ts, keys, {score_product<kN>(k, w.qt, shape.depth)});
    } else if (w.kt != nullptr) {
      store_product<kN, 1>(w.ts, keys, {score_product<kN>(kt, w.q, shape.depth)});
    }

    Float factor = scale * static_cast<Float>(kLog2e);
    if (params.mask.kind != MaskKind::none || crosses_window(params.window, place)) {
      Float* const tangents[] = {tangent_scores ? w.ts : nullptr};
      apply_mask<kN>(w.s, tangents, factor, params.mask, params.window, place, w.bias);
      factor = 1;
    }
    if (tangent_scores) {
      softmax_tile<kN, true>(state, w.s, w.ts, w.p, w.h, keys, factor, scale);
    } else {
      softmax_tile<kN, false>(state, w.s, w.ts, w.p, w.h, keys, factor, scale);
    }

    const int64_t depth = ceil_div(keys, kDepth);
    if constexpr (kAmx) {
      clear_units(w.p, depth, kLanesW);
      if (tangent_scores) clear_units(w.h, depth, kLanesW);
    }
    const int64_t stride = shape.value_stride, depth_stride = shape.value_depth_stride;
    const Unit* v = w.v + key / kDepth * depth_stride;
    const Unit* vt = w.vt == nullptr ? nullptr : w.vt + key / kDepth * depth_stride;
    const TileProduct<Unit> v_p = {v, stride, depth_stride, w.p, kLanesW, depth};
    const TileProduct<Unit> v_h = {v, stride, depth_stride, w.h, kLanesW, depth};
    const TileProduct<Unit> vt_p = {vt, stride, depth_stride, w.p, kLanesW, depth};
    if (tangent_scores && tangent_values) {
      output_tile<kN, true, 2>(w.ot, w.o, first, state.rescale, state.delta, rows, {v_h, vt_p});
    } else if (tangent_scores) {
      output_tile<kN, true, 1>(w.ot, w.o, first, state.rescale, state.delta, rows, {v_h});
    } else if (tangent_values) {
      output_tile<kN, false, 1>(w.ot, w.o, first, state.rescale, state.delta, rows, {vt_p});
    }
    output_tile<kN, false, 1>(w.o, w.o, first, state.rescale, state.delta, rows, {v_p});
    if (w.any_spoiled) add_spoiled<kN>(params, w, packer, place, tangent_scores);
  }
}

// Normalises o and ot (or null) in place and writes lse and, unless it is null, lse_t:
//   out = O / l,  out_t = tO / l - (r / l) out,  lse = ln 2 (m + log2 l),  lse_t = p + r / l
// (r is the remainder after the pivot p, which is already included in H.) A row with l = 0 attended
// to nothing: its results are zero, and lse is -inf.
template <int kN, typename Float>
inline void finish_panel(const RowState<kN, Float>& state, Float* o, Float* ot, int64_t rows,
                         Float* lse, Float* lse_t, int64_t queries) {
  constexpr int kStep = kLanes<Float>;
  constexpr int kLanesW = kN * kStep;
  Float sum[kLanesW], top[kLanesW], mean[kLanesW];
  Vec<Float> inverse[kN], residual[kN];
  PMF_UNROLL for (int j = 0; j < kN; ++j) {
    inverse[j] = state.sum[j] == Float(0) ? Vec<Float>{} : Float(1) / state.sum[j];
    residual[j] = state.tangent[j] * inverse[j];
    store(sum + j * kStep, state.sum[j]);
    store(top + j * kStep, state.max[j]);
    const Vec<Float> r = state.pivot[j] + residual[j];
    store(mean + j * kStep, state.sum[j] == Float(0) ? Vec<Float>{} : r);
  }
  for (int64_t i = 0; i < rows; ++i) {
    PMF_UNROLL for (int j = 0; j < kN; ++j) {
      const int64_t at = i * kLanesW + j * kStep;
      const Vec<Float> out = load(o + at) * inverse[j];
      store(o + at, out);
      if (ot != nullptr) store(ot + at, fma(-residual[j], out, load(ot + at) * inverse[j]));
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    const Float log_sum = sizeof(Float) == 4 ? static_cast<Float>(__builtin_log2f(sum[i]))
                                             : static_cast<Float>(__builtin_log2(sum[i]));
    lse[i] = sum[i] == Float(0) ? -kInfinity<Float> : static_cast<Float>(kLn2) * (top[i] + log_sum);
    if (lse_t != nullptr) lse_t[i] = mean[i];
  }
}

}  // namespace pmf::cpu::PMF_LEVEL
