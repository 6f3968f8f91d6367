// Gradients of the patch embedding on CUDA. The contract is in pmf/patch_embed.h, the mathematics
// in csrc/ops/patch_embed.cpp.
//
// Products on tensor cores (patch_gemm.cuh), with value and tangent in the same launches:
//   dh = Y W_up                      dW_up = sum of Y' hidden over runs of rows, then over the runs
//   dimages = dh W_down, scattered   dW_down = sum of dh' patches, likewise, from the pixels
// and sums over rows (row_sums.cuh) for the biases and the position.
//
// Bytes: Y three times (dh, dW_up, position), hidden and dh three times, the images once, and the
// gradient of each weight in fp32 once per run. Bound: the tensor cores; twice the forward's FLOPs.
#include "cuda/patch_embed/patch_views.cuh"
#include "cuda/rows/row_sums.cuh"
#include "pmf/patch_embed.h"

namespace pmf::cuda {
namespace {

// ---- sums over rows ----------------------------------------------------------------------------

constexpr int kSumThreads = 256, kSumAlong = 64;

// Sums each run of the rows of [rows, width] to an fp32 vector.
template <class Access>
__global__ void __launch_bounds__(kSumThreads)
    sum_rows_kernel(const typename Access::Element* in, float* vectors,
                    const __grid_constant__ RowSums sums, int64_t rows, int64_t width) {
  using Sums = ColumnSums<Access, 1, 1>;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * blockDim.x * Access::kWidth;
  const int64_t column = tile + threadIdx.x * Access::kWidth, first = blockIdx.y * sums.run_rows;
  const int64_t end = first + sums.run_rows < rows ? first + sums.run_rows : rows;
  Sums total;
#pragma unroll 4
  for (int64_t row = first + threadIdx.y; row < end; row += blockDim.y) {
    const auto slot = Access::load(in + row * width, column, width);
#pragma unroll
    for (int k = 0; k < Access::kWidth; ++k) total.sum[0][0][k] += slot[k];
  }
  total.finish(tile, width, reinterpret_cast<float*>(dynamic_shared()),
               [&](int, int64_t at, float sum) { vectors[blockIdx.y * sums.pitch + at] = sum; });
}

template <class Access>
cudaError_t launch_sum_rows(const void* in, void* vectors, const RowSums& sums, int64_t rows,
                            int64_t width, cudaStream_t stream) {
  using T = typename Access::Element;
  const dim3 block(kSumAlong, kSumThreads / kSumAlong);
  const int64_t columns = kSumAlong * Access::kWidth;
  const dim3 grid(static_cast<unsigned>((width + columns - 1) / columns),
                  static_cast<unsigned>(sums.runs));
  return launch(sum_rows_kernel<Access>, grid, block, ColumnSums<Access, 1, 1>::shared_bytes(block),
                stream, static_cast<const T*>(in), static_cast<float*>(vectors), sums, rows, width);
}

template <typename T>
cudaError_t sum_rows(const void* in, void* vectors, const RowSums& sums, int64_t rows,
                     int64_t width, cudaStream_t stream) {
  const bool aligned =
      width % Whole<T>::kWidth == 0 && reinterpret_cast<uintptr_t>(in) % kVectorBytes == 0;
  return aligned ? launch_sum_rows<Whole<T>>(in, vectors, sums, rows, width, stream)
                 : launch_sum_rows<Pairs<T>>(in, vectors, sums, rows, width, stream);
}

// The layout of `count` contiguous vectors of `width`.
RowSums vectors_of(int64_t count, int64_t width) {
  RowSums sums(0, 0);
  sums.runs = count;
  sums.pitch = width;
  return sums;
}

// ---- one call ----------------------------------------------------------------------------------

// One call. `pairs_` lists the gradients that exist: of the value (0), the tangent (1), or both.
template <typename T>
class Backward {
 public:
  Backward(const PatchEmbedBackwardParams& params, cudaStream_t stream)
      : p_(params), s_(params.sizes), views_(s_), stream_(stream) {
    const PatchWorkspace parts(p_);
    char* at = static_cast<char*>(p_.workspace);
    for (void*& hidden : hidden_) hidden = at, at += parts.hidden;
    weights_ = at, at += parts.weights;
    position_ = at, at += parts.position;
    sums_ = at;
    for (int pair = 0; pair < 2; ++pair) {
      if (p_.grad[pair] != nullptr) pairs_[count_++] = pair;
    }
  }

  cudaError_t run() {
    cudaError_t status = hidden_gradient();
    if (status == cudaSuccess) status = weight_gradients();
    if (status == cudaSuccess) status = image_gradients();
    if (status == cudaSuccess && p_.grad[0] != nullptr) status = shift_gradients();
    return status;
  }

