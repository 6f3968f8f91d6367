// Checks whether the CUDA kernels can run on a device, with one sentence if they cannot.
#include <cstdio>
#include <mutex>

#include "cuda/common/device.h"
#include "cuda/common/errors.h"

namespace pmf::cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kSentence = 256;
constexpr int kOldestMajor = 8;  // sm_80: A100. Older cards lack bf16 and asynchronous copies.

// Kept for the life of the process, because callers hold pointers into it.
struct Answer {
  std::once_flag asked;
  char text[kSentence] = "";
};

void examine(int device, char* text) {
  int driver = 0, runtime = 0, major = 0, minor = 0;
  const auto attribute = [device](int* value, cudaDeviceAttr which) {
    return checked([&] { return cudaDeviceGetAttribute(value, which, device); });
  };
  checked([&] { return cudaRuntimeGetVersion(&runtime); });
  if (checked([&] { return cudaDriverGetVersion(&driver); }) != cudaSuccess || driver == 0) {
    std::snprintf(text, kSentence, "no NVIDIA driver was found");
  } else if (driver / 1000 < runtime / 1000) {
    std::snprintf(text, kSentence,
                  "the NVIDIA driver supports CUDA %d.%d and pmf was compiled with CUDA %d.%d: "
                  "update the driver (CUDA 13 needs 580 or newer) or use CPU tensors",
                  driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  } else if (const cudaError_t status = attribute(&major, cudaDevAttrComputeCapabilityMajor);
             status != cudaSuccess) {
    std::snprintf(text, kSentence, "CUDA device %d cannot be used (%s)", device,
                  cudaGetErrorString(status));
  } else if (major < kOldestMajor) {
    attribute(&minor, cudaDevAttrComputeCapabilityMinor);
    std::snprintf(text, kSentence,
                  "CUDA device %d is sm_%d%d and the kernels need sm_80 (A100) or newer: use CPU "
                  "tensors there",
                  device, major, minor);
  }
}

}  // namespace

const char* device_problem(int device) {
  static Answer answers[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return "the device number is out of range";
  Answer& answer = answers[device];
  std::call_once(answer.asked, examine, device, answer.text);
  return answer.text[0] == '\0' ? nullptr : answer.text;
}

const char* error_sentence(int status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace pmf::cuda
