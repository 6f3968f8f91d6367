// Attention's backward on the CPU, ordinary and through both outputs of attention with tangents.
// The mathematics is in pmf/attention_backward.h, a single panel in attention_backward_panel-inl.h
// and its includes. This file packs the operands and divides the work.
//
// A worker takes one (batch, key head) at a time, packs its keys and values, and processes the
// panels of all query heads of the group, so it alone sums grad_key and grad_value, in a fixed
// order and in fp32, and stores them once. With T workers, the first floor(heads / T) T heads are
// distributed evenly. The remaining heads are split by panels, with T / remaining workers per head
// that each keep their own sums, which are then added in order. Results are bitwise the same for
// the same T, and for sequences packed together or separate: each is divided as if it were alone.
//
// Memory per worker, in numbers: scores 2 x 96 Nk (4 x 96 Nk with tangents), packed keys and values
// 2 to 3 Nk D (double with tangents), sums 2 Nk D (4 Nk D).
#include "pmf/attention_backward.h"

#include "cpu/attention/attention_backward_panel-inl.h"
#include "cpu/attention/attention_workspace-inl.h"

namespace pmf::cpu::PMF_LEVEL {
namespace {

template <typename Unit>
class BackwardKernel {
  using Float = Accumulator<Unit>;
  using Sizes = BackwardSizes<Unit>;
  using Buffers = BackwardBuffers<Unit>;
  static constexpr int64_t kDepth = Sizes::kDepth;

 public:
  BackwardKernel(const AttentionBackwardParams& params, const Packer<Unit>& packer, int64_t threads,
                 int64_t worker_bytes)
      : p_(params),
        sizes_(params.shape, params.window),
        packer_(packer),
        worker_bytes_(worker_bytes) {
    // An empty tensor may have no data: without queries every gradient is written as zero.
    tangent_ = p_.grad_t.data != nullptr || sizes_.queries == 0;
    hides_ = p_.window.hides() || p_.mask.kind != MaskKind::none;
    const int64_t heads = p_.shape.batch * p_.shape.key_heads;
    whole_ = heads / threads * threads;
    remaining_ = heads - whole_;
    const int64_t panels = max64(1, sizes_.panels * group());
    splits_ = remaining_ == 0 ? 1 : min64(threads / remaining_, panels);
    if (splits_ == 1) whole_ += remaining_, remaining_ = 0;
  }

  // Workspace per worker.
  int64_t workspace_bytes() const {
    Buffers buffers;
    return carve(buffers, nullptr);
  }

  int64_t whole_heads() const { return whole_; }

  // Runs heads [first, last) of those that a single worker processes.
  void run_heads(int64_t worker, int64_t first, int64_t last) const {
    Buffers w = buffers_of(worker);
    for (int64_t head = first; head < last; ++head) {
      panels(w, head, 0, 1);
      store_keys(w, head, 0, sizes_.keys);
    }
  }

  // Runs the heads that several workers share.
  void run_shared_heads(const ParallelFor& parallel) {
    if (remaining_ == 0) return;
    parallel(
        0, remaining_ * splits_, 1,
        [](void* self, int64_t first, int64_t last) {
          for (; first < last; ++first) static_cast<BackwardKernel*>(self)->part_of_head(first);
        },
        this);
    parallel(
        0, remaining_ * blocks(), 1,
        [](void* self, int64_t first, int64_t last) {
          for (; first < last; ++first) static_cast<BackwardKernel*>(self)->add_parts(first);
        },
        this);
  }

 private:
  int64_t group() const { return p_.shape.heads / max64(1, p_.shape.key_heads); }
  int64_t blocks() const { return ceil_div(sizes_.keys, kKeyBlock); }

