// One panel of queries against one head of keys: both sweeps of attention's backward.
//
// A panel is kGroups groups of kTileN query vectors (96 queries in fp32 with AVX-512). Its scores
// against ALL keys are kept: e, B (and tS, A), [keys][96] each. D, a and r are thus known in full
// precision before the first derivative is formed, without the two (six) products that computing
// them beforehand would cost and without rounded outputs of the forward. Memory is linear in Nk.
//
//   sweep 1, per group and kScoreBlock keys
//     S^T  = K Q^T               B^T = V G^T + tV X^T
//     tS^T = K tQ^T + tK Q^T     A^T = V X^T
//
//   sweep 2, per group: attention_backward_sweeps-inl.h
//
//   sweep 3, per kKeyBlock keys, all groups at once
//     grad_query[96][D]     += dS K + dtS tK         grad_query_t += dtS K
//     grad_key[block][D]    += dS^T Q + dtS^T tQ     grad_key_t   += dtS^T Q
//     grad_value[block][Dv] += P^T G + W^T X         grad_value_t += P^T X
//
//   at the end
//     grad_query -= rho K' + rho_t tK'               grad_query_t -= rho_t K'
//
// rho, rho_t: row sums of the rounded c dS and c dtS, which should be zero; K', tK': the panel's
// mean keys, weighted by P. Otherwise the rounding error in the sums would be multiplied by
// whatever the attended keys have in common. (The head's plain means are not enough if few keys get
// most of the weight: 3.7e-3 in bf16 for late sinks, against 2.2e-3.)
//
// FLOPs: 2 Nq Nk D for each of 5 products, 15 with tangents. Bytes between L2 and L1 per panel and
// key, fp32, D = Dv = 64: e and B written and read (96 x 16), K twice and V once (768), grad_key
// and grad_value read and written (1024): 3.3 KB against 960 cycles of FMAs. Bound: the FMA units,
// 64 FLOP per cycle and core in fp32, 128 in bf16.
//
// With AMX (1024 FLOP per cycle) a vector of scores at D = 64 costs 10 cycles of products, 30 with
// tangents, and its 28 (53) vector instructions at least half as many cycles. grad_query is summed
// transposed, as K^T dS^T, because A's units must be contiguous along keys.
#pragma once

#include "cpu/attention/attention_backward_sweeps-inl.h"
#include "cpu/attention/attention_hidden-inl.h"
#include "pmf/attention_backward.h"

namespace pmf::cpu::PMF_LEVEL {

constexpr int kGroups = 2;

template <typename Unit>
struct BackwardSizes {
  using Float = Accumulator<Unit>;
  static constexpr int64_t kStep = kLanes<Float>;
  static constexpr int64_t kDepth = UnitTraits<Unit>::kDepth;
  // Windows of keys begin at multiples of this.
  static constexpr int64_t kKeyStep = kDepthStep * kDepth;
  static constexpr int64_t kGroupLanes = kTileN * kStep;
  static constexpr int64_t kPanel = kGroups * kGroupLanes;  // queries

  int64_t queries, keys, width, value_width;
  int64_t depth, value_depth;                // units that hold width and value_width numbers
  int64_t depth_padded, value_depth_padded;  // whole vectors of units
  int64_t width_padded, value_padded;        // whole vectors of Floats
  int64_t keys_padded;                       // rows of packed keys
  int64_t key_units;                         // units that hold the keys, rounded up to kDepthStep
  int64_t panel_padded;                      // rows of panel matrices: the window's keys
  int64_t panels;                            // panels per query head

