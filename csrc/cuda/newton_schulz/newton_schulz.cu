// Newton-Schulz for a list of matrices of mixed shapes, and the complete Muon step. The contract is
// in pmf/newton_schulz.h, the plan in newton_schulz_plan.h, the kernels in
// newton_schulz_prologue.cuh and newton_schulz_products.cuh.
//
// Launches for a chunk (the 178 matrices of pMF-B/16 are one chunk in three buckets; H/16 is five
// chunks): with Muon one for the step's coefficients, two for the prologue, and at five steps 17
// waves: 20. No launch depends on values in device memory, so a graph can capture them all. Results
// are deterministic, and a matrix gives the same bits in any list.
#include <utility>

#include "cuda/newton_schulz/hopper_products.h"
#include "cuda/newton_schulz/newton_schulz_launchers.h"
#include "cuda/newton_schulz/newton_schulz_products.cuh"
#include "cuda/newton_schulz/newton_schulz_prologue.cuh"

namespace pmf::cuda {
namespace ns {
namespace {

constexpr int64_t kCoefficientBytes = kAlign;

int element_bytes(const NewtonSchulzParams& p) { return p.compute == DType::f32 ? 4 : 2; }

// Sizes in bytes of a chunk's workspace: the strips' partial results, the norms, the operands.
struct Layout {
  int64_t partials = 0, norms = 0, operands = 0;

  Layout(const NewtonSchulzParams& p, const Chunk& chunk) {
    for (const int64_t i : chunk.order) {
      partials += strips(p.matrices[i].rows, p.matrices[i].columns);
    }
    partials = round_up(partials * sizeof(Partial), kAlign);
    norms = round_up(2 * sizeof(float) * chunk.order.size(), kAlign);
    for (const Bucket& bucket : chunk.buckets) operands += bucket.elements() * element_bytes(p);
  }
  int64_t bytes() const { return partials + norms + operands; }
};

// Launches the kernels of one chunk.
template <class Products>
class Runner {
 public:
  Runner(const NewtonSchulzParams& p, const Chunk& chunk, cudaStream_t stream)
      : p_(p), chunk_(chunk), stream_(stream) {
    const Layout layout(p, chunk);
    char* place = static_cast<char*>(p.workspace);
    const auto next = [&](int64_t bytes) { return std::exchange(place, place + bytes); };
    coefficients_ = reinterpret_cast<float*>(next(kCoefficientBytes));
    partials_ = reinterpret_cast<Partial*>(next(layout.partials));
    norms_.inverse = reinterpret_cast<float*>(next(layout.norms));
    norms_.inverse_square = norms_.inverse + chunk.order.size();
    operands_ = place;
  }

  cudaError_t run() {
    cudaError_t status = prologue();
    const std::vector<Wave> waves = waves_of(p_, chunk_, operands_, sizeof(Element), norms_);
    for (size_t w = 0; w < waves.size() && status == cudaSuccess; ++w) {
      status = products(waves[w], w + 1 == waves.size());
    }
    return status;
  }

 private:
  using Element = typename Products::Element;

  cudaError_t prologue() {
    Prologue table{};
    table.count = static_cast<int>(chunk_.order.size());
    table.operands = operands_;
    table.partials = partials_;
    table.norms = norms_;
    if (p_.muon != nullptr) {
      table.coefficients = coefficients_;
      table.mu_weight = static_cast<float>(1 - p_.muon->momentum);
    }
    int blocks = 0;
    int64_t bucket_offset = 0;
    for (const Bucket& bucket : chunk_.buckets) {
      for (int i = 0; i < bucket.count; ++i) {
        const NewtonSchulzMatrix& matrix = p_.matrices[chunk_.order[bucket.first + i]];
        PrologueMatrix& row = table.matrices[bucket.first + i];
        row.source = matrix.source;
        row.momentum = matrix.momentum;
        row.rows = static_cast<int>(matrix.rows);
        row.columns = static_cast<int>(matrix.columns);
        row.x_offset = bucket_offset + i * bucket.padded_m() * bucket.padded_n();
        row.first_block = blocks;
        blocks += strips(matrix.rows, matrix.columns);
      }
      bucket_offset += bucket.elements();
    }
    switch (p_.dtype) {
      case DType::bf16:
        return prologue<__nv_bfloat16>(table, blocks);
      case DType::f16:
        return prologue<__half>(table, blocks);
      default:
        return prologue<float>(table, blocks);
    }
  }

