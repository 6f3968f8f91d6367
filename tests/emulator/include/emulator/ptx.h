// The building blocks of kernels translated from PTX (tests/helpers/ptx). Each kernel is a separate
// library, loaded on its first launch; it does everything outside its registers through Device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "emulator/runtime.h"

namespace pmf::emulator::ptx {

// The machine's interface to a translated kernel. `line` is an instruction's line in the PTX: all
// lanes of a warp must reach an .aligned instruction at the same line.
class Device {
 public:
  virtual Index thread_index() const = 0;
  virtual Index block_index() const = 0;
  virtual Index block_size() const = 0;
  virtual Index grid_size() const = 0;
  virtual unsigned char* shared() const = 0;

  virtual void access(const void* address, size_t bytes, bool write) const = 0;
  virtual void copy(void* to, const void* from, uint32_t bytes, uint32_t source_bytes) const = 0;
  virtual void commit_copies() const = 0;
  virtual void wait_for_copies(int pending) const = 0;

  virtual uint32_t shuffle(Shuffle how, uint32_t bits, uint32_t amount, uint32_t clamp,
                           uint32_t lanes) const = 0;
  virtual uint32_t ballot(bool value, uint32_t lanes) const = 0;
  virtual void sync_warp(uint32_t lanes) const = 0;
  virtual void barrier(int line, uint32_t id, uint32_t threads) const = 0;
  virtual Word4 load_matrices(int line, const void* row, int count, bool transposed) const = 0;
  virtual Float4 multiply(int line, Element element, Float4 c, Word4 a, uint64_t b) const = 0;

  virtual void mbarrier_init(uint32_t barrier, uint32_t arrivals) const = 0;
  virtual void mbarrier_init_fence() const = 0;
  virtual void mbarrier_arrive(uint32_t barrier, uint32_t bytes) const = 0;
  virtual bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) const = 0;
  virtual void fence_proxy_async() const = 0;
  virtual uint32_t peer_address(uint32_t address, uint32_t block) const = 0;
  virtual void cluster_arrive(int line) const = 0;
  virtual void cluster_wait(int line) const = 0;
  virtual void copy_box(uint32_t to, const void* map, uint32_t barrier, Word4 place,
                        uint32_t blocks) const = 0;
  virtual void prefetch(uint64_t address, uint32_t bytes) const = 0;
  virtual void wgmma(int line, const Product& product, float* sums, const uint32_t* a) const = 0;
  virtual void wgmma_fence(int line) const = 0;
  virtual void wgmma_commit(int line) const = 0;
  virtual void wgmma_wait(int line, int pending) const = 0;
  virtual float waited_for(float x) const = 0;
  virtual bool elect_one(uint32_t lanes) const = 0;
  virtual void set_registers(int line, int count, bool more) const = 0;

  virtual uint16_t to_half(float x) const = 0;
  virtual float from_half(uint16_t bits) const = 0;
  [[noreturn]] virtual void trap() const = 0;
};

// ---- registers ----------------------------------------------------------------------------------

// For each of a kernel's many instructions that needs a function, here is one that is no template:
// g++ took three quarters of its time to choose template arguments.

inline float as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
inline double as_double(uint64_t x) { return __builtin_bit_cast(double, x); }
inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline uint64_t bits_of(double x) { return __builtin_bit_cast(uint64_t, x); }

// The contents of registers before they are written: values that do not go unnoticed.
constexpr bool unwritten_bool = false;
constexpr uint8_t unwritten_uint8_t = 0xa5;
constexpr uint16_t unwritten_uint16_t = 0xa5a5;
constexpr uint32_t unwritten_uint32_t = 0xa5a5a5a5;
constexpr uint64_t unwritten_uint64_t = 0xa5a5a5a5a5a5a5a5;
constexpr float unwritten_float = __builtin_nanf("");
constexpr double unwritten_double = __builtin_nan("");

// Called after a wait, for each register that may hold a sum of a pending product.
inline void settle(const Device& d, float& x) {
  if (held_sum(bits_of(x))) x = d.waited_for(x);
}

// ---- memory -------------------------------------------------------------------------------------

inline unsigned char* shared_at(const Device& d, uint32_t address) {
  return d.shared() + (int64_t{address} - kSharedWindow);
}
inline uint32_t shared_address(const Device& d, uint64_t generic) {
  return static_cast<uint32_t>(generic - reinterpret_cast<uint64_t>(d.shared()) + kSharedWindow);
}

