// Per-head RMSNorm and rotary embedding on the CPU. The mathematics is in pmf/rotary_qk_norm.h, the
// norm of a row (one head of one token) in norm-inl.h.
//
// The elements that rotate together lie in pairs in registers (layout-inl.h), so that a turn is
// four multiplications for two vectors, and the tables are used as they come. Rows are walked in
// the order they lie in memory, heads inside tokens or tokens inside heads. In units of query plus
// key the forward moves 2, its tangent 2 more, the backward 3 or 6: copy bandwidth is the bound.
#include "pmf/rotary_qk_norm.h"

#include "cpu/rows/norm-inl.h"

namespace pmf::cpu::PMF_LEVEL {
namespace {

PMF_INLINE Whole halved(Whole) { return {}; }
PMF_INLINE Part halved(Part part) { return {part.n / 2}; }

// R of one token.
template <typename A>
struct Rotation {
  const A *cos, *sin;
  int64_t mask;  // of the places in cos and sin: 0 if one vector serves all

  template <typename P>
  PMF_INLINE Vec<A> at(const A* table, int64_t i, P part) const {
    return get<InOrder<A>>(table + (i / 2 & mask), halved(part));
  }
  template <typename P>
  PMF_INLINE Pairs<A> forward(Pairs<A> v, int64_t i, P part) const {
    const Vec<A> c = at(cos, i, part), s = at(sin, i, part);
    return {v.even * c - v.odd * s, v.odd * c + v.even * s};
  }
  template <typename P>
  PMF_INLINE Pairs<A> backward(Pairs<A> v, int64_t i, P part) const {
    const Vec<A> c = at(cos, i, part), s = at(sin, i, part);
    return {v.even * c + v.odd * s, v.odd * c - v.even * s};
  }
};

template <typename A>
struct Rotations {
  const A *cos, *sin;   // [P, D/2]
  int64_t half, first;  // D/2; tokens from `first` on are rotated
  A one[kLanes<A>], zero[kLanes<A>] = {};

  PMF_INLINE explicit Rotations(const RotaryShape& s)
      : cos(static_cast<const A*>(s.cos)),
        sin(static_cast<const A*>(s.sin)),
        half(s.width / 2),
        first(s.tokens - s.rotated) {
    for (A& x : one) x = 1;
  }
  PMF_INLINE Rotation<A> at(int64_t token) const {
    if (token < first) return {one, zero, 0};
    const int64_t row = (token - first) * half;
    return {cos + row, sin + row, -1};
  }
};

// The turns of a stretch of rows.
template <typename A>
struct Turns {
  const Rotations<A>& rotations;
  int64_t token, step;

  PMF_INLINE Rotation<A> operator()(int64_t k) const { return rotations.at(token + k * step); }
};

// Walks the rows of a [B, heads, N, D] view, the dimension with the smaller stride innermost.
struct HeadCursor {
  int64_t heads, tokens, b, h, n;
  bool heads_inside;

  PMF_INLINE HeadCursor(int64_t heads, int64_t tokens, const int64_t* stride, int64_t row)
      : heads(heads), tokens(tokens), heads_inside(stride[1] < stride[2]) {
    const int64_t inner = heads_inside ? heads : tokens, outer = heads_inside ? tokens : heads;
    const int64_t i = row % inner, o = row / inner % outer;
    b = row / (inner * outer);
    h = heads_inside ? i : o;
    n = heads_inside ? o : i;
  }
  // The number of rows before the inner dimension wraps, and a jump to the row where it does.
  PMF_INLINE int64_t left() const { return heads_inside ? heads - h : tokens - n; }
  PMF_INLINE void next_stretch() {
    int64_t &inner = heads_inside ? h : n, &outer = heads_inside ? n : h;
    inner = 0;
    if (++outer < (heads_inside ? tokens : heads)) return;
    outer = 0;
    ++b;
  }
  template <typename A>
  PMF_INLINE Turns<A> turns(const Rotations<A>& rotations) const {
    return {rotations, n, heads_inside ? 0 : 1};
  }
  template <typename T>
  PMF_INLINE Stretch<const T> stretch(const ConstView4& v) const {
    return {static_cast<const T*>(v.data) + offset(v.stride), inner_stride(v.stride)};
  }
  template <typename T>
  PMF_INLINE Stretch<T> stretch(const View4& v) const {
    return {static_cast<T*>(v.data) + offset(v.stride), inner_stride(v.stride)};
  }
  PMF_INLINE int64_t offset(const int64_t* stride) const {
    return b * stride[0] + h * stride[1] + n * stride[2];
  }
  PMF_INLINE int64_t inner_stride(const int64_t* stride) const {
    return stride[heads_inside ? 1 : 2];
  }
};

// The widths of heads that get code of their own, in the dtypes that networks run in.
template <typename T, typename Body>
PMF_INLINE void with_width(int64_t width, const Body& body) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16>) {
    if (width == 64) return body(Width<64>{});
  }
  body(width);
}

