// Attention plans that a tuning run (benchmarks/tune.py) found fastest on a device. The launchers
// look here first and fall back to their own cost model.
#pragma once

#include "pmf/attention.h"

namespace pmf::cuda {

enum class AttentionLaunch : int32_t { forward = 0, backward_queries = 1, backward_keys = 2 };

// The key of the tuning table. Batch size and head count are left out: there are many of both.
struct AttentionProblem {
  AttentionLaunch launch = AttentionLaunch::forward;
  DType dtype = DType::f32;
  bool allow_tf32 = false, tangent = false;
  int64_t queries = 0, keys = 0, width = 0, value_width = 0;
};

// A compiled kernel and its launch parameters: index in its table, warps per block, ring slots.
struct AttentionChoice {
  int kernel = -1;  // -1: not tuned, the cost model decides
  int warps = 0, slots = 0;
  bool tuned() const { return kernel >= 0; }
};

// Replaces a device's table. Each row has kAttentionChoiceColumns numbers: a problem and its
// choice. Device -1 holds the table for dry runs.
constexpr int kAttentionChoiceColumns = 11;
void set_attention_choices(int device, const int64_t* rows, int64_t count);

// Looks up the current device; in a dry run, device -1.
AttentionChoice attention_choice(const AttentionProblem& problem);

}  // namespace pmf::cuda