  // Lays out one worker's memory and returns its size.
  int64_t carve(Buffers& w, char* base) const {
    const Sizes& s = sizes_;
    constexpr int64_t kPanel = Sizes::kPanel, kLanesW = Sizes::kGroupLanes;
    constexpr bool kOneTile = TileWriter<Unit>::kOneTile;
    const bool qt = tangent_ && p_.query_t.data != nullptr;
    const bool kt = tangent_ && p_.key_t.data != nullptr;
    const bool vt = tangent_ && p_.value_t.data != nullptr;
    const bool grad = p_.grad.data != nullptr;
    Arena arena{base};

    arena.take(w.k, s.keys_padded * s.depth_padded);
    arena.take(w.kt, s.keys_padded * s.depth_padded, kt);
    arena.take(w.v, s.keys_padded * s.value_depth_padded);
    arena.take(w.vt, s.keys_padded * s.value_depth_padded, vt);
    arena.take(w.k_depth, s.key_units * s.width_padded, !kOneTile);
    arena.take(w.kt_depth, s.key_units * s.width_padded, !kOneTile && kt);
    arena.take(w.k_turned, s.key_units * s.width_padded, kAmx);
    arena.take(w.kt_turned, s.key_units * s.width_padded, kAmx && kt);
    if (kOneTile) w.k_depth = w.k, w.kt_depth = w.kt;

    arena.take(w.q, kGroups * s.depth_padded * kLanesW);
    arena.take(w.qt, kGroups * s.depth_padded * kLanesW, qt);
    arena.take(w.g, kGroups * s.value_depth_padded * kLanesW, grad);
    arena.take(w.gt, kGroups * s.value_depth_padded * kLanesW, tangent_);
    arena.take(w.q_depth, kPanel / kDepth * s.width_padded);
    arena.take(w.qt_depth, kPanel / kDepth * s.width_padded, qt);
    arena.take(w.g_depth, kPanel / kDepth * s.value_padded, grad);
    arena.take(w.gt_depth, kPanel / kDepth * s.value_padded, tangent_);
    arena.take(w.stage, kLanesW * max64(s.depth_padded, s.value_depth_padded));

    const int64_t panel = kGroups * s.panel_padded * kLanesW;
    arena.take(w.e, panel);
    arena.take(w.b, panel);
    arena.take(w.ts, panel, tangent_);
    arena.take(w.a, panel, tangent_);
    arena.take(w.bias, round_up(kScoreBlock, kLanes<Float>) * kLanesW,
               p_.mask.kind != MaskKind::none);

    arena.take(w.masses, round_up(kKeyBlock, Sizes::kStep) * Sizes::kStep);
    arena.take(w.weights, round_up(kKeyBlock, Sizes::kStep));
    arena.take(w.k_mean, s.width_padded);
    arena.take(w.kt_mean, s.width_padded, kt);

    w.tiles.row_stride = kPanel / kDepth;
    w.tiles.pair_stride = kPanel;
    const int64_t rows = (kKeyBlock + kMaxTileRows) * w.tiles.row_stride;
    const int64_t pairs = kKeyBlock / kDepth * kPanel + kMaxTileRows;
    arena.take(w.tiles.p_rows, rows);
    arena.take(w.tiles.w_rows, rows, tangent_);
    arena.take(w.tiles.ds_rows, rows);
    arena.take(w.tiles.dts_rows, rows, tangent_);
    arena.take(w.tiles.ds_pairs, pairs, !kOneTile);
    arena.take(w.tiles.dts_pairs, pairs, !kOneTile && tangent_);
    if (kOneTile) w.tiles.ds_pairs = w.tiles.ds_rows, w.tiles.dts_pairs = w.tiles.dts_rows;

    arena.take(w.dq_rows, kPanel * s.width_padded, kAmx);
    const int64_t query_rows = kPanel + kMaxTileRows, key_rows = s.keys + kMaxTileRows;
    arena.take(w.dq, query_rows * s.width_padded);
    arena.take(w.dqt, query_rows * s.width_padded, tangent_ && p_.grad_query_t.data != nullptr);
    arena.take(w.dk, key_rows * s.width_padded);
    arena.take(w.dkt, key_rows * s.width_padded, tangent_ && p_.grad_key_t.data != nullptr);
    arena.take(w.dv, key_rows * s.value_padded);
    arena.take(w.dvt, key_rows * s.value_padded, tangent_ && p_.grad_value_t.data != nullptr);
    arena.take(w.lse, kPanel, hides_);
    arena.take(w.spoiled, s.keys, hides_);
    w.any_spoiled = false;
    return arena.used;
  }

