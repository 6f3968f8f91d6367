// The matrices of the patch embedding as grid views, and the launch of their products.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/patch_embed/patch_gemm.cuh"
#include "pmf/patch_embed.h"

namespace pmf::cuda {

// The views of one call, for products in T. Rows are patches: image, patch row, patch column.
template <typename T>
class Views {
 public:
  explicit Views(const PatchSizes& sizes) : s_(sizes) {}

  int pairs() const { return s_.tangents > 0 ? 2 : 1; }
  int64_t images_of(int pair) const { return pair == 0 ? s_.batch : s_.tangents; }

  // [batch N, C p p], the patches of images of any strides.
  template <class View4Like>
  GridView patches(const View4Like& images, int pair) const {
    const int64_t* t = images.stride;
    const bool wide = s_.image_dtype == DType::f32;
    return grid_view(
        images.data,
        grid_digits(images_of(pair), s_.rows, s_.columns, {t[0], s_.patch * t[2], s_.patch * t[3]}),
        grid_digits(s_.channels, s_.patch, s_.patch, {t[1], t[2], t[3]}), kChunk<T>, wide);
  }
  // [rows, columns], contiguous.
  GridView plain(const void* data, int64_t rows, int64_t columns) const {
    return grid_view(data, plain_digits(rows, columns), plain_digits(columns, 1), kChunk<T>);
  }
  GridView hidden(const void* data, int pair) const {
    return plain(data, images_of(pair) * s_.tokens(), s_.narrow);
  }
  // [batch N, D], the tokens behind the prefix.
  GridView tokens(const void* data, int pair) const {
    const int64_t N = s_.tokens(), D = s_.wide;
    const T* first = static_cast<const T*>(data) + s_.prefix * D;
    return grid_view(first, grid_digits(images_of(pair), 1, N, {(s_.prefix + N) * D, 0, D}),
                     plain_digits(D, 1), kChunk<T>);
  }
  // [batch N, D]: the same N rows for every image.
  GridView positions(const void* data) const {
    const int64_t N = s_.tokens(), D = s_.wide;
    return grid_view(data, grid_digits(s_.batch, 1, N, {0, 0, D}), plain_digits(D, 1), kChunk<T>);
  }
  // [any, width]: one row, repeated.
  GridView repeated(const void* data, int64_t width) const {
    return grid_view(data, Digits{}, plain_digits(width, 1), kChunk<T>);
  }

 private:
  const PatchSizes& s_;
};

// Sets result number `pair` to left times right.
inline void set_result(PatchProduct& product, int pair, const GridView& left, const GridView& right,
                       const GridView& out) {
  product.left[pair] = left;
  product.right[pair] = right;
  product.out[pair] = out;
  product.tiles[pair] = (out.row.count + kTile - 1) / kTile;
  product.column_tiles = (out.column.count + kTile - 1) / kTile;
}

template <typename T, bool kLeftRows, bool kRightRows>
cudaError_t launch_product(const PatchProduct& product, cudaStream_t stream) {
  const int64_t tiles = (product.tiles[0] + product.tiles[1]) * product.column_tiles;
  const int64_t runs = product.runs[0] + product.runs[1];
  if (tiles * runs == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(runs));
  plan_next_launch(kTile, kTile, PatchProducts<T>::kBlocks);
  return launch(patch_product_kernel<T, kLeftRows, kRightRows>, grid,
                dim3(kTileThreads<PatchProducts<T>::kParts>), kTileSharedBytes, stream, product);
}

}  // namespace pmf::cuda
