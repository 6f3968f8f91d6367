// The read-out on the CPU. The mathematics is in pmf/patch_velocity.h.
//
// One row of patches at a time: its tokens and its rows of the image fit in the L1 cache
// together, so that reordering costs no second pass over memory. A token holds the channels of a
// pixel side by side, an image holds them apart; for grey and colour images and patches of whole
// vectors, shuffles take them apart in registers. Rounded once, at the store. Copy bandwidth is the
// bound.
#include "pmf/patch_velocity.h"

#include "cpu/rows/rows-inl.h"

namespace pmf::cpu::PMF_LEVEL {
namespace {

template <typename A>
PMF_INLINE A clip(A t, A floor) {
  return t < floor ? floor : t > 1 ? A(1) : t;
}

// body(sample, row of patches) for all of them.
template <typename Body>
PMF_INLINE void for_patch_rows(const PatchShape& s, const ParallelFor& parallel, const Body& body) {
  const int64_t elements = s.columns * s.token();
  parallel_ranges(parallel, s.batch * s.rows, row_grain(elements), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i / s.rows, i % s.rows);
  });
}

// The channels of kLanes<Acc<T>> neighbouring pixels. Channel c of pixel j is element j C + c in a
// token; vectors are joined from, and split into, the C vectors of a token's elements one after
// another.
template <typename T, int C>
struct Pixels {
  static constexpr int kCount = kLanes<Acc<T>>;
  using V = Vec<Acc<T>>;
  V channel[C];

  template <int c, int k>  // the lanes of channel c that lie in the k-th vector of the token
  struct Apart {
    static constexpr int lane(int j) {
      const int from = j * C + c - k * kCount;
      return from < 0 || from >= kCount ? j : (k == 0 ? from : kCount + from);
    }
  };
  template <int k, int c>  // the lanes of the token's k-th vector that hold channel c
  struct Together {
    static constexpr int lane(int j) {
      const int at = k * kCount + j;
      return at % C == c ? (c == 0 ? at / C : kCount + at / C) : j;
    }
  };
  template <int c, int k = 0>
  PMF_INLINE V taken_apart(const V* token, V so_far) const {
    if constexpr (k == C) {
      return so_far;
    } else {
      return taken_apart<c, k + 1>(token,
                                   shuffle<Apart<c, k>>(k == 0 ? token[0] : so_far, token[k]));
    }
  }
  template <int k, int c = 0>
  PMF_INLINE V put_together(V so_far) const {
    if constexpr (c == C) {
      return so_far;
    } else {
      return put_together<k, c + 1>(
          shuffle<Together<k, c>>(c == 0 ? channel[0] : so_far, channel[c]));
    }
  }
  template <int c = 0>
  PMF_INLINE void from_vectors(const V* token) {
    if constexpr (c < C) {
      channel[c] = taken_apart<c>(token, token[0]);
      from_vectors<c + 1>(token);
    }
  }
  template <int k = 0>
  PMF_INLINE void to_vectors(T* token) const {
    if constexpr (k < C) {
      store_float(token + k * kCount, put_together<k>(channel[0]));
      to_vectors<k + 1>(token);
    }
  }

  // `apart`: the distance of the channels of an image.
  template <typename I>
  PMF_INLINE void from_image(const I* image, int64_t apart) {
    PMF_UNROLL for (int c = 0; c < C; ++c) channel[c] = load_float(image + c * apart);
  }
  template <typename I>
  PMF_INLINE void to_image(I* image, int64_t apart) const {
    PMF_UNROLL for (int c = 0; c < C; ++c) store_float(image + c * apart, channel[c]);
  }
  PMF_INLINE void from_token(const T* token) {
    V vectors[C];
    PMF_UNROLL for (int k = 0; k < C; ++k) vectors[k] = load_float(token + k * kCount);
    from_vectors(vectors);
  }
  PMF_INLINE void to_token(T* token) const { to_vectors(token); }

  template <typename F>
  PMF_INLINE Pixels with(const Pixels& other, const F& f) const {
    Pixels result;
    PMF_UNROLL for (int c = 0; c < C; ++c) result.channel[c] = f(channel[c], other.channel[c]);
    return result;
  }
};

// One channel of one pixel, where the above does not fit. Elements of a token are C apart.
template <typename T>
struct Pixel {
  Acc<T> value;

  template <typename I>
  PMF_INLINE void from_image(const I* image, int64_t) {
    value = to_float(*image);
  }
  template <typename I>
  PMF_INLINE void to_image(I* image, int64_t) const {
    *image = from_float<I>(value);
  }
  PMF_INLINE void from_token(const T* token) { value = to_float(*token); }
  PMF_INLINE void to_token(T* token) const { *token = from_float<T>(value); }

  template <typename F>
  PMF_INLINE Pixel with(const Pixel& other, const F& f) const {
    return {f(value, other.value)};
  }
};