  Buffers buffers_of(int64_t worker) const {
    Buffers w;
    carve(w, static_cast<char*>(p_.workspace) + worker * worker_bytes_);
    return w;
  }

  // Takes every splits_-th panel, which balances causal panels of growing cost.
  void part_of_head(int64_t part) {
    const TileRegisters tiles;
    Buffers w = buffers_of(part);
    const int64_t head = whole_ + part / splits_;
    panels(w, head, part % splits_, splits_);
  }

  // Adds and stores one block of keys of a head that several workers shared.
  void add_parts(int64_t index) {
    const int64_t head = index / blocks(), key = index % blocks() * kKeyBlock;
    const int64_t count = min64(kKeyBlock, sizes_.keys - key);
    const Buffers sum = buffers_of(head * splits_);
    for (int64_t part = 1; part < splits_; ++part) {
      const Buffers other = buffers_of(head * splits_ + part);
      add(sum.dk, other.dk, key, count, sizes_.width_padded);
      add(sum.dkt, other.dkt, key, count, sizes_.width_padded);
      add(sum.dv, other.dv, key, count, sizes_.value_padded);
      add(sum.dvt, other.dvt, key, count, sizes_.value_padded);
    }
    store_keys(sum, whole_ + head, key, count);
  }

  static void add(Float* dst, const Float* src, int64_t row, int64_t rows, int64_t stride) {
    if (dst == nullptr) return;
    for (int64_t i = row * stride; i < (row + rows) * stride; i += kLanes<Float>) {
      store(dst + i, load(dst + i) + load(src + i));
    }
  }

  // Adds panels first, first + step, ... of the group's query heads to w's sums; writes grad_query.
  void panels(Buffers& w, int64_t head, int64_t first, int64_t step) const {
    const int64_t batch = head / p_.shape.key_heads, key_head = head % p_.shape.key_heads;
    pack_head(w, batch, key_head);
    BackwardPanel<Unit> panel(p_, sizes_, w);
    for (int64_t i = first; i < sizes_.panels * group(); i += step) {
      TilePlace place{};
      place.batch = batch;
      place.head = key_head * group() + i / sizes_.panels;
      place.query = i % sizes_.panels * Sizes::kPanel;
      place.queries = min64(Sizes::kPanel, sizes_.queries - place.query);
      pack_panel(w, place);
      if (hides_) drop_rows(w, place);
      panel.run(place);
      write_queries(w, w.dq, p_.grad_query, place);
      write_queries(w, w.dqt, p_.grad_query_t, place);
    }
  }

  void write_queries(const Buffers& w, const Float* sums, const View4& view,
                     const TilePlace& place) const {
    if (sums == nullptr) return;
    if constexpr (kAmx) {
      transpose_blocks(w.dq_rows, sizes_.width_padded, sums, Sizes::kPanel, sizes_.width_padded,
                       Sizes::kPanel);
      sums = w.dq_rows;
    }
    write_rows(sums, view, place.batch, place.head, place.query, place.queries, sizes_.width_padded,
               sizes_.width);
  }