  BackwardSizes(const AttentionShape& shape, const AttentionWindow& window)
      : queries(shape.queries),
        keys(shape.keys),
        width(shape.width),
        value_width(shape.value_width),
        depth(ceil_div(width, kDepth)),
        value_depth(ceil_div(value_width, kDepth)),
        depth_padded(round_up(depth, kStep)),
        value_depth_padded(round_up(value_depth, kStep)),
        width_padded(round_up(width, kStep)),
        value_padded(round_up(value_width, kStep)),
        keys_padded(round_up(keys, kDepth) + kMaxTileRows),
        key_units(round_up(ceil_div(keys, kDepth), kDepthStep)),
        panel_padded(min64(keys_padded, max64(0, window.left + window.right) + kPanel + kKeyStep +
                                            2 * kMaxTileRows)),
        panels(ceil_div(queries, kPanel)) {}
};

// A worker's buffers; null for tensors that the call does not have.
template <typename Unit>
struct BackwardBuffers {
  using Float = Accumulator<Unit>;
  // A head's keys and values: rows to broadcast from, and the keys again in the layout that the
  // grad_query product reads (the same memory if a unit is one number).
  Unit *k, *kt, *v, *vt;       // [keys_padded][depth_padded or value_depth_padded]
  Unit *k_depth, *kt_depth;    // [key_units][width_padded]
  Unit *k_turned, *kt_turned;  // for AMX: k_depth, kt_depth transposed, [width_padded][key_units]
  // A panel's queries and gradients: columns for the scores, rows for grad_key and grad_value.
  Unit *q, *qt, *g, *gt;     // [group][depth_padded or value_depth_padded][kGroupLanes]
  Unit *q_depth, *qt_depth;  // [kPanel / kDepth][width_padded]
  Unit *g_depth, *gt_depth;  // [kPanel / kDepth][value_padded]
  Float *e, *ts, *a, *b;     // [group][panel_padded][kGroupLanes]
  UnitTiles<Unit> tiles;     // kKeyBlock keys of a whole panel
  Float* masses;             // [kKeyBlock rounded up to kLanes][kLanes]
  Float* weights;            // [kKeyBlock rounded up to kLanes]: sums of P over the panel's queries
  Float *k_mean, *kt_mean;   // [width_padded]: means of the keys with these weights
  Float* bias;               // [kScoreBlock rounded up to kLanes][kGroupLanes]
  Unit* stage;               // [kGroupLanes][the larger depth_padded]
  Float *dq, *dqt;   // [kPanel + kMaxTileRows][width_padded]; for AMX [width_padded][kPanel]
  Float* dq_rows;    // for AMX: [kPanel][width_padded]
  Float *dk, *dkt;   // [keys + kMaxTileRows][width_padded], over all panels of the worker
  Float *dv, *dvt;   // [keys + kMaxTileRows][value_padded]
  Float* lse;        // [kPanel], -inf if a row is ignored; null if nothing is hidden
  uint8_t* spoiled;  // [keys], a set of Spoiled flags; null if nothing is hidden
  bool any_spoiled;  // whether this head has any such key
};

template <typename Unit>
class BackwardPanel {
  using Float = Accumulator<Unit>;
  using Sizes = BackwardSizes<Unit>;
  static constexpr int64_t kDepth = Sizes::kDepth;
  static constexpr int64_t kGroupLanes = Sizes::kGroupLanes;
  static constexpr int64_t kPanel = Sizes::kPanel;

 public:
  BackwardPanel(const AttentionBackwardParams& params, const Sizes& sizes,
                const BackwardBuffers<Unit>& buffers)
      : params_(params), sizes_(sizes), w_(buffers), scale_(static_cast<Float>(params.scale)) {}

  // Adds the panel's contributions to dk, dkt, dv, dvt and computes dq, dqt. `place` holds the
  // batch, query head and queries, which are already packed.
  void run(TilePlace place) {
    keys_ = keys_in_window(params_.window, place.query, place.query + place.queries - 1,
                           sizes_.keys, Sizes::kKeyStep);
    const bool tangent = w_.gt != nullptr;
    if (tangent) {
      sweep<true>(place);
    } else {
      sweep<false>(place);
    }
  }

