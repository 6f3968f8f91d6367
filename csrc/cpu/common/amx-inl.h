// Intel AMX: products of bf16 on the eight tile registers of 16 rows by 64 bytes.
//
// tdpbf16ps multiplies a tile A of 16 rows by 16 pairs with a tile B of 16 pairs by 16 columns and
// adds the product to a tile C of 16 x 16 floats: 16384 FLOPs in 16 cycles, eight times vdpbf16ps
// at two per cycle. A tile is loaded in 8 cycles and stored in 16 (Intel's optimization manual).
// Denormals are treated as zero.
//
// The instructions are written out because the compiler's macros take no template parameters as
// tile numbers, and because GCC's tell it nothing of the memory that they read. Only multiply_tiles
// in tile_gemm-inl.h uses them; it begins with sync_memory(), and every store has the same effect.
#pragma once

#include "cpu/common/simd-inl.h"

namespace pmf::cpu::PMF_LEVEL {

constexpr int64_t kAmxRows = 16, kAmxPairs = 16, kAmxColumns = 16;

#if defined(__AMX_BF16__)
constexpr bool kAmx = true;

// Configures the calling thread's tile registers during its lifetime. Afterwards they are released,
// so that other libraries find them unused and the operating system need not save them.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = kAmxColumns * 4;
      shape.rows[tile] = kAmxRows;
    }
    static_assert(sizeof(shape) == 64, "");
    __asm__ volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileRegisters() { __asm__ volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

PMF_INLINE void sync_memory() { __asm__ volatile("" ::: "memory"); }

template <int kTile>
PMF_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
PMF_INLINE void load_tile(const void* p, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(kTile));
}
template <int kTile>
PMF_INLINE void store_tile(void* p, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(kTile)
                   : "memory");
}
// C += A B.
template <int kC, int kA, int kB>
PMF_INLINE void multiply_tile() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#else
constexpr bool kAmx = false;

class TileRegisters {
 public:
  TileRegisters() {}
};

#endif

}  // namespace pmf::cpu::PMF_LEVEL