  void pack_head(Buffers& w, int64_t batch, int64_t head) const {
    const Sizes& s = sizes_;
    const auto rows = [&](Unit* dst, const ConstView4& view, int64_t padded, int64_t cols) {
      if (dst != nullptr) packer_.rows(dst, padded, view, batch, head, s.keys, cols, s.keys_padded);
    };
    const auto depth = [&](Unit* dst, const ConstView4& view) {
      if (TileWriter<Unit>::kOneTile || dst == nullptr) return;
      packer_.depth_rows(dst, s.width_padded, view, batch, head, s.keys, s.width);
      clear_units(dst, ceil_div(s.keys, kDepth), s.width_padded);
    };
    rows(w.k, p_.key, s.depth_padded, s.width);
    rows(w.kt, p_.key_t, s.depth_padded, s.width);
    rows(w.v, p_.value, s.value_depth_padded, s.value_width);
    rows(w.vt, p_.value_t, s.value_depth_padded, s.value_width);
    depth(w.k_depth, p_.key);
    depth(w.kt_depth, p_.key_t);
    const auto clear = [&](Float* dst, int64_t stride) {
      if (dst != nullptr) std::memset(dst, 0, static_cast<size_t>(s.keys * stride) * sizeof(Float));
    };
    clear(w.dk, s.width_padded);
    clear(w.dkt, s.width_padded);
    clear(w.dv, s.value_padded);
    clear(w.dvt, s.value_padded);
    if (hides_) clear_spoiled_head(w);
    turn(w.k_turned, w.k_depth);
    turn(w.kt_turned, w.kt_depth);
  }

  void turn(Unit* dst, const Unit* src) const {
    if (dst == nullptr) return;
    const Sizes& s = sizes_;
    transpose_blocks(reinterpret_cast<LaneOf<Unit>*>(dst), s.key_units,
                     reinterpret_cast<const LaneOf<Unit>*>(src), s.width_padded, s.key_units,
                     s.width_padded);
  }

  // See attention_hidden-inl.h.
  void clear_spoiled_head(Buffers& w) const {
    const Sizes& s = sizes_;
    std::memset(w.spoiled, 0, static_cast<size_t>(s.keys));
    const auto rows = [&](Unit* from, int64_t padded, Spoiled what) {
      return clear_spoiled_rows(from, padded, s.keys, w.spoiled, what);
    };
    const auto depth_rows = [&](Unit* from, Spoiled what) {
      if (!TileWriter<Unit>::kOneTile) {
        clear_spoiled_depth_rows(from, s.width_padded, s.keys, w.spoiled, what);
      }
    };
    w.any_spoiled = rows(w.k, s.depth_padded, kKey);
    w.any_spoiled |= rows(w.kt, s.depth_padded, kKeyTangent);
    w.any_spoiled |= rows(w.v, s.value_depth_padded, kValue);
    w.any_spoiled |= rows(w.vt, s.value_depth_padded, kValueTangent);
    if (!w.any_spoiled) return;
    depth_rows(w.k_depth, kKey);
    depth_rows(w.kt_depth, kKeyTangent);
  }

  // Excludes rows, whatever they contain, that attend to nothing, or that are not finite but have a
  // zero gradient, such as padded queries: sets their lse to -inf and the row to 0.
  void drop_rows(const Buffers& w, const TilePlace& place) const {
    const Sizes& s = sizes_;
    const int64_t head = place.batch * p_.shape.heads + place.head;
    const int64_t row = head * lse_stride(p_) + place.query;
    const Float* lse = static_cast<const Float*>(p_.lse) + row;
    const auto no_gradient = [&](const void* data, int64_t i) {
      return data == nullptr || static_cast<const Float*>(data)[row + i] == Float(0);
    };
    const int64_t groups = ceil_div(place.queries, Sizes::kGroupLanes);
    const bool finite_tangents =
        w.qt == nullptr || all_finite(w.qt, groups * s.depth_padded * Sizes::kGroupLanes);
    for (int64_t i = 0; i < place.queries; ++i) {
      w.lse[i] = lse[i];
      const bool suspect = lse[i] != lse[i] || !finite_tangents;
      const bool drop = lse[i] == -kInfinity<Float> ||
                        (suspect && is_zero(w.g, s.value_depth_padded, i) &&
                         is_zero(w.gt, s.value_depth_padded, i) && no_gradient(p_.grad_lse, i) &&
                         no_gradient(p_.grad_lse_t, i));
      if (!drop) continue;
      w.lse[i] = -kInfinity<Float>;
      clear_query(w.q, w.q_depth, s.depth_padded, s.width_padded, i);
      clear_query(w.qt, w.qt_depth, s.depth_padded, s.width_padded, i);
      clear_query(w.g, w.g_depth, s.value_depth_padded, s.value_padded, i);
      clear_query(w.gt, w.gt_depth, s.value_depth_padded, s.value_padded, i);
    }
  }

