// Shared by the Hopper attention kernels: tiles in the layout that tensor maps copy, and products
// of a warpgroup's 64 rows with a tile.
//
//   across   sums [64][tile's rows] = rows times tile^T
//   down     sums [64][width] += A, in registers, times tile
#pragma once

#include <type_traits>

#include "cuda/attention/attention_tile.cuh"
#include "cuda/common/hopper_ring.cuh"

namespace pmf::cuda {

constexpr int kRowBlock = 64, kPieceColumns = 64;

// The maps of one tensor: boxes of 64 columns, and of the 16 or 32 left over at widths 80 and 96.
struct HopperMaps {
  TensorMap piece, tail;
};

// Rows of up to four tensors, the sides: first the 64-column pieces of each side, then the tails.
// The size is a multiple of 1024 bytes, the period of the swizzle.
template <int kRows_, int kPieces, int kTail, int kSides>
struct HopperTile {
  static constexpr int kRows = kRows_;
  static constexpr uint32_t kPieceBytes = kRows * 2 * kPieceColumns;
  static constexpr uint32_t kTailBytes = kRows * 2 * kTail;
  static constexpr uint32_t kTails = kSides * kPieces * kPieceBytes;
  static constexpr uint32_t kCopied = kTails + kSides * kTailBytes;
  static constexpr uint32_t kBytes = (kCopied + 1023) / 1024 * 1024;

  __device__ static constexpr uint32_t piece(int side, int i) {
    return uint32_t(side * kPieces + i) * kPieceBytes;
  }
  __device__ static constexpr uint32_t tail(int side) {
    return kTails + uint32_t(side) * kTailBytes;
  }
};

// Rows of kWidth elements, in pieces of 64 and a tail. A tile has kColumns of them and streams past
// a consumer's kRowBlock rows.
template <typename T_, int kWidth_, int kColumns, int kSides_>
struct HopperShape {
  using T = T_;
  using E = Arithmetic16<T>;
  static constexpr int kWidth = kWidth_, kSides = kSides_;
  static constexpr int kTiles = kColumns / 8, kOutTiles = kWidth / 8, kDepths = kColumns / 16;
  static constexpr int kPieces = kWidth / kPieceColumns, kTail = kWidth % kPieceColumns;
  static constexpr int kTailTiles = kTail / 8;
  static_assert(kTail == 0 || kTail == 16 || kTail == 32, "as wide as a swizzle");
  static constexpr Swizzle kTailSwizzle = kTail == 16 ? Swizzle::bytes32 : Swizzle::bytes64;
  static constexpr uint32_t kRowBytes = 2 * kPieceColumns;  // of a piece: as wide as the swizzle
  static constexpr uint32_t kTailRowBytes = 2 * kTail;
  using Tile = HopperTile<kColumns, kPieces, kTail, kSides>;
  using Rows = HopperTile<kRowBlock, kPieces, kTail, kSides>;

  // Whether the forward's values are stored as panels of 16 columns: one product then covers all
  // columns, but one of 16 columns alone takes as long as one of 32.
  static constexpr bool kPanels = kTail == 16;
  static constexpr uint32_t kPanelBytes = kColumns * kTailRowBytes;
  __device__ static constexpr uint32_t panel(int side, int i) {
    return uint32_t(side * kWidth / 16 + i) * kPanelBytes;
  }

