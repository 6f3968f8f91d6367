// Adam with decoupled weight decay over many tensors; Nesterov as in optax's adamw(nesterov=True):
//
//   m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
//   u  = b1 m / (1 - b1^(k+1)) + (1 - b1) g / (1 - b1^k)   (or m / (1 - b1^k))
//   p <- (1 - lr wd) p - lr u / (sqrt(v / (1 - b2^k)) + eps)
//
// Two launches: the step's coefficients (optimizer_step.cuh), then all tensors, at most kMaxTensors
// per launch. For 16-bit parameters the step updates an fp32 master weight and rounds it into the
// parameter; if the parameter was changed externally, the master restarts from its value.
//
// Tiling: a block processes kBlockElements of one tensor, which it finds by bisection; a thread
// uses 16-byte vectors, or single elements if a tensor's memory is not aligned.
//
// Bytes per element: fp32 28 (p, g, m, v read; p, m, v written), 16-bit with a master weight 30.
// Memory bandwidth is the bound.
#include "cuda/common/vector.cuh"
#include "cuda/optimizer/optimizer_launchers.h"
#include "cuda/optimizer/optimizer_step.cuh"

namespace pmf::cuda {
namespace {

constexpr int kThreads = 256, kVectors = 4;  // vectors per thread
constexpr int kWidth = 4;                    // fp32 elements per vector
constexpr int kBlockElements = kThreads * kVectors * kWidth;
constexpr int kMaxTensors = 512;

struct Entry {
  AdamTensor tensor;
  int first_block;
  bool aligned;
};

// A kernel parameter, so it lies in the constant bank.
struct Table {
  Entry entries[kMaxTensors];
  int count;
  float gradient_weight, square_keep, square_weight, eps;  // 1 - b1, b2, 1 - b2
  const float* coefficients;
};

struct Adam {
  float gradient_weight, square_keep, square_weight, eps, of_momentum, of_gradient, of_square,
      decay, lr;

  __device__ explicit Adam(const Table& t)
      : gradient_weight(t.gradient_weight),
        square_keep(t.square_keep),
        square_weight(t.square_weight),
        eps(t.eps),
        of_momentum(t.coefficients[kOfMomentum]),
        of_gradient(t.coefficients[kOfGradient]),
        of_square(t.coefficients[kOfSquare]),
        decay(t.coefficients[kDecay]),
        lr(t.coefficients[kLearningRate]) {}

  __device__ void operator()(float g, float& m, float& v, float& p) const {
    m = fmaf(gradient_weight, g - m, m);
    v = fmaf(square_weight * g, g, square_keep * v);
    const float update = fmaf(of_gradient, g, of_momentum * m);
    p = decay * p - lr * (update / (sqrtf(v * of_square) + eps));
  }
};

template <class T, int kCount>
__device__ inline void update(const Adam& adam, const AdamTensor& t, int64_t at) {
  T* const parameter = static_cast<T*>(t.parameter) + at;
  const auto g = load_vector<T, kCount>(static_cast<const T*>(t.gradient) + at);
  const auto p = load_vector<T, kCount>(parameter);
  const auto m = load_vector<float, kCount>(t.momentum + at);
  const auto v = load_vector<float, kCount>(t.square + at);
  float weight[kCount], momentum[kCount], square[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) weight[k] = p[k];
  if (t.master != nullptr) {
    const auto master = load_vector<float, kCount>(t.master + at);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (to_float(from_float<T>(master[k])) == p[k]) weight[k] = master[k];
    }
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    momentum[k] = m[k], square[k] = v[k];
    adam(g[k], momentum[k], square[k], weight[k]);
  }
  store_vector<float, kCount>(t.momentum + at, momentum);
  store_vector<float, kCount>(t.square + at, square);
  if (t.master != nullptr) store_vector<float, kCount>(t.master + at, weight);
  store_vector<T, kCount>(parameter, weight);
}

template <class T>
__global__ void __launch_bounds__(kThreads) adam_kernel(const __grid_constant__ Table table) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.entries[middle].first_block <= static_cast<int>(blockIdx.x) ? low : high) = middle;
  }
  const Entry& entry = table.entries[low];
  const Adam adam(table);
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - entry.first_block) * kBlockElements;
  const int64_t end = min(begin + kBlockElements, entry.tensor.size);
  const int64_t whole = entry.aligned ? begin + (end - begin) / kWidth * kWidth : begin;
  for (int64_t at = begin + threadIdx.x * kWidth; at < whole; at += kThreads * kWidth) {
    update<T, kWidth>(adam, entry.tensor, at);
  }
  for (int64_t at = whole + threadIdx.x; at < end; at += kThreads) {
    update<T, 1>(adam, entry.tensor, at);
  }
}

bool aligned(const AdamTensor& t) {
  uintptr_t bits = 0;
  for (const void* data :
       {static_cast<const void*>(t.parameter), t.gradient, static_cast<const void*>(t.momentum),
        static_cast<const void*>(t.square), static_cast<const void*>(t.master)}) {
    bits |= reinterpret_cast<uintptr_t>(data);
  }
  return bits % kVectorBytes == 0;
}

template <class T>
cudaError_t run(const AdamParams& p, cudaStream_t stream) {
  auto* const coefficients = static_cast<float*>(p.workspace);
  cudaError_t status = launch(step_kernel, dim3(1), dim3(1), 0, stream, p.step, coefficients);
  for (int64_t first = 0; first < p.count && status == cudaSuccess; first += kMaxTensors) {
    Table table{};
    table.coefficients = coefficients;
    table.gradient_weight = static_cast<float>(1 - p.step.momentum);
    table.square_keep = static_cast<float>(p.step.beta2);
    table.square_weight = static_cast<float>(1 - p.step.beta2);
    table.eps = static_cast<float>(p.eps);
    int64_t blocks = 0;
    for (int64_t i = first; i < p.count && table.count < kMaxTensors; ++i) {
      const AdamTensor& tensor = p.tensors[i];
      table.entries[table.count++] = {tensor, static_cast<int>(blocks), aligned(tensor)};
      blocks += (tensor.size + kBlockElements - 1) / kBlockElements;
    }
    if (blocks > 0) {
      status = launch(adam_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                      stream, table);
    }
  }
  return status;
}

}  // namespace

int64_t adam_workspace_bytes() { return kCoefficients * sizeof(float); }

const char* adam(const AdamParams& params, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::f32:
      return error_sentence(run<float>(params, queue));
    case DType::bf16:
      return error_sentence(run<__nv_bfloat16>(params, queue));
    case DType::f16:
      return error_sentence(run<__half>(params, queue));
    case DType::f64:
      return "float64 parameters step by plain PyTorch";
  }
  return nullptr;
}

}  // namespace pmf::cuda
