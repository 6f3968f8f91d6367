// The read-out on the CPU. The mathematics is in pmf/patch_velocity.h.
//
// One row of patches at a time: its tokens and its rows of the image fit in the L1 cache
// together, so that reordering costs no second pass over memory. Rounded
// once, at the store.
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

// body(element of the tokens, element of the images) for the first of each run of p elements, which
// lie C apart in a token and next to each other in an image.
template <typename Body>
PMF_INLINE void for_runs_of(const PatchShape& s, int64_t sample, int64_t row, const Body& body) {
  const int64_t width = s.columns * s.patch, height = s.rows * s.patch;
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t i = 0; i < s.patch; ++i) {
      const int64_t line = ((sample * s.channels + c) * height + row * s.patch + i) * width;
      const int64_t first = (sample * s.rows + row) * s.columns * s.token();
      for (int64_t q = 0; q < s.columns; ++q) {
        body(first + q * s.token() + i * s.patch * s.channels + c, line + q * s.patch);
      }
    }
  }
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
  for_patch_rows(s, parallel, [&](int64_t sample, int64_t row) {
    const A t = time[sample], clipped = clip(t, floor);
    if (sample >= p.tangents) {
      for_runs_of(s, sample, row, [&](int64_t token, int64_t image) PMF_ALWAYS {
        for (int64_t j = 0; j < s.patch; ++j) {
          const A difference =
              to_float(images[image + j]) - to_float(tokens[token + j * s.channels]);
          velocity[image + j] = from_float<I>(difference / clipped);
        }
      });
      return;
    }
    const A rate = t >= floor && t <= 1 ? time_t[sample] / clipped : A(0);
    for_runs_of(s, sample, row, [&](int64_t token, int64_t image) PMF_ALWAYS {
      for (int64_t j = 0; j < s.patch; ++j) {
        const int64_t k = token + j * s.channels, i = image + j;
        const A v = (to_float(images[i]) - to_float(tokens[k])) / clipped;
        const A direct = (to_float(images_t[i]) - to_float(tokens_t[k])) / clipped;
        velocity[i] = from_float<I>(v);
        velocity_t[i] = from_float<I>(direct - rate * v);
      }
    });
  });
}

template <typename T, typename I>
void backward(const PatchVelocityBackwardParams& p, const ParallelFor& parallel) {
  using A = Acc<T>;
  const PatchShape& s = p.shape;
  const I* grad = static_cast<const I*>(p.grad);
  T* grad_tokens = static_cast<T*>(p.grad_tokens);
  for_patch_rows(s, parallel, [&](int64_t sample, int64_t row) {
    const A clipped = clip(static_cast<const A*>(p.t)[sample], static_cast<A>(p.floor));
    for_runs_of(s, sample, row, [&](int64_t token, int64_t image) PMF_ALWAYS {
      for (int64_t j = 0; j < s.patch; ++j) {
        grad_tokens[token + j * s.channels] = from_float<T>(-to_float(grad[image + j]) / clipped);
      }
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

PMF_DISPATCH(void, patch_velocity, (const PatchVelocityParams& params, const ParallelFor& parallel),
             (params, parallel))
PMF_DISPATCH(void, patch_velocity_backward,
             (const PatchVelocityBackwardParams& params, const ParallelFor& parallel),
             (params, parallel))
