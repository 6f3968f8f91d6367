// Newton-Schulz orthogonalisation on the CPU: the products are PyTorch's GEMM; the savings are in
// the choice of products.
//
//   A = X X^T,  X <- a X + (b A + c A^2) X,  for X [m, n], m <= n (a tall matrix is transposed).
//
// A direct implementation spends 4 m^2 n + 2 m^3 FLOPs per step on full products. Here A and A^2,
// being symmetric, are computed by block rows up to the diagonal and mirrored: (m + block) / 2m of
// the work. The Gram form iterates on R = X X^T alone and touches X once per
// segment (restarted for accuracy, segment_steps() in the contract says when):
//   Z = b R + c R^2,  Q <- a Q + Z Q,  T = a R + Z R,  R <- a T + T Z,  at the end X <- Q X.
// All of these are polynomials of one symmetric matrix, hence symmetric: 6 m^2 n + 14 m^3 for five
// steps instead of 20 m^2 n + 10 m^3, and 17 m^3 as done here, where Q is not mirrored for
// accuracy.
//
// Threads: every product is cut into block-row tasks whose shape depends on m and n only, and each
// task is one single-threaded GEMM (PyTorch's GEMM does not nest threads). Whole matrices go to
// threads first; the last few, fewer than there are threads, are shared task by task. The bits of a
// result therefore depend neither on the number of threads nor on which other matrices are in the
// list.
//
// Bound: the GEMM rate of one core times the cores; there is no barrier inside a whole matrix.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/common/dispatch.h"
#include "ops/newton_schulz_binding.h"
#include "ops/products.h"

namespace pmf {
namespace {

// Block rows of a symmetric product, where finer ones save more and coarser ones run faster, and of
// a full product. Every task packs its right factor again, which weighs more where AMX multiplies
// eight times as fast. Measured on an Intel Xeon with two threads, two matrices of 1024 x 2730 in
// bfloat16: with AMX 103 ms by the coarse rows and 138 by the fine ones, without it 640 and 590.
struct BlockRows {
  int64_t symmetric, full;
};
constexpr BlockRows kFine = {128, 256}, kCoarse = {256, 512};

BlockRows block_rows(ScalarType dtype) {
  const bool by_amx = dtype == ScalarType::BFloat16 && cpu::level() == cpu::Level::amx_bf16;
  return by_amx ? kCoarse : kFine;
}

// Partial sums of the norm: a fixed order whatever the vector width.
constexpr int64_t kLanes = 16;

// ---- tasks -------------------------------------------------------------------

// Calls body(0 .. count - 1), in this thread or distributed; each call stays on its thread, so that
// the number of threads does not affect the bits.
template <class Body>
void for_each_task(int64_t count, bool shared, const Body& body) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  if (!shared || threads == 1) {
    const SingleThread single;
    for (int64_t task = 0; task < count; ++task) body(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const SingleThread single;
    for (int64_t task = next++; task < count; task = next++) body(task);
  });
}

// ---- products ----------------------------------------------------------------

Tensor rows_of(const Tensor& matrix, int64_t begin, int64_t count) {
  if (begin == 0 && count == matrix.size(0)) return matrix;
  Tensor view = matrix;
  return torch::stable::narrow(view, 0, begin, count);
}

Tensor columns_of(const Tensor& matrix, int64_t begin, int64_t count) {
  if (begin == 0 && count == matrix.size(1)) return matrix;
  Tensor view = matrix;
  return torch::stable::narrow(view, 1, begin, count);
}

Tensor transposed(Tensor matrix) { return torch::stable::transpose(matrix, 0, 1); }

// Rounds to the nearest bfloat16 in place, ties to even; NaN stays NaN.
void round_to_bf16(float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1);
    bits = (is_nan ? bits | 0x400000u : rounded) & 0xffff0000u;
    std::memcpy(x + i, &bits, sizeof(bits));
  }
}

// Rounds float32 to the nearest number of a 16-bit dtype in place: 16-bit storage with float32
// products, as a GPU does it, where 16 bits are multiplied in float32.
void round_to(Tensor block, ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) {  // in one pass
    float* x = static_cast<float*>(block.mutable_data_ptr());
    for (int64_t i = 0; i < block.size(0); ++i)
      round_to_bf16(x + i * block.stride(0), block.size(1));
    return;
  }
  Tensor rounded = torch::stable::new_empty(block, {block.size(0), block.size(1)}, dtype);
  torch::stable::copy_(rounded, block);
  torch::stable::copy_(block, rounded);
}

