// The launch plan of Newton-Schulz, made on the host: which matrices are processed together, where
// their operands lie in the workspace, and which products each launch computes.
//
// Matrices of the same shape (short side m, long side n) form a bucket, whose operands are
// adjacent. Sides are padded with zeros to multiples of kPad, so that every row is aligned and
// every depth is a multiple of a slice; zeros stay zeros through all products. All products that
// can run together form a wave, which is one launch. For five steps:
//
//   direct, 15 waves: three per step   A = X X^T,  P = a I + b A + c A^2,  X <- P X
//   Gram, 17 waves, on the smaller R = X X^T, restarted (see segment_steps() in the contract)
//   because R squares the condition number:
//     each segment   R = X X^T;   at its end   X <- Q X
//     each step      P = a I + b R + c R^2;   Q <- P Q (Q = P in the segment's first);
//                    T = P R,  R <- T P (not in the segment's last); Q shares T's wave
//
// A, P, T and R are symmetric, so only half of their tiles are computed. Q is symmetric except for
// rounding, but mirroring it costs a factor of two in accuracy on rank-deficient matrices, and Q P
// in place of P Q a factor of three. FLOPs of five steps: direct 15 m^2 n + 5 m^3, Gram 6 m^2 n +
// 17 m^3. Buckets that need fewer waves start later, so that all buckets end in the same wave,
// whose epilogue updates the parameters.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "pmf/newton_schulz.h"

