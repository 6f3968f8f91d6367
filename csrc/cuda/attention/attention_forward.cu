// Host side of attention's forward: kernel selection, launch plan and launch. The kernels and their
// mathematics are in attention_forward.cuh.
#include <algorithm>
#include <cmath>

#include "cuda/attention/attention_choices.h"
#include "cuda/attention/attention_forward_plan.h"
#include "cuda/attention/attention_launchers.h"
#include "cuda/attention/attention_views.h"
#include "cuda/attention/hopper_forward.h"
#include "cuda/common/cuda.cuh"
#include "cuda/common/launch.cuh"

namespace pmf::cuda {
namespace {

constexpr int64_t kSharedOverhead = 1024;  // bytes reserved per block beyond its request
constexpr int64_t kLargest = 2147483647;
constexpr float kLog2e = 1.4426950408889634f;

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// ForwardKernel::regular except for the widths and windows.
bool is_regular_or_windowed(const AttentionParams& p) {
  const AttentionShape& s = p.shape;
  if (p.mask.kind != MaskKind::none || p.scale < 0) return false;
  const int64_t bytes = dtype_bytes(p.dtype);
  const auto queries = [&](const auto& x) {
    return x.data != nullptr && whole_chunks(x, s.batch, s.heads, s.queries, bytes);
  };
  const auto keys = [&](const auto& x) {
    return x.data != nullptr && whole_chunks(x, s.batch, s.key_heads, s.keys, bytes);
  };
  const bool primal = queries(p.query) && keys(p.key) && keys(p.value) && queries(p.out);
  return primal && (p.out_t.data == nullptr ||
                    (queries(p.query_t) && keys(p.key_t) && keys(p.value_t) && queries(p.out_t)));
}

bool is_regular(const AttentionParams& p) { return !p.window.hides() && is_regular_or_windowed(p); }

// The kernel table for the call's dtype, with or without tangents.
const ForwardKernel* first_kernel(const AttentionParams& params) {
  const ForwardTable table = params.dtype == DType::bf16  ? attention_forward_bf16()
                             : params.dtype == DType::f16 ? attention_forward_f16()
                             : params.allow_tf32          ? attention_forward_tf32()
                                                          : attention_forward_f32();
  return params.out_t.data != nullptr ? table.tangent : table.plain;
}

// Whether a kernel supports a call, given the shared memory available to a block.
bool takes(const ForwardKernel& k, const AttentionParams& params, bool regular,
           int64_t shared_per_block) {
  const AttentionShape& s = params.shape;
  if (shared_per_block < k.least_shared) return false;
  return k.regular ? regular && s.width == k.width && s.value_width == k.width &&
                         attention_forward_plan(k, params, {shared_per_block, 0}).warps > 0
                   : s.width <= k.width;
}

int64_t units_of(const ForwardKernel& kernel, const AttentionShape& shape) {
  return std::max<int64_t>(1, ceil_div(shape.queries, kernel.unit));
}

int64_t tiles_of(const ForwardKernel& kernel, const AttentionShape& shape) {
  return std::max<int64_t>(1, ceil_div(shape.keys, kernel.keys));
}

// A plan with the given warps and slots; its `warps` is 0 if the kernel or device cannot run it.
ForwardPlan plan_with(const ForwardKernel& kernel, const AttentionParams& params,
                      const DeviceLimits& limits, int warps, int slots) {
  const AttentionShape shape = planned_shape(params.shape, params.sequences);
  const int64_t units = units_of(kernel, shape), tiles = tiles_of(kernel, shape);
  const int most = int(std::min<int64_t>(3, tiles));
  const bool has_warps = warps >= 1 && warps <= kernel.warps && (warps == 1 || warps <= units);
  const bool has_slots =
      kernel.regular ? slots == kForwardRegularSlots : slots >= 1 && slots <= most;
  if (!has_warps || !has_slots) return {};
  const int64_t row = int64_t(kernel.element_bytes) * kernel.sides;
  const int64_t slot_bytes = row * kernel.keys * (kernel.width + kernel.out);
  const int64_t unit_bytes = row * kernel.unit * kernel.width;
  const int64_t bytes = kForwardPlaceBytes + slots * slot_bytes + warps * unit_bytes;
  if (bytes > limits.shared_per_block) return {};
  const int64_t parts = ceil_div(shape.value_width, kernel.out);
  ForwardPlan plan;
  plan.warps = warps;
  plan.slots = slots;
  plan.shared_bytes = int(bytes);
  plan.blocks_per_processor =
      int(std::max<int64_t>(1, std::min(limits.shared_per_processor / (bytes + kSharedOverhead),
                                        int64_t(kernel.warps / warps))));
  const int64_t blocks = row_blocks(params.shape.queries, warps * kernel.unit, params.sequences);
  plan.row_blocks = int(std::min(blocks, kLargest));
  plan.blocks = shape.batch * shape.heads * parts * blocks;
  plan.by_parts = Divisor(uint32_t(parts));
  plan.by_row_blocks = Divisor(uint32_t(plan.row_blocks));
  plan.by_heads = Divisor(uint32_t(shape.heads));
  plan.by_group = Divisor(uint32_t(shape.heads / std::max<int64_t>(1, shape.key_heads)));
  return plan;
}

// Uses the tuned kernel and plan if this call has one. Its key tiles must have the size that the
// cost model chose (`kernel`), so that tuning never changes results, not even bitwise.
bool take_tuned(const AttentionParams& params, const DeviceLimits& limits,
                const ForwardKernel*& kernel, ForwardPlan& plan) {
  const AttentionShape s = planned_shape(params.shape, params.sequences);
  const AttentionChoice choice = attention_choice(
      {AttentionLaunch::forward, params.dtype, params.dtype == DType::f32 && params.allow_tf32,
       params.out_t.data != nullptr, s.queries, s.keys, s.width, s.value_width});
  if (!choice.tuned()) return false;
  const bool regular = is_regular(params);
  const ForwardKernel* const first = first_kernel(params);
  for (const ForwardKernel* k = first;; ++k) {
    if (k - first == choice.kernel && k->keys == kernel->keys &&
        takes(*k, params, regular, limits.shared_per_block)) {
      const ForwardPlan tuned = plan_with(*k, params, limits, choice.warps, choice.slots);
      if (tuned.warps == 0) return false;
      kernel = k;
      plan = tuned;
      return true;
    }
    if (!k->regular && k->width == kAttentionMaxWidth) return false;  // end of the table
  }
}

}  // namespace

const ForwardKernel& attention_forward_kernel(const AttentionParams& params,
                                              int64_t shared_per_block) {
  const bool regular = is_regular(params);
  const ForwardKernel* kernel = first_kernel(params);
  while (!takes(*kernel, params, regular, shared_per_block)) ++kernel;
  return *kernel;
}

ForwardPlan attention_forward_plan(const ForwardKernel& kernel, const AttentionParams& params,
                                   const DeviceLimits& limits) {
  // Scored by the cycle model (benchmarks/gpu_model.py), not measured: copying a key tile pays off
  // the more queries use it (half_reuse queries per block reach half of the limit); more resident
  // blocks hide more prologue, epilogue and barrier latency; a ring of two slots is worth less than
  // one of three, and one slot, which alternates copies and computation, much less.
  constexpr double kShortRing = 0.95, kNoRing = 0.5;
  const double half_reuse = kernel.width <= 64 ? 24 : 40;
  constexpr double kCover[] = {0.62, 0.8, 0.94};  // one, two, three blocks per SM; more: 1
  const AttentionShape shape = planned_shape(params.shape, params.sequences);
  const int64_t units = units_of(kernel, shape), tiles = tiles_of(kernel, shape);

  ForwardPlan best;
  double best_value = -1;
  const auto consider = [&](int warps, int slots) {
    const ForwardPlan plan = plan_with(kernel, params, limits, warps, slots);
    if (plan.warps == 0) return;
    const double resident = double(plan.blocks_per_processor) * warps;
    const double busy = double(units) / double(ceil_div(units, warps) * warps);
    const double queries = double(warps) * kernel.unit;
    double value = resident / kernel.warps * busy * queries / (queries + half_reuse);
    if (plan.blocks_per_processor <= 3) value *= kCover[plan.blocks_per_processor - 1];
    if (tiles > slots) value *= slots == 1 ? kNoRing : slots == 2 ? kShortRing : 1;
    if (value < best_value) return;
    best = plan;
    best_value = value;
  };
  for (int warps = 1; warps <= kernel.warps; ++warps) {
    for (int slots = 1; slots <= 3; ++slots) consider(warps, slots);
  }
  return best;
}

const char* attention_forward(const AttentionParams& params, void* stream) {
  const AttentionShape& s = params.shape;
  constexpr int64_t kLongest = kLargest - 4096;  // room to round up to whole blocks and tiles
  if (s.queries > kLongest || s.keys > kLongest) return "more than 2^31 queries or keys";
  const DeviceLimits limits = {device_shared_limit(), device_shared_per_processor()};
  if (limits.shared_per_block <= 0 || limits.shared_per_processor <= 0) return kNoLimits;
  const char* problem = nullptr;
  if (is_regular_or_windowed(params) && hopper_forward(params, stream, problem)) return problem;
  const ForwardKernel* kernel = &attention_forward_kernel(params, limits.shared_per_block);
  ForwardPlan plan;
  if (!take_tuned(params, limits, kernel, plan))
    plan = attention_forward_plan(*kernel, params, limits);
  plan.scale = std::fabs(float(params.scale));
  plan.factor = plan.scale * kLog2e;
  if (params.scale < 0) plan.sign = kernel->element_bytes == 2 ? 0x80008000u : 0x80000000u;
  plan.window = Window(params.window);
  if (plan.blocks == 0) return nullptr;
  if (plan.blocks > kLargest) return "more than 2^31 blocks of queries";
  plan_next_launch(plan.warps * kernel->unit, kernel->keys, plan.blocks_per_processor);
  return error_sentence(launch(kernel->function, dim3(unsigned(plan.blocks)),
                               dim3(unsigned(plan.warps * kWarpThreads)), plan.shared_bytes,
                               static_cast<cudaStream_t>(stream), params, plan));
}

}  // namespace pmf::cuda
