// Patch embedding on CUDA, values and tangents. The contract is in pmf/patch_embed.h.
//
// For 16-bit types, one kernel computes both products (patch_fused.cuh) and keeps hidden in shared
// memory; in fp32, if R > 256, or if memory is not aligned, each product has its own kernel
// (patch_gemm.cuh). Both read the pixels in place, so patches are never materialised, and write the
// tokens behind the prefix. Value and tangent share the launches: the map is affine, so the tangent
// is just another batch of images, without the biases.
//
// Bytes: images, tokens and hidden once each (hidden twice with two kernels), the weights from L2.
// [256, 3, 256, 256] in bf16 with p = 16, R = 256, D = 768: 235 MB, 0.08 ms at 3.0 TB/s, and 52
// GFLOP, 0.06 ms at 800 TFLOP/s (estimates; not measured). fp32 takes three TF32 products each.
#include "pmf/patch_embed.h"

#include "cuda/patch_embed/patch_fused.cuh"
#include "cuda/patch_embed/patch_views.cuh"
#include "cuda/rows/rows.cuh"

namespace pmf::cuda {
namespace {

// ---- the prefix --------------------------------------------------------------------------------

struct Prefix {
  ConstRows prefix, position;  // null: zeros
  Rows tokens;

  template <class Access>
  __device__ void run(const SlotIo<Access>& io) const {
    typename Access::Slot given{}, added{};
    if (prefix.data != nullptr) given = io.load(prefix);
    if (position.data != nullptr) added = io.load(position);
    float y[Access::kWidth];
#pragma unroll
    for (int k = 0; k < Access::kWidth; ++k) y[k] = given[k] + added[k];
    io.store(tokens, y);
  }
};

template <typename T>
cudaError_t write_prefix(const PatchEmbedParams& p, int pair, cudaStream_t stream) {
  const PatchSizes& s = p.sizes;
  RowShape shape;
  shape.leading = 2;
  shape.size[0] = pair == 0 ? s.batch : s.tangents;
  shape.size[1] = s.prefix;
  shape.width = s.wide;
  if (shape.rows() * s.wide == 0) return cudaSuccess;
  Prefix work;
  work.prefix.data = p.prefix[pair];
  work.prefix.stride[0] = s.prefix * s.wide;
  work.position.data = pair == 0 ? p.prefix_position : nullptr;
  work.tokens.data = p.tokens[pair];
  work.tokens.stride[0] = (s.prefix + s.tokens()) * s.wide;
  work.prefix.stride[1] = work.position.stride[1] = work.tokens.stride[1] = s.wide;
  return for_slots<T>(work, shape, {work.prefix, work.position, work.tokens}, stream);
}

// ---- the two products --------------------------------------------------------------------------

// hidden = patches W_down' + b_down
template <typename T>
PatchProduct down_product(const PatchEmbedParams& p) {
  const Views<T> views(p.sizes);
  PatchProduct product;
  product.add[0][0] = views.repeated(p.bias_down, p.sizes.narrow);
  const GridView weight = views.plain(p.weight_down, p.sizes.narrow, p.sizes.features());
  for (int pair = 0; pair < views.pairs(); ++pair) {
    set_result(product, pair, views.patches(p.images[pair], pair), weight,
               views.hidden(p.hidden[pair], pair));
  }
  return product;
}

// tokens = hidden W_up' + b_up + position
template <typename T>
PatchProduct up_product(const PatchEmbedParams& p) {
  const Views<T> views(p.sizes);
  PatchProduct product;
  product.add[0][0] = views.repeated(p.bias_up, p.sizes.wide);
  product.add[0][1] = views.positions(p.position);
  const GridView weight = views.plain(p.weight_up, p.sizes.wide, p.sizes.narrow);
  for (int pair = 0; pair < views.pairs(); ++pair) {
    set_result(product, pair, views.hidden(p.hidden[pair], pair), weight,
               views.tokens(p.tokens[pair], pair));
  }
  return product;
}

// ---- both in one kernel -------------------------------------------------------------------------

// Whether the fused kernel supports a call; the separate kernels support every call.
template <typename T>
bool fits_fused(const PatchFused& p) {
  bool fits = sizeof(T) == 2 && p.weight_up.column.count <= kFusedColumns &&
              device_shared_limit() >= kFusedSharedBytes;
  for (const GridView* view : {&p.weight_down, &p.weight_up, &p.hidden[0], &p.hidden[1],
                               &p.tokens[0], &p.tokens[1], &p.bias_up, &p.position}) {
    fits = fits && (view->data == nullptr || view->words);
  }
  return fits;
}

template <typename T>
PatchFused fused(const PatchProduct& down, const PatchProduct& up) {
  PatchFused p;
  for (int pair = 0; pair < 2; ++pair) {
    p.patches[pair] = down.left[pair];
    p.hidden[pair] = down.out[pair];
    p.tokens[pair] = up.out[pair];
    p.tiles[pair] = down.tiles[pair];
  }
  p.weight_down = down.right[0];
  p.weight_up = up.right[0];
  p.bias_down = down.add[0][0];
  p.bias_up = up.add[0][0];
  p.position = up.add[0][1];
  return p;
}

template <typename T>
cudaError_t both_products(const PatchEmbedParams& p, cudaStream_t stream) {
  const PatchProduct down = down_product<T>(p), up = up_product<T>(p);
  if constexpr (sizeof(T) == 2) {
    const PatchFused both = fused<T>(down, up);
    const int64_t tiles = both.tiles[0] + both.tiles[1];
    if (tiles > 0 && p.sizes.narrow * p.sizes.wide > 0 && fits_fused<T>(both)) {
      plan_next_launch(kTile, kFusedColumns, kFusedBlocks);
      return launch(patch_fused_kernel<T>, dim3(static_cast<unsigned>(tiles)), dim3(kFusedThreads),
                    kFusedSharedBytes, stream, both);
    }
  }
  const cudaError_t status = launch_product<T, true, true>(down, stream);
  return status != cudaSuccess ? status : launch_product<T, true, true>(up, stream);
}

}  // namespace

const char* patch_embed(const PatchEmbedParams& p, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (device_shared_limit() <= 0) return kNoLimits;  // they decide which kernel runs
  return with_type(p.sizes.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    cudaError_t status = both_products<T>(p, queue);
    for (int pair = 0; pair < 2 && status == cudaSuccess; ++pair) {
      status = write_prefix<T>(p, pair, queue);
    }
    return status;
  });
}

}  // namespace pmf::cuda
