// tokens = W_up (W_down patches + b_down) + b_up + position, after given prefix tokens. CUDA only:
// on the CPU, csrc/ops/patch_embed.cpp, which has the gradients' equations, calls PyTorch's GEMM.
//
//   hidden [B N, R] = patches [B N, K] W_down' + b_down           K = C p p, N patches per image
//   tokens [B, P + N, D]: hidden W_up' + b_up + position after the P tokens of the prefix
// The tangent uses the same products without the biases.
//
// Bytes: images, tokens and hidden once each, forward; backward: the images once, the tokens'
// gradient three times, hidden and its gradient three times.
#pragma once

#include "pmf/rows.h"

namespace pmf {

struct PatchSizes {
  DType dtype = DType::f32;                                // of all but images
  DType image_dtype = DType::f32;                          // dtype, or f32
  int64_t batch = 0, tangents = 0;                         // B; samples with a tangent
  int64_t channels = 0, rows = 0, columns = 0, patch = 0;  // C; patches of an image; p
  int64_t narrow = 0, wide = 0, prefix = 0;                // R, D, P

  int64_t tokens() const { return rows * columns; }
  int64_t features() const { return channels * patch * patch; }
};

// The value and its tangent, or their gradients; null data in the second: none.
struct PatchEmbedParams {
  PatchSizes sizes;
  ConstView4 images[2];                   // [B, C, H, W], [n, C, H, W]
  const void* weight_down = nullptr;      // [R, K]
  const void* bias_down = nullptr;        // [R] or null
  const void* weight_up = nullptr;        // [D, R]
  const void* bias_up = nullptr;          // [D] or null
  const void* position = nullptr;         // [N, D] or null
  const void* prefix[2] = {};             // [B, P, D], [n, P, D], or null: zeros
  const void* prefix_position = nullptr;  // [P, D] or null
  void* hidden[2] = {};                   // [B, N, R], [n, N, R]
  void* tokens[2] = {};                   // [B, P + N, D], [n, P + N, D]
};

struct PatchEmbedBackwardParams {
  PatchSizes sizes;  // tangents: 0 or B
  ConstView4 images[2];
  const void* weight_down = nullptr;
  const void* weight_up = nullptr;
  const void* hidden[2] = {};
  const void* grad[2] = {};          // [B, P + N, D]; the first null: zero
  View4 grad_images[2];              // in image_dtype; null: not wanted
  void* grad_weight_down = nullptr;  // [R, K]
  void* grad_bias_down = nullptr;    // [R]
  void* grad_weight_up = nullptr;    // [D, R]
  void* grad_bias_up = nullptr;      // [D]
  void* grad_position = nullptr;     // [P + N, D]
  void* workspace = nullptr;         // patch_embed_workspace_bytes() bytes, 64-aligned
};

// The weights' gradients sum over the rows of all images: each run of rows is summed separately,
// then the runs, in order. `tiles`: of the gradient, one per block.
struct PatchRuns {
  int64_t runs, depth;

  static constexpr int64_t kTile = 128, kBlocks = 512, kMinDepth = 256, kDepthStep = 32;

  PatchRuns(int64_t rows, int64_t height, int64_t width) {
    const int64_t tiles = ((height + kTile - 1) / kTile) * ((width + kTile - 1) / kTile);
    depth = (rows * tiles + kBlocks - 1) / kBlocks;
    if (depth < kMinDepth) depth = kMinDepth;
    depth = (depth + kDepthStep - 1) / kDepthStep * kDepthStep;
    runs = (rows + depth - 1) / depth;
  }
};

// The consecutive parts of the backward's workspace.
struct PatchWorkspace {
  int64_t hidden = 0;    // gradient of hidden, [B, N, R] of each pair
  int64_t weights = 0;   // runs of one weight's gradient, fp32
  int64_t position = 0;  // gradient of all positions, [P + N, D] fp32
  int64_t sums = 0;      // runs of a bias's gradient, fp32
  int64_t total() const { return 2 * hidden + weights + position + sums; }

  explicit PatchWorkspace(const PatchEmbedBackwardParams& p) {
    const PatchSizes& s = p.sizes;
    const int64_t rows = s.batch * s.tokens(), R = s.narrow, D = s.wide, K = s.features();
    const int64_t pairs = s.tangents > 0 ? 2 : 1;
    const auto bytes = [](int64_t count, int64_t each) { return (count * each + 63) / 64 * 64; };
    const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
    hidden = bytes(rows * R, dtype_bytes(s.dtype));
    weights = larger(bytes(pairs * PatchRuns(rows, D, R).runs * D * R, 4),
                     bytes(pairs * PatchRuns(rows, R, K).runs * R * K, 4));
    position = bytes((s.prefix + s.tokens()) * D, 4);
    const RowSums down = RowSums::on_gpu(1, rows, R), up = RowSums::on_gpu(1, s.tokens(), D);
    sums = larger(bytes(down.runs * down.pitch, 4), bytes(up.runs * up.pitch, 4));
  }
};

}  // namespace pmf
