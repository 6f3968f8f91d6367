// The input of Newton-Schulz: X = 2^-e G in the operands' dtype, transposed if tall and padded with
// zeros, and 1 / |X|_F, by which the first products are scaled. In a Muon step, G is computed here:
//
//   m <- m + (1 - mu) (g - m),   G = of_momentum m + of_gradient g
//
// Two launches process all matrices of a chunk. `measure` updates the momentum and writes X, as
// well as the largest magnitude and the sum of squares of every strip of G; `norm` adds up the
// strips of each matrix. So that one pass suffices, `measure` takes e from a sample of the source.
// Where X then leaves the range of float16, which is rare, `norm` writes it again, with the
// exponent of max |G|.
//
// Tiling: a block processes a strip of X, 64 rows of 512 columns, tile by tile. A 64 x 64 tile is
// read in memory order and, if the matrix is tall, transposed in shared memory. Sums are computed
// from there, in an order that depends only on X, so G and its transpose give the same bits.
//
// Scaling: multiplying by 2^-e is exact, and so are the squares of fp32 numbers in fp64, which
// neither overflow nor underflow: the sums need no scaling, and G and 2^k G give the same bits. A
// zero matrix has the norm 1; with NaN or infinity the norm is NaN, and so is the result.
//
// Bytes per element, with fp32 gradients: 12 plus one operand element. Each element takes one FMA
// and one conversion to fp64, so memory is the bound (the 174 M elements of B/16: 0.8 ms at 3.0
// TB/s, an estimate).
#pragma once

#include "cuda/common/ptx.cuh"
#include "cuda/common/shared.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/newton_schulz/newton_schulz_plan.h"
#include "cuda/optimizer/optimizer_step.cuh"

namespace pmf::cuda::ns {

constexpr int kSquare = 64;     // rows and columns of a tile
constexpr int kStripTiles = 8;  // tiles per strip
constexpr int kStripColumns = kSquare * kStripTiles;
constexpr int kPrologueThreads = 256;
constexpr int kPrologueWarps = kPrologueThreads / kWarpThreads;
constexpr int kTurnStride = kSquare + 1;  // words: neither rows nor columns have bank conflicts
constexpr int kTileBytes = kSquare * kTurnStride * 4;
constexpr int kPrologueShared = kTileBytes + kPrologueWarps * 16;

struct PrologueMatrix {
  const void* source;
  float* momentum;   // null: the source is G
  int64_t x_offset;  // in elements, from `operands`
  int rows, columns;
  int first_block;
};

// The parameter of both kernels, so it lies in the constant bank.
struct Prologue {
  PrologueMatrix matrices[kMaxMatrices];
  int count;
  float mu_weight;           // 1 - mu
  void* operands;            // X of the first matrix
  struct Partial* partials;  // one per strip
  Norms norms;
  const float* coefficients;  // optimizer_step.cuh; null without Muon
};

struct Partial {
  double squares;
  unsigned largest;  // bits of max |G|, which compare like floats, NaN as the largest
  int exponent;      // with which X was written
};

inline int strips(int64_t rows, int64_t columns) {
  const int64_t m = std::min(rows, columns), n = std::max(rows, columns);
  return static_cast<int>(round_up(m, kSquare) / kSquare *
                          (round_up(n, kStripColumns) / kStripColumns));
}

// This block's matrix, by bisection.
__device__ inline int matrix_of_block(const Prologue& p) {
  int low = 0, high = p.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.matrices[middle].first_block <= static_cast<int>(blockIdx.x) ? low : high) = middle;
  }
  return low;
}

// Computes G from momentum and gradient.
struct Update {
  float of_momentum = 0, of_gradient = 1;

  __device__ explicit Update(const Prologue& p) {
    if (p.coefficients == nullptr) return;
    of_momentum = p.coefficients[kOfMomentum];
    of_gradient = p.coefficients[kOfGradient];
  }
  __device__ float operator()(float momentum, float gradient) const {
    return fmaf(of_gradient, gradient, of_momentum * momentum);
  }
};