template <typename T, bool kTangent, typename W>
PMF_INLINE void forward_rows(const RotaryShape& s, const RotaryHeads& side, W width, bool moving,
                             int64_t begin, int64_t end) {
  using L = InPairs<T>;
  using A = Acc<T>;
  const Rotations<A> rotations(s);
  const Row<L, W> w(static_cast<const T*>(side.weight));
  const Row<L, W> tw(static_cast<const T*>(kTangent ? side.weight_t : side.weight));
  const auto stretch = [&](const HeadCursor& row, int64_t count) PMF_ALWAYS {
    const Turns<A> turns = row.turns(rotations);
    const auto x = row.stretch<T>(side.x);
    const auto y = row.stretch<T>(side.y);
    if constexpr (kTangent) {
      const auto tx = row.stretch<T>(side.x_t);
      const auto ty = row.stretch<T>(side.y_t);
      run_norm(NormJvp<L, W, Turns<A>>{width, s.eps, w, tw, moving, turns, x, tx, y, ty}, count);
    } else {
      run_norm(Norm<L, W, Turns<A>>{width, s.eps, w, turns, x, y}, count);
    }
  };
  for_stretches(HeadCursor(side.heads, s.tokens, side.x.stride, begin), begin, end, stretch);
}

template <typename T, bool kTangent>
void forward(const RotaryQkNormParams& p, const ParallelFor& parallel) {
  const RotaryShape& s = p.shape;
  const int64_t sequences = s.batch * s.tokens;
  with_width<T>(s.width, [&](auto width) {
    const auto rows = [&](int64_t begin, int64_t end) {  // of both sides, the query's first
      for (const RotaryHeads& side : p.sides) {
        const int64_t count = sequences * side.heads;
        const bool moving = kTangent && moves(static_cast<const T*>(side.weight_t), s.width);
        if (begin < count) {
          forward_rows<T, kTangent>(s, side, width, moving, begin, min64(end, count));
        }
        begin = max64(begin - count, 0);
        end -= count;
      }
    };
    const int64_t heads = p.sides[0].heads + p.sides[1].heads;
    parallel_ranges(parallel, sequences * heads, row_grain(s.width), rows);
  });
}

template <typename T, bool kTangent, typename W>
PMF_INLINE void backward_rows(const RotaryShape& s, const RotaryHeadsBackward& side, W width,
                              int64_t begin, int64_t end, Acc<T>* dw, Acc<T>* dtw) {
  using L = InPairs<T>;
  using A = Acc<T>;
  const Rotations<A> rotations(s);
  const Row<L, W> w(static_cast<const T*>(side.weight));
  const Row<L, W> tw(static_cast<const T*>(kTangent ? side.weight_t : side.weight));
  const auto stretch = [&](const HeadCursor& row, int64_t count) PMF_ALWAYS {
    const Turns<A> turns = row.turns(rotations);
    const auto grad = row.stretch<T>(side.grad), x = row.stretch<T>(side.x);
    const auto dx = row.stretch<T>(side.grad_x);
    if constexpr (kTangent) {
      const auto grad_t = row.stretch<T>(side.grad_t), tx = row.stretch<T>(side.x_t);
      const auto dtx = row.stretch<T>(side.grad_x_t);
      run_norm(NormJvpBackward<L, W, Turns<A>>{width, s.eps, w, tw, turns, grad, grad_t, x, tx, dx,
                                               dtx, dw, dtw},
               count);
    } else {
      run_norm(NormBackward<L, W, Turns<A>>{width, s.eps, w, turns, grad, x, dx, dw}, count);
    }
  };
  for_stretches(HeadCursor(side.heads, s.tokens, side.x.stride, begin), begin, end, stretch);
}

template <typename T, bool kTangent>
void backward(const RotaryQkNormBackwardParams& p, const ParallelFor& parallel) {
  const RotaryShape& s = p.shape;
  constexpr int kinds = kTangent ? 2 : 1;
  for (const RotaryHeadsBackward& side : p.sides) {
    const int64_t rows = s.batch * side.heads * s.tokens;
    const RowSums sums(rows, s.width);
    with_width<T>(s.width, [&](auto width) {
      const auto run = [&](int64_t begin, int64_t end, Acc<T>* dw) {
        backward_rows<T, kTangent>(s, side, width, begin, end, dw, dw + sums.pitch);
      };
      for_runs<Acc<T>>(sums, 1, rows, kinds, p.workspace, parallel, run);
    });
    add_runs<InPairs<T>>(sums, 1, s.width, kinds, 0, p.workspace, side.grad_weight, parallel);
    if (kTangent)
      add_runs<InPairs<T>>(sums, 1, s.width, 2, 1, p.workspace, side.grad_weight_t, parallel);
  }
}

}  // namespace

void rotary_qk_norm(const RotaryQkNormParams& params, const ParallelFor& parallel) {
  with_type(params.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.sides[0].x_t.data == nullptr ? forward<T, false>(params, parallel)
                                        : forward<T, true>(params, parallel);
  });
}

void rotary_qk_norm_backward(const RotaryQkNormBackwardParams& params,
                             const ParallelFor& parallel) {
  with_type(params.shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.sides[0].grad_t.data == nullptr ? backward<T, false>(params, parallel)
                                           : backward<T, true>(params, parallel);
  });
}

}  // namespace pmf::cpu::PMF_LEVEL

PMF_DISPATCH(params.shape.dtype, void, rotary_qk_norm,
             (const RotaryQkNormParams& params, const ParallelFor& parallel), (params, parallel))
PMF_DISPATCH(params.shape.dtype, void, rotary_qk_norm_backward,
             (const RotaryQkNormBackwardParams& params, const ParallelFor& parallel),
             (params, parallel))
