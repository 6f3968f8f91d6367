// The row-wise part of attention's backward: operations on scores between the matrix products.
//
// Queries lie on the lanes, so each lane sums over keys independently, down a tile. There are three
// sweeps over a panel, with c = scale and w = 1 / sum e:
//
//   1   e = 2^(S - lse);  sums of e, e (tS - .), e (A - .)  (without tangents: of e (B - .))
//
//   2   u = c tS - r,  a' = A - a,  B' = B + u a';  sum of e (B' - .)  (only with tangents)
//
//   3   P = e w,  c dS = P (c B' - c D),  c dtS = P c a',  W = P u, rounded to units
//
// Accuracy. The rows of dS, dtS and W sum to zero in exact arithmetic. Any error in these sums is
// multiplied by the mean of the keys (or gradients) in the products that follow. So
//
// - P is normalised by the sum of the same e that it consists of, not by lse;
// - every mean is taken about a pivot, the row's value at the first key it sees, because
//   pivot + sum e (tS - pivot) / sum e is as exact as the differences, even if the tS of a row are
//   huge and nearly equal (a hidden key, which may hold anything, is never the pivot);
// - a and D are computed here, in full precision: from outputs stored in bf16 they would be wrong
//   by 2^-9 of the values' mean;
// - sums restart in every block of keys: if all terms of a row are equal, each addition to a long
//   sum would round the same way, and the error would grow with the number of keys;
// - the caller removes the row sums of the rounded c dS and c dtS from grad_query.
//
// Per vector of scores: about 16 instructions (33 with tangents) in sweeps 1 and 2 and 12 (20) in
// sweep 3, against 5 D / kDepth FMAs in the products (15 D / kDepth), two per cycle.
#pragma once

#include "cpu/attention/attention_backward_tile-inl.h"
#include "cpu/attention/attention_softmax-inl.h"

namespace pmf::cpu::PMF_LEVEL {

template <typename Mask>
PMF_INLINE bool any_lane(const Mask& mask) {
  bool any = false;
  for (size_t i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) any |= mask[i] != 0;
  return any;
}

// Statistics of a group of queries, kTileN vectors of lanes each.
template <typename Float>
struct BackwardRows {
  Vec<Float> shift[kTileN];  // lse in log-2 units; inf (so e = 0) if the row attends to nothing
  Vec<Float> mass[kTileN];   // sum e, later w
  Vec<Float> r[kTileN], a[kTileN], d[kTileN];
  Vec<Float> r_pivot[kTileN], a_pivot[kTileN], d_pivot[kTileN];
  Vec<Float> rho[kTileN], rho_t[kTileN];            // row sums of the rounded c dS and c dtS
  Vec<Float> grad_lse[kTileN], grad_lse_t[kTileN];  // these times c are the exact row sums
};

// The matrices of a group in a panel, [keys][kTileN vectors].
template <typename Float>
struct BackwardTile {
  Float *e, *ts, *a, *b;  // sweep 1 turns scores into e; sweep 2 ts into u, a into a', b into B'

  PMF_INLINE BackwardTile at(int64_t key) const {
    const int64_t offset = key * kTileN * kLanes<Float>;
    return {e + offset, ts + offset, a + offset, b + offset};
  }
};

// Reads lse and clears the sums. Lanes past `queries` attend to nothing. Returns whether lse is so
// large that its rounding error is a large exponent; the caller then calls shift_to_maximum().
template <typename Float>
inline bool begin_rows(BackwardRows<Float>& rows, const Float* lse, int64_t queries) {
  constexpr int kStep = kLanes<Float>;
  Float shift[kTileN * kStep];
  bool beyond = false;
  for (int64_t i = 0; i < kTileN * kStep; ++i) {
    shift[i] = kInfinity<Float>;
    if (i >= queries || lse[i] == -kInfinity<Float>) continue;
    // If a row is masked with the lowest finite number only, all its scores are exactly that.
    const bool lowest = lse[i] < Float(-0.99 * kLn2) * kLargest<Float>;
    shift[i] = lowest ? -kLargest<Float> : lse[i] * static_cast<Float>(kLog2e);
    // A row that sees NaN: its e are NaN, and 0 for masked keys.
    if (lse[i] != lse[i]) shift[i] = Float(0);
    beyond |= __builtin_fabs(shift[i]) > kLargestUnrounded<Float>;
  }
  PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
    rows.shift[j] = load(shift + j * kStep);
    rows.mass[j] = rows.r[j] = rows.a[j] = rows.d[j] = Vec<Float>{};
    rows.r_pivot[j] = rows.a_pivot[j] = rows.d_pivot[j] = Vec<Float>{};
    rows.rho[j] = rows.rho_t[j] = Vec<Float>{};
  }
  return beyond;
}

