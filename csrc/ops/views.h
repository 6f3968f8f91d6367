// Converts four-dimensional tensors to the views that kernels take.
#pragma once

#include "ops/torch_shim.h"
#include "pmf/common.h"

namespace pmf {

inline ConstView4 const_view4(const Tensor& tensor) {
  ConstView4 view;
  view.data = tensor.const_data_ptr();
  for (int d = 0; d < 4; ++d) view.stride[d] = tensor.stride(d);
  return view;
}

inline View4 view4(const Tensor& tensor) {
  View4 view;
  view.data = tensor.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) view.stride[d] = tensor.stride(d);
  return view;
}

}  // namespace pmf
