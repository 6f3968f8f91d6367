// The read-out on CUDA: velocities and their tangents from tokens, and the gradients of the tokens.
// The mathematics is in pmf/patch_velocity.h.
//
// Tiling: a thread processes a few neighbouring pixels in all three channels, 16 bytes of each
// plane of the image. In the tokens these are three contiguous words in a different order, which
// the thread permutes in registers: no shared memory, no second pass. If patches do not have three
// channels, if words do not divide their width, or if memory is not aligned, a thread processes one
// element.
//
// Bytes, in units of one image: forward 3, with tangent 6; backward 2. An element takes at most one
// subtraction and two FMAs, so copy bandwidth is the bound: [256, 3, 256, 256] in bf16
// would take 0.10 ms at 3.0 TB/s, 0.20 ms with tangents (estimates; not measured). Each result is
// rounded once, at the store.
#include "pmf/patch_velocity.h"

#include "cuda/rows/rows.cuh"

namespace pmf::cuda {
namespace {

constexpr int kColours = 3;

// A thread's position: neighbouring pixels of a line, in one or more channels.
struct Place {
  int64_t sample;
  int64_t token, image;  // offsets of the first element
  int64_t plane;         // between channels of an image

  __device__ Place(const PatchShape& s, int64_t slot, int pixels, int channels) {
    const int64_t width = s.columns * s.patch, height = s.rows * s.patch;
    const int64_t in_line = divide(width, pixels), groups = divide(s.channels, channels);
    const int64_t line = divide(slot, in_line), x = (slot - line * in_line) * pixels;
    const int64_t group_line = divide(line, height), y = line - group_line * height;
    sample = divide(group_line, groups);
    const int64_t channel = (group_line - sample * groups) * channels;
    const int64_t row = divide(y, s.patch), column = divide(x, s.patch);
    const int64_t pixel = (y - row * s.patch) * s.patch + x - column * s.patch;
    plane = height * width;
    image = (sample * s.channels + channel) * plane + y * width + x;
    const int64_t patch = (sample * s.rows + row) * s.columns + column;
    token = (patch * s.patch * s.patch + pixel) * s.channels + channel;
  }
};

// The elements of kPixels pixels in kChannels channels, contiguous in a token.
template <typename T, int kPixels, int kChannels>
struct Together {
  Vector<T, kPixels> word[kChannels];

  __device__ void load(const T* first) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      word[i] = load_vector<T, kPixels>(first + i * kPixels);
    }
  }
  __device__ void store(T* first) const {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) store_vector(first + i * kPixels, word[i]);
  }
  __device__ T& at(int pixel, int channel) {
    const int i = pixel * kChannels + channel;
    return word[i / kPixels].element[i % kPixels];
  }
};

struct Clipped {
  float inverse;  // 1 / s
  bool moves;     // whether s depends on t

  __device__ Clipped(float t, float floor)
      : inverse(1.0f / (t < floor  ? floor
                        : t > 1.0f ? 1.0f
                                   : t)),
        moves(t >= floor && t <= 1.0f) {}
};

// ---- kernels: tokens in T, images in I ----------------------------------------------------------

template <typename T, typename I, int kPixels, int kChannels>
struct Forward {
  PatchVelocityParams p;

