// Matrices that lie in images: element (row, column) is found by one sum of a row's and a column's
// offset, each a three-digit number in mixed radix. Patches of an image are such a matrix (row:
// image, patch row, patch column; column: channel, pixel row, pixel column), and so are tokens
// behind a prefix, a vector repeated over rows, and any plain matrix: one kernel serves them all.
#pragma once

#include <initializer_list>

#include "cuda/common/vector.cuh"

namespace pmf::cuda {

struct Digits {
  int64_t count = 0;              // how many rows, or columns, exist
  uint32_t middle = 1, last = 1;  // index = (first * middle + m) * last + l
  int64_t stride[3] = {0, 0, 0};  // elements, of first, m, l

  __device__ int64_t offset(int64_t index) const {
    const uint32_t all = static_cast<uint32_t>(index), rest = all / last;
    const uint32_t first = rest / middle;
    return first * stride[0] + (rest - first * middle) * stride[1] +
           (all - rest * last) * stride[2];
  }
};

// Indices are below 2^32; csrc/ops checks that.
struct GridView {
  void* data = nullptr;
  Digits row, column;
  // Columns from a multiple of 16 bytes' worth (of the products' type) on lie together, aligned.
  bool words = false;
  bool wide = false;  // elements are float whatever the products' type
};

// The digits of a plain dimension.
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

// `chunk`: the elements of the products' type in 16 bytes.
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
