// Per-head RMSNorm and rotary embedding on CUDA: values, tangents and gradients. The mathematics is
// in pmf/rotary_qk_norm.h; norm.cuh has the norm of a row (one head of one token).
//
// Tiling: 4 or 8 threads process a row of 64 or 80 16-bit elements, so a warp processes 8 or 4 rows
// in memory order, heads within tokens or tokens within heads. Queries and keys share one launch,
// selected by blockIdx.y. cos and sin [P, D/2] are read from cache.
//
// Bytes, in units of query plus key: forward 2, with tangents 4; backward 3, through both outputs
// 6. Copy bandwidth is the bound: 2 x [256, 12, 276, 64] in bf16 would take 0.15 ms at 3.0 TB/s,
// 0.29 ms with tangents (estimates; not measured). Sums are in fp32; each result is rounded once.
#include "pmf/rotary_qk_norm.h"

#include "cuda/rows/norm.cuh"

namespace pmf::cuda {
namespace {

// ---- the rotation ------------------------------------------------------------------------------

struct Rotation {
  const float *cos, *sin;  // [P, D/2]
  int64_t first;           // first token that is rotated
  int64_t pairs;           // D/2
  bool tokens_inside;      // rows are [B, heads, N], else [B, N, heads]

  struct Turn {
    const float *cos, *sin;  // for one token; null: no rotation

    template <int kWidth>
    __device__ void turn(float (&v)[kWidth], int64_t column, int64_t width, float sign) const {
      if (cos == nullptr || column >= width) return;
      const auto c = load_vector<float, kWidth / 2>(cos + column / 2);
      const auto s = load_vector<float, kWidth / 2>(sin + column / 2);
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) {
        const float a = v[2 * i], b = v[2 * i + 1], sine = sign * s[i];
        v[2 * i] = fmaf(-b, sine, a * c[i]);
        v[2 * i + 1] = fmaf(a, sine, b * c[i]);
      }
    }
    template <int kWidth>
    __device__ void forward(float (&v)[kWidth], int64_t column, int64_t width) const {
      turn(v, column, width, 1.0f);
    }
    template <int kWidth>
    __device__ void backward(float (&v)[kWidth], int64_t column, int64_t width) const {
      turn(v, column, width, -1.0f);
    }
  };
  __device__ Turn at(const RowIndex& row) const {
    const int64_t token = (tokens_inside ? row.at[2] : row.at[1]) - first;
    if (token < 0) return {nullptr, nullptr};
    return {cos + token * pairs, sin + token * pairs};
  }
};

// ---- heads as rows -----------------------------------------------------------------------------

bool tokens_inside(const ConstView4& x) { return x.stride[2] <= x.stride[1]; }

RowShape shape_of(const RotaryShape& s, int64_t heads, bool tokens_inside) {
  RowShape shape;
  shape.leading = 3;
  shape.size[0] = s.batch;
  shape.size[1] = tokens_inside ? heads : s.tokens;
  shape.size[2] = tokens_inside ? s.tokens : heads;
  shape.width = s.width;
  return shape;
}

// Converts ConstView4 to ConstRows, and View4 to Rows.
template <class To, class From>
To rows_of(const From& view, bool tokens_inside) {
  To rows;
  rows.data = view.data;
  rows.stride[0] = view.stride[0];
  rows.stride[1] = view.stride[tokens_inside ? 1 : 2];
  rows.stride[2] = view.stride[tokens_inside ? 2 : 1];
  return rows;
}

Rotation rotation_of(const RotaryShape& s, bool tokens_inside) {
  return {static_cast<const float*>(s.cos), static_cast<const float*>(s.sin), s.tokens - s.rotated,
          s.width / 2, tokens_inside};
}

ConstRows vector(const void* data) {
  ConstRows rows;
  rows.data = data;
  return rows;
}

// A call as the kernels see it: query and key are two rms_norm calls, each with a rotation.
template <class Params>
struct Sides {
  Params norm[2];
  Rotation rotation[2];
  int64_t rows[2];
  RowSums sums[2];  // backward only
};

Sides<RmsNormParams> sides_of(const RotaryQkNormParams& p) {
  Sides<RmsNormParams> result{{}, {}, {}, {RowSums(0, 0), RowSums(0, 0)}};
  for (int i = 0; i < 2; ++i) {
    const RotaryHeads& side = p.sides[i];
    const bool inside = tokens_inside(side.x);
    RmsNormParams& n = result.norm[i];
    n.dtype = p.shape.dtype;
    n.shape = shape_of(p.shape, side.heads, inside);
    n.eps = p.shape.eps;
    n.x = rows_of<ConstRows>(side.x, inside);
    n.x_t = rows_of<ConstRows>(side.x_t, inside);
    n.weight = side.weight;
    n.weight_t = side.weight_t;
    n.y = rows_of<Rows>(side.y, inside);
    n.y_t = rows_of<Rows>(side.y_t, inside);
    result.rotation[i] = rotation_of(p.shape, inside);
    result.rows[i] = n.shape.rows();
  }
  return result;
}

Sides<RmsNormBackwardParams> sides_of(const RotaryQkNormBackwardParams& p) {
  Sides<RmsNormBackwardParams> result{{}, {}, {}, {RowSums(0, 0), RowSums(0, 0)}};
  char* workspace = static_cast<char*>(p.workspace);
  for (int i = 0; i < 2; ++i) {
    const RotaryHeadsBackward& side = p.sides[i];
    const bool inside = tokens_inside(side.x);
    RmsNormBackwardParams& n = result.norm[i];
    n.dtype = p.shape.dtype;
    n.shape = shape_of(p.shape, side.heads, inside);
    n.eps = p.shape.eps;
    n.grad = rows_of<ConstRows>(side.grad, inside);
    n.grad_t = rows_of<ConstRows>(side.grad_t, inside);
    n.x = rows_of<ConstRows>(side.x, inside);
    n.x_t = rows_of<ConstRows>(side.x_t, inside);
    n.weight = side.weight;
    n.weight_t = side.weight_t;
    n.grad_x = rows_of<Rows>(side.grad_x, inside);
    n.grad_x_t = rows_of<Rows>(side.grad_x_t, inside);
    n.grad_weight = side.grad_weight;
    n.grad_weight_t = side.grad_weight_t;
    n.workspace = workspace;
    workspace += rms_norm_workspace_bytes(n, true);
    result.rotation[i] = rotation_of(p.shape, inside);
    result.rows[i] = n.shape.rows();
    result.sums[i] = RowSums::on_gpu(1, result.rows[i], p.shape.width);
  }
  return result;
}

bool is_aligned(const RmsNormParams& p, int64_t width) {
  return rows_aligned(p.shape, width,
                      {p.x, p.x_t, vector(p.weight), vector(p.weight_t), p.y, p.y_t});
}

bool is_aligned(const RmsNormBackwardParams& p, int64_t width) {
  return rows_aligned(
      p.shape, width,
      {p.grad, p.grad_t, p.x, p.x_t, vector(p.weight), vector(p.weight_t), p.grad_x, p.grad_x_t});
}

template <class Params>
bool is_aligned(const Sides<Params>& sides, int64_t width) {
  const Rotation& r = sides.rotation[0];
  return is_aligned(sides.norm[0], width) && is_aligned(sides.norm[1], width) &&
         reinterpret_cast<uintptr_t>(r.cos) % kVectorBytes == 0 &&
         reinterpret_cast<uintptr_t>(r.sin) % kVectorBytes == 0;
}

// ---- kernels -----------------------------------------------------------------------------------

template <class Access, bool kTangent>
__global__ void __launch_bounds__(kMaxTeam)
    forward_kernel(const __grid_constant__ Sides<RmsNormParams> p) {
  const int side = blockIdx.y;
  norm_rows<Access, kTangent>(p.norm[side], p.rotation[side], p.rows[side],
                              reinterpret_cast<float*>(dynamic_shared()));
}

template <class Access, bool kTangent>
__global__ void __launch_bounds__(kMaxTeam)
    backward_kernel(const __grid_constant__ Sides<RmsNormBackwardParams> p) {
  const int side = blockIdx.y;
  if (blockIdx.x >= p.sums[side].runs) return;
  norm_rows_backward<Access, kTangent>(p.norm[side], p.rotation[side], p.sums[side], blockIdx.x,
                                       p.rows[side], reinterpret_cast<float*>(dynamic_shared()));
}

template <class Access, bool kTangent>
cudaError_t forward(const Sides<RmsNormParams>& p, cudaStream_t stream) {
  const dim3 block = team_block(p.norm[0].shape.width, kForwardVectors * Access::kWidth);
  const int64_t rows = p.rows[0] > p.rows[1] ? p.rows[0] : p.rows[1];
  const int64_t blocks = (rows + block.y - 1) / block.y;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), 2);
  return launch(forward_kernel<Access, kTangent>, grid, block, TeamSums::kSharedBytes, stream, p);
}

