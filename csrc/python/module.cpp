// pmf._introspection: introspection of the library, as Python values. No kernel is reachable
// through here and nothing here touches a tensor; pmf works without this module (portable wheels).
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

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

// ---- arguments ----------------------------------------------------------------------------------

pmf::DType dtype_named(const std::string& name) {
  if (name == "float32") return pmf::DType::f32;
  if (name == "bfloat16") return pmf::DType::bf16;
  if (name == "float16") return pmf::DType::f16;
  if (name == "float64") return pmf::DType::f64;
  throw py::value_error("dtype must be float32, bfloat16, float16 or float64, got " + name);
}

pmf::DType cuda_dtype(const std::string& name) {
  if (name == "float64") throw py::value_error("float64 has no CUDA kernels: it runs in PyTorch");
  return dtype_named(name);
}

pmf::Pass pass_of(bool backward) { return backward ? pmf::Pass::backward : pmf::Pass::forward; }

pmf::AttentionShape attention_shape(int64_t batch, int64_t heads, int64_t key_heads,
                                    int64_t queries, int64_t keys, int64_t width,
                                    int64_t value_width) {
  const auto fits = [](int64_t w) { return 1 <= w && w <= pmf::kAttentionMaxWidth; };
  if (!fits(width) || !fits(value_width)) throw py::value_error("widths must be 1 to 256");
  if (key_heads < 1 || heads % key_heads != 0) {
    throw py::value_error("heads must be a multiple of key_heads, which is at least 1");
  }
  return {batch, heads, key_heads, queries, keys, width, value_width};
}

// The device arguments of every CUDA op's plan; an H100 by default.
#define PMF_DEVICE_ARGUMENTS                                                              \
  py::arg("shared_per_block") = 227 * 1024, py::arg("shared_per_processor") = 228 * 1024, \
  py::arg("processors") = 132, py::arg("compute_capability") = std::pair(9, 0)

using Capability = std::pair<int, int>;

pmf::Device device_with(int64_t shared_per_block, int64_t shared_per_processor, int processors,
                        const Capability& capability) {
  constexpr int64_t kLeastShared = 99 * 1024;  // of sm_86, the smallest for which a plan exists
  if (shared_per_block < kLeastShared || shared_per_processor < shared_per_block ||
      processors < 1) {
    throw py::value_error(
        "shared_per_block must be at least 101376 bytes, shared_per_processor no less, and "
        "processors at least 1");
  }
  return {shared_per_block, shared_per_processor, processors, capability.first, capability.second};
}

// ---- results ------------------------------------------------------------------------------------

py::dict cost_dict(const pmf::Cost& cost) {
  py::dict result;
  result["flops"] = cost.flops;
  result["bytes"] = cost.bytes;
  result["workspace_bytes"] = cost.workspace_bytes;
  return result;
}

void note_launch(void* context, const pmf::KernelLaunch& launch) {
  Dl_info place{};
  dladdr(launch.kernel, &place);
  py::dict result;
  result["kernel"] =
      static_cast<const char*>(launch.kernel) - static_cast<const char*>(place.dli_fbase);
  result["blocks"] = launch.blocks;
  result["threads"] = launch.threads;
  result["shared_bytes"] = launch.shared_bytes;
  result["tile"] = py::make_tuple(launch.tile_rows, launch.tile_columns);
  result["blocks_per_processor"] = launch.blocks_per_processor;
  static_cast<py::list*>(context)->append(result);
}

void note_product(void* context, const pmf::PlannedProduct& product) {
  py::dict result;
  result["wave"] = product.wave;
  result["m"] = product.m;
  result["n"] = product.n;
  result["k"] = product.k;
  result["matrices"] = product.matrices;
  result["symmetric"] = product.symmetric;
  result["right_transposed"] = product.right_transposed;
  result["adds_left"] = product.adds_left;
  result["squared"] = product.squared;
  result["warpgroups"] = product.warpgroups;
  static_cast<py::list*>(context)->append(result);
}