// Loads the tile of X at (top, left), unscaled, to shared memory, with zeros outside the matrix. If
// kMeasure, also updates the momentum; otherwise it has been updated already.
template <class T, bool kMeasure>
__device__ inline void load_tile(float* tile, const Prologue& p, const PrologueMatrix& matrix,
                                 const Update& update, int top, int left) {
  const bool tall = matrix.rows > matrix.columns;
  const int lane = threadIdx.x % kSquare, first = threadIdx.x / kSquare;
  const int column = (tall ? top : left) + lane, first_row = (tall ? left : top) + first;
  constexpr int kRowStep = kPrologueThreads / kSquare, kRows = kSquare / kRowStep;
  float gradient[kRows], momentum[kRows];
#pragma unroll
  for (int q = 0; q < kRows; ++q) {
    const int row = first_row + q * kRowStep;
    const bool valid = row < matrix.rows && column < matrix.columns;
    const int64_t at = static_cast<int64_t>(row) * matrix.columns + column;
    gradient[q] = valid ? to_float(static_cast<const T*>(matrix.source)[at]) : 0;
    momentum[q] = valid && matrix.momentum != nullptr ? matrix.momentum[at] : 0;
  }
#pragma unroll
  for (int q = 0; q < kRows; ++q) {
    const int row = first_row + q * kRowStep;
    const bool valid = row < matrix.rows && column < matrix.columns;
    float value = gradient[q];
    if (matrix.momentum != nullptr) {
      if constexpr (kMeasure) {
        momentum[q] = fmaf(p.mu_weight, gradient[q] - momentum[q], momentum[q]);
        const int64_t at = static_cast<int64_t>(row) * matrix.columns + column;
        if (valid) matrix.momentum[at] = momentum[q];
      }
      value = update(momentum[q], gradient[q]);
    }
    const int along = first + q * kRowStep;
    tile[tall ? lane * kTurnStride + along : along * kTurnStride + lane] = value;
  }
}

// Sum and maximum over the block, in a fixed order; all threads get the result.
__device__ inline Partial reduce(Partial mine, unsigned char* shared) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    mine.squares += shuffle_xor(mine.squares, distance);
    mine.largest = max(mine.largest, shuffle_xor(mine.largest, distance));
  }
  auto* squares = reinterpret_cast<double*>(shared);
  auto* largest = reinterpret_cast<unsigned*>(squares + kPrologueWarps);
  if (threadIdx.x % kWarpThreads == 0) {
    squares[threadIdx.x / kWarpThreads] = mine.squares;
    largest[threadIdx.x / kWarpThreads] = mine.largest;
  }
  __syncthreads();
  Partial all{0, 0, mine.exponent};
#pragma unroll
  for (int warp = 0; warp < kPrologueWarps; ++warp) {
    all.squares += squares[warp];
    all.largest = max(all.largest, largest[warp]);
  }
  return all;
}

// This block's strip of its matrix.
struct Strip {
  int top, left, padded_n;

  __device__ Strip(const PrologueMatrix& matrix) {
    const int n = max(matrix.rows, matrix.columns);
    padded_n = (n + kPad - 1) / kPad * kPad;
    const int across = (n + kStripColumns - 1) / kStripColumns;
    const int strip = static_cast<int>(blockIdx.x) - matrix.first_block;
    top = strip / across * kSquare;
    left = strip % across * kStripColumns;
  }
  __device__ int end() const { return min(left + kStripColumns, padded_n); }
};

// ---- the exponent -------------------------------------------------------------------------------

__device__ inline unsigned magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }
constexpr unsigned kInfinite = 0x7f800000u;  // the magnitude of infinity; NaNs have larger ones

// The exponent of the sample's largest element in X, and the first that X must not have. float16
// reaches 2^16, and gradients are often several times as large as G.
constexpr int kSampled = 4, kTooLarge = 15;
constexpr int kUnknown = 1 << 10;  // e of a sample of zeros: X becomes too small

// e for a sample of the source: elements of 16 rows and 16 columns, evenly spaced. It is the same
// in all strips of a matrix, and for its transpose.
template <class T>
__device__ inline int sampled_exponent(const PrologueMatrix& matrix, unsigned char* shared) {
  constexpr int kSide = 16;
  static_assert(kSide * kSide == kPrologueThreads, "an element per thread");
  const int64_t m = min(matrix.rows, matrix.columns), n = max(matrix.rows, matrix.columns);
  const int64_t i = threadIdx.x / kSide * m / kSide, j = threadIdx.x % kSide * n / kSide;
  const int64_t at = matrix.rows > matrix.columns ? j * m + i : i * n + j;
  const float value = to_float(static_cast<const T*>(matrix.source)[at]);
  const unsigned largest = reduce({0, magnitude(value), 0}, shared).largest;
  return largest == 0 || largest >= kInfinite ? kUnknown
                                              : ilogbf(__uint_as_float(largest)) - kSampled;
}

// |X|_F^2
__device__ inline double square_of_norm(const Partial& all, int exponent) {
  return ldexp(all.squares, -2 * exponent);
}