  __device__ void run(int64_t slot) const {
    const Place at(p.shape, slot, kPixels, kChannels);
    const Clipped s(static_cast<const float*>(p.t)[at.sample], static_cast<float>(p.floor));
    const bool tangent = at.sample < p.tangents;
    const float rate =
        tangent && s.moves ? static_cast<const float*>(p.t_t)[at.sample] * s.inverse : 0.0f;
    Together<T, kPixels, kChannels> x, x_t;
    x.load(static_cast<const T*>(p.tokens) + at.token);
    if (tangent) x_t.load(static_cast<const T*>(p.tokens_t) + at.token);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int64_t image = at.image + c * at.plane;
      const auto z = load_vector<I, kPixels>(static_cast<const I*>(p.images) + image);
      float v[kPixels];
#pragma unroll
      for (int k = 0; k < kPixels; ++k) v[k] = (z[k] - to_float(x.at(k, c))) * s.inverse;
      store_vector<I, kPixels>(static_cast<I*>(p.velocity) + image, v);
      if (!tangent) continue;
      const auto z_t = load_vector<I, kPixels>(static_cast<const I*>(p.images_t) + image);
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        v[k] = fmaf(-rate, v[k], (z_t[k] - to_float(x_t.at(k, c))) * s.inverse);
      }
      store_vector<I, kPixels>(static_cast<I*>(p.velocity_t) + image, v);
    }
  }
};

template <typename T, typename I, int kPixels, int kChannels>
struct Backward {
  PatchVelocityBackwardParams p;

  __device__ void run(int64_t slot) const {
    const Place at(p.shape, slot, kPixels, kChannels);
    const Clipped s(static_cast<const float*>(p.t)[at.sample], static_cast<float>(p.floor));
    Together<T, kPixels, kChannels> x;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const I* const grad = static_cast<const I*>(p.grad) + at.image + c * at.plane;
      const auto v = load_vector<I, kPixels>(grad);
#pragma unroll
      for (int k = 0; k < kPixels; ++k) x.at(k, c) = from_float<T>(-v[k] * s.inverse);
    }
    x.store(static_cast<T*>(p.grad_tokens) + at.token);
  }
};

template <class Work>
__global__ void __launch_bounds__(kSlotThreads)
    places_kernel(const __grid_constant__ Work work, int64_t slots) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSlotThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kSlotThreads) + threadIdx.x; i < slots;
       i += step) {
    work.run(i);
  }
}

// ---- choosing the kernel (host) -----------------------------------------------------------------

template <class Work>
cudaError_t launch_places(const Work& work, int64_t slots, cudaStream_t stream) {
  const int64_t blocks = (slots + kSlotThreads - 1) / kSlotThreads;
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  return launch(places_kernel<Work>, grid, dim3(kSlotThreads), 0, stream, work, slots);
}

template <template <typename, typename, int, int> class Work, typename T, typename I, class Params>
cudaError_t for_places(const Params& p, std::initializer_list<const void*> memory,
                       cudaStream_t stream) {
  constexpr int kPixels = kVectorBytes / (sizeof(I) > sizeof(T) ? sizeof(I) : sizeof(T));
  const PatchShape& s = p.shape;
  bool words = s.channels == kColours && s.patch % kPixels == 0;
  for (const void* data : memory) {
    words = words && reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  }
  const int64_t numbers = s.batch * s.rows * s.columns * s.token();
  return words ? launch_places(Work<T, I, kPixels, kColours>{p}, numbers / (kPixels * kColours),
                               stream)
               : launch_places(Work<T, I, 1, 1>{p}, numbers, stream);
}

// Calls body(type of tokens, type of images); the latter is that of the tokens or float.
template <class Params, class Body>
const char* with_types(const Params& p, const Body& body) {
  return with_type(p.dtype, [&](auto type) {
    return p.image_dtype == p.dtype ? body(type, type) : body(type, Type<float>{});
  });
}

}  // namespace

const char* patch_velocity(const PatchVelocityParams& p, void* stream) {
  return with_types(p, [&](auto token, auto image) {
    return for_places<Forward, typename decltype(token)::type, typename decltype(image)::type>(
        p, {p.tokens, p.images, p.velocity, p.tokens_t, p.images_t, p.velocity_t},
        static_cast<cudaStream_t>(stream));
  });
}

const char* patch_velocity_backward(const PatchVelocityBackwardParams& p, void* stream) {
  return with_types(p, [&](auto token, auto image) {
    return for_places<Backward, typename decltype(token)::type, typename decltype(image)::type>(
        p, {p.grad, p.grad_tokens}, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace pmf::cuda