// out = beta add + alpha product for float32 matrices with contiguous rows; no `add` stands for
// zero.
void combine(const Tensor& out, const Tensor* add, const Tensor& product, double beta,
             double alpha) {
  const int64_t rows = out.size(0), columns = out.size(1);
  const auto scale = static_cast<float>(alpha), share = static_cast<float>(beta);
  for (int64_t i = 0; i < rows; ++i) {
    float* to = static_cast<float*>(out.mutable_data_ptr()) + i * out.stride(0);
    const float* from = static_cast<const float*>(product.const_data_ptr()) + i * columns;
    if (add == nullptr) {
      for (int64_t j = 0; j < columns; ++j) to[j] = scale * from[j];
    } else {
      const float* other = static_cast<const float*>(add->const_data_ptr()) + i * add->stride(0);
      for (int64_t j = 0; j < columns; ++j) to[j] = share * other[j] + scale * from[j];
    }
  }
}

// Copies what is below the diagonal of a square block above it.
template <class Element>
void mirror(const Tensor& block) {
  auto* x = static_cast<Element*>(block.mutable_data_ptr());
  const int64_t stride = block.stride(0);
  for (int64_t i = 1; i < block.size(0); ++i) {
    for (int64_t j = 0; j < i; ++j) x[j * stride + i] = x[i * stride + j];
  }
}

void mirror(const Tensor& block) {
  switch (block.element_size()) {
    case 2:
      return mirror<uint16_t>(block);
    case 4:
      return mirror<uint32_t>(block);
    default:
      return mirror<uint64_t>(block);
  }
}

struct Executor {
  bool shared;          // tasks of this matrix are shared between threads
  ScalarType rounding;  // what every stored product is rounded to

  void round(const Tensor& block) const {
    if (block.scalar_type() != rounding) round_to(block, rounding);
  }

  // out = beta add + alpha left right, all rows of the block at once.
  void multiply(Tensor out, const Tensor& add, const Tensor& left, const Tensor& right, double beta,
                double alpha) const {
    if (prefers_onednn(left, right)) {
      combine(out, beta == 0 ? nullptr : &add, onednn_product(left, right), beta, alpha);
      round(out);
      return;
    }
    const AOTITorchError status =
        beta == 0
            ? aoti_torch_cpu_mm_out(out.get(), left.get(), right.get())
            : aoti_torch_cpu_addmm_out(out.get(), add.get(), left.get(), right.get(), beta, alpha);
    if (status != 0) fail("newton_schulz: PyTorch's matrix product failed");
    round(out);
  }

  // out = beta add + left right, in block rows.
  void full(const Tensor& out, const Tensor& add, const Tensor& left, const Tensor& right,
            double beta) const {
    const int64_t m = out.size(0);
    const int64_t block = block_rows(out.scalar_type()).full;
    for_each_task((m + block - 1) / block, shared, [&](int64_t task) {
      const int64_t begin = task * block, count = std::min(block, m - begin);
      multiply(rows_of(out, begin, count), rows_of(add, begin, count), rows_of(left, begin, count),
               right, beta, 1);
    });
  }

  // out = beta add + alpha left right^T where the result is known to be symmetric: rows up to the
  // diagonal block, then mirrored to the last bit. So a symmetric `right` is its own transpose, and
  // its rows, unlike its columns, lie together.
  void symmetric(const Tensor& out, const Tensor& add, const Tensor& left, const Tensor& right,
                 double beta, double alpha) const {
    const int64_t m = out.size(0), block = block_rows(out.scalar_type()).symmetric;
    const int64_t blocks = (m + block - 1) / block;
    for_each_task(blocks, shared, [&](int64_t task) {
      const int64_t begin = (blocks - 1 - task) * block;  // the longest first
      const int64_t count = std::min(block, m - begin), width = begin + count;
      const Tensor row = columns_of(rows_of(out, begin, count), 0, width);
      multiply(row, columns_of(rows_of(add, begin, count), 0, width), rows_of(left, begin, count),
               transposed(rows_of(right, 0, width)), beta, alpha);
      mirror(columns_of(row, begin, count));
      if (begin > 0) {
        Tensor mirrored = columns_of(rows_of(out, 0, begin), begin, count);
        Tensor below = columns_of(row, 0, begin);
        torch::stable::copy_(mirrored, torch::stable::transpose(below, 0, 1));
      }
    });
  }
};

// ---- normalisation -----------------------------------------------------------

template <class Real>
struct Bits;
template <>
struct Bits<float> {
  using Integer = int32_t;
  static constexpr Integer kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
};
template <>
struct Bits<double> {
  using Integer = int64_t;
  static constexpr Integer kMagnitude = 0x7fffffffffffffff, kInfinity = 0x7ff0000000000000;
};

