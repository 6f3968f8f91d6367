// torch.ops.pmf.set_attention_plans: tuned launch plans for attention on a GPU.
#include "ops/torch_shim.h"
#if PMF_WITH_CUDA
#include "cuda/attention/attention_choices.h"
#endif

namespace pmf {
namespace {

void set_attention_plans([[maybe_unused]] int64_t device,
                         [[maybe_unused]] std::vector<int64_t> rows) {
#if PMF_WITH_CUDA
  constexpr int64_t kColumns = cuda::kAttentionChoiceColumns;
  const auto size = static_cast<int64_t>(rows.size());
  check_value(size % kColumns == 0, "set_attention_plans: rows must have ", kColumns,
              " numbers each, got ", size);
  cuda::set_attention_choices(static_cast<int>(device), rows.data(), size / kColumns);
#endif
}

}  // namespace
}  // namespace pmf

// No tensor argument selects a device.
STABLE_TORCH_LIBRARY_IMPL(pmf, CompositeExplicitAutograd, m) {
  m.impl("set_attention_plans", TORCH_BOX(&pmf::set_attention_plans));
}