  template <class T>
  cudaError_t prologue(const Prologue& table, int blocks) {
    const cudaError_t status = launch(measure_kernel<T, Products>, dim3(blocks),
                                      dim3(kPrologueThreads), kPrologueShared, stream_, table);
    if (status != cudaSuccess) return status;
    return launch(norm_kernel<T, Products>, dim3(blocks), dim3(kPrologueThreads), kPrologueShared,
                  stream_, table);
  }

  // Large matrices go to the Hopper kernels, if those can run.
  cudaError_t products(const Wave& wave, bool last) {
    const TargetTable targets = last ? target_table() : TargetTable{};
    std::vector<Product> large, others;
    for (const Product& product : wave.products) {
      (takes_warpgroups(product, p_.compute) ? large : others).push_back(product);
    }
    cudaError_t status = cudaSuccess;
    const bool hopper =
        !large.empty() && (last ? hopper_updates(large, targets, p_.compute, stream_, status)
                                : hopper_products(large, p_.compute, stream_, status));
    const std::vector<Product>& rest = hopper ? others : wave.products;
    if (status != cudaSuccess || rest.empty()) return status;
    const auto [table, tiles] = wave_table(rest);
    constexpr int kThreads = kTileThreads<Products::kParts>;
    plan_next_launch(kTile, kTile, Products::kBlocks);
    return last ? launch(update_kernel<Products>, dim3(tiles), dim3(kThreads), kTileSharedBytes,
                         stream_, table, targets)
                : launch(product_kernel<Products>, dim3(tiles), dim3(kThreads), kTileSharedBytes,
                         stream_, table);
  }

  // Where the results leave the workspace to.
  TargetTable target_table() const {
    TargetTable targets{};
    targets.dtype = p_.dtype;
    targets.coefficients = p_.muon == nullptr ? nullptr : coefficients_;
    for (size_t i = 0; i < chunk_.order.size(); ++i) {
      const NewtonSchulzMatrix& matrix = p_.matrices[chunk_.order[i]];
      targets.targets[i] = {matrix.target, matrix.master, static_cast<float>(matrix.scale),
                            matrix.rows > matrix.columns};
    }
    return targets;
  }

  // The parameter of a launch, and its number of tiles.
  static std::pair<WaveTable, int> wave_table(const std::vector<Product>& products) {
    WaveTable table{};
    int tiles = 0;
    for (const Product& product : products) {
      const int down = (product.m + kTile - 1) / kTile, across = (product.n + kTile - 1) / kTile;
      table.products[table.count] = product;
      table.products[table.count++].first_tile = tiles;
      tiles += (product.symmetric ? down * (down + 1) / 2 : down * across) * product.matrices;
    }
    return {table, tiles};
  }

  const NewtonSchulzParams& p_;
  const Chunk& chunk_;
  cudaStream_t stream_;
  float* coefficients_;
  Partial* partials_;
  Norms norms_;
  char* operands_;
};

template <class Products>
cudaError_t run(const NewtonSchulzParams& p, cudaStream_t stream) {
  if (p.muon != nullptr) {
    const cudaError_t status =
        launch(step_kernel, dim3(1), dim3(1), 0, stream, *p.muon, static_cast<float*>(p.workspace));
    if (status != cudaSuccess) return status;
  }
  for (const Chunk& chunk : chunks_of(p)) {
    const cudaError_t status = Runner<Products>(p, chunk, stream).run();
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace ns

int64_t newton_schulz_workspace_bytes(const NewtonSchulzParams& params) {
  int64_t largest = 0;
  for (const auto& chunk : ns::chunks_of(params)) {
    largest = std::max(largest, ns::Layout(params, chunk).bytes());
  }
  return ns::kCoefficientBytes + largest;
}

const char* newton_schulz(const NewtonSchulzParams& params, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (params.compute) {
    case DType::f16:
      return error_sentence(ns::run<HalfProducts<__half>>(params, queue));
    case DType::bf16:
      return error_sentence(ns::run<HalfProducts<__nv_bfloat16>>(params, queue));
    case DType::f32:
      return error_sentence(params.allow_tf32 ? ns::run<Tf32Products>(params, queue)
                                              : ns::run<SplitTf32Products>(params, queue));
    case DType::f64:
      return "float64 runs on the CPU, or through pmf.reference";
  }
  return nullptr;
}

}  // namespace pmf::cuda