// plan(note, context): one of the functions of pmf/introspection.h.
template <class Plan>
py::dict launches(const Plan& plan) {
  py::list noted;
  const pmf::CudaPlan result = plan(note_launch, static_cast<void*>(&noted));
  if (result.problem != nullptr) throw std::runtime_error(result.problem);
  py::dict all = cost_dict(result.cost);
  all["launches"] = noted;
  return all;
}

// ---- functions ----------------------------------------------------------------------------------

py::dict attention_plan(int64_t batch, int64_t heads, int64_t key_heads, int64_t queries,
                        int64_t keys, int64_t width, int64_t value_width, const std::string& dtype,
                        bool backward, bool tangent, int64_t threads) {
  if (threads < 1) throw py::value_error("threads must be at least 1");
  const auto shape = attention_shape(batch, heads, key_heads, queries, keys, width, value_width);
  py::dict result = cost_dict(
      pmf::attention_plan(shape, dtype_named(dtype), pass_of(backward), tangent, threads));
  result["level"] = pmf::cpu_level();
  return result;
}

py::dict attention_launches(int64_t batch, int64_t heads, int64_t key_heads, int64_t queries,
                            int64_t keys, int64_t width, int64_t value_width,
                            const std::string& dtype, bool backward, bool tangent,
                            int64_t shared_per_block, int64_t shared_per_processor, int processors,
                            const Capability& capability) {
  const auto shape = attention_shape(batch, heads, key_heads, queries, keys, width, value_width);
  const pmf::Device device =
      device_with(shared_per_block, shared_per_processor, processors, capability);
  return launches([&](pmf::NoteLaunch note, void* context) {
    return pmf::attention_launches(shape, cuda_dtype(dtype), pass_of(backward), tangent, device,
                                   note, context);
  });
}

py::dict newton_schulz_launches(const std::vector<std::pair<int64_t, int64_t>>& shapes,
                                const std::string& dtype, const std::string& compute_dtype,
                                const std::string& method, int64_t steps, bool muon,
                                int64_t shared_per_block, int64_t shared_per_processor,
                                int processors, const Capability& capability) {
  pmf::NewtonSchulzParams params;
  if (method == "auto") {
    params.method = pmf::NewtonSchulzMethod::automatic;
  } else if (method == "direct" || method == "gram") {
    params.method =
        method == "gram" ? pmf::NewtonSchulzMethod::gram : pmf::NewtonSchulzMethod::direct;
  } else {
    throw py::value_error("method must be auto, direct or gram, got " + method);
  }
  if (steps < 1) throw py::value_error("steps must be at least 1");
  std::vector<pmf::NewtonSchulzMatrix> matrices(shapes.size());
  for (size_t i = 0; i < shapes.size(); ++i) {
    matrices[i].rows = shapes[i].first, matrices[i].columns = shapes[i].second;
    if (matrices[i].rows < 1 || matrices[i].columns < 1) {
      throw py::value_error("matrices must not be empty");
    }
  }
  std::vector<double> coefficients;  // the quintic's, which decide on restarts
  for (int64_t step = 0; step < steps; ++step) {
    coefficients.insert(coefficients.end(), {3.4445, -4.7750, 2.0315});
  }
  const pmf::StepParams step;
  params.dtype = cuda_dtype(dtype);
  params.compute = cuda_dtype(compute_dtype);
  params.matrices = matrices.data();
  params.count = int64_t(matrices.size());
  params.coefficients = coefficients.data();
  params.steps = steps;
  params.muon = muon ? &step : nullptr;
  const pmf::Device device =
      device_with(shared_per_block, shared_per_processor, processors, capability);
  py::dict all = launches([&](pmf::NoteLaunch note, void* context) {
    return pmf::newton_schulz_launches(params, device, note, context);
  });
  py::list products;
  pmf::newton_schulz_products(params, note_product, static_cast<void*>(&products));
  all["products"] = products;
  return all;
}

