// The library's facts about itself. Compiled once, with the baseline flags.
#include "pmf/introspection.h"

#include "cpu/dispatch.h"

namespace pmf {

BuildFacts build_facts() {
  return {PMF_VERSION, "g++ " __VERSION__, PMF_CUDA_FACTS, PMF_WITH_CUDA != 0};
}

const char* cpu_level() { return cpu::level_name(cpu::level()); }
const char* best_cpu_level() { return cpu::level_name(cpu::best_level()); }
bool set_cpu_level(const char* name) { return cpu::set_level(name); }

}  // namespace pmf