// body(empty pixels, element of the tokens, element of the images) for every pixel of a row of
// patches, several at a time.
template <typename T, typename Body>
PMF_INLINE void for_pixels(const PatchShape& s, int64_t sample, int64_t row, const Body& body) {
  const int64_t width = s.columns * s.patch, plane = s.rows * s.patch * width, C = s.channels;
  const auto visit = [&](auto pixels, int64_t channels, int64_t step) PMF_ALWAYS {
    for (int64_t c = 0; c < C; c += channels) {
      for (int64_t i = 0; i < s.patch; ++i) {
        const int64_t line = (sample * C + c) * plane + (row * s.patch + i) * width;
        const int64_t first = (sample * s.rows + row) * s.columns * s.token() + i * s.patch * C + c;
        for (int64_t q = 0; q < s.columns; ++q) {
          for (int64_t j = 0; j < s.patch; j += step) {
            body(pixels, first + q * s.token() + j * C, line + q * s.patch + j);
          }
        }
      }
    }
  };
  const bool fits = s.patch % kLanes<Acc<T>> == 0;
  if (fits && C == 3) return visit(Pixels<T, 3>{}, 3, kLanes<Acc<T>>);
  if (fits && C == 1) return visit(Pixels<T, 1>{}, 1, kLanes<Acc<T>>);
  visit(Pixel<T>{}, 1, 1);
}

template <typename T, typename I>
void forward(const PatchVelocityParams& p, const ParallelFor& parallel) {
  using A = Acc<T>;
  const PatchShape& s = p.shape;
  const T *tokens = static_cast<const T*>(p.tokens), *tokens_t = static_cast<const T*>(p.tokens_t);
  const I *images = static_cast<const I*>(p.images), *images_t = static_cast<const I*>(p.images_t);
  const A *time = static_cast<const A*>(p.t), *time_t = static_cast<const A*>(p.t_t);
  I *velocity = static_cast<I*>(p.velocity), *velocity_t = static_cast<I*>(p.velocity_t);
  const A floor = static_cast<A>(p.floor);
  const int64_t plane = s.rows * s.columns * s.patch * s.patch;
  for_patch_rows(s, parallel, [&](int64_t sample, int64_t row) {
    const A t = time[sample], clipped = clip(t, floor), factor = 1 / clipped;
    const auto velocity_of = [&](auto x, const T* token, const I* image) PMF_ALWAYS {
      auto z = x;
      x.from_token(token);
      z.from_image(image, plane);
      return z.with(x, [&](auto a, auto b) PMF_ALWAYS { return (a - b) * factor; });
    };
    if (sample >= p.tangents) {
      for_pixels<T>(s, sample, row, [&](auto x, int64_t token, int64_t image) PMF_ALWAYS {
        velocity_of(x, tokens + token, images + image).to_image(velocity + image, plane);
      });
      return;
    }
    const A rate = t >= floor && t <= 1 ? time_t[sample] * factor : A(0);
    for_pixels<T>(s, sample, row, [&](auto x, int64_t token, int64_t image) PMF_ALWAYS {
      const auto v = velocity_of(x, tokens + token, images + image);
      const auto direct = velocity_of(x, tokens_t + token, images_t + image);
      v.to_image(velocity + image, plane);
      direct.with(v, [&](auto a, auto b) PMF_ALWAYS { return a - rate * b; })
          .to_image(velocity_t + image, plane);
    });
  });
}

template <typename T, typename I>
void backward(const PatchVelocityBackwardParams& p, const ParallelFor& parallel) {
  using A = Acc<T>;
  const PatchShape& s = p.shape;
  const I* grad = static_cast<const I*>(p.grad);
  T* grad_tokens = static_cast<T*>(p.grad_tokens);
  const int64_t plane = s.rows * s.columns * s.patch * s.patch;
  for_patch_rows(s, parallel, [&](int64_t sample, int64_t row) {
    const A factor = -1 / clip(static_cast<const A*>(p.t)[sample], static_cast<A>(p.floor));
    for_pixels<T>(s, sample, row, [&](auto x, int64_t token, int64_t image) PMF_ALWAYS {
      x.from_image(grad + image, plane);
      x.with(x, [&](auto a, auto) PMF_ALWAYS { return a * factor; }).to_token(grad_tokens + token);
    });
  });
}

}  // namespace

void patch_velocity(const PatchVelocityParams& params, const ParallelFor& parallel) {
  with_type(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.image_dtype == params.dtype ? forward<T, T>(params, parallel)
                                       : forward<T, Acc<T>>(params, parallel);
  });
}

void patch_velocity_backward(const PatchVelocityBackwardParams& params,
                             const ParallelFor& parallel) {
  with_type(params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    params.image_dtype == params.dtype ? backward<T, T>(params, parallel)
                                       : backward<T, Acc<T>>(params, parallel);
  });
}

}  // namespace pmf::cpu::PMF_LEVEL

PMF_DISPATCH(params.dtype, void, patch_velocity,
             (const PatchVelocityParams& params, const ParallelFor& parallel), (params, parallel))
PMF_DISPATCH(params.dtype, void, patch_velocity_backward,
             (const PatchVelocityBackwardParams& params, const ParallelFor& parallel),
             (params, parallel))