template <class Access, bool kTangent>
cudaError_t backward(const Sides<RmsNormBackwardParams>& p, cudaStream_t stream) {
  const int64_t width = p.norm[0].shape.width;
  const dim3 block = team_block(width, kBackwardVectors * Access::kWidth);
  const int64_t runs = p.sums[0].runs > p.sums[1].runs ? p.sums[0].runs : p.sums[1].runs;
  cudaError_t status =
      launch(backward_kernel<Access, kTangent>, dim3(static_cast<unsigned>(runs), 2), block,
             norm_shared_bytes<WeightSums<Access, kTangent>>(block), stream, p);
  for (int i = 0; i < 2 && status == cudaSuccess; ++i) {
    const RmsNormBackwardParams& n = p.norm[i];
    status = add_runs<typename Access::Element>(p.sums[i], 1, width, n.workspace, n.grad_weight,
                                                kTangent ? n.grad_weight_t : nullptr, stream);
  }
  return status;
}

}  // namespace

const char* rotary_qk_norm(const RotaryQkNormParams& params, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Sides<RmsNormParams> p = sides_of(params);
  return with_type(params.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = is_aligned(p, Whole<T>::kWidth);
    if (params.sides[0].x_t.data == nullptr) {
      return aligned ? forward<Whole<T>, false>(p, queue) : forward<Pairs<T>, false>(p, queue);
    }
    return aligned ? forward<Whole<T>, true>(p, queue) : forward<Pairs<T>, true>(p, queue);
  });
}

const char* rotary_qk_norm_backward(const RotaryQkNormBackwardParams& params, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  const Sides<RmsNormBackwardParams> p = sides_of(params);
  return with_type(params.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = is_aligned(p, Whole<T>::kWidth);
    if (params.sides[0].grad_t.data == nullptr) {
      return aligned ? backward<Whole<T>, false>(p, queue) : backward<Pairs<T>, false>(p, queue);
    }
    return aligned ? backward<Whole<T>, true>(p, queue) : backward<Pairs<T>, true>(p, queue);
  });
}

}  // namespace pmf::cuda