namespace pmf::cuda::ns {

constexpr int kPad = 64;           // elements
constexpr int64_t kAlign = 128;    // bytes: a line of the L2 cache
constexpr int kMaxMatrices = 512;  // per chunk; these three keep launch arguments below 32 KB
constexpr int kMaxBuckets = 32;    // per chunk
constexpr int kMaxProducts = 64;   // per wave: two for each bucket
constexpr int64_t kMaxElements = 1 << 28;  // per chunk: bounds the workspace to about 2 GB

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Of the matrices of a chunk, in its order: 1 / |X|_F of the first X, which is not normalised, and
// its square.
struct Norms {
  float *inverse = nullptr, *inverse_square = nullptr;
};

// One product for every matrix of a bucket: out = factor scale left right + addend left + identity
// I.
struct Product {
  const void* left = nullptr;   // [m, k]
  const void* right = nullptr;  // [n, k] if right_transposed, else [k, n]
  void* out = nullptr;          // [m, n]; the bucket's matrices are contiguous
  int m = 0, n = 0, k = 0;      // padded
  float factor = 1, addend = 0, identity = 0;
  const float* scale = nullptr;  // of each of the bucket's matrices; null: 1
  int rows = 0, columns = 0;     // of the matrix, without padding
  int first_matrix = 0;          // the first of the bucket, in the chunk's order
  int matrices = 0;              // in the bucket
  int first_tile = 0;            // of this product in the launch's grid
  bool symmetric = false, right_transposed = false;
#ifdef __CUDACC__
  __device__
#endif
      bool adds_left() const {
    return addend != 0 || identity != 0;
  }
#ifdef __CUDACC__
  __device__
#endif
      float factor_of(int matrix) const {
    return scale == nullptr ? factor : factor * scale[matrix];
  }
};

// Matrices of a chunk that share a shape.
struct Bucket {
  int64_t m, n;  // short and long side
  bool gram;
  int first, count;  // in the chunk's order
  int64_t padded_m() const { return round_up(m, kPad); }
  int64_t padded_n() const { return round_up(n, kPad); }
  // Square operands besides X and its successor: A, P; or R, T and three buffers among which Q, P
  // and the next Q rotate.
  int64_t squares() const { return gram ? 5 : 2; }
  int64_t elements() const {
    return count * padded_m() * (2 * padded_n() + squares() * padded_m());
  }
};

struct Chunk {
  std::vector<int64_t> order;  // indices into params.matrices, bucket by bucket
  std::vector<Bucket> buckets;
};

struct Wave {
  std::vector<Product> products;
};

inline Bucket bucket_of(const NewtonSchulzParams& params, const NewtonSchulzMatrix& matrix) {
  Bucket bucket{std::min(matrix.rows, matrix.columns), std::max(matrix.rows, matrix.columns), false,
                0, 0};
  bucket.gram = takes_gram_form(params.method, matrix.rows, matrix.columns);
  return bucket;
}

// Whether a product is one for warpgroups (hopper_products.h), given 16-bit operands and a device
// that has them: in smaller matrices, more than half of their tiles of 128 x 256 would be padding.
inline bool takes_warpgroups(const Product& product, DType compute) {
  constexpr int kLeast = 192;  // padded
  return compute != DType::f32 && product.m >= kLeast;
}

// Divides the matrices into chunks that fit the tables of the launches and a bounded workspace. The
// costliest shapes come first. The division does not affect the bits of any result.
inline std::vector<Chunk> chunks_of(const NewtonSchulzParams& params) {
  std::vector<int64_t> order(params.count);
  for (int64_t i = 0; i < params.count; ++i) order[i] = i;
  const auto shape = [&](int64_t i) {
    const Bucket bucket = bucket_of(params, params.matrices[i]);
    return std::make_pair(bucket.m, bucket.n);
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return shape(i) > shape(j); });
  std::vector<Chunk> chunks;
  int64_t elements = 0;
  for (const int64_t i : order) {
    const Bucket bucket = bucket_of(params, params.matrices[i]);
    const int64_t more = bucket.padded_m() * bucket.padded_n();
    const auto joins = [&] {
      const Bucket& last = chunks.back().buckets.back();
      return last.m == bucket.m && last.n == bucket.n;
    };
    const auto full = [&] {
      return elements + more > kMaxElements ||
             static_cast<int>(chunks.back().order.size()) == kMaxMatrices ||
             (!joins() && static_cast<int>(chunks.back().buckets.size()) == kMaxBuckets);
    };
    if (chunks.empty() || full()) {
      chunks.emplace_back();
      elements = 0;
    }
    Chunk& chunk = chunks.back();
    if (chunk.buckets.empty() || !joins()) {
      chunk.buckets.push_back(bucket);
      chunk.buckets.back().first = static_cast<int>(chunk.order.size());
    }
    ++chunk.buckets.back().count;
    chunk.order.push_back(i);
    elements += more;
  }
  return chunks;
}

// The waves of one bucket's products. `x` is the start of its operands.
class Schedule {
 public:
  Schedule(const NewtonSchulzParams& params, const Bucket& bucket, char* x, int element_bytes,
           const Norms& norms = {})
      : params_(params), bucket_(bucket) {
    const int64_t wide = bucket.count * bucket.padded_m() * bucket.padded_n() * element_bytes,
                  square = bucket.count * bucket.padded_m() * bucket.padded_m() * element_bytes;
    x_ = x;
    next_x_ = x + wide;
    for (int i = 0; i < kSquares; ++i) square_[i] = x + 2 * wide + i * square;
    if (norms.inverse == nullptr) return;
    norms_ = {norms.inverse + bucket.first, norms.inverse_square + bucket.first};
  }

  std::vector<Wave> waves() {
    bucket_.gram ? gram() : direct();
    return std::move(waves_);
  }

 private:
  static constexpr int kSquares = 5;

  void direct() {
    char *a = square_[0], *p = square_[1];
    for (int64_t step = 0; step < params_.steps; ++step) {
      self_product(a);
      next_wave();
      polynomial(step, a, p);
      next_wave();
      apply(p);
      if (step + 1 < params_.steps) next_wave();
    }
  }