 private:
  template <bool kTangent>
  void sweep(TilePlace place) {
    BackwardRows<Float> rows[kGroups];
    const int64_t groups = ceil_div(place.queries, kGroupLanes);
    for (int64_t g = 0; g < groups; ++g) scores<kTangent>(rows[g], place, g);
    clear(w_.dq, kPanel * sizes_.width_padded);
    clear(w_.dqt, kPanel * sizes_.width_padded);
    clear(w_.k_mean, sizes_.width_padded);
    clear(w_.kt_mean, sizes_.width_padded);
    if constexpr (kAmx) {
      if (groups < kGroups) clear_second_group();
    }
    Float mass = 0;  // number of queries that attend to anything
    for (int64_t key = keys_.begin; key < keys_.end; key += kKeyBlock) {
      const int64_t count = min64(kKeyBlock, keys_.end - key);
      clear(w_.masses, round_up(kKeyBlock, Sizes::kStep) * Sizes::kStep);
      for (int64_t g = 0; g < groups; ++g) {
        UnitTiles<Unit> out = w_.tiles;
        const int64_t rows_at = g * (kGroupLanes / kDepth), pairs_at = g * kGroupLanes;
        out.ds_rows += rows_at, out.p_rows += rows_at, out.ds_pairs += pairs_at;
        if (kTangent) out.dts_rows += rows_at, out.w_rows += rows_at, out.dts_pairs += pairs_at;
        const BackwardTile<Float> from = tile(g, key);
        if (w_.any_spoiled) {
          differentiate<kTangent, true, Unit>(rows[g], from, count, scale_, out, w_.masses);
        } else {
          differentiate<kTangent, false, Unit>(rows[g], from, count, scale_, out, w_.masses);
        }
      }
      if (count < kKeyBlock) clear_rows_from(round_up(count, kDepth));
      if constexpr (kAmx) {
        clear_units(w_.tiles.ds_pairs, ceil_div(count, kDepth), kPanel);
        if (kTangent) clear_units(w_.tiles.dts_pairs, ceil_div(count, kDepth), kPanel);
      }
      query_products(key, count, place.queries);
      key_products(key, count, place.queries);
      sum_lanes(w_.weights, w_.masses, count);
      for (int64_t i = 0; i < count; ++i) mass += w_.weights[i];
      weigh_keys(w_.k_mean, w_.k_depth, key, count);
      weigh_keys(w_.kt_mean, w_.kt_depth, key, count);
    }
    const Float share = mass > 0 ? 1 / mass : Float(0);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * kGroupLanes, count = min64(kGroupLanes, place.queries - first);
      const int64_t at = kAmx ? first : first * sizes_.width_padded;
      leave_rounding(rows[g], scale_);
      remove(w_.dq + at, rows[g].rho, w_.k_mean, share, count);
      if (kTangent) remove(w_.dq + at, rows[g].rho_t, w_.kt_mean, share, count);
      if (w_.dqt != nullptr) remove(w_.dqt + at, rows[g].rho_t, w_.k_mean, share, count);
    }
  }

  static void clear(Float* dst, int64_t count) {
    if (dst != nullptr) std::memset(dst, 0, static_cast<size_t>(count) * sizeof(Float));
  }

  // mean += the block's keys times their weights.
  void weigh_keys(Float* mean, const Unit* keys, int64_t key, int64_t count) {
    if (mean == nullptr) return;
    for (int64_t x = 0; x < sizes_.width_padded; x += kLanes<Float>) {
      Vec<Float> sum = load(mean + x);
      for (int64_t i = 0; i < count; i += kDepth) {
        const Unit* unit = keys + (key + i) / kDepth * sizes_.width_padded + x;
        sum = TileWriter<Unit>::weigh(unit, w_.weights + i, sum);
      }
      store(mean + x, sum);
    }
  }

