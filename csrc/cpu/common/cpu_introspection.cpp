// Introspection of the library. Compiled once, for the baseline instruction set.
#include "pmf/introspection.h"

#include <initializer_list>

#include "cpu/common/dispatch.h"
#include "pmf/attention_backward.h"

namespace pmf {
namespace {

// Tile products per query-key pair: those over the width of queries and keys, and those over the
// width of values. The formulas are at the top of attention.h and attention_backward.h.
struct Products {
  int width, value_width;
};

Products products(Pass pass, bool tangent) {
  if (pass == Pass::forward) return tangent ? Products{3, 3} : Products{1, 1};
  return tangent ? Products{9, 6} : Products{3, 2};
}

// Sets a placeholder address: workspace queries only test whether an operand is present.
template <class View>
void present(View& view) {
  static char anything;
  view.data = &anything;
}

int64_t forward_workspace(const AttentionShape& shape, DType dtype, bool tangent, int64_t threads) {
  AttentionParams params;
  params.shape = shape;
  params.dtype = dtype;
  for (ConstView4* view : {&params.query, &params.key, &params.value}) present(*view);
  present(params.out);
  if (tangent) {
    for (ConstView4* view : {&params.query_t, &params.key_t, &params.value_t}) present(*view);
    present(params.out_t);
  }
  return cpu::attention_forward_workspace_bytes(params, threads);
}

int64_t backward_workspace(const AttentionShape& shape, DType dtype, bool tangent,
                           int64_t threads) {
  AttentionBackwardParams params;
  params.shape = shape;
  params.dtype = dtype;
  for (ConstView4* view : {&params.query, &params.key, &params.value, &params.grad}) present(*view);
  for (View4* view : {&params.grad_query, &params.grad_key, &params.grad_value}) present(*view);
  if (tangent) {
    for (ConstView4* view : {&params.query_t, &params.key_t, &params.value_t, &params.grad_t}) {
      present(*view);
    }
    for (View4* view : {&params.grad_query_t, &params.grad_key_t, &params.grad_value_t}) {
      present(*view);
    }
  }
  return cpu::attention_backward_workspace_bytes(params, threads);
}

}  // namespace

BuildFacts build_facts() {
  return {PMF_VERSION, "g++ " __VERSION__, PMF_CUDA_FACTS, PMF_WITH_CUDA != 0};
}

const char* cpu_level() { return cpu::level_name(cpu::level()); }
const char* best_cpu_level() { return cpu::level_name(cpu::best_level()); }
bool set_cpu_level(const char* name) { return cpu::set_level(name); }

Cost attention_plan(const AttentionShape& s, DType dtype, Pass pass, bool tangent,
                    int64_t threads) {
  const Products count = products(pass, tangent);
  const double rows = double(s.batch) * s.heads * s.queries;
  const double key_rows = double(s.batch) * s.key_heads * s.keys;
  Cost plan;
  plan.flops = 2 * rows * s.keys * (count.width * s.width + count.value_width * s.value_width);
  // Forward: queries and out; keys and values. Backward: queries, grad and grad_query; keys, values
  // and their gradients. Tangents double both. The row statistic is read or written once.
  const bool forward = pass == Pass::forward;
  const double elements = rows * (forward ? s.width + s.value_width : 2 * s.width + s.value_width) +
                          key_rows * (s.width + s.value_width) * (forward ? 1 : 2);
  plan.bytes =
      elements * dtype_bytes(dtype) * (tangent ? 2 : 1) + rows * (dtype == DType::f64 ? 8 : 4);
  plan.workspace_bytes = forward ? forward_workspace(s, dtype, tangent, threads)
                                 : backward_workspace(s, dtype, tangent, threads);
  return plan;
}

}  // namespace pmf
