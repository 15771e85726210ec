// Values as tables store them, sixteen at a time, made floats at each level.
//
// A level's rows define `widen` for values of 32, 16 and 8 bits; see `rows_of`.
#pragma once

#include <algorithm>

#include "cpu.h"

namespace fx {

// Sixteen values of `Bits` each: fp32, bf16, signed 8-bit codes, or 4-bit codes of which the lower
// half of a byte is the first.
template <int Bits>
using Stored [[gnu::vector_size(kLanes * Bits / 8)]] = uint8_t;

struct PortableRows {
  static Floats widen(Stored<32> values) { return std::bit_cast<Floats>(values); }
  static Floats widen(Stored<16> values) { return to_floats(std::bit_cast<Halves>(values)); }
  static Floats widen(Stored<8> codes) {
    // Twice as wide in each step; in one step the compiler would take the codes one by one.
    using Codes [[gnu::vector_size(16)]] = int8_t;
    using Shorts [[gnu::vector_size(32)]] = int16_t;
    const auto shorts = __builtin_convertvector(std::bit_cast<Codes>(codes), Shorts);
    return to_floats(__builtin_convertvector(shorts, Ints));
  }
};

inline PortableRows rows_of(Portable) { return {}; }

#if FX_AVX2
struct Avx2Rows : PortableRows {
  using PortableRows::widen;
  static Floats widen(Stored<8> codes) {
    const __m128i low = __m128i(codes), high = _mm_unpackhi_epi64(low, low);
    const __m256i halves[2] = {_mm256_cvtepi8_epi32(low), _mm256_cvtepi8_epi32(high)};
    return to_floats(load_as<Ints>(halves));
  }
};

inline Avx2Rows rows_of(Avx2) { return {}; }
#endif

#if FX_AVX512
struct Avx512Rows : PortableRows {
  using PortableRows::widen;
  static Floats widen(Stored<16> values) {
    return Floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(__m256i(values)), 16));
  }
  static Floats widen(Stored<8> codes) {
    return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(__m128i(codes))));
  }
};

inline Avx512Rows rows_of(Avx512Vnni) { return {}; }
#if FX_VBMI2
inline Avx512Rows rows_of(Avx512Vbmi2) { return {}; }
#endif
#endif

template <class Rows, int Bits>
Floats widen(Stored<Bits> values) {
  if constexpr (Bits == 4) {
    using Pairs [[gnu::vector_size(16)]] = uint16_t;
    const auto pairs = __builtin_convertvector(values, Pairs);
    return Rows::widen(std::bit_cast<Stored<8>>((pairs | pairs << 4) & 0x0f0f));
  } else {
    return Rows::widen(values);
  }
}

// The first `count` of sixteen values; the others are zero bits.
template <class Rows, int Bits>
Floats load(const uint8_t* from, int64_t count) {
  if (count == kLanes) return widen<Rows, Bits>(load_as<Stored<Bits>>(from));
  Stored<Bits> values{};
  std::memcpy(&values, from, (count * Bits + 7) / 8);
  return widen<Rows, Bits>(values);
}

}  // namespace fx