  // Unit `u` of a panel row, in the columns layout.
  static Unit& unit_of(Unit* columns, int64_t depth_padded, int64_t row, int64_t u) {
    constexpr int64_t kLanesW = Sizes::kGroupLanes;
    return columns[(row / kLanesW * depth_padded + u) * kLanesW + row % kLanesW];
  }
  static bool is_zero(Unit* columns, int64_t depth_padded, int64_t row) {
    bool zero = true;
    for (int64_t u = 0; columns != nullptr && u < depth_padded; ++u) {
      for (int64_t part = 0; part < kDepth; ++part) {
        zero &= unit_number(unit_of(columns, depth_padded, row, u), part) == Float(0);
      }
    }
    return zero;
  }
  static void clear_query(Unit* columns, Unit* rows, int64_t depth_padded, int64_t width_padded,
                          int64_t row) {
    if (columns == nullptr) return;
    for (int64_t u = 0; u < depth_padded; ++u) unit_of(columns, depth_padded, row, u) = Unit{};
    for (int64_t x = 0; x < width_padded; ++x) {
      clear_number(rows[row / kDepth * width_padded + x], row % kDepth);
    }
  }

  void pack_panel(const Buffers& w, const TilePlace& place) const {
    const auto pack = [&](Unit* columns, Unit* rows, const ConstView4& view, int64_t cols,
                          int64_t depth_padded, int64_t width_padded) {
      if (columns == nullptr) return;
      for (int64_t at = 0; at < place.queries; at += Sizes::kGroupLanes) {
        packer_.columns(columns, Sizes::kGroupLanes, view, place.batch, place.head,
                        place.query + at, min64(Sizes::kGroupLanes, place.queries - at), cols,
                        depth_padded, w.stage);
        columns += depth_padded * Sizes::kGroupLanes;
      }
      packer_.depth_rows(rows, width_padded, skip_rows(view, place.query, p_.dtype), place.batch,
                         place.head, place.queries, cols);
      clear_units(rows, ceil_div(place.queries, kDepth), width_padded);
    };
    const Sizes& s = sizes_;
    pack(w.q, w.q_depth, p_.query, s.width, s.depth_padded, s.width_padded);
    pack(w.qt, w.qt_depth, p_.query_t, s.width, s.depth_padded, s.width_padded);
    pack(w.g, w.g_depth, p_.grad, s.value_width, s.value_depth_padded, s.value_padded);
    pack(w.gt, w.gt_depth, p_.grad_t, s.value_width, s.value_depth_padded, s.value_padded);
  }

  void store_keys(const Buffers& w, int64_t head, int64_t key, int64_t count) const {
    const int64_t batch = head / p_.shape.key_heads, key_head = head % p_.shape.key_heads;
    const Sizes& s = sizes_;
    write_rows(w.dk, p_.grad_key, batch, key_head, key, count, s.width_padded, s.width, key);
    write_rows(w.dkt, p_.grad_key_t, batch, key_head, key, count, s.width_padded, s.width, key);
    write_rows(w.dv, p_.grad_value, batch, key_head, key, count, s.value_padded, s.value_width,
               key);
    write_rows(w.dvt, p_.grad_value_t, batch, key_head, key, count, s.value_padded, s.value_width,
               key);
  }

  // Writes rows [row, row + count) of the sums to rows [first, first + count) of a gradient.
  void write_rows(const Float* sums, const View4& view, int64_t batch, int64_t head, int64_t first,
                  int64_t count, int64_t padded, int64_t cols, int64_t row = 0) const {
    if (sums == nullptr) return;
    packer_.store(view, batch, head, first, sums + row * padded, padded, count, cols);
  }