py::dict patch_embed_launches(int64_t batch, int64_t channels, int64_t height, int64_t width,
                              int64_t patch, int64_t narrow, int64_t wide, int64_t prefix,
                              int64_t tangents, const std::string& dtype,
                              const std::string& image_dtype, bool backward,
                              int64_t shared_per_block, int64_t shared_per_processor,
                              int processors, const Capability& capability) {
  if (patch < 1 || height % patch != 0 || width % patch != 0) {
    throw py::value_error("height and width must be multiples of patch");
  }
  if (backward && tangents != 0 && tangents != batch) {
    throw py::value_error("backward: tangents must be 0 or the batch");
  }
  pmf::PatchSizes sizes;
  sizes.dtype = cuda_dtype(dtype);
  sizes.image_dtype = cuda_dtype(image_dtype);
  sizes.batch = batch, sizes.tangents = tangents;
  sizes.channels = channels, sizes.rows = height / patch, sizes.columns = width / patch;
  sizes.patch = patch;
  sizes.narrow = narrow, sizes.wide = wide, sizes.prefix = prefix;
  const pmf::Device device =
      device_with(shared_per_block, shared_per_processor, processors, capability);
  return launches([&](pmf::NoteLaunch note, void* context) {
    return pmf::patch_embed_launches(sizes, pass_of(backward), device, note, context);
  });
}

}  // namespace

PYBIND11_MODULE(_introspection, module) {
  module.doc() =
      "Facts about the compiled library: build, CPU level, what calls cost and launch.\n\n"
      "The *_launches functions run a CUDA op's launcher dry, for a device of a\n"
      "`compute_capability`, of `processors` multiprocessors whose blocks may ask for\n"
      "`shared_per_block` bytes and share `shared_per_processor`. Each launch says where its "
      "kernel's host function lies in "
      "libpmf.so,\n"
      "the blocks of the grid, threads and shared memory of a block, and the tile and the blocks "
      "a\n"
      "multiprocessor that the launcher counts on (0: none).";
  module.def("build_facts", &build_facts, "Version, compiler and CUDA architectures of the build.");
  module.def("cpu_level", &pmf::cpu_level, "The level the CPU kernels run at.");
  module.def("best_cpu_level", &pmf::best_cpu_level, "The best level this processor has.");
  module.def("attention_plan", &attention_plan, py::kw_only(), py::arg("batch"), py::arg("heads"),
             py::arg("key_heads"), py::arg("queries"), py::arg("keys"), py::arg("width"),
             py::arg("value_width"), py::arg("dtype") = "float32", py::arg("backward") = false,
             py::arg("tangent") = false, py::arg("threads") = 1,
             "FLOPs, least bytes moved and scratch memory of one attention call on the CPU.");
  module.def("attention_launches", &attention_launches, py::kw_only(), py::arg("batch"),
             py::arg("heads"), py::arg("key_heads"), py::arg("queries"), py::arg("keys"),
             py::arg("width"), py::arg("value_width"), py::arg("dtype") = "bfloat16",
             py::arg("backward") = false, py::arg("tangent") = false, PMF_DEVICE_ARGUMENTS,
             "What one attention call costs and launches on a GPU.");
  module.def("newton_schulz_launches", &newton_schulz_launches, py::kw_only(), py::arg("shapes"),
             py::arg("dtype") = "float32", py::arg("compute_dtype") = "float16",
             py::arg("method") = "auto", py::arg("steps") = 5, py::arg("muon") = false,
             PMF_DEVICE_ARGUMENTS,
             "What Newton-Schulz on matrices of these (rows, columns) costs and launches on a GPU, "
             "and the products of each wave.");
  module.def("patch_embed_launches", &patch_embed_launches, py::kw_only(), py::arg("batch"),
             py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("patch"),
             py::arg("narrow"), py::arg("wide"), py::arg("prefix") = 0, py::arg("tangents") = 0,
             py::arg("dtype") = "bfloat16", py::arg("image_dtype") = "float32",
             py::arg("backward") = false, PMF_DEVICE_ARGUMENTS,
             "What one patch embedding costs and launches on a GPU.");
}
