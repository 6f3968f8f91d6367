// Flash attention on the CPU, without and with tangents (tile loop: attention_panel-inl.h).
//
// Work is divided into panels of queries, numbered head by head and sequence by sequence. Each
// worker processes one contiguous run of panels of nearly equal cost and packs the keys and values
// of a head when it reaches it (grouped query heads share the packing). Workers share nothing and
// no sum crosses panels, so results are bitwise the same for any number of threads, and for
// sequences packed together or separate. A panel reads only the key tiles within its window.
//
// Memory per worker: one packed head, at most 4 Nk D units, and about 100 KB of tiles. Packing
// reads and writes a head once; each panel of 48 queries then performs 72 FMAs per packed scalar.
#include "cpu/attention/attention_panel-inl.h"
#include "cpu/attention/attention_workspace-inl.h"
#include "pmf/attention.h"

namespace pmf::cpu::PMF_LEVEL {
namespace {

// Divides a head's queries into panels of at most kTileN vectors, as equal as possible: a
// one-vector panel has too few accumulators to hide the FMA latency, so it is used only if there is
// at most one vector of queries.
struct Panels {
  int64_t count, narrow,
      wider;  // the first `wider` panels have narrow + 1 vectors, the rest narrow

  Panels(int64_t queries, int64_t lanes) {
    const int64_t vectors = ceil_div(queries, lanes);
    count = max64(1, ceil_div(vectors, kTileN));
    narrow = vectors / count;
    wider = vectors % count;
  }
  int64_t vectors(int64_t panel) const { return narrow + (panel < wider ? 1 : 0); }
  int64_t first_vector(int64_t panel) const { return panel * narrow + min64(panel, wider); }
};

// One problem: B samples of equal length, or one packed sequence.
template <typename Unit>
class ForwardKernel {
  using Float = Accumulator<Unit>;
  static constexpr int64_t kLane = kLanes<Float>;
  static constexpr int64_t kDepth = UnitTraits<Unit>::kDepth;
  static constexpr bool kRounds =
      kDepth > 1;  // P and H are narrower than scores, in buffers of their own

 public:
  ForwardKernel(const AttentionParams& params, const Packer<Unit>& packer)
      : params_(params),
        packer_(packer),
        panels_(params.shape.queries, kLane),
        depth_(round_up(ceil_div(params.shape.width, kDepth), kDepthStep)),
        depth_padded_(round_up(depth_, kLane)),
        value_rows_(round_up(params.shape.value_width, kTileM)),
        value_padded_(round_up(value_rows_, kLane)),
        keys_padded_(round_up(params.shape.keys, kKeyStep)),
        hides_(params.window.hides() || params.mask.kind != MaskKind::none) {
    if (params.shape.queries == 0) return;
    for (int64_t panel = 0; panel < panels_.count; ++panel) head_cost_ += cost(panel);
  }

  // The total cost; 0 if there is nothing to do.
  int64_t cost() const { return params_.shape.batch * params_.shape.heads * head_cost_; }

  // Scratch memory per worker.
  int64_t workspace_bytes() const {
    AttentionBuffers<Unit> unused;
    return place(nullptr, unused);
  }

  // Runs the panels, counted over all heads, whose cost range begins in [begin, end).
  void run(int64_t begin, int64_t end, char* workspace) const {
    AttentionBuffers<Unit> w;
    place(workspace, w);
    const int64_t heads = params_.shape.heads, group = heads / params_.shape.key_heads;
    int64_t packed = -1;
    for (int64_t item = max64(0, begin) / head_cost_; item < params_.shape.batch * heads; ++item) {
      int64_t at = item * head_cost_;
      if (at >= end) return;
      const int64_t b = item / heads, h = item % heads;
      for (int64_t panel = 0; panel < panels_.count; at += cost(panel++)) {
        if (at < begin || at >= end) continue;
        const int64_t key_head = b * params_.shape.key_heads + h / group;
        if (key_head != packed) pack_head(w, b, h / group);
        packed = key_head;
        switch (panels_.vectors(panel)) {
          case 1:
            run_panel<1>(w, b, h, panel);
            break;
          case 2:
            run_panel<2>(w, b, h, panel);
            break;
          default:
            run_panel<kTileN>(w, b, h, panel);
        }
      }
    }
  }

 private:
  bool with_tangent() const { return params_.out_t.data != nullptr; }
  bool has(const ConstView4& tangent) const { return with_tangent() && tangent.data != nullptr; }