  const AttentionBackwardParams p_;
  const Sizes sizes_;
  const Packer<Unit>& packer_;
  const int64_t worker_bytes_;
  bool tangent_;
  bool hides_;  // some query may not attend to some key
  int64_t whole_, remaining_,
      splits_;  // heads with one worker each, remaining heads, workers per remaining head
};

// All problems of a call. First, the heads that a single worker processes, over all problems,
// divided by cost; then, problem by problem, the heads that several workers share. A problem's
// heads are divided as if it were alone, which keeps its sums independent of the other problems.
template <typename Unit>
class Backward {
 public:
  Backward(const AttentionBackwardParams& params, Packer<Unit> packer, int64_t threads)
      : params_(params), packer_(packer), threads_(max64(1, threads)) {
    for (int64_t i = 0; i < problem_count(params); ++i) {
      worker_bytes_ = max64(worker_bytes_, problem(i).workspace_bytes());
    }
  }

  int64_t workspace_bytes() const { return threads_ * worker_bytes_; }

  void run(const ParallelFor& parallel) {
    for (int64_t i = 0; i < problem_count(params_); ++i) {
      cost_ += problem(i).whole_heads() * head_cost(i);
    }
    parallel(
        0, threads_, 1,
        [](void* self, int64_t first, int64_t last) {
          for (; first < last; ++first) static_cast<Backward*>(self)->share(first);
        },
        this);
    for (int64_t i = 0; i < problem_count(params_); ++i) problem(i).run_shared_heads(parallel);
  }

 private:
  BackwardKernel<Unit> problem(int64_t index) const {
    return {problem_of(params_, index), packer_, threads_, worker_bytes_};
  }

  // Relative cost of a head; windows and causality cost all heads of a problem the same.
  int64_t head_cost(int64_t index) const {
    const AttentionShape shape = problem_of(params_, index).shape;
    const int64_t seen = params_.window.left + params_.window.right;
    return (shape.queries + 1) * (min64(shape.keys, max64(0, seen)) + 1);
  }

  // Runs the heads whose cost range begins within the worker's share of the total.
  void share(int64_t worker) const {
    const TileRegisters tiles;
    const int64_t begin = cost_ * worker / threads_, end = cost_ * (worker + 1) / threads_;
    int64_t at = 0;
    for (int64_t i = 0; i < problem_count(params_) && at < end; ++i) {
      const BackwardKernel<Unit> kernel = problem(i);
      const int64_t each = head_cost(i), heads = kernel.whole_heads();
      const int64_t first = max64(0, ceil_div(begin - at, each));
      const int64_t last = min64(heads, ceil_div(end - at, each));
      if (begin < at + heads * each && first < last) kernel.run_heads(worker, first, last);
      at += heads * each;
    }
  }

  const AttentionBackwardParams& params_;
  const Packer<Unit> packer_;
  const int64_t threads_;
  int64_t worker_bytes_ = 0, cost_ = 0;
};

// Calls with(kernel) with the arithmetic that this level uses for the dtype.
template <typename With>
auto with_kernel(const AttentionBackwardParams& params, int64_t threads, With with) {
#if defined(__AVX512BF16__)
  return with(Backward<bf16x2>(params, make_packer<bf16, bf16x2>(), threads));
#else
  if (params.dtype == DType::f64) {
    return with(Backward<double>(params, make_packer<double, double>(), threads));
  }
  return with(Backward<float>(params, float_packer(params.dtype), threads));
#endif
}

}  // namespace

int64_t attention_backward_workspace_bytes(const AttentionBackwardParams& params, int64_t threads) {
  return with_kernel(params, threads, [](const auto& kernel) { return kernel.workspace_bytes(); });
}

void attention_backward(const AttentionBackwardParams& params, const ParallelFor& parallel) {
  with_kernel(params, parallel.threads, [&](auto&& kernel) { kernel.run(parallel); });
}

}  // namespace pmf::cpu::PMF_LEVEL

PMF_DISPATCH_AMX(params.dtype, int64_t, attention_backward_workspace_bytes,
                 (const AttentionBackwardParams& params, int64_t threads), (params, threads))
PMF_DISPATCH_AMX(params.dtype, void, attention_backward,
                 (const AttentionBackwardParams& params, const ParallelFor& parallel),
                 (params, parallel))
