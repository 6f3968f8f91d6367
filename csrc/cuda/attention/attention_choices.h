// Plans of attention that a tuning run (benchmarks/tune.py) found fastest on a card. Launchers ask
// here before their own model decides.
#pragma once

#include "pmf/attention.h"

namespace pmf::cuda {

enum class AttentionLaunch : int32_t { forward = 0, backward_queries = 1, backward_keys = 2 };

// What a plan was tuned for; batch and heads do not matter, as there are many.
struct AttentionProblem {
  AttentionLaunch launch = AttentionLaunch::forward;
  DType dtype = DType::f32;
  bool allow_tf32 = false, tangent = false;
  int64_t queries = 0, keys = 0, width = 0, value_width = 0;
};

// One of the compiled plans: the kernel's place in its table, warps of a block, slots of the ring.
struct AttentionChoice {
  int kernel = -1;  // -1: nothing was tuned, the model decides
  int warps = 0, slots = 0;
  bool tuned() const { return kernel >= 0; }
};

// Replaces a device's table: rows of kAttentionChoiceColumns numbers, a problem's and its choice's.
// Device -1 is that of dry runs.
constexpr int kAttentionChoiceColumns = 11;
void set_attention_choices(int device, const int64_t* rows, int64_t count);

// On the current device; in a dry run on device -1.
AttentionChoice attention_choice(const AttentionProblem& problem);

}  // namespace pmf::cuda