// Reads the gradients of lse and lse_t (null: zero), with zeros for rows that attend to nothing.
template <typename Float>
inline void read_gradients(BackwardRows<Float>& rows, const Float* grad_lse,
                           const Float* grad_lse_t, int64_t queries) {
  constexpr int kStep = kLanes<Float>;
  const auto read = [&](Vec<Float>(&to)[kTileN], const Float* from) {
    Float lanes[kTileN * kStep] = {};
    if (from != nullptr) std::memcpy(lanes, from, static_cast<size_t>(queries) * sizeof(Float));
    PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
      const Vec<Float> x = load(lanes + j * kStep);
      to[j] = rows.shift[j] == kInfinity<Float> ? Vec<Float>{} : x;
    }
  };
  read(rows.grad_lse, grad_lse);
  read(rows.grad_lse_t, grad_lse_t);
}

// Subtracts the exact row sums of c dS and c dtS, which leaves their rounding errors.
template <typename Float>
inline void leave_rounding(BackwardRows<Float>& rows, Float scale) {
  PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
    rows.rho[j] -= splat(scale) * rows.grad_lse[j];
    rows.rho_t[j] -= splat(scale) * rows.grad_lse_t[j];
  }
}

// Replaces lse by the maximum of scores in log-2 units, for rows that attend to anything.
template <typename Float>
inline void shift_to_maximum(BackwardRows<Float>& rows, const BackwardTile<Float>& tile,
                             int64_t keys) {
  constexpr int kStep = kLanes<Float>;
  PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
    Vec<Float> top = splat(-kInfinity<Float>);
    for (int64_t i = 0; i < keys; ++i) top = max(load(tile.e + (i * kTileN + j) * kStep), top);
    top = top == -kInfinity<Float> ? Vec<Float>{} : top;  // only NaN
    rows.shift[j] = rows.shift[j] == kInfinity<Float> ? rows.shift[j] : top;
  }
}

// Chooses the pivots of rows that had seen nothing before this block of keys.
template <bool kTangent, typename Float>
inline void choose_pivots(BackwardRows<Float>& rows, const BackwardTile<Float>& tile,
                          int64_t keys) {
  constexpr int kStep = kLanes<Float>;
  constexpr int64_t kCheck = 8;  // keys between checks of all lanes
  PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
    Vec<Float> r = rows.r_pivot[j], a = rows.a_pivot[j], d = rows.d_pivot[j];
    auto open = (rows.mass[j] == Float(0)) & (rows.shift[j] != kInfinity<Float>);
    for (int64_t i = 0; i < keys; ++i) {
      if (i % kCheck == 0 && !any_lane(open)) break;
      const int64_t at = (i * kTileN + j) * kStep;
      const auto seen = open & (load(tile.e + at) != -kInfinity<Float>);
      if constexpr (kTangent) {
        r = seen ? load(tile.ts + at) : r;
        a = seen ? load(tile.a + at) : a;
      }
      d = seen ? load(tile.b + at) : d;
      open &= ~seen;
    }
    rows.r_pivot[j] = r, rows.a_pivot[j] = a, rows.d_pivot[j] = d;
  }
}

