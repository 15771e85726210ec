// The arithmetic of one step in two 256-bit registers; see lanes_portable.h for what it is made of.
#pragma once

#include <immintrin.h>

#include <array>

#include "lanes_portable.h"

namespace fx {
namespace avx2 {

// For each mask of 8 bits: which of the next values goes to each place, -128 where none does.
inline constexpr auto kPlaces = [] {
  std::array<std::array<int8_t, 8>, 256> table{};
  for (int mask = 0; mask < 256; mask++) {
    for (int bit = 0, next = 0; bit < 8; bit++) table[mask][bit] = mask >> bit & 1 ? next++ : -128;
  }
  return table;
}();

// The same for the bytes of 16-bit values.
inline constexpr auto kPlaces16 = [] {
  std::array<std::array<int8_t, 16>, 256> table{};
  for (int mask = 0; mask < 256; mask++) {
    for (int bit = 0; bit < 8; bit++) {
      const int place = kPlaces[mask][bit];
      table[mask][2 * bit] = place < 0 ? -128 : 2 * place;
      table[mask][2 * bit + 1] = place < 0 ? -128 : 2 * place + 1;
    }
  }
  return table;
}();

inline __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

struct Step {
  __m256i low, high;  // outputs 0 to 7, 8 to 15
};

// Eight values of 32 bits, 16 of 16 bits or 32 of 8 bits; `p` moves past those that are used.
inline __m256i expand_half(uint8_t mask, const float*& p) {
  const __m256i places = _mm256_cvtepi8_epi32(load8(kPlaces[mask].data()));
  const __m256 values = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), places);
  p += std::popcount(mask);
  // A place's sign says that there is no value.
  return _mm256_castps_si256(
      _mm256_blendv_ps(values, _mm256_setzero_ps(), _mm256_castsi256_ps(places)));
}

inline __m128i expand8(uint8_t mask, const BFloat*& p) {
  const __m128i values = _mm_shuffle_epi8(load16(p), load16(kPlaces16[mask].data()));
  p += std::popcount(mask);
  return values;
}

inline __m256i expand_half(uint16_t mask, const BFloat*& p) {
  const __m128i low = expand8(uint8_t(mask), p);
  return _mm256_set_m128i(expand8(uint8_t(mask >> 8), p), low);
}

inline __m128i expand8(uint8_t mask, const int8_t*& p) {
  const __m128i values = _mm_shuffle_epi8(load8(p), load8(kPlaces[mask].data()));
  p += std::popcount(mask);
  return values;
}

inline __m256i expand_half(uint32_t mask, const int8_t*& p) {
  const __m128i a = expand8(uint8_t(mask), p), b = expand8(uint8_t(mask >> 8), p);
  const __m128i c = expand8(uint8_t(mask >> 16), p), d = expand8(uint8_t(mask >> 24), p);
  return _mm256_set_m128i(_mm_unpacklo_epi64(c, d), _mm_unpacklo_epi64(a, b));
}

struct Registers {
  static constexpr int kChains = 4;
  static constexpr int kStreams = 4;
  static constexpr int kDirectRows = 4;
  static constexpr int kTileRows = 6;
  static constexpr int kTilePanels = 1;
};

template <class ValueT, class HalfMask>
struct Steps : Registers {
  using Value = ValueT;
  using Step = avx2::Step;
  static Step load(const Value* p) { return {load32(p), load32(p + 32 / sizeof(Value))}; }
  template <class Bits>
  static Step expand(Bits mask, const Value* p) {
    const __m256i low = expand_half(HalfMask(mask), p);
    return {low, expand_half(HalfMask(mask >> (8 * sizeof(HalfMask))), p)};
  }
};

// Products of fp32: everything wider than a float is made of `Group` floats a lane.
template <class ValueT, class HalfMask, int Group>
struct FloatMath : Steps<ValueT, HalfMask> {
  using Input = float;
  static constexpr int kGroup = Group;
  static constexpr bool kInteger = false;
  struct Sum {
    __m256 low, high;
  };
  struct Weights {
    Sum group[Group];
  };
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    for (int j = 0; j < Group; j++) {
      const __m256 input = _mm256_broadcast_ss(x + j);
      sum.low = _mm256_fmadd_ps(w.group[j].low, input, sum.low);
      sum.high = _mm256_fmadd_ps(w.group[j].high, input, sum.high);
    }
    return sum;
  }
  static Sum add(Sum a, Sum b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
};

struct F32 : FloatMath<float, uint8_t, 1> {
  static Weights widen(const Step& s) {
    return {{{_mm256_castsi256_ps(s.low), _mm256_castsi256_ps(s.high)}}};
  }
};

struct BF16 : FloatMath<BFloat, uint16_t, 2> {
  static __m256 first(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
  static __m256 second(__m256i v) {
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int32_t(0xffff0000u))));
  }
  static Weights widen(const Step& s) {
    return {{{first(s.low), first(s.high)}, {second(s.low), second(s.high)}}};
  }
};

struct W8 : FloatMath<int8_t, uint32_t, 4> {
  template <int j>
  static __m256 codes(__m256i v) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * j), 24));
  }
  static Weights widen(const Step& s) {
    return {{{codes<0>(s.low), codes<0>(s.high)},
             {codes<1>(s.low), codes<1>(s.high)},
             {codes<2>(s.low), codes<2>(s.high)},
             {codes<3>(s.low), codes<3>(s.high)}}};
  }
};

// Products in 16 bits would saturate (vpmaddubsw), so even and odd codes are widened first.
struct I8 : Steps<int8_t, uint32_t> {
  using Input = uint8_t;
  static constexpr int kGroup = 4;
  static constexpr bool kInteger = true;
  struct Sum {
    __m256i low, high;
  };
  struct Weights {
    Sum even, odd;
  };
  static __m256i evens(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
  static Weights widen(const Step& s) {
    return {
        {evens(s.low), evens(s.high)}, {_mm256_srai_epi16(s.low, 8), _mm256_srai_epi16(s.high, 8)}};
  }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    const __m256i even = _mm256_set1_epi32(bits & 0x00ff00ff);
    const __m256i odd = _mm256_set1_epi32((bits >> 8) & 0x00ff00ff);
    sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(w.even.low, even));
    sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(w.even.high, even));
    sum.low = _mm256_add_epi32(sum.low, _mm256_madd_epi16(w.odd.low, odd));
    sum.high = _mm256_add_epi32(sum.high, _mm256_madd_epi16(w.odd.high, odd));
    return sum;
  }
  static Sum add(Sum a, Sum b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
  }
};

}  // namespace avx2

struct Avx2 {
  using F32 = avx2::F32;
  using BF16 = avx2::BF16;
  using I8 = avx2::I8;
  template <class X>
  using W8 = avx2::W8;
};

}  // namespace fx
