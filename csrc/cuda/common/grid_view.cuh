// Matrices embedded in images: element (row, column) lies at the sum of a row offset and a column
// offset, each a three-digit number in mixed radix. This covers the patches of an image (row:
// image, patch row, patch column; column: channel, pixel row, pixel column), tokens behind a
// prefix, a vector repeated over rows, and any plain matrix, so one kernel serves them all.
#pragma once

#include <initializer_list>

#include "cuda/common/vector.cuh"

namespace pmf::cuda {

struct Digits {
  int64_t count = 0;              // number of rows or columns
  uint32_t middle = 1, last = 1;  // index = (first * middle + m) * last + l
  int64_t stride[3] = {0, 0, 0};  // element strides of first, m and l

  __device__ int64_t offset(int64_t index) const {
    const uint32_t all = static_cast<uint32_t>(index), rest = all / last;
    const uint32_t first = rest / middle;
    return first * stride[0] + (rest - first * middle) * stride[1] +
           (all - rest * last) * stride[2];
  }
};

// Indices are below 2^32, as csrc/ops checks.
struct GridView {
  void* data = nullptr;
  Digits row, column;
  // Every 16-byte group of columns (in the product's element type) is contiguous and aligned.
  bool words = false;
  bool wide = false;  // elements are float regardless of the product's type
};

// The digits of an ordinary dimension.
inline Digits plain_digits(int64_t count, int64_t stride) {
  Digits digits;
  digits.count = count;
  digits.last = static_cast<uint32_t>(count > 0 ? count : 1);
  digits.stride[2] = stride;
  return digits;
}

inline Digits grid_digits(int64_t first, int64_t middle, int64_t last, const int64_t (&stride)[3]) {
  Digits digits;
  digits.count = first * middle * last;
  digits.middle = static_cast<uint32_t>(middle);
  digits.last = static_cast<uint32_t>(last);
  for (int d = 0; d < 3; ++d) digits.stride[d] = stride[d];
  return digits;
}

// `chunk`: the number of elements of the product's type in 16 bytes.
inline GridView grid_view(const void* data, const Digits& row, const Digits& column, int64_t chunk,
                          bool wide = false) {
  GridView view;
  view.data = const_cast<void*>(data);
  view.row = row;
  view.column = column;
  view.wide = wide;
  view.words = column.stride[2] == 1 && column.last % chunk == 0 &&
               reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  for (const int64_t stride :
       {row.stride[0], row.stride[1], row.stride[2], column.stride[0], column.stride[1]}) {
    view.words = view.words && stride % chunk == 0;
  }
  return view;
}

}  // namespace pmf::cuda