  // Lays out one worker's buffers from `base` on; returns their size in bytes.
  int64_t place(char* base, AttentionBuffers<Unit>& w) const {
    const int64_t lanes = kTileN * kLane;
    const int64_t key_units = keys_padded_ * depth_;
    const int64_t value_units =
        ceil_div(kAmx ? keys_padded_ : params_.shape.keys, kDepth) * value_padded_;
    const int64_t tile = kTileKeys * lanes;
    const bool scores_t = has(params_.query_t) || has(params_.key_t);
    const bool masked = params_.mask.kind != MaskKind::none;
    Arena arena{base};
    arena.take(w.k, key_units);
    arena.take(w.kt, key_units, has(params_.key_t));
    arena.take(w.v, value_units);
    arena.take(w.vt, value_units, has(params_.value_t));
    arena.take(w.q, depth_padded_ * lanes);
    arena.take(w.qt, depth_padded_ * lanes, has(params_.query_t));
    arena.take(w.s, tile);
    arena.take(w.ts, tile, scores_t);
    arena.take(w.p, tile / kDepth, kRounds);
    arena.take(w.h, tile / kDepth, kRounds && scores_t);
    if (!kRounds) {
      w.p = reinterpret_cast<Unit*>(w.s);
      w.h = reinterpret_cast<Unit*>(w.ts);
    }
    arena.take(w.o, value_padded_ * lanes);
    arena.take(w.ot, value_padded_ * lanes, with_tangent());
    arena.take(w.bias, tile, masked);
    arena.take(w.stage_in, depth_padded_ * lanes);
    arena.take(w.stage_out, value_padded_ * lanes);
    arena.take(w.spoiled, params_.shape.keys, hides_);
    w.any_spoiled = false;
    return arena.used;
  }

  KeyRange visible_keys(int64_t panel) const {
    const int64_t first = panels_.first_vector(panel) * kLane;
    const int64_t end = min64(first + panels_.vectors(panel) * kLane, params_.shape.queries);
    return keys_in_window(params_.window, first, end - 1, params_.shape.keys, kKeyStep);
  }
  int64_t cost(int64_t panel) const {
    const KeyRange keys = visible_keys(panel);
    return panels_.vectors(panel) * (keys.end - keys.begin + 1);
  }

  void pack_head(AttentionBuffers<Unit>& w, int64_t b, int64_t h) const {
    const AttentionShape& n = params_.shape;
    packer_.rows(w.k, depth_, params_.key, b, h, n.keys, n.width, keys_padded_);
    if (w.kt != nullptr) {
      packer_.rows(w.kt, depth_, params_.key_t, b, h, n.keys, n.width, keys_padded_);
    }
    if (hides_) std::memset(w.spoiled, 0, static_cast<size_t>(n.keys));
    w.any_spoiled = pack_values(w.v, w, params_.value, b, h, kValue);
    if (w.vt != nullptr) {
      w.any_spoiled |= pack_values(w.vt, w, params_.value_t, b, h, kValueTangent);
    }
  }

  // Returns whether any value was not finite and may be hidden.
  bool pack_values(Unit* dst, const AttentionBuffers<Unit>& w, const ConstView4& view, int64_t b,
                   int64_t h, Spoiled what) const {
    const int64_t keys = params_.shape.keys, width = params_.shape.value_width;
    const auto clear = [&](Unit* rows, int64_t key, int64_t count) {
      return hides_ && clear_spoiled_depth_rows(rows, value_padded_, count, w.spoiled + key, what);
    };
    if constexpr (!kAmx) {
      packer_.depth_rows(dst, value_padded_, view, b, h, keys, width);
      return clear(dst, 0, keys);
    }
    // The same, transposed block by block.
    constexpr int64_t kUnits = kKeyStep / kDepth;
    Unit* const block = reinterpret_cast<Unit*>(w.stage_out);
    bool spoiled = false;
    for (int64_t key = 0; key < keys; key += kKeyStep) {
      const int64_t count = min64(kKeyStep, keys - key);
      packer_.depth_rows(block, value_padded_, skip_rows(view, key, params_.dtype), b, h, count,
                         width);
      clear_units(block, ceil_div(count, kDepth), value_padded_);
      spoiled |= clear(block, key, count);
      transpose_blocks(reinterpret_cast<LaneOf<Unit>*>(dst + key / kDepth), keys_padded_ / kDepth,
                       reinterpret_cast<const LaneOf<Unit>*>(block), value_padded_, kUnits,
                       value_padded_);
    }
    return spoiled;
  }

  // The scale's sign is applied to the queries, which is exact: the largest raw score is then the
  // largest score.
  void pack_queries(Unit* dst, const AttentionBuffers<Unit>& w, int64_t lanes,
                    const ConstView4& view, const TilePlace& place) const {
    packer_.columns(dst, lanes, view, place.batch, place.head, place.query, place.queries,
                    params_.shape.width, depth_padded_, w.stage_in);
    if (params_.scale < 0) negate(dst, depth_ * lanes);
  }

  void store_output(const View4& view, const Float* o, Float* stage, int64_t lanes,
                    const TilePlace& place) const {
    transpose_blocks(stage, value_padded_, o, lanes, value_padded_, lanes);
    packer_.store(view, place.batch, place.head, place.query, stage, value_padded_, place.queries,
                  params_.shape.value_width);
  }

