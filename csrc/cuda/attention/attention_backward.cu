// Host side of attention's backward: kernel selection, launch plans and two launches.
//
// The kernels and their mathematics are in attention_backward_queries.cuh (ordinary) or
// attention_backward_tangents.cuh (through both outputs), then attention_backward_keys.cuh.
#include <algorithm>

#include "cuda/attention/attention_backward_plan.h"
#include "cuda/attention/attention_choices.h"
#include "cuda/attention/attention_launchers.h"
#include "cuda/attention/attention_views.h"
#include "cuda/attention/hopper_backward.h"
#include "cuda/common/cuda.cuh"
#include "cuda/common/launch.cuh"

namespace pmf::cuda {
namespace {

constexpr int kRowsOfWarp = 16;
constexpr int kMaxWarps = kBackwardMostRows / kRowsOfWarp;
constexpr int64_t kLargestGrid = 2147483647;
constexpr float kLog2e = 1.4426950408889634f;
constexpr int64_t kSharedOverhead = 1024;  // bytes reserved per block beyond its request

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

int64_t shared_bytes(const BackwardKernels& k, int warps, int slots, bool by_keys) {
  const int64_t row = int64_t(k.width) * k.element_bytes * k.tensors;
  const int64_t statistics =
      by_keys ? int64_t(k.statistics) * k.columns * int64_t(sizeof(float)) : 0;
  return kBackwardPlaceBytes + warps * kRowsOfWarp * row + slots * (k.columns * row + statistics);
}

// Six warps, or four if that leaves fewer idle rows, or two if there are few rows. Blocks are whole
// query tiles, as every row of such a tile needs its statistics.
int preferred_warps(int64_t rows) {
  if (rows <= 2 * kRowsOfWarp) return 2;
  const auto padded = [rows](int warps) {
    return ceil_div(rows, warps * kRowsOfWarp) * warps * kRowsOfWarp;
  };
  return 20 * padded(4) < 19 * padded(kMaxWarps) ? 4 : kMaxWarps;
}

// Whether blocks of queries cover whole query tiles, every row of which needs its statistics. For
// packed sequences this must hold whatever their lengths.
bool covers_tiles(const BackwardKernels& kernels, int64_t queries, int warps, bool packed) {
  const int64_t rows = warps * kRowsOfWarp;
  if (packed) return rows % kernels.columns == 0;
  return ceil_div(queries, rows) * rows >= ceil_div(queries, kernels.columns) * kernels.columns;
}

// Warps per block of a regular kernel. By the cycle model (benchmarks/gpu_model.py), not measured,
// three or four blocks per SM hide each other's barriers better than two.
int regular_warps(const BackwardKernels& kernels, int64_t rows, bool packed) {
  const int fewest = kernels.warps / 4, more = kernels.warps / 3;
  const auto padded = [&](int warps) {
    return ceil_div(rows, warps * kRowsOfWarp) * warps * kRowsOfWarp;
  };
  return !covers_tiles(kernels, rows, fewest, packed) || padded(more) < padded(fewest) ? more
                                                                                       : fewest;
}

// BackwardKernels::regular except for the widths.
bool is_regular(const AttentionBackwardParams& p) {
  const AttentionShape& s = p.shape;
  if (p.mask.kind != MaskKind::none || p.window.hides() || s.heads != s.key_heads) return false;
  const int64_t bytes = dtype_bytes(p.dtype);
  const auto queries = [&](const auto& x) {
    return x.data != nullptr && whole_chunks(x, s.batch, s.heads, s.queries, bytes);
  };
  const auto keys = [&](const auto& x) {
    return x.data != nullptr && whole_chunks(x, s.batch, s.key_heads, s.keys, bytes);
  };
  const bool primal = queries(p.query) && queries(p.grad) && keys(p.key) && keys(p.value);
  return primal && (p.grad_t.data == nullptr ||
                    (queries(p.query_t) && queries(p.grad_t) && keys(p.key_t) && keys(p.value_t)));
}

// The kernel table for the call's dtype, with or without tangents.
const BackwardKernels* first_kernels(const AttentionBackwardParams& params) {
  const BackwardTable table = params.dtype == DType::bf16  ? attention_backward_bf16()
                              : params.dtype == DType::f16 ? attention_backward_f16()
                              : params.allow_tf32          ? attention_backward_tf32()
                                                           : attention_backward_f32();
  // Without queries grad_t is empty, but gradients of tangents may still be requested.
  const bool tangent = params.grad_t.data != nullptr || params.shape.queries == 0;
  return tangent ? table.tangent : table.ordinary;
}

// Whether the kernels support a call, given the shared memory available to a block.
bool take(const BackwardKernels& kernels, const AttentionBackwardParams& params, bool regular,
          int64_t shared_limit) {
  const AttentionShape& s = params.shape;
  if (!kernels.regular) return s.width <= kernels.width && s.value_width <= kernels.width;
  const auto runs = [&](bool by_keys) {
    const BackwardPlan plan = attention_backward_plan(kernels, params, by_keys, shared_limit);
    return plan.slots == kBackwardRegularSlots && plan.shared_bytes <= shared_limit;
  };
  return regular && s.width == kernels.width && s.value_width == kernels.width && runs(false) &&
         runs(true);
}

// The tuned kernels if they support the call, otherwise the cost model's choice, `kernels`. Both
// must stream tiles of the same size, so that tuning never changes results, not even bitwise.
const BackwardKernels& tuned_kernels(const AttentionBackwardParams& params, int64_t shared_limit,
                                     const BackwardKernels& kernels,
                                     const AttentionChoice& choice) {
  if (!choice.tuned()) return kernels;
  const bool regular = is_regular(params);
  const BackwardKernels* const first = first_kernels(params);
  for (const BackwardKernels* k = first;; ++k) {
    if (k - first == choice.kernel && k->columns == kernels.columns &&
        take(*k, params, regular, shared_limit)) {
      return *k;
    }
    if (!k->regular && k->width == kAttentionMaxWidth) return kernels;  // end of the table
  }
}

// A plan with the given warps and ring slots.
BackwardPlan plan_with(const BackwardKernels& kernels, const AttentionBackwardParams& params,
                       bool by_keys, int warps, int slots) {
  const AttentionShape& s = params.shape;
  BackwardPlan plan;
  plan.rows = warps * kRowsOfWarp;
  const int64_t blocks = row_blocks(by_keys ? s.keys : s.queries, plan.rows, params.sequences);
  plan.slots = slots;
  plan.shared_bytes = int(shared_bytes(kernels, warps, slots, by_keys));
  const int64_t width = by_keys && s.value_width > s.width ? s.value_width : s.width;
  const int out = by_keys ? kernels.out_keys : kernels.out_queries;
  const int64_t heads = by_keys ? s.key_heads : s.heads;
  plan.blocks = ceil_div(width, out) * blocks * heads * s.batch;
  plan.by_parts = Divisor(uint32_t(ceil_div(width, out)));
  plan.by_row_blocks = Divisor(uint32_t(std::min(blocks, kLargestGrid)));
  plan.by_heads = Divisor(uint32_t(heads));
  plan.by_group = Divisor(uint32_t(heads / (s.key_heads > 0 ? s.key_heads : 1)));
  plan.scale = float(params.scale);
  plan.factor = float(params.scale * double(kLog2e));
  plan.window = Window(params.window);
  plan.padded_queries = int(attention_backward_padded_queries(params));
  plan.statistics = static_cast<float*>(params.workspace);
  return plan;
}

// Whether the kernels and the device can run the tuned choice.
bool has_plan(const BackwardKernels& kernels, const AttentionBackwardParams& params, bool by_keys,
              int64_t shared_limit, const AttentionChoice& choice) {
  const int warps = choice.warps, slots = choice.slots;
  if (warps < 1 || warps > kMaxWarps || warps > kernels.warps || slots < 1 || slots > 3)
    return false;
  if (kernels.regular && slots != kBackwardRegularSlots) return false;
  const bool packed = params.sequences.queries != nullptr;
  if (!by_keys && !covers_tiles(kernels, params.shape.queries, warps, packed)) return false;
  return shared_bytes(kernels, warps, slots, by_keys) <= shared_limit;
}

}  // namespace

const BackwardKernels& attention_backward_kernels(const AttentionBackwardParams& params,
                                                  int64_t shared_limit) {
  const bool regular = is_regular(params);
  const BackwardKernels* k = first_kernels(params);
  while (!take(*k, params, regular, shared_limit)) ++k;
  return *k;
}

BackwardPlan attention_backward_plan(const BackwardKernels& kernels,
                                     const AttentionBackwardParams& params, bool by_keys,
                                     int64_t shared_limit) {
  const AttentionShape s = planned_shape(params.shape, params.sequences);
  const int64_t rows = by_keys ? s.keys : s.queries;
  const bool packed = params.sequences.queries != nullptr;
  int warps = kernels.regular ? regular_warps(kernels, rows, packed) : preferred_warps(rows);
  int slots = 3;
  // Shrinks the ring before the blocks: smaller blocks would read the streamed tiles more often.
  while (shared_bytes(kernels, warps, slots, by_keys) > shared_limit) {
    const int fewer = warps > 2 ? warps - 2 : 1;
    if (slots > 2) {
      --slots;
    } else if (fewer < warps && fewer * kRowsOfWarp % kernels.columns == 0) {
      warps = fewer;
    } else if (slots > 1) {
      --slots;
    } else {
      break;
    }
  }
  return plan_with(kernels, params, by_keys, warps, slots);
}

const char* attention_backward(const AttentionBackwardParams& params, void* stream) {
  const AttentionShape& s = params.shape;
  constexpr int64_t kLongest = 2147483647 - 4 * kMaxWarps * kRowsOfWarp;
  if (s.queries > kLongest || s.keys > kLongest ||
      attention_backward_padded_queries(params) > kLongest) {
    return "more than 2^31 queries or keys";
  }
  const int64_t shared_limit = device_shared_limit(), per_processor = device_shared_per_processor();
  if (shared_limit <= 0 || per_processor <= 0) return kNoLimits;
  const char* problem = nullptr;
  const auto hopper = params.grad_t.data == nullptr ? hopper_backward : hopper_backward_tangents;
  if (params.sequences.queries == nullptr && is_regular(params) &&
      hopper(params, stream, problem)) {
    return problem;
  }
  const AttentionShape one = planned_shape(s, params.sequences);
  const auto tuned = [&](AttentionLaunch launch) {
    return attention_choice({launch, params.dtype, params.dtype == DType::f32 && params.allow_tf32,
                             params.grad_t.data != nullptr, one.queries, one.keys, one.width,
                             one.value_width});
  };
  const AttentionChoice choices[] = {tuned(AttentionLaunch::backward_queries),
                                     tuned(AttentionLaunch::backward_keys)};
  const BackwardKernels& kernels =
      tuned_kernels(params, shared_limit, attention_backward_kernels(params, shared_limit),
                    choices[0].tuned() ? choices[0] : choices[1]);
  for (const bool by_keys : {false, true}) {
    const AttentionChoice& choice = choices[by_keys];
    const bool takes_choice = choice.tuned() && &kernels == first_kernels(params) + choice.kernel &&
                              has_plan(kernels, params, by_keys, shared_limit, choice);
    const BackwardPlan plan = takes_choice
                                  ? plan_with(kernels, params, by_keys, choice.warps, choice.slots)
                                  : attention_backward_plan(kernels, params, by_keys, shared_limit);
    if (plan.blocks == 0) continue;
    if (plan.blocks > kLargestGrid) return "more than 2^31 blocks of queries or keys";
    const int warps = plan.rows / kRowsOfWarp;
    const int64_t fit = per_processor / (plan.shared_bytes + kSharedOverhead);
    plan_next_launch(plan.rows, kernels.columns,
                     int(std::max<int64_t>(1, std::min<int64_t>(kernels.warps / warps, fit))));
    const auto status = launch(by_keys ? kernels.keys : kernels.queries,
                               dim3(unsigned(plan.blocks)), dim3(unsigned(warps * kWarpThreads)),
                               plan.shared_bytes, static_cast<cudaStream_t>(stream), params, plan);
    if (const char* problem = error_sentence(status)) return problem;
  }
  return nullptr;
}

}  // namespace pmf::cuda