 private:
  // dh = Y W_up
  cudaError_t hidden_gradient() {
    PatchProduct product;
    const GridView weight = views_.plain(p_.weight_up, s_.wide, s_.narrow);
    for (int i = 0; i < count_; ++i) {
      set_result(product, i, views_.tokens(p_.grad[pairs_[i]], pairs_[i]), weight,
                 views_.hidden(hidden_[pairs_[i]], pairs_[i]));
    }
    return launch_product<T, true, false>(product, stream_);
  }

  // dW_up = sum Y' hidden, dW_down = sum dh' patches
  cudaError_t weight_gradients() {
    PatchProduct up, down;
    for (int i = 0; i < count_; ++i) {
      const int pair = pairs_[i];
      up.left[i] = views_.tokens(p_.grad[pair], pair);
      up.right[i] = views_.hidden(p_.hidden[pair], pair);
      down.left[i] = views_.hidden(hidden_[pair], pair);
      down.right[i] = views_.patches(p_.images[pair], pair);
    }
    const cudaError_t status = sum_products(up, s_.wide, s_.narrow, p_.grad_weight_up);
    if (status != cudaSuccess) return status;
    return sum_products(down, s_.narrow, s_.features(), p_.grad_weight_down);
  }

  // out [height, width] = the sum of left' right over pairs and rows.
  cudaError_t sum_products(PatchProduct& product, int64_t height, int64_t width, void* out) {
    const PatchRuns runs(s_.batch * s_.tokens(), height, width);
    const GridView partial =
        grid_view(weights_, plain_digits(height, width), plain_digits(width, 1), kChunk<T>, true);
    const GridView left = product.left[0], right = product.right[0];
    set_result(product, 0, left, right, partial);
    product.runs[0] = runs.runs;
    product.runs[1] = count_ == 2 ? runs.runs : 0;
    product.run_depth = runs.depth;
    product.run_stride = height * width;
    const cudaError_t status = launch_product<T, false, false>(product, stream_);
    if (status != cudaSuccess) return status;
    return add_runs<T>(vectors_of(count_ * runs.runs, height * width), 1, height * width, weights_,
                       out, nullptr, stream_);
  }

  // dimages = dh W_down, each patch scattered to its pixels
  cudaError_t image_gradients() {
    if (p_.grad_images[pairs_[0]].data == nullptr) return cudaSuccess;
    PatchProduct product;
    const GridView weight = views_.plain(p_.weight_down, s_.narrow, s_.features());
    for (int i = 0; i < count_; ++i) {
      set_result(product, i, views_.hidden(hidden_[pairs_[i]], pairs_[i]), weight,
                 views_.patches(p_.grad_images[pairs_[i]], pairs_[i]));
    }
    return launch_product<T, true, false>(product, stream_);
  }

  // The biases and the position contribute only to the value.
  cudaError_t shift_gradients() {
    const int64_t N = s_.tokens(), D = s_.wide, R = s_.narrow, all = (s_.prefix + N) * D;
    RowSums whole = vectors_of(1, all);
    whole.run_rows = s_.batch;
    cudaError_t status = sum_rows<T>(p_.grad[0], position_, whole, s_.batch, all, stream_);
    if (status != cudaSuccess) return status;
    status = add_runs<T>(whole, 1, all, position_, p_.grad_position, nullptr, stream_);
    if (status != cudaSuccess) return status;
    status =
        bias_gradient<float>(static_cast<float*>(position_) + s_.prefix * D, N, D, p_.grad_bias_up);
    if (status != cudaSuccess) return status;
    return bias_gradient<T>(hidden_[0], s_.batch * N, R, p_.grad_bias_down);
  }

  template <typename In>
  cudaError_t bias_gradient(const void* rows, int64_t count, int64_t width, void* out) {
    const RowSums sums = RowSums::on_gpu(1, count, width);
    const cudaError_t status = sum_rows<In>(rows, sums_, sums, count, width, stream_);
    if (status != cudaSuccess) return status;
    return add_runs<T>(sums, 1, width, sums_, out, nullptr, stream_);
  }

  const PatchEmbedBackwardParams& p_;
  const PatchSizes& s_;
  Views<T> views_;
  cudaStream_t stream_;
  void *hidden_[2], *weights_, *position_, *sums_;
  int pairs_[2] = {0, 0}, count_ = 0;
};

}  // namespace

const char* patch_embed_backward(const PatchEmbedBackwardParams& p, void* stream) {
  return with_type(p.sizes.dtype, [&](auto type) {
    return Backward<typename decltype(type)::type>(p, static_cast<cudaStream_t>(stream)).run();
  });
}

}  // namespace pmf::cuda
