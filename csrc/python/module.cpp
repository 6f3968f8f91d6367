// pmf._introspection: what the library knows about itself, as Python values. No kernel is reached
// through here and nothing here touches a tensor; pmf works without this module (portable wheels).
#include <pybind11/pybind11.h>

#include <string>

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

pmf::DType dtype_named(const std::string& name) {
  if (name == "float32") return pmf::DType::f32;
  if (name == "bfloat16") return pmf::DType::bf16;
  if (name == "float16") return pmf::DType::f16;
  if (name == "float64") return pmf::DType::f64;
  throw py::value_error(
      "attention_plan: dtype must be float32, bfloat16, float16 or float64, got " + name);
}

py::dict attention_plan(int64_t batch, int64_t heads, int64_t key_heads, int64_t queries,
                        int64_t keys, int64_t width, int64_t value_width, const std::string& dtype,
                        bool backward, bool tangent, int64_t threads) {
  pmf::AttentionShape shape;
  shape.batch = batch, shape.heads = heads, shape.key_heads = key_heads;
  shape.queries = queries, shape.keys = keys;
  shape.width = width, shape.value_width = value_width;
  if (width < 1 || width > pmf::kAttentionMaxWidth || value_width < 1 ||
      value_width > pmf::kAttentionMaxWidth || threads < 1) {
    throw py::value_error("attention_plan: widths must be 1 to 256 and threads at least 1");
  }
  const auto pass = backward ? pmf::AttentionPass::backward : pmf::AttentionPass::forward;
  const pmf::AttentionPlan plan =
      pmf::attention_plan(shape, dtype_named(dtype), pass, tangent, threads);
  py::dict result;
  result["level"] = pmf::cpu_level();
  result["flops"] = plan.flops;
  result["bytes"] = plan.bytes;
  result["workspace_bytes"] = plan.workspace_bytes;
  return result;
}

}  // namespace

PYBIND11_MODULE(_introspection, module) {
  module.doc() = "Facts about the compiled library: build, CPU level, launch plans.";
  module.def("build_facts", &build_facts, "Version, compiler and CUDA architectures of the build.");
  module.def("cpu_level", &pmf::cpu_level, "The level the CPU kernels run at.");
  module.def("best_cpu_level", &pmf::best_cpu_level, "The best level this processor has.");
  module.def("attention_plan", &attention_plan, py::kw_only(), py::arg("batch"), py::arg("heads"),
             py::arg("key_heads"), py::arg("queries"), py::arg("keys"), py::arg("width"),
             py::arg("value_width"), py::arg("dtype") = "float32", py::arg("backward") = false,
             py::arg("tangent") = false, py::arg("threads") = 1,
             "FLOPs, least bytes moved and scratch memory of one attention call on the CPU.");
}