  // Products round rows up to a register tile. Keys past the end of a causal panel exist, and their
  // sums must not change.
  void clear_rows_from(int64_t row) {
    const int64_t stride = w_.tiles.row_stride;
    Unit* const all[] = {w_.tiles.ds_rows, w_.tiles.dts_rows, w_.tiles.p_rows, w_.tiles.w_rows};
    for (Unit* rows : all) {
      if (rows == nullptr) continue;
      std::memset(static_cast<void*>(rows + row * stride), 0,
                  static_cast<size_t>(kMaxTileRows * stride) * sizeof(Unit));
    }
  }

  // Products round queries up to kDepthStep units, past a first group that is alone.
  void clear_second_group() {
    constexpr int64_t kBegin = kGroupLanes / kDepth, kStep = kDepthStep;
    constexpr int64_t kCount = (kBegin + kStep - 1) / kStep * kStep - kBegin;
    const UnitTiles<Unit>& t = w_.tiles;
    Unit* const all[] = {t.ds_rows, t.dts_rows, t.p_rows, t.w_rows};
    for (Unit* rows : all) {
      if (rows == nullptr) continue;
      for (int64_t i = 0; i < kKeyBlock + kMaxTileRows; ++i) {
        std::memset(static_cast<void*>(rows + i * t.row_stride + kBegin), 0, kCount * sizeof(Unit));
      }
    }
  }

  BackwardTile<Float> tile(int64_t group, int64_t key) const {
    const int64_t at = group * sizes_.panel_padded * kGroupLanes;
    return BackwardTile<Float>{w_.e + at, w_.ts + at, w_.a + at, w_.b + at}.at(key - keys_.begin);
  }

  // Sweeps 1 and 2 for one group.
  template <bool kTangent>
  void scores(BackwardRows<Float>& rows, TilePlace panel, int64_t group) {
    TilePlace place = panel;
    place.query = panel.query + group * kGroupLanes;
    place.queries = min64(kGroupLanes, panel.queries - group * kGroupLanes);
    const bool beyond = begin_rows(rows, lse_of(place, group), place.queries);
    const Float factor = scale_ * static_cast<Float>(kLog2e);
    read_gradients(rows, rows_from(params_.grad_lse, place), rows_from(params_.grad_lse_t, place),
                   place.queries);
    for (int64_t key = keys_.begin; key < keys_.end; key += kScoreBlock) {
      const BackwardTile<Float> t = tile(group, key);
      place.key = key;
      place.keys = min64(kScoreBlock, keys_.end - key);
      score_products<kTangent>(t, group, key, place.keys);
      const bool masked =
          params_.mask.kind != MaskKind::none || crosses_window(params_.window, place);
      if (w_.any_spoiled) restore_spoiled<kTangent>(t, place);
      Float* const others[] = {t.b, kTangent ? t.ts : nullptr, kTangent ? t.a : nullptr};
      Float* const none[] = {nullptr};
      if (masked && w_.any_spoiled) {
        apply_mask<kTileN>(t.e, others, factor, params_.mask, params_.window, place, w_.bias);
      } else if (masked) {
        apply_mask<kTileN>(t.e, none, factor, params_.mask, params_.window, place, w_.bias);
      } else if (beyond) {
        scale_scores<kTileN>(t.e, place.keys, factor);
      }
      if (beyond) continue;
      exponentiate<kTangent>(rows, t, place.keys, masked ? Float(1) : factor);
    }
    if (beyond) {
      shift_to_maximum(rows, tile(group, keys_.begin), keys_.end - keys_.begin);
      for (int64_t key = keys_.begin; key < keys_.end; key += kScoreBlock) {
        exponentiate<kTangent>(rows, tile(group, key), min64(kScoreBlock, keys_.end - key),
                               Float(1));
      }
    }
    // The block's last unit may extend past the last key.
    for (int64_t key = keys_.end; key % kDepth != 0; ++key) {
      std::memset(tile(group, key).e, 0, kGroupLanes * sizeof(Float));
    }
    center<kTangent>(rows, tile(group, keys_.begin), keys_.end - keys_.begin, scale_);
  }