// Whether X is in float16's range: its numbers are at least as large as those of G / |G|_F. Zeros,
// and what is not finite, need no range.
__device__ inline bool is_in_range(const Partial& all) {
  if (all.largest == 0 || all.largest >= kInfinite) return true;
  return square_of_norm(all, all.exponent) >= 1 &&
         ilogbf(__uint_as_float(all.largest)) - all.exponent < kTooLarge;
}

// 2^-e as two exact factors, because it may overflow as a single float.
struct Scale {
  float first, second;

  __device__ explicit Scale(int exponent)
      : first(ldexpf(1, -exponent / 2)), second(ldexpf(1, -exponent - -exponent / 2)) {}
  __device__ float operator()(float value) const { return value * first * second; }
};

// ---- the kernels --------------------------------------------------------------------------------

// Stores a tile in X; also(value) is called for every element that this thread stores.
template <class Products, class Also>
__device__ inline void write_tile(const float* tile, const Prologue& p,
                                  const PrologueMatrix& matrix, const Strip& strip, int left,
                                  const Scale& scale, const Also& also) {
  using Element = typename Products::Element;
  constexpr int kWidth = kVectorBytes / sizeof(Element), kAcross = kSquare / kWidth;
  Element* const x = static_cast<Element*>(p.operands) + matrix.x_offset;
  for (int v = threadIdx.x; v < kSquare * kAcross; v += kPrologueThreads) {
    const int row = v / kAcross, column = v % kAcross * kWidth;
    Vector<Element, kWidth> out;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float value = tile[row * kTurnStride + column + k];
      also(value);
      out.element[k] = Products::round(scale(value));
    }
    store_vector(x + static_cast<int64_t>(strip.top + row) * strip.padded_n + left + column, out);
  }
}

template <class T, class Products>
__global__ void __launch_bounds__(kPrologueThreads)
    measure_kernel(const __grid_constant__ Prologue p) {
  float* const tile = reinterpret_cast<float*>(dynamic_shared());
  unsigned char* const sums = dynamic_shared() + kTileBytes;
  const PrologueMatrix& matrix = p.matrices[matrix_of_block(p)];
  const Strip strip(matrix);
  const Update update(p);
  Partial mine{0, 0, sampled_exponent<T>(matrix, sums)};
  const Scale scale(mine.exponent);
  for (int left = strip.left; left < strip.end(); left += kSquare) {
    load_tile<T, true>(tile, p, matrix, update, strip.top, left);
    __syncthreads();
    write_tile<Products>(tile, p, matrix, strip, left, scale, [&](float value) {
      mine.squares = fma(static_cast<double>(value), static_cast<double>(value), mine.squares);
      mine.largest = max(mine.largest, magnitude(value));
    });
    __syncthreads();
  }
  const Partial all = reduce(mine, sums);
  if (threadIdx.x == 0) p.partials[blockIdx.x] = all;
}

// Every block of a matrix adds up all of its strips; the first one writes the norm.
template <class T, class Products>
__global__ void __launch_bounds__(kPrologueThreads)
    norm_kernel(const __grid_constant__ Prologue p) {
  float* const tile = reinterpret_cast<float*>(dynamic_shared());
  const int index = matrix_of_block(p);
  const PrologueMatrix& matrix = p.matrices[index];
  const Strip strip(matrix);
  const int across = (strip.padded_n + kStripColumns - 1) / kStripColumns;
  const int down = (min(matrix.rows, matrix.columns) + kSquare - 1) / kSquare;
  const Partial* const partials = p.partials + matrix.first_block;
  Partial mine{0, 0, partials[0].exponent};
  for (int s = threadIdx.x; s < across * down; s += kPrologueThreads) {
    mine.squares += partials[s].squares;
    mine.largest = max(mine.largest, partials[s].largest);
  }
  const Partial all = reduce(mine, dynamic_shared() + kTileBytes);
  const bool done = is_in_range(all);
  const int exponent = done ? all.exponent : ilogbf(__uint_as_float(all.largest));
  if (static_cast<int>(blockIdx.x) == matrix.first_block && threadIdx.x == 0) {
    float square = static_cast<float>(square_of_norm(all, exponent));
    if (all.largest == 0) square = 1;
    if (all.largest >= kInfinite) square = __uint_as_float(all.largest) * 0;
    p.norms.inverse[index] = 1 / sqrtf(square);
    p.norms.inverse_square[index] = 1 / square;
  }
  if (done) return;
  const Update update(p);
  const Scale scale(exponent);
  for (int left = strip.left; left < strip.end(); left += kSquare) {
    load_tile<T, false>(tile, p, matrix, update, strip.top, left);
    __syncthreads();
    write_tile<Products>(tile, p, matrix, strip, left, scale, [](float) {});
    __syncthreads();
  }
}

}  // namespace pmf::cuda::ns