// Sweep 1 for one block of keys; s * factor is in log-2 units.
template <bool kTangent, typename Float>
inline void exponentiate(BackwardRows<Float>& rows, const BackwardTile<Float>& tile, int64_t keys,
                         Float factor) {
  constexpr int kStep = kLanes<Float>;
  choose_pivots<kTangent>(rows, tile, keys);
  Vec<Float> mass[kTileN] = {}, r[kTileN] = {}, a[kTileN] = {}, d[kTileN] = {};
  for (int64_t i = 0; i < keys; ++i) {
    PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
      const int64_t at = (i * kTileN + j) * kStep;
      const Vec<Float> e = exp2(fma(load(tile.e + at), splat(factor), -rows.shift[j]));
      store(tile.e + at, e);
      mass[j] += e;
      if constexpr (kTangent) {
        r[j] = fma(e, load(tile.ts + at) - rows.r_pivot[j], r[j]);
        a[j] = fma(e, load(tile.a + at) - rows.a_pivot[j], a[j]);
      } else {
        d[j] = fma(e, load(tile.b + at) - rows.d_pivot[j], d[j]);
      }
    }
  }
  PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
    rows.mass[j] += mass[j], rows.r[j] += r[j], rows.a[j] += a[j], rows.d[j] += d[j];
  }
}

// Turns sums into means and, with tangents, runs sweep 2 over all keys: results in w and D. The
// gradients of lse and lse_t are subtracted from D and a.
template <bool kTangent, typename Float>
inline void center(BackwardRows<Float>& rows, const BackwardTile<Float>& tile, int64_t keys,
                   Float scale) {
  constexpr int kStep = kLanes<Float>;
  const Vec<Float> c = splat(scale);
  PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
    const Vec<Float> mass = rows.mass[j];
    rows.mass[j] = mass == Float(0) ? Vec<Float>{} : Float(1) / mass;
    rows.a[j] = fma(rows.a[j], rows.mass[j], rows.a_pivot[j]) - rows.grad_lse_t[j];
    // r stays about its pivot: u = c (tS - pivot) - c (r - pivot).
    rows.r[j] = rows.r[j] * rows.mass[j];
  }
  if constexpr (kTangent) {
    for (int64_t first = 0; first < keys; first += kScoreBlock) {
      Vec<Float> d[kTileN] = {};
      const int64_t last = min64(keys, first + kScoreBlock);
      for (int64_t i = first; i < last; ++i) {
        PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
          const int64_t at = (i * kTileN + j) * kStep;
          const Vec<Float> u = c * ((load(tile.ts + at) - rows.r_pivot[j]) - rows.r[j]);
          const Vec<Float> a = load(tile.a + at) - rows.a[j];
          const Vec<Float> b = fma(u, a, load(tile.b + at));
          store(tile.ts + at, u);
          store(tile.a + at, a);
          store(tile.b + at, b);
          d[j] = fma(load(tile.e + at), b - rows.d_pivot[j], d[j]);
        }
      }
      PMF_UNROLL for (int j = 0; j < kTileN; ++j) rows.d[j] += d[j];
    }
  }
  PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
    rows.d[j] = fma(rows.d[j], rows.mass[j], rows.d_pivot[j]) - rows.grad_lse[j];
  }
}

// The output of sweep 3 for a block of keys: strides are in units.
template <typename Unit>
struct UnitTiles {
  Unit *ds_rows, *dts_rows, *p_rows, *w_rows;  // [keys][row_stride]
  Unit *ds_pairs, *dts_pairs;  // [ceil(keys / kDepth)][pair_stride], or alias ds_rows, dts_rows
  int64_t row_stride, pair_stride;
};