  template <int kN>
  __attribute__((noinline)) void run_panel(const AttentionBuffers<Unit>& w, int64_t b, int64_t h,
                                           int64_t panel) const {
    constexpr int64_t kLanesW = kN * kLane;
    const int64_t first = panels_.first_vector(panel) * kLane;
    const TilePlace place = {b, h, first, min64(kLanesW, params_.shape.queries - first), 0, 0};
    const PanelShape shape = {depth_,
                              value_rows_,
                              value_padded_,
                              kAmx ? keys_padded_ / kDepth : 1,
                              kAmx ? 1 : value_padded_,
                              visible_keys(panel)};
    pack_queries(w.q, w, kLanesW, params_.query, place);
    if (w.qt != nullptr) pack_queries(w.qt, w, kLanesW, params_.query_t, place);

    const bool no_tangent = w.qt == nullptr && w.kt == nullptr && w.vt == nullptr;
    const int64_t bytes = value_padded_ * kLanesW * static_cast<int64_t>(sizeof(Float));
    const bool empty = shape.keys.begin == shape.keys.end;
    if (empty) std::memset(w.o, 0, bytes);
    if (w.ot != nullptr && (empty || no_tangent)) std::memset(w.ot, 0, bytes);

    RowState<kN, Float> state;
    const Float scale = static_cast<Float>(params_.scale < 0 ? -params_.scale : params_.scale);
    attention_tiles(params_, w, packer_, shape, place, scale, state);

    const int64_t row = (b * params_.shape.heads + h) * lse_stride(params_) + first;
    Float* const lse_t = static_cast<Float*>(params_.lse_t);
    finish_panel(state, w.o, w.ot, value_rows_, static_cast<Float*>(params_.lse) + row,
                 lse_t == nullptr ? nullptr : lse_t + row, place.queries);
    store_output(params_.out, w.o, w.stage_out, kLanesW, place);
    if (w.ot != nullptr) store_output(params_.out_t, w.ot, w.stage_out, kLanesW, place);
  }

  const AttentionParams params_;
  const Packer<Unit>& packer_;
  const Panels panels_;
  const int64_t depth_, depth_padded_, value_rows_, value_padded_, keys_padded_;
  const bool hides_;  // some query may not attend to some key
  int64_t head_cost_ = 0;
};

// All problems of a call, distributed by cost.
template <typename Unit>
class Forward {
 public:
  Forward(const AttentionParams& params, Packer<Unit> packer) : params_(params), packer_(packer) {
    for (int64_t i = 0; i < problem_count(params); ++i) {
      const ForwardKernel<Unit> kernel = problem(i);
      cost_ += kernel.cost();
      bytes_ = max64(bytes_, kernel.workspace_bytes());
    }
  }

  int64_t workspace_bytes(int64_t workers) const { return workers * bytes_; }

  void run(const ParallelFor& parallel) {
    workers_ = max64(1, parallel.threads);
    parallel(
        0, workers_, 1,
        [](void* self, int64_t begin, int64_t end) {
          for (int64_t w = begin; w < end; ++w) static_cast<Forward*>(self)->share(w);
        },
        this);
  }

 private:
  ForwardKernel<Unit> problem(int64_t index) const {
    return ForwardKernel<Unit>(problem_of(params_, index), packer_);
  }

  void share(int64_t worker) const {
    const TileRegisters tiles;
    const int64_t begin = cost_ * worker / workers_, end = cost_ * (worker + 1) / workers_;
    char* const workspace = static_cast<char*>(params_.workspace) + worker * bytes_;
    int64_t at = 0;
    for (int64_t i = 0; i < problem_count(params_) && at < end; ++i) {
      const ForwardKernel<Unit> kernel = problem(i);
      if (kernel.cost() > 0 && at + kernel.cost() > begin)
        kernel.run(begin - at, end - at, workspace);
      at += kernel.cost();
    }
  }

  const AttentionParams& params_;
  const Packer<Unit> packer_;
  int64_t cost_ = 0, bytes_ = 0, workers_ = 1;
};

// Calls `use` with the kernel for this dtype at this level.
template <typename Use>
PMF_INLINE void with_kernel(const AttentionParams& params, Use use) {
#if defined(__AVX512BF16__)
  Forward<bf16x2> kernel(params, make_packer<bf16, bf16x2>());
  use(kernel);
#else
  if (params.dtype == DType::f64) {
    Forward<double> kernel(params, make_packer<double, double>());
    use(kernel);
  } else {
    Forward<float> kernel(params, float_packer(params.dtype));
    use(kernel);
  }
#endif
}

}  // namespace

int64_t attention_forward_workspace_bytes(const AttentionParams& params, int64_t threads) {
  int64_t bytes = 0;
  with_kernel(params, [&](auto& kernel) { bytes = kernel.workspace_bytes(max64(1, threads)); });
  return bytes;
}

void attention_forward(const AttentionParams& params, const ParallelFor& parallel) {
  const AttentionShape& n = params.shape;
  if (n.batch == 0 || n.heads == 0 || n.queries == 0) return;
  with_kernel(params, [&](auto& kernel) { kernel.run(parallel); });
}

}  // namespace pmf::cpu::PMF_LEVEL

PMF_DISPATCH_AMX(params.dtype, int64_t, attention_forward_workspace_bytes,
                 (const AttentionParams& params, int64_t threads), (params, threads))
PMF_DISPATCH_AMX(params.dtype, void, attention_forward,
                 (const AttentionParams& params, const ParallelFor& parallel), (params, parallel))