template <typename T, int kCount>
struct Vector {
  T of[kCount];
};

template <typename T, int kCount>
inline Vector<T, kCount> fetch(const void* address) {
  Vector<T, kCount> result;
  __builtin_memcpy(&result, address, sizeof(result));
  return result;
}

template <typename T, int kCount>
inline Vector<T, kCount> load(const Device& d, const void* address) {
  d.access(address, sizeof(Vector<T, kCount>), false);
  return fetch<T, kCount>(address);
}

template <typename T, int kCount>
inline void store(const Device& d, void* address, const Vector<T, kCount>& value) {
  d.access(address, sizeof(value), true);
  __builtin_memcpy(address, &value, sizeof(value));
}

// ---- integers -----------------------------------------------------------------------------------

inline uint16_t shift_left(uint16_t x, uint32_t by) { return by < 16 ? uint16_t(x << by) : 0; }
inline uint32_t shift_left(uint32_t x, uint32_t by) { return by < 32 ? x << by : 0; }
inline uint64_t shift_left(uint64_t x, uint32_t by) { return by < 64 ? x << by : 0; }
inline uint16_t shift_right(uint16_t x, uint32_t by) { return by < 16 ? uint16_t(x >> by) : 0; }
inline uint32_t shift_right(uint32_t x, uint32_t by) { return by < 32 ? x >> by : 0; }
inline uint64_t shift_right(uint64_t x, uint32_t by) { return by < 64 ? x >> by : 0; }
// Signed numbers keep their sign (arithmetic shift).
inline int16_t shift_right(int16_t x, uint32_t by) { return int16_t(x >> (by < 16 ? by : 15)); }
inline int32_t shift_right(int32_t x, uint32_t by) { return x >> (by < 32 ? by : 31); }
inline int64_t shift_right(int64_t x, uint32_t by) { return x >> (by < 64 ? by : 63); }

// Division by zero and overflow, which the ISA leaves undefined, return arbitrary values here.
template <typename T>
inline T divide(T a, T b) {
  if (b == 0) return T(-1);
  if (std::is_signed_v<T> && b == T(-1)) return T(0 - std::make_unsigned_t<T>(a));
  return a / b;
}
template <typename T>
inline T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return a % b;
}

inline uint32_t insert_bits(uint32_t field, uint32_t into, uint32_t position, uint32_t length) {
  position &= 0xff, length &= 0xff;
  if (position > 31 || length == 0) return into;
  const uint32_t ones = length > 31 ? ~0u : (1u << length) - 1;
  return (into & ~(ones << position)) | ((field & ones) << position);
}

// ---- floating point -----------------------------------------------------------------------------

inline uint16_t to_bf16(float x) {
  const uint32_t word = bits_of(x);
  return x != x ? 0x7fffu : static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

// Rounds to nearest, ties away from zero: adds half a unit of the tenth bit to the magnitude.
inline uint32_t to_tf32(float x) {
  const uint32_t word = bits_of(x);
  const bool finite = (word & 0x7f800000u) != 0x7f800000u;
  return (finite ? word + 0x1000u : word) & 0xffffe000u;
}

inline float saturate(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline int32_t to_s32(float x) {
  if (x != x) return 0;
  if (x >= 0x1p31f) return INT32_MAX;
  return x < -0x1p31f ? INT32_MIN : static_cast<int32_t>(x);
}

// a b + c rounded down: the nearest float, or the one below if that exceeds the exact result. The
// product is exact in double, the sum in two doubles (Knuth's two-sum).
inline float fma_down(float a, float b, float c) {
  const float nearest = __builtin_fmaf(a, b, c);
  const double product = double(a) * b, sum = product + c, back = sum - product;
  const double rest = (product - (sum - back)) + (c - back);
  const bool above = nearest > sum || (nearest == sum && rest < 0.0);
  return above ? __builtin_nextafterf(nearest, -__builtin_inff()) : nearest;
}

// .approx functions are exact here; .ftz flushes subnormal numbers to zero.
inline float flushed(float x) {
  return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x;
}
inline float exp2_approx(float x) { return flushed(__builtin_exp2f(flushed(x))); }
inline float log2_approx(float x) { return __builtin_log2f(flushed(x)); }
inline float rcp_approx(float x) { return flushed(1.0f / flushed(x)); }
// Keeps the upper half of the bits and zeroes the rest.
inline double rcp_approx(double x) { return as_double(bits_of(1.0 / x) & 0xffffffff00000000ull); }

}  // namespace pmf::emulator::ptx
