// Launch plans of the CUDA ops, from dry runs of their launchers; without CUDA, one error sentence.
#include "pmf/introspection.h"

#if PMF_WITH_CUDA
#include "cuda/attention/attention_launchers.h"
#include "cuda/common/dry_run.h"
#include "cuda/newton_schulz/newton_schulz_launchers.h"
#include "cuda/newton_schulz/newton_schulz_plan.h"
#include "cuda/patch_embed/patch_embed_launchers.h"
#include "pmf/attention_backward.h"

namespace pmf {
namespace {

// A placeholder address that is never read, aligned as tensors are.
alignas(128) char anything[1];

template <class View>
View contiguous(int64_t d1, int64_t d2, int64_t d3) {
  View view;
  view.data = anything;
  view.stride[0] = d1 * d2 * d3, view.stride[1] = d2 * d3, view.stride[2] = d3, view.stride[3] = 1;
  return view;
}

// Runs launcher() and records its launches.
template <class Launcher>
const char* run_dry(const Device& device, NoteLaunch note, void* context,
                    const Launcher& launcher) {
  struct Ended {
    ~Ended() { cuda::dry_run = nullptr; }
  } ended;  // also if note() throws
  cuda::DryRun dry(device, note, context);
  cuda::dry_run = &dry;
  return launcher();
}

const char* dry_attention(const AttentionShape& s, DType dtype, bool tangent) {
  AttentionParams p;
  p.shape = s;
  p.dtype = dtype;
  p.query = contiguous<ConstView4>(s.heads, s.queries, s.width);
  p.key = contiguous<ConstView4>(s.key_heads, s.keys, s.width);
  p.value = contiguous<ConstView4>(s.key_heads, s.keys, s.value_width);
  p.out = contiguous<View4>(s.heads, s.queries, s.value_width);
  if (tangent) p.query_t = p.query, p.key_t = p.key, p.value_t = p.value, p.out_t = p.out;
  return cuda::attention_forward(p, nullptr);
}

const char* dry_attention_backward(const AttentionShape& s, DType dtype, bool tangent,
                                   int64_t& workspace_bytes) {
  AttentionBackwardParams p;
  p.shape = s;
  p.dtype = dtype;
  p.query = contiguous<ConstView4>(s.heads, s.queries, s.width);
  p.key = contiguous<ConstView4>(s.key_heads, s.keys, s.width);
  p.value = contiguous<ConstView4>(s.key_heads, s.keys, s.value_width);
  p.grad = contiguous<ConstView4>(s.heads, s.queries, s.value_width);
  p.grad_query = contiguous<View4>(s.heads, s.queries, s.width);
  p.grad_key = contiguous<View4>(s.key_heads, s.keys, s.width);
  p.grad_value = contiguous<View4>(s.key_heads, s.keys, s.value_width);
  if (tangent) {
    p.query_t = p.query, p.key_t = p.key, p.value_t = p.value, p.grad_t = p.grad;
    p.grad_query_t = p.grad_query, p.grad_key_t = p.grad_key, p.grad_value_t = p.grad_value;
  }
  workspace_bytes = cuda::attention_backward_workspace_bytes(p);
  return cuda::attention_backward(p, nullptr);
}

constexpr int kTileSide = 2 * cuda::ns::kPad;

// A symmetric product computes the tiles on and below the diagonal, including whole diagonal tiles.
double product_flops(const cuda::ns::Product& product) {
  double elements = double(product.m) * product.n;
  if (product.symmetric) {
    elements = 0;
    for (int end = 0; end < product.m;) {
      const int begin = end;
      end = begin + kTileSide < product.m ? begin + kTileSide : product.m;
      elements += double(end - begin) * end;
    }
  }
  return 2 * elements * product.k;
}

double newton_schulz_flops(const NewtonSchulzParams& params) {
  double flops = 0;
  for (const cuda::ns::Chunk& chunk : cuda::ns::chunks_of(params)) {
    for (const cuda::ns::Bucket& bucket : chunk.buckets) {
      for (const cuda::ns::Wave& wave :
           cuda::ns::Schedule(params, bucket, anything, sizeof(anything)).waves()) {
        for (const auto& product : wave.products) flops += bucket.count * product_flops(product);
      }
    }
  }
  return flops;
}

// Reads matrices and writes results; a Muon step also moves the parameters and the momentum.
double newton_schulz_bytes(const NewtonSchulzParams& params) {
  double bytes = 0;
  for (int64_t i = 0; i < params.count; ++i) {
    const NewtonSchulzMatrix& matrix = params.matrices[i];
    const double each = params.muon == nullptr ? 2 * dtype_bytes(params.dtype)
                                               : 3 * dtype_bytes(params.dtype) + 2 * sizeof(float);
    bytes += each * double(matrix.rows) * matrix.columns;
  }
  return bytes;
}

const char* dry_patch_embed(const PatchSizes& s) {
  PatchEmbedParams p;
  p.sizes = s;
  for (int pair = 0; pair < (s.tangents > 0 ? 2 : 1); ++pair) {
    p.images[pair] = contiguous<ConstView4>(s.channels, s.rows * s.patch, s.columns * s.patch);
    p.hidden[pair] = p.tokens[pair] = anything;
  }
  p.weight_down = p.weight_up = p.bias_down = p.bias_up = p.position = anything;
  p.prefix_position = anything;
  return cuda::patch_embed(p, nullptr);
}

const char* dry_patch_embed_backward(const PatchSizes& s, int64_t& workspace_bytes) {
  PatchEmbedBackwardParams p;
  p.sizes = s;
  for (int pair = 0; pair < (s.tangents > 0 ? 2 : 1); ++pair) {
    p.images[pair] = contiguous<ConstView4>(s.channels, s.rows * s.patch, s.columns * s.patch);
    p.grad_images[pair] = contiguous<View4>(s.channels, s.rows * s.patch, s.columns * s.patch);
    p.hidden[pair] = p.grad[pair] = anything;
  }
  p.weight_down = p.weight_up = anything;
  p.grad_weight_down = p.grad_bias_down = p.grad_weight_up = p.grad_bias_up = anything;
  p.grad_position = p.workspace = anything;
  workspace_bytes = PatchWorkspace(p).total();
  return cuda::patch_embed_backward(p, nullptr);
}

}  // namespace

CudaPlan attention_launches(const AttentionShape& shape, DType dtype, Pass pass, bool tangent,
                            const Device& device, NoteLaunch note, void* context) {
  CudaPlan plan;
  plan.cost = attention_plan(shape, dtype, pass, tangent, 1);
  plan.cost.workspace_bytes = 0;
  plan.problem = run_dry(device, note, context, [&] {
    return pass == Pass::forward
               ? dry_attention(shape, dtype, tangent)
               : dry_attention_backward(shape, dtype, tangent, plan.cost.workspace_bytes);
  });
  return plan;
}

CudaPlan newton_schulz_launches(const NewtonSchulzParams& params, const Device& device,
                                NoteLaunch note, void* context) {
  CudaPlan plan;
  plan.cost = {newton_schulz_flops(params), newton_schulz_bytes(params),
               cuda::newton_schulz_workspace_bytes(params)};
  plan.problem =
      run_dry(device, note, context, [&] { return cuda::newton_schulz(params, nullptr); });
  return plan;
}

void newton_schulz_products(const NewtonSchulzParams& params, NoteProduct note, void* context) {
  int64_t number = 0;
  for (const cuda::ns::Chunk& chunk : cuda::ns::chunks_of(params)) {
    for (const cuda::ns::Wave& wave :
         cuda::ns::waves_of(params, chunk, anything, sizeof(anything))) {
      for (const cuda::ns::Product& p : wave.products) {
        note(context,
             {number, p.m, p.n, p.k, p.matrices, p.symmetric, p.right_transposed, p.adds_left(),
              p.left == p.right, cuda::ns::takes_warpgroups(p, params.compute)});
      }
      ++number;
    }
  }
}

CudaPlan patch_embed_launches(const PatchSizes& s, Pass pass, const Device& device, NoteLaunch note,
                              void* context) {
  const bool forward = pass == Pass::forward;
  const double pairs = double(s.batch + s.tangents) * s.tokens();
  const double weights = double(s.narrow) * (s.features() + s.wide);
  const double bytes = double(dtype_bytes(s.dtype));
  CudaPlan plan;
  plan.cost.flops = 2 * pairs * weights * (forward ? 1 : 2);
  // Images, hidden, tokens, weights; the backward also writes gradients of images and weights.
  plan.cost.bytes =
      pairs * double(s.features()) * double(dtype_bytes(s.image_dtype)) * (forward ? 1 : 2) +
      (pairs * double(s.narrow + s.wide) + weights * (forward ? 1 : 2)) * bytes;
  plan.problem = run_dry(device, note, context, [&] {
    return forward ? dry_patch_embed(s) : dry_patch_embed_backward(s, plan.cost.workspace_bytes);
  });
  return plan;
}

}  // namespace pmf

#else

namespace pmf {
namespace {
constexpr CudaPlan kNone = {{}, "this build of pmf has no CUDA kernels"};
}

CudaPlan attention_launches(const AttentionShape&, DType, Pass, bool, const Device&, NoteLaunch,
                            void*) {
  return kNone;
}
CudaPlan newton_schulz_launches(const NewtonSchulzParams&, const Device&, NoteLaunch, void*) {
  return kNone;
}
void newton_schulz_products(const NewtonSchulzParams&, NoteProduct, void*) {}
CudaPlan patch_embed_launches(const PatchSizes&, Pass, const Device&, NoteLaunch, void*) {
  return kNone;
}

}  // namespace pmf

#endif
