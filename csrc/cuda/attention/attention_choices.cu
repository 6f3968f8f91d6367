// Tables of tuned plans, one per device of this process.
#include "cuda/attention/attention_choices.h"

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/common/current_device.cuh"

namespace pmf::cuda {
namespace {

// The columns of a row that set_attention_choices() receives.
enum Column {
  kLaunch,
  kDtype,
  kTf32,
  kTangent,
  kQueries,
  kKeys,
  kWidth,
  kValueWidth,  // up to here: the problem
  kKernel,
  kWarps,
  kSlots,  // from kKernel: the choice
};
static_assert(kSlots + 1 == kAttentionChoiceColumns, "a row has all columns");
constexpr int kProblemColumns = kKernel;

using Problem = std::vector<int64_t>;

std::mutex mutex;
std::map<int, std::map<Problem, AttentionChoice>> tables;

}  // namespace

void set_attention_choices(int device, const int64_t* rows, int64_t count) {
  std::map<Problem, AttentionChoice> table;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* row = rows + i * kAttentionChoiceColumns;
    AttentionChoice choice;
    choice.kernel = int(row[kKernel]), choice.warps = int(row[kWarps]);
    choice.slots = int(row[kSlots]);
    table[Problem(row, row + kProblemColumns)] = choice;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  tables[device] = std::move(table);
}

AttentionChoice attention_choice(const AttentionProblem& p) {
  const Problem problem = {int64_t(p.launch), int64_t(p.dtype), p.allow_tf32, p.tangent,
                           p.queries,         p.keys,           p.width,      p.value_width};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto table = tables.find(current_device());
  if (table == tables.end()) return {};
  const auto found = table->second.find(problem);
  return found == table->second.end() ? AttentionChoice{} : found->second;
}

}  // namespace pmf::cuda
