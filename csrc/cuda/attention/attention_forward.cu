// Attention's forward on the host: which kernel, how it is cut, and its launch. The kernels and
// their mathematics: attention_forward.cuh.
#include <algorithm>

#include "cuda/attention/attention_forward_plan.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/launchers.h"

namespace pmf::cuda {
namespace {

constexpr int64_t kSharedOverhead = 1024;  // of a block, on top of what it asks for
constexpr int kSchedulers = 4;             // of a multiprocessor
constexpr int kEnoughWarps = 8;            // on a multiprocessor, to cover each other's waiting
constexpr double kAlone = 0.93;            // a block has no other to cover its first copies
constexpr int64_t kLargest = 2147483647;

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// How well a plan keeps a multiprocessor busy, 1 at best: what a search over plans compares.
double utilisation(const ForwardPlan& plan, int64_t units) {
  const double resident = double(plan.blocks_per_processor) * plan.warps;
  const double hiding = std::min(1.0, resident / kEnoughWarps);
  if (plan.blocks_per_processor == 1) {
    // The schedulers' shares of the last units count.
    const int64_t rest = units % plan.warps;
    const int64_t steps =
        units / plan.warps * ceil_div(plan.warps, kSchedulers) + ceil_div(rest, kSchedulers);
    return kAlone * hiding * double(units) / double(kSchedulers * steps);
  }
  // What idle warps leave, the other blocks use at least in part.
  const double busy = double(units) / double(ceil_div(units, plan.warps) * plan.warps);
  return hiding * (1 + busy) / 2;
}

}  // namespace

const ForwardKernel& attention_forward_kernel(const AttentionParams& params) {
  const ForwardTable table = params.dtype == DType::bf16  ? attention_forward_bf16()
                             : params.dtype == DType::f16 ? attention_forward_f16()
                             : params.allow_tf32          ? attention_forward_tf32()
                                                          : attention_forward_f32();
  const ForwardKernel* kernel = params.out_t.data != nullptr ? table.tangent : table.plain;
  while (kernel->width < params.shape.width) ++kernel;
  return *kernel;
}

ForwardPlan attention_forward_plan(const ForwardKernel& kernel, const AttentionShape& shape,
                                   const DeviceLimits& limits) {
  // A tile of keys is worth its copy the more queries it meets (a block of kHalfReuse queries is
  // worth half of an endless one); a ring of two tiles less than one of three, and one that copies
  // and computes in turns little. Judged, not measured.
  constexpr double kHalfReuse = 16, kShortRing = 0.98, kNoRing = 0.5;
  const int64_t units = std::max<int64_t>(1, ceil_div(shape.queries, kernel.unit));
  const int64_t tiles = std::max<int64_t>(1, ceil_div(shape.keys, kernel.keys));
  const int64_t parts = ceil_div(shape.value_width, kernel.out);
  const int64_t heads = shape.batch * shape.heads * parts;
  const int64_t row = int64_t(kernel.element_bytes) * kernel.sides;
  const int64_t slot_bytes = row * kernel.keys * (kernel.width + kernel.out);
  const int64_t unit_bytes = kernel.shared_queries ? row * kernel.unit * kernel.width : 0;

  ForwardPlan best;
  double best_value = -1;
  const auto consider = [&](int warps, int64_t slots, bool whole_head) {
    const int64_t bytes = kForwardParamsBytes + slots * slot_bytes + warps * unit_bytes;
    if (bytes > limits.shared_per_block) return;
    ForwardPlan plan;
    plan.warps = warps;
    plan.slots = int(slots);
    plan.passes = whole_head ? int(ceil_div(units, warps)) : 1;
    plan.shared_bytes = int(bytes);
    plan.blocks_per_processor =
        int(std::max<int64_t>(1, std::min(limits.shared_per_processor / (bytes + kSharedOverhead),
                                          int64_t(kernel.warps / warps))));
    plan.row_blocks = int(ceil_div(units, int64_t(warps) * plan.passes));
    plan.blocks = shape.queries == 0 ? 0 : heads * plan.row_blocks;
    const double queries = double(std::min(units, int64_t(warps) * plan.passes) * kernel.unit);
    double value = utilisation(plan, units) * queries / (queries + kHalfReuse);
    if (tiles > slots) value *= slots == 1 ? kNoRing : slots == 2 ? kShortRing : 1;
    if (value < best_value) return;
    best = plan;
    best_value = value;
  };
  for (int warps = 1; warps <= kernel.warps && (warps == 1 || warps <= units); ++warps) {
    for (int64_t slots = 1; slots <= 3 && slots <= tiles; ++slots) consider(warps, slots, false);
    // One block a head leaves multiprocessors idle where heads are few.
    if (heads >= limits.processors) consider(warps, tiles, true);
  }
  return best;
}

const char* attention_forward(const AttentionParams& params, void* stream) {
  const AttentionShape& s = params.shape;
  constexpr int64_t kLongest = kLargest - 4096;  // a block's rows and a tile's keys may reach past
  if (s.queries > kLongest || s.keys > kLongest) return "more than 2^31 queries or keys";
  const ForwardKernel& kernel = attention_forward_kernel(params);
  const DeviceLimits limits = {device_shared_limit(), device_shared_per_processor(),
                               device_processors()};
  const ForwardPlan plan = attention_forward_plan(kernel, s, limits);
  if (plan.blocks == 0) return nullptr;
  if (plan.blocks > kLargest) return "more than 2^31 blocks of queries";
  plan_next_launch(plan.warps * kernel.unit, kernel.keys, plan.blocks_per_processor);
  return error_sentence(launch(kernel.function, dim3(unsigned(plan.blocks)),
                               dim3(unsigned(plan.warps * kWarpThreads)), plan.shared_bytes,
                               static_cast<cudaStream_t>(stream), params, plan));
}

}  // namespace pmf::cuda
