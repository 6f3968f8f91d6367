// Prints the errors that a launch and a device query report and leave pending when the calls named
// by the arguments fail; "pending" is an error that existed before.
#include <cstdio>

#include "cuda/common/device.cu"
#include "cuda/common/launch.cuh"

int main(int count, char** names) {
  failing.insert(names + 1, names + count);
  const bool before = failing.count("pending") != 0;
  const auto show = [&](const char* what, const char* said) {
    std::printf("%s: %s; pending: %s\n", what, said == nullptr ? "well" : said,
                pending == cudaSuccess ? "nothing" : cudaGetErrorString(pending));
    pending = before ? cudaErrorInvalidValue : cudaSuccess;
  };
  pending = before ? cudaErrorInvalidValue : cudaSuccess;
  void (*const kernel)(int) = [](int) {};
  using namespace pmf::cuda;
  show("launch", error_sentence(launch(kernel, {}, {}, 100 * 1024, nullptr, 1)));
  show("device", device_problem(0));
  show("limits", device_shared_limit() > 0 ? nullptr : kNoLimits);
  std::printf("launched: %d\n", launched);
}
