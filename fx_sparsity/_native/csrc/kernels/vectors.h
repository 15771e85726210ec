// Sixteen lanes as the compiler's own vectors: one register, two or four, whatever there is.
//
// For code that is not worth instructions chosen by hand: activations, epilogue, portable kernels.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace fx {

constexpr int kLanes = 16;

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));
using Bytes = uint8_t __attribute__((vector_size(16)));

struct BFloat {
  uint16_t bits;
};

// Of NaN and a bound, the NaN: comparisons with it are false.
inline Floats at_least(Floats x, float low) { return x < low ? Floats{} + low : x; }
inline Floats at_most(Floats x, float high) { return x > high ? Floats{} + high : x; }

// To the nearest integer, ties to even; for |x| < 2^22, and clamped to that.
inline Floats round(Floats x) {
  constexpr float big = 0x1.8p23f;
  Floats shifted = at_most(at_least(x, -0x1p22f), 0x1p22f) + big;
  asm("" : "+m"(shifted));  // no algebra: x + big - big is meant
  return shifted - big;
}

inline Ints to_ints(Floats x) { return __builtin_convertvector(x, Ints); }
inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

inline Floats to_floats(Halves bits) {
  return std::bit_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
}

// Rounded to the nearest bf16, ties to even; NaN stays NaN.
inline Halves to_bfloats(Floats x) {
  const Words bits = std::bit_cast<Words>(x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40u, Halves);
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

template <class V, class T>
V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The first `count` of 16 elements as floats, the others 0.
inline Floats load_floats(const float* p, int64_t count = kLanes) {
  if (count >= kLanes) return load_as<Floats>(p);
  Floats v{};
  std::memcpy(&v, p, count * sizeof *p);
  return v;
}

inline Floats load_floats(const BFloat* p, int64_t count = kLanes) {
  if (count >= kLanes) return to_floats(load_as<Halves>(p));
  Halves v{};
  std::memcpy(&v, p, count * sizeof *p);
  return to_floats(v);
}

inline void store_floats(Floats v, float* p, int64_t count = kLanes) {
  std::memcpy(p, &v, (count < kLanes ? count : kLanes) * sizeof *p);
}

inline void store_floats(Floats v, BFloat* p, int64_t count = kLanes) {
  const Halves halves = to_bfloats(v);
  std::memcpy(p, &halves, (count < kLanes ? count : kLanes) * sizeof *p);
}

}  // namespace fx