// x <- x 2^-e / nu, e the exponent of the largest magnitude and nu the Frobenius norm of x 2^-e.
// The power of two is exact, so that neither a huge nor a tiny matrix overflows or vanishes in its
// squares. Zero divides by 1 and stays zero; NaN and infinity have e = 0 and come out as NaN.
template <class Real>
void normalise(Real* x, int64_t count) {
  using Integer = typename Bits<Real>::Integer;
  Integer largest[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  const auto magnitude = [x](int64_t i) {  // ordered like |x|, with NaN above infinity
    Integer bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    return bits & Bits<Real>::kMagnitude;
  };
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane)
      largest[lane] = std::max(largest[lane], magnitude(i + lane));
  }
  for (int64_t i = whole; i < count; ++i) largest[0] = std::max(largest[0], magnitude(i));
  const Integer top = *std::max_element(largest, largest + kLanes);
  if (top == 0) return;

  // Two factors, because 2^-e itself is not finite for the smallest subnormals.
  int exponent = 0;
  if (top < Bits<Real>::kInfinity) {
    Real value;
    std::memcpy(&value, &top, sizeof(value));
    exponent = std::ilogb(value);
  }
  const Real first = std::ldexp(Real(1), -exponent / 2),
             second = std::ldexp(Real(1), -exponent - (-exponent / 2));

  // float32 partial sums over a stretch, float64 over stretches: always this order.
  constexpr int64_t kStretch = 64 * kLanes;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kStretch) {
    Real sums[kLanes] = {};
    const int64_t end = std::min(count, begin + kStretch),
                  whole_end = begin + (end - begin) / kLanes * kLanes;
    for (int64_t i = begin; i < whole_end; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const Real value = x[i + lane] * first * second;
        x[i + lane] = value;
        sums[lane] += value * value;
      }
    }
    for (int64_t i = whole_end; i < end; ++i) {
      x[i] = x[i] * first * second;
      sums[i - whole_end] += x[i] * x[i];
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
  }
  const Real norm = static_cast<Real>(std::sqrt(total));
  for (int64_t i = 0; i < count; ++i) x[i] /= norm;
}

template <class Element>
void add_to_diagonal(Element* x, int64_t rows, double value) {
  for (int64_t i = 0; i < rows; ++i)
    x[i * (rows + 1)] = static_cast<Element>(static_cast<double>(x[i * (rows + 1)]) + value);
}

void add_to_diagonal(const Tensor& x, double value) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return add_to_diagonal(static_cast<c10::BFloat16*>(x.mutable_data_ptr()), x.size(0), value);
    case ScalarType::Double:
      return add_to_diagonal(static_cast<double*>(x.mutable_data_ptr()), x.size(0), value);
    default:
      return add_to_diagonal(static_cast<float*>(x.mutable_data_ptr()), x.size(0), value);
  }
}

// ---- the iteration -----------------------------------------------------------

struct Settings {
  std::vector<double> coefficients;  // a, b, c of every step
  std::string method;
  ScalarType dtype;