  const Float* lse_of(const TilePlace& place, int64_t group) const {
    return w_.lse != nullptr ? w_.lse + group * kGroupLanes : rows_from(params_.lse, place);
  }

  // Row statistics from the first query of `place` on, or null.
  const Float* rows_from(const void* data, const TilePlace& place) const {
    const int64_t head = place.batch * params_.shape.heads + place.head;
    return data == nullptr
               ? nullptr
               : static_cast<const Float*>(data) + head * lse_stride(params_) + place.query;
  }

  // Sets scores to NaN if they come from an inf or NaN key or value that was zeroed during packing.
  // Lanes past the queries stay finite: products whose depth is the queries may read them.
  template <bool kTangent>
  void restore_spoiled(const BackwardTile<Float>& t, const TilePlace& place) {
    const auto spoil = [&](Float* row) {
      for (int64_t j = 0; j < place.queries; ++j) row[j] = static_cast<Float>(__builtin_nan(""));
    };
    for (int64_t i = 0; i < place.keys; ++i) {
      const uint8_t spoiled = w_.spoiled[place.key + i];
      const int64_t at = i * kGroupLanes;
      if ((spoiled & kKey) != 0) spoil(t.e + at);
      if ((spoiled & kKeyTangent) != 0) spoil(t.ts + at);
      if ((spoiled & (kValue | kValueTangent)) != 0) spoil(t.b + at);
      if (kTangent && (spoiled & kValue) != 0) spoil(t.a + at);
    }
  }

  // Computes raw S, B, tS and A for one group and block.
  template <bool kTangent>
  void score_products(const BackwardTile<Float>& t, int64_t group, int64_t key, int64_t keys) {
    const int64_t depth = sizes_.depth, depth_padded = sizes_.depth_padded;
    const int64_t value_depth = sizes_.value_depth, value_padded = sizes_.value_depth_padded;
    const auto by_query = [=](const Unit* rows, const Unit* columns) {
      return TileProduct<Unit>{rows + key * depth_padded,
                               depth_padded,
                               1,
                               columns + group * depth_padded * kGroupLanes,
                               kGroupLanes,
                               depth};
    };
    const auto by_grad = [=](const Unit* rows, const Unit* columns) {
      return TileProduct<Unit>{rows + key * value_padded,
                               value_padded,
                               1,
                               columns + group * value_padded * kGroupLanes,
                               kGroupLanes,
                               value_depth};
    };
    ProductList<Unit> s, b;
    s.add(by_query(w_.k, w_.q));
    store_products(t.e, keys, s);
    if (w_.g != nullptr) b.add(by_grad(w_.v, w_.g));
    if (w_.vt != nullptr) b.add(by_grad(w_.vt, w_.gt));
    store_products(t.b, keys, b);
    if constexpr (kTangent) {
      ProductList<Unit> ts, a;
      if (w_.qt != nullptr) ts.add(by_query(w_.k, w_.qt));
      if (w_.kt != nullptr) ts.add(by_query(w_.kt, w_.q));
      store_products(t.ts, keys, ts);
      a.add(by_grad(w_.v, w_.gt));
      store_products(t.a, keys, a);
    }
  }

  // Adds a key block's contribution to the panel's queries.
  void query_products(int64_t key, int64_t keys, int64_t queries) {
    ProductList<Unit> dq, dqt;
    dq.add(by_key(w_.tiles.ds_pairs, w_.k_depth, w_.k_turned, key, keys));
    if (w_.kt != nullptr) {
      dq.add(by_key(w_.tiles.dts_pairs, w_.kt_depth, w_.kt_turned, key, keys));
    }
    dqt.add(by_key(w_.tiles.dts_pairs, w_.k_depth, w_.k_turned, key, keys));
    const int64_t width = sizes_.width_padded;
    const int64_t stride = kAmx ? kPanel : width, rows = kAmx ? width : queries;
    add_products(w_.dq, stride, rows, dq);
    if (w_.dqt != nullptr) add_products(w_.dqt, stride, rows, dqt);
  }