// Sweep 3 for one block of keys. masses[key][lane] += P, summed over the group's vectors. Reads
// keys rounded up to kDepth rows, the excess with e = 0. With kSpoiled a row may contain NaN;
// elements that it does not see still become zero.
template <bool kTangent, bool kSpoiled, typename Unit, typename Float = Accumulator<Unit>>
inline void differentiate(BackwardRows<Float>& rows, const BackwardTile<Float>& tile, int64_t keys,
                          Float scale, const UnitTiles<Unit>& out, Float* masses) {
  using Writer = TileWriter<Unit>;
  constexpr int kStep = kLanes<Float>;
  constexpr int kDepth = UnitTraits<Unit>::kDepth;
  const Vec<Float> c = splat(scale);
  Vec<Float> weight[kTileN], d[kTileN], rho[kTileN], rho_t[kTileN];
  PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
    weight[j] = rows.mass[j], d[j] = rows.d[j], rho[j] = rows.rho[j], rho_t[j] = rows.rho_t[j];
  }
  for (int64_t i = 0; i < keys; i += kDepth) {
    Vec<Float> mass[kDepth] = {};
    PMF_UNROLL for (int j = 0; j < kTileN; ++j) {
      const int64_t row = i * out.row_stride + j * (kStep / kDepth);
      const int64_t pair = (i / kDepth) * out.pair_stride + j * kStep;
      Vec<Float> p[kDepth], x[kDepth];
      const auto seen = [&](Vec<Float> y, int k) {
        if constexpr (kSpoiled) {
          y = load(tile.e + ((i + k) * kTileN + j) * kStep) == Float(0) ? Vec<Float>{} : y;
        }
        return y;
      };
      PMF_UNROLL for (int k = 0; k < kDepth; ++k) {
        const int64_t at = ((i + k) * kTileN + j) * kStep;
        p[k] = seen(load(tile.e + at) * weight[j], k);
        mass[k] += p[k];
        x[k] = seen(p[k] * (c * (load(tile.b + at) - d[j])), k);
      }
      Writer::rows(out.p_rows + row, out.row_stride, p);
      rho[j] += Writer::both(out.ds_rows + row, out.row_stride, out.ds_pairs + pair, x);
      if constexpr (kTangent) {
        PMF_UNROLL for (int k = 0; k < kDepth; ++k) {
          x[k] = seen(p[k] * (c * load(tile.a + ((i + k) * kTileN + j) * kStep)), k);
        }
        rho_t[j] += Writer::both(out.dts_rows + row, out.row_stride, out.dts_pairs + pair, x);
        PMF_UNROLL for (int k = 0; k < kDepth; ++k) {
          x[k] = seen(p[k] * load(tile.ts + ((i + k) * kTileN + j) * kStep), k);
        }
        Writer::rows(out.w_rows + row, out.row_stride, x);
      }
    }
    PMF_UNROLL for (int k = 0; k < kDepth; ++k) {
      Float* to = masses + (i + k) * kStep;
      store(to, load(to) + mass[k]);
    }
  }
  PMF_UNROLL for (int j = 0; j < kTileN; ++j) rows.rho[j] = rho[j], rows.rho_t[j] = rho_t[j];
}

// Sums the lanes of `masses`, kLanes keys at a time: weights[key] = sum of masses[key][lane]. The
// transpose turns sums along lanes into sums of vectors. Rounds keys up to kLanes. NaN counts as 0:
// it shows in its own query's gradient, but the mean keys serve all queries of a panel.
template <typename Float>
inline void sum_lanes(Float* weights, const Float* masses, int64_t keys) {
  constexpr int kStep = kLanes<Float>;
  for (int64_t i = 0; i < keys; i += kStep) {
    Vec<Float> rows[kStep];
    PMF_UNROLL for (int k = 0; k < kStep; ++k) rows[k] =
        max(load(masses + (i + k) * kStep), Vec<Float>{});
    transpose<Float>(rows);
    PMF_UNROLL for (int half = kStep / 2; half > 0; half /= 2) {
      PMF_UNROLL for (int k = 0; k < half; ++k) rows[k] += rows[k + half];
    }
    store(weights + i, rows[0]);
  }
}

}  // namespace pmf::cpu::PMF_LEVEL