  int64_t steps() const { return static_cast<int64_t>(coefficients.size()) / 3; }
  DType rounding() const {
    return dtype == ScalarType::Half       ? DType::f16
           : dtype == ScalarType::BFloat16 ? DType::bf16
           : dtype == ScalarType::Double   ? DType::f64
                                           : DType::f32;
  }
  ScalarType precise() const {
    return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
};

Tensor direct(Tensor x, const Settings& settings, const Executor& run) {
  const int64_t m = x.size(0), n = x.size(1);
  Tensor next = torch::stable::new_empty(x, {m, n});
  Tensor gram = torch::stable::new_empty(x, {m, m}),
         polynomial = torch::stable::new_empty(x, {m, m});
  for (int64_t step = 0; step < settings.steps(); ++step) {
    const double* k = &settings.coefficients[3 * step];
    run.symmetric(gram, gram, x, x, 0, 1);
    run.symmetric(polynomial, gram, gram, gram, k[1], k[2]);
    run.full(next, x, polynomial, x, k[0]);
    std::swap(x, next);
  }
  return x;
}

Tensor on_gram(Tensor x, const Settings& settings, const Executor& run) {
  const int64_t m = x.size(0), n = x.size(1), steps = settings.steps();
  const auto square = [&] { return torch::stable::new_empty(x, {m, m}); };
  Tensor next = torch::stable::new_empty(x, {m, n});
  Tensor gram = square(), product = square(), z = square(), q = square(), spare = square();
  for (int64_t begin = 0, end; begin < steps; begin = end) {
    end = begin +
          segment_steps(settings.coefficients.data(), steps, begin, settings.rounding(), false);
    run.symmetric(gram, gram, x, x, 0, 1);
    for (int64_t step = begin; step < end; ++step) {
      const double* k = &settings.coefficients[3 * step];
      run.symmetric(z, gram, gram, gram, k[1], k[2]);
      if (step + 1 < end) {
        run.symmetric(product, gram, z, gram, k[0], 1);
        run.symmetric(gram, product, product, z, k[0], 1);
      }
      if (step == begin) {
        std::swap(q, z);
        add_to_diagonal(q, k[0]);
        run.round(q);
      } else {
        run.full(spare, q, z, q,
                 k[0]);  // mirrored, Q would lose a factor of two on rank-deficient matrices
        std::swap(q, spare);
      }
    }
    run.full(next, x, q, x, 0);
    std::swap(x, next);
  }
  return x;
}

void orthogonalise(const Tensor& source, const Tensor& out, const Settings& settings, bool shared) {
  const Executor run{shared, settings.dtype};
  Tensor from = source, to = out;
  if (from.size(0) > from.size(1)) {
    from = torch::stable::transpose(from, 0, 1);
    to = torch::stable::transpose(to, 0, 1);
  }
  const int64_t m = from.size(0), n = from.size(1);
  Tensor x = torch::stable::new_empty(from, {m, n}, settings.precise());
  torch::stable::copy_(x, from);
  if (settings.precise() == ScalarType::Double) {
    normalise(static_cast<double*>(x.mutable_data_ptr()), m * n);
  } else {
    normalise(static_cast<float*>(x.mutable_data_ptr()), m * n);
  }
  const ScalarType storage = product_dtype(settings.dtype);
  if (storage != settings.precise()) x = torch::stable::to(x, storage);
  run.round(x);
  const bool gram = takes_gram_form(method_named(settings.method), m, n);
  torch::stable::copy_(to, gram ? on_gram(x, settings, run) : direct(x, settings, run));
}

// Steps from restart to restart; ones for the direct form.
std::vector<int64_t> newton_schulz_segments(int64_t rows, int64_t columns,
                                            std::vector<double> coefficients, std::string method,
                                            ScalarType dtype, bool allow_tf32) {
  const Settings settings{std::move(coefficients), std::move(method), dtype};
  const bool gram = takes_gram_form(method_named(settings.method), rows, columns);
  std::vector<int64_t> segments;
  for (int64_t begin = 0; begin < settings.steps(); begin += segments.back()) {
    segments.push_back(gram ? segment_steps(settings.coefficients.data(), settings.steps(), begin,
                                            settings.rounding(), allow_tf32)
                            : 1);
  }
  return segments;
}

std::vector<Tensor> newton_schulz(std::vector<Tensor> matrices, std::vector<double> coefficients,
                                  std::string method, ScalarType dtype, bool allow_tf32) {
  if (!matrices.empty() && takes_cuda_kernel(matrices[0])) {
    return newton_schulz_by_kernels(matrices, coefficients, method, dtype, allow_tf32);
  }
  const Settings settings{std::move(coefficients), std::move(method), dtype};
  std::vector<Tensor> results;
  for (const Tensor& matrix : matrices) {
    check_same_device(matrix, matrices[0], "newton_schulz", "every matrix", "the first");
    check_value(matrix.dim() == 2, "newton_schulz: every matrix must have two dimensions, got ",
                shape_of(matrix));
    results.push_back(torch::stable::new_empty(matrix, {matrix.size(0), matrix.size(1)}));
  }
  // The costly first, so that threads finish together and the shared remainder is of the small
  // ones.
  std::vector<int64_t> order;
  for (int64_t i = 0; i < static_cast<int64_t>(matrices.size()); ++i) {
    if (matrices[i].numel() > 0) order.push_back(i);
  }
  const auto cost = [&](int64_t i) {
    return static_cast<double>(matrices[i].numel()) *
           std::min(matrices[i].size(0), matrices[i].size(1));
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return cost(i) > cost(j); });
  const int64_t count = static_cast<int64_t>(order.size());
  const int64_t whole = count - count % static_cast<int64_t>(torch::stable::get_num_threads());
  for_each_task(whole, true, [&](int64_t i) {
    orthogonalise(matrices[order[i]], results[order[i]], settings, false);
  });
  for (int64_t i = whole; i < count; ++i)
    orthogonalise(matrices[order[i]], results[order[i]], settings, true);
  return results;
}

}  // namespace
}  // namespace pmf

PMF_IMPLEMENT(m) { m.impl("newton_schulz", TORCH_BOX(&pmf::newton_schulz)); }

// No tensor decides where this runs.
STABLE_TORCH_LIBRARY_IMPL(pmf, CompositeExplicitAutograd, m) {
  m.impl("newton_schulz_segments", TORCH_BOX(&pmf::newton_schulz_segments));
}
