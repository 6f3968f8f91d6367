// pmf._introspection: what the library knows about itself, as Python values. No kernel is reached
// through here and nothing here touches a tensor; pmf works without this module (portable wheels).
#include <pybind11/pybind11.h>

#include "pmf/introspection.h"

namespace py = pybind11;

namespace {

py::dict build_facts() {
  const pmf::BuildFacts facts = pmf::build_facts();
  py::dict result;
  result["version"] = facts.version;
  result["compiler"] = facts.compiler;
  result["cuda"] = facts.cuda;
  result["has_cuda"] = facts.has_cuda;
  return result;
}

}  // namespace

PYBIND11_MODULE(_introspection, module) {
  module.doc() = "Facts about the compiled library: build, CPU level, launch plans.";
  module.def("build_facts", &build_facts, "Version, compiler and CUDA architectures of the build.");
  module.def("cpu_level", &pmf::cpu_level, "The level the CPU kernels run at.");
  module.def("best_cpu_level", &pmf::best_cpu_level, "The best level this processor has.");
}
