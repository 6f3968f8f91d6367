// PyTorch's functions as csrc/ops sees them in the emulator. The linker redirects calls here (ld
// --wrap=NAME: calls to NAME reach __wrap_NAME, which may call __real_NAME).
//
// CPU tensors appear to be on CUDA device 0, or where a test places them. Taking a tensor's address
// registers its elements with the emulator, as read-only or writable. Tensors made by new_empty()
// start unwritten.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string_view>
#include <vector>

#include "emulator/device.h"
#include "memory.h"

extern "C" {
AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError __real_torch_call_dispatcher(const char*, const char*, StableIValue*, uint64_t);
}

namespace pmf::emulator {
namespace {

std::vector<uintptr_t> unwritten_storages;  // those of this call's new_empty()

// A tensor's storage, and its elements as contiguous runs of bytes.
struct Elements {
  uintptr_t storage = 0, first = 0;
  int64_t storage_bytes = 0, run_bytes = 0;
  std::vector<int64_t> sizes, steps;  // count and step in bytes, from run to run

  explicit Elements(AtenTensorHandle tensor) {
    const void* data = nullptr;
    int64_t dims = 0, offset = 0, *size = nullptr, *stride = nullptr;
    int32_t dtype = 0;
    __real_torch_get_const_data_ptr(tensor, &data);
    aoti_torch_get_dim(tensor, &dims);
    aoti_torch_get_sizes(tensor, &size);
    aoti_torch_get_strides(tensor, &stride);
    aoti_torch_get_storage_offset(tensor, &offset);
    aoti_torch_get_storage_size(tensor, &storage_bytes);
    aoti_torch_get_dtype(tensor, &dtype);
    const auto item = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
    first = reinterpret_cast<uintptr_t>(data);
    storage = first - offset * item;
    run_bytes = item;
    std::vector<std::pair<int64_t, int64_t>> order;
    for (int64_t d = 0; d < dims; ++d) {
      if (size[d] == 0) run_bytes = 0;
      if (size[d] > 1 && stride[d] > 0) order.emplace_back(stride[d] * item, size[d]);
    }
    std::sort(order.begin(), order.end());
    for (const auto& [step, count] : order) {
      if (sizes.empty() && step == run_bytes) {
        run_bytes *= count;
      } else {
        sizes.push_back(count), steps.push_back(step);
      }
    }
  }

  template <class Function>
  void for_each_run(Function function) const {
    if (run_bytes == 0 || first == 0) return;
    std::vector<int64_t> at(sizes.size(), 0);
    uintptr_t address = first;
    for (;;) {
      function(address, static_cast<size_t>(run_bytes));
      size_t d = 0;
      for (; d < sizes.size(); ++d) {
        address += steps[d];
        if (++at[d] < sizes[d]) break;
        address -= sizes[d] * steps[d];
        at[d] = 0;
      }
      if (d == sizes.size()) return;
    }
  }
};

void bind(AtenTensorHandle tensor, bool writable) {
  const Elements elements(tensor);
  if (elements.run_bytes == 0 || elements.first == 0) return;
  const bool unwritten =
      std::count(unwritten_storages.begin(), unwritten_storages.end(), elements.storage) != 0;
  Region& region = memory.region(elements.storage, static_cast<size_t>(elements.storage_bytes));
  elements.for_each_run(
      [&](uintptr_t address, size_t bytes) { region.allow(address, bytes, writable, !unwritten); });
}

// The device that a tensor appears to be on.
struct Place {
  bool on_cuda = true;
  int32_t index = 0;
};
std::map<uintptr_t, Place> places;  // by storage; only those that a test has placed

Place place_of(AtenTensorHandle tensor) {
  if (places.empty()) return {};
  const auto found = places.find(Elements(tensor).storage);
  return found == places.end() ? Place{} : found->second;
}

AtenTensorHandle handle_of(StableIValue value) {
  AtenTensorHandle tensor = nullptr;
  std::memcpy(&tensor, &value, sizeof(tensor));
  return tensor;
}

}  // namespace

void forget_tensors() {
  memory.forget();
  unwritten_storages.clear();
}

extern "C" {

AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  bind(tensor, false);
  return __real_torch_get_const_data_ptr(tensor, data);
}

AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  bind(tensor, true);
  return __real_torch_get_mutable_data_ptr(tensor, data);
}

AOTITorchError __wrap_torch_call_dispatcher(const char* name, const char* overload,
                                            StableIValue* stack, uint64_t version) {
  const AOTITorchError status = __real_torch_call_dispatcher(name, overload, stack, version);
  const std::string_view op(name);
  if (status != AOTI_TORCH_SUCCESS) return status;
  if (op == "aten::new_empty") {
    unwritten_storages.push_back(Elements(handle_of(stack[0])).storage);
  } else if (op.back() == '_') {  // in place: its elements count as written
    const Elements elements(handle_of(stack[0]));
    elements.for_each_run([&](uintptr_t address, size_t bytes) {
      memory.region(elements.storage, static_cast<size_t>(elements.storage_bytes))
          .allow(address, bytes, false, true);
    });
  }
  return status;
}

AOTITorchError __wrap_aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  *type = place_of(tensor).on_cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  *index = place_of(tensor).index;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) {
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
}

// ---- called by tests through ctypes -------------------------------------------------------------

#define PMF_EXPORT extern "C" __attribute__((visibility("default")))

// Places a storage on the CPU or on CUDA device `index`.
PMF_EXPORT void pmf_emulator_place(const void* storage, bool on_cuda, int32_t index) {
  places[reinterpret_cast<uintptr_t>(storage)] = {on_cuda, index};
}

PMF_EXPORT void pmf_emulator_forget_places() { places.clear(); }

// Must precede any work on device `index`, whose properties are queried once.
PMF_EXPORT void pmf_emulator_device(int32_t index, int major, int minor) {
  capabilities[index] = {major, minor};
}

// Sets the driver version; 0: no driver.
PMF_EXPORT void pmf_emulator_driver(int version) { driver_version = version; }

}  // namespace pmf::emulator