  void gram() {
    char *r = square_[0], *t = square_[1], *q = square_[2], *p = square_[3], *next_q = square_[4];
    for (int64_t begin = 0, end; begin < params_.steps; begin = end) {
      end = begin + segment_steps(params_.coefficients, params_.steps, begin, params_.compute,
                                  params_.allow_tf32);
      if (begin > 0) next_wave();
      self_product(r);
      for (int64_t step = begin; step < end; ++step) {
        char* const factor = step == begin ? q : p;
        next_wave();
        polynomial(step, r, factor);
        next_wave();
        if (step + 1 < end) symmetric(factor, r, t);
        if (step > begin) {
          square_product(p, q, next_q);
          std::swap(q, next_q);
        }
        if (step + 1 < end) {
          next_wave();
          symmetric(t, factor, r);
        }
      }
      // A segment of one step adds no product after its polynomial, so its wave is still empty.
      if (!waves_.back().products.empty()) next_wave();
      apply(q);
    }
  }

  void next_wave() { waves_.emplace_back(); }

  Product& add(const void* left, const void* right, void* out, int64_t n, int64_t k) {
    if (waves_.empty()) next_wave();
    Product product;
    product.left = left;
    product.right = right;
    product.out = out;
    product.m = static_cast<int>(bucket_.padded_m());
    product.n = static_cast<int>(n);
    product.k = static_cast<int>(k);
    product.rows = static_cast<int>(bucket_.m);
    product.columns = static_cast<int>(bucket_.n);
    product.first_matrix = bucket_.first;
    product.matrices = bucket_.count;
    waves_.back().products.push_back(product);
    return waves_.back().products.back();
  }

  // out = left right, where all three are symmetric.
  Product& symmetric(const void* left, const void* right, void* out) {
    Product& product = add(left, right, out, bucket_.padded_m(), bucket_.padded_m());
    product.symmetric = product.right_transposed = true;
    return product;
  }

  void self_product(void* out) {
    Product& product = add(x_, x_, out, bucket_.padded_m(), bucket_.padded_n());
    product.symmetric = product.right_transposed = true;
    product.scale = norms_.inverse_square;
  }

  void polynomial(int64_t step, const void* gram, void* out) {
    const double* k = params_.coefficients + 3 * step;
    Product& product = symmetric(gram, gram, out);
    product.identity = static_cast<float>(k[0]);
    product.addend = static_cast<float>(k[1]);
    product.factor = static_cast<float>(k[2]);
  }

  void square_product(const void* left, const void* right, void* out) {
    add(left, right, out, bucket_.padded_m(), bucket_.padded_m());
  }

  void apply(const void* left) {
    Product& product = add(left, x_, next_x_, bucket_.padded_n(), bucket_.padded_m());
    product.scale = norms_.inverse;
    norms_ = {};
    std::swap(x_, next_x_);
  }

  const NewtonSchulzParams& params_;
  const Bucket& bucket_;
  Norms norms_;  // null once X has been replaced
  char *x_, *next_x_, *square_[kSquares];
  std::vector<Wave> waves_;
};

// The products of all buckets of a chunk, aligned to end in the same wave.
inline std::vector<Wave> waves_of(const NewtonSchulzParams& params, const Chunk& chunk, char* x,
                                  int element_bytes, const Norms& norms = {}) {
  std::vector<std::vector<Wave>> each;
  size_t longest = 0;
  for (const Bucket& bucket : chunk.buckets) {
    each.push_back(Schedule(params, bucket, x, element_bytes, norms).waves());
    longest = std::max(longest, each.back().size());
    x += bucket.elements() * element_bytes;
  }
  std::vector<Wave> together(longest);
  for (const std::vector<Wave>& waves : each) {
    for (size_t w = 0; w < waves.size(); ++w) {
      Wave& wave = together[longest - waves.size() + w];
      wave.products.insert(wave.products.end(), waves[w].products.begin(), waves[w].products.end());
    }
  }
  return together;
}

}  // namespace pmf::cuda::ns