  // The row of a tile of the forward's values that the byte at `offset` belongs to.
  __device__ static constexpr int row_at(uint32_t offset) {
    if (kPanels) return int(offset / 32 % kColumns);
    if (kTail == 0 || offset < Tile::kTails) return int(offset / kRowBytes % kColumns);
    constexpr uint32_t kBytes = kTail == 0 ? 1 : kTailRowBytes;
    return int((offset - Tile::kTails) / kBytes % kColumns);
  }
  // The offset in it of 16-byte chunk `chunk` of a row of a side.
  __device__ static constexpr uint32_t chunk_at(int side, int row, int chunk) {
    constexpr int kWide = kPanels ? 0 : kPieces * int(kRowBytes) / kChunkBytes;
    const bool wide = chunk < kWide;
    const uint32_t bytes = wide ? kRowBytes : kTailRowBytes, per_row = bytes / kChunkBytes;
    const uint32_t start = kPanels ? panel(side, chunk / 2)
                           : wide  ? Tile::piece(side, chunk / 8)
                                   : Tile::tail(side);
    const int column = kPanels ? chunk % 2 : wide ? chunk % 8 : chunk - kWide;
    const uint32_t offset = start + uint32_t(row) * bytes + uint32_t(column) * kChunkBytes;
    return offset ^ ((offset >> 7 & (per_row - 1)) << 4);
  }
};

// ---- work ---------------------------------------------------------------------------------------

struct HopperItem {
  int batch, head, first;  // first row block
};

// An item of a launch: a head and `rounds` row blocks for each of C::kConsumers consumers.
template <class C, class Launch>
__device__ inline HopperItem hopper_item(const Launch& p, int item) {
  uint32_t index = uint32_t(item);
  const int first = int(p.by_parts.divide(index)) * C::kConsumers * p.rounds;
  const int head = int(p.by_heads.divide(index));
  return {int(index), head, first};
}

// Consumer c's row blocks in its block's i-th item: first + turn, and every kConsumers-th after it.
struct HopperShare {
  int turn, count;
};
template <class C, class Launch>
__device__ inline HopperShare hopper_share(const Launch& p, const HopperItem& item, int c, int i) {
  const int turn = (c + i) % C::kConsumers, left = p.row_blocks - item.first - turn;
  const int count = (left + C::kConsumers - 1) / C::kConsumers;
  return {turn, count < 0 ? 0 : count < p.rounds ? count : p.rounds};
}

// ---- copies -------------------------------------------------------------------------------------

// Copies a side's rows of a Tile, from `row` on.
template <class C, class Tile>
__device__ inline void copy_side(uint32_t to, int side, const HopperMaps& from, uint32_t barrier,
                                 int row, int head, int batch) {
#pragma unroll
  for (int i = 0; i < C::kPieces; ++i) {
    copy_box(to + Tile::piece(side, i), &from.piece, barrier, i * kPieceColumns, row, head, batch);
  }
  if (C::kTail > 0) {
    copy_box(to + Tile::tail(side), &from.tail, barrier, C::kPieces * kPieceColumns, row, head,
             batch);
  }
}

// Announces the bytes of a Tile and copies the rows of all sides.
template <class C, class Tile>
__device__ inline void copy_rows(uint32_t to, const HopperMaps (&from)[C::kSides], uint32_t barrier,
                                 int row, int head, int batch) {
  mbarrier_expect(barrier, Tile::kCopied);
#pragma unroll
  for (int side = 0; side < C::kSides; ++side) {
    copy_side<C, Tile>(to, side, from[side], barrier, row, head, batch);
  }
}
template <class C, class Tile>
__device__ inline void copy_rows(uint32_t to, const HopperMaps& first, const HopperMaps& second,
                                 uint32_t barrier, int row, int head, int batch) {
  mbarrier_expect(barrier, Tile::kCopied);
#pragma unroll
  for (int side = 0; side < C::kSides; ++side) {
    copy_side<C, Tile>(to, side, side == 0 ? first : second, barrier, row, head, batch);
  }
}

// The same for a tile of the forward's values.
template <class C>
__device__ inline void copy_values(uint32_t to, const HopperMaps& first, const HopperMaps& second,
                                   uint32_t barrier, int row, int head, int batch) {
  if constexpr (C::kPanels) {
    mbarrier_expect(barrier, C::Tile::kCopied);
#pragma unroll
    for (int side = 0; side < C::kSides; ++side) {
#pragma unroll
      for (int i = 0; i < C::kWidth / 16; ++i) {
        copy_box(to + C::panel(side, i), side == 0 ? &first.tail : &second.tail, barrier, 16 * i,
                 row, head, batch);
      }
    }
  } else {
    copy_rows<C, typename C::Tile>(to, first, second, barrier, row, head, batch);
  }
}

// ---- products -----------------------------------------------------------------------------------

// Descriptors are one base plus compile-time constants, so they take few registers.
template <class C>
__device__ inline uint64_t tile_descriptor(uint32_t base, uint32_t row_bytes, Swizzle swizzle) {
  return matrix_descriptor(base, C::Tile::kPieceBytes, 8 * row_bytes, swizzle);
}

// Multiplies a side of the rows with a side of the tile. Each step of 16 columns is 32 bytes along
// a row.
template <class C, int kSideOfRows, int kSideOfTile>
__device__ inline void wgmma_across(float (&sums)[C::kTiles][4], uint32_t rows, uint32_t tile,
                                    bool adds) {
  using Rows = typename C::Rows;
  using Tile = typename C::Tile;
  const uint64_t a =
      tile_descriptor<C>(rows + Rows::piece(kSideOfRows, 0), C::kRowBytes, Swizzle::bytes128);
  const uint64_t b =
      tile_descriptor<C>(tile + Tile::piece(kSideOfTile, 0), C::kRowBytes, Swizzle::bytes128);
#pragma unroll
  for (int i = 0; i < 4 * C::kPieces; ++i) {
    const uint32_t step = uint32_t(i) % 4 * 32;
    wgmma<typename C::T, false>(sums, a + further(Rows::piece(0, i / 4) + step),
                                b + further(Tile::piece(0, i / 4) + step), adds || i > 0);
  }
#pragma unroll
  for (int i = 0; i < C::kTail / 16; ++i) {
    const uint32_t step = uint32_t(i) * 32;
    wgmma<typename C::T, false>(sums,
                                tile_descriptor<C>(rows, C::kTailRowBytes, C::kTailSwizzle) +
                                    further(Rows::tail(kSideOfRows) + step),
                                tile_descriptor<C>(tile, C::kTailRowBytes, C::kTailSwizzle) +
                                    further(Tile::tail(kSideOfTile) + step),
                                true);
  }
}

// The same with the rows in registers.
template <class C, int kSideOfTile>
__device__ inline void wgmma_across(float (&sums)[C::kTiles][4],
                                    const FragmentA (&rows)[C::kWidth / 16], uint32_t tile,
                                    bool adds) {
  using Tile = typename C::Tile;
  const uint64_t b =
      tile_descriptor<C>(tile + Tile::piece(kSideOfTile, 0), C::kRowBytes, Swizzle::bytes128);
#pragma unroll
  for (int i = 0; i < 4 * C::kPieces; ++i) {
    wgmma<typename C::T, false>(
        sums, rows[i].x, b + further(Tile::piece(0, i / 4) + uint32_t(i) % 4 * 32), adds || i > 0);
  }
#pragma unroll
  for (int i = 0; i < C::kTail / 16; ++i) {
    wgmma<typename C::T, false>(sums, rows[4 * C::kPieces + i].x,
                                tile_descriptor<C>(tile, C::kTailRowBytes, C::kTailSwizzle) +
                                    further(Tile::tail(kSideOfTile) + uint32_t(i) * 32),
                                true);
  }
}

// Loads a side of the rows, in shared memory, into the registers of a warpgroup.
template <class C, int kSide>
__device__ inline void load_rows(FragmentA (&to)[C::kWidth / 16], const unsigned char* rows,
                                 int thread) {
  using Rows = typename C::Rows;
  const uint32_t lane = uint32_t(thread) % kWarpThreads;
  const uint32_t row = uint32_t(thread) / kWarpThreads * 16 + lane % 16, half = lane / 16;
#pragma unroll
  for (int i = 0; i < C::kWidth / 16; ++i) {
    const int piece = i / 4;
    const bool tail = piece == C::kPieces;
    const uint32_t bytes = tail ? C::kTailRowBytes : C::kRowBytes;
    const uint32_t offset = row * bytes + uint32_t(i % 4) * 32 + half * kChunkBytes;
    const uint32_t swizzled = offset ^ ((offset >> 7 & (bytes / kChunkBytes - 1)) << 4);
    ldmatrix_x4(to[i].x, rows + (tail ? Rows::tail(kSide) : Rows::piece(kSide, piece)) + swizzled);
  }
}

// Multiplies the i-th 16 columns of A with the corresponding rows of a side of the tile. If not
// `adds`, overwrites the sums.
template <class C, int kSide>
__device__ inline void wgmma_down(float (&sums)[C::kOutTiles][4], const FragmentA& a, uint32_t tile,
                                  int i, bool adds = true) {
  using Tile = typename C::Tile;
  constexpr int kWhole = C::kOutTiles - C::kTailTiles;
  const uint32_t rows = 16 * uint32_t(i);
  wgmma<typename C::T, true>(reinterpret_cast<float (&)[kWhole][4]>(sums), a.x,
                             tile_descriptor<C>(tile, C::kRowBytes, Swizzle::bytes128) +
                                 further(Tile::piece(kSide, 0) + C::kRowBytes * rows),
                             adds);
  if constexpr (C::kTail > 0) {
    wgmma<typename C::T, true>(reinterpret_cast<float (&)[C::kTailTiles][4]>(sums[kWhole]), a.x,
                               tile_descriptor<C>(tile, C::kTailRowBytes, C::kTailSwizzle) +
                                   further(Tile::tail(kSide) + C::kTailRowBytes * rows),
                               adds);
  }
}

// The same for a tile of the forward's values.
template <class C, int kSide>
__device__ inline void wgmma_values(float (&sums)[C::kOutTiles][4], const FragmentA& a,
                                    uint32_t tile, int i) {
  if constexpr (C::kPanels) {
    const uint32_t rows = 16 * uint32_t(i);
    wgmma<typename C::T, true>(
        sums, a.x,
        matrix_descriptor(tile, C::kPanelBytes, 8 * C::kTailRowBytes, C::kTailSwizzle) +
            further(C::panel(kSide, 0) + C::kTailRowBytes * rows),
        true);
  } else {
    wgmma_down<C, kSide>(sums, a, tile, i);
  }
}

// Hides a tile's columns from `left` on: their scores become -inf. All else that belongs to them is
// zero, since copies fill rows past the end with zeros. `column`: the lane's first column.
template <int kTiles>
__device__ inline void hide_past(float (&s)[kTiles][4], int column, int left) {
#pragma unroll
  for (int j = kTiles - 1; j >= 0; --j) {
    if (8 * j + 8 <= left) break;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (8 * j + e % 2 < left - column) continue;
      s[j][e] = -INFINITY;
    }
  }
}