  // One product of grad_query, dS K, or with AMX its transpose, K^T dS^T, because A's units must be
  // contiguous along keys.
  TileProduct<Unit> by_key(const Unit* pairs, const Unit* rows, const Unit* turned, int64_t key,
                           int64_t keys) const {
    const int64_t first = key / kDepth, depth = ceil_div(keys, kDepth);
    if (kAmx) return {turned + first, sizes_.key_units, 1, pairs, w_.tiles.pair_stride, depth};
    const int64_t width = sizes_.width_padded;
    return {pairs, 1, w_.tiles.pair_stride, rows + first * width, width, depth};
  }

  // Adds the panel's contribution to a block of keys and values.
  void key_products(int64_t key, int64_t keys, int64_t queries) {
    const int64_t width = sizes_.width_padded, value_width = sizes_.value_padded;
    const auto by_query = [=](const Unit* tile_rows, const Unit* rows, int64_t stride) {
      return TileProduct<Unit>{tile_rows, w_.tiles.row_stride,      1, rows,
                               stride,    ceil_div(queries, kDepth)};
    };
    const UnitTiles<Unit>& t = w_.tiles;
    ProductList<Unit> dk, dkt, dv, dvt;
    dk.add(by_query(t.ds_rows, w_.q_depth, width));
    if (w_.qt != nullptr) dk.add(by_query(t.dts_rows, w_.qt_depth, width));
    add_products(w_.dk + key * width, width, keys, dk);
    if (w_.g != nullptr) dv.add(by_query(t.p_rows, w_.g_depth, value_width));
    if (w_.qt != nullptr || w_.kt != nullptr) {
      dv.add(by_query(t.w_rows, w_.gt_depth, value_width));
    }
    add_products(w_.dv + key * value_width, value_width, keys, dv);
    if (w_.dkt != nullptr) {
      dkt.add(by_query(t.dts_rows, w_.q_depth, width));
      add_products(w_.dkt + key * width, width, keys, dkt);
    }
    if (w_.dvt != nullptr) {
      dvt.add(by_query(t.p_rows, w_.gt_depth, value_width));
      add_products(w_.dvt + key * value_width, value_width, keys, dvt);
    }
  }

  // Each row of dst (column with AMX) -= sums (one per lane) times share times mean; does nothing
  // without a mean.
  void remove(Float* dst, const Vec<Float> (&sums)[kTileN], const Float* mean, Float share,
              int64_t count) {
    if (mean == nullptr) return;
    constexpr int kStep = kLanes<Float>;
    Float sum[kGroupLanes];
    PMF_UNROLL for (int j = 0; j < kTileN; ++j) { store(sum + j * kStep, sums[j] * splat(-share)); }
    if constexpr (kAmx) {
      for (int64_t x = 0; x < sizes_.width_padded; ++x, dst += kPanel) {
        PMF_UNROLL for (int j = 0; j < kGroupLanes; j += kStep) {
          store(dst + j, fma(load(sum + j), splat(mean[x]), load(dst + j)));
        }
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i, dst += sizes_.width_padded) {
      for (int64_t x = 0; x < sizes_.width_padded; x += kStep) {
        store(dst + x, fma(splat(sum[i]), load(mean + x), load(dst + x)));
      }
    }
  }

  const AttentionBackwardParams& params_;
  const Sizes& sizes_;
  const BackwardBuffers<Unit>& w_;
  const Float scale_;
  KeyRange keys_{};  // those that any query of the panel attends to
};

}  // namespace pmf::cpu::PMF_LEVEL