// Stores sixteen rows of sums, where neighbouring lanes exchange pairs so that a quad writes 32
// contiguous bytes of a row. `to`: the head's first row; `first`: the lane's row g, of `rows`.
template <typename T, int kOutTiles>
__device__ inline void store_sums(const float (&sums)[kOutTiles][4], T* to, int64_t row_stride,
                                  int first, int rows, int lane) {
  static_assert(sizeof(T) == 2 && kOutTiles % 2 == 0, "pairs of 8-column tiles");
  const bool odd = (lane & 1) != 0;
  to += first * row_stride + 8 * (lane & 1) + 2 * (lane & 2);
#pragma unroll
  for (int h = 0; h < 2; ++h, to += 8 * row_stride) {
    uint2 w[kOutTiles / 2];
#pragma unroll
    for (int n = 0; n < kOutTiles; n += 2) {
      const uint32_t even_tile = pack2<T>(sums[n][2 * h], sums[n][2 * h + 1]);
      const uint32_t odd_tile = pack2<T>(sums[n + 1][2 * h], sums[n + 1][2 * h + 1]);
      const uint32_t other = shuffle_xor(odd ? even_tile : odd_tile, 1);
      w[n / 2] = {odd ? other : even_tile, odd ? odd_tile : other};
    }
    if (first + 8 * h >= rows) continue;
#pragma unroll
    for (int i = 0; i < kOutTiles / 2; ++i) {
      __stwb(assume_aligned<8>(reinterpret_cast<uint2*>(to + 16 * i)), w[i]);
    }
  }
}

}  // namespace pmf::cuda
