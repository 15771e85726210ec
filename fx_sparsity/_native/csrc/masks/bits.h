// Masks as bits: eight elements a byte, the lowest bit first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "keys.h"

namespace fx {

// Which of 64 elements are not zero, a bit each; `strange` gathers whether one is not `one` either.
template <class Out>
inline uint64_t pack64(const Out* x, Out one, uint64_t& strange) {
#if FX_AVX512
  uint64_t kept = 0, ones = 0;
  if constexpr (sizeof(Out) == 1) {
    const __m512i v = _mm512_loadu_si512(x);
    kept = _mm512_test_epi8_mask(v, v);
    ones = _mm512_cmpeq_epi8_mask(v, _mm512_set1_epi8(char(one)));
  } else if constexpr (sizeof(Out) == 2) {
    for (int i = 0; i < 2; i++) {
      const __m512i v = _mm512_loadu_si512(x + 32 * i);
      kept |= uint64_t(_mm512_test_epi16_mask(v, v)) << (32 * i);
      ones |= uint64_t(_mm512_cmpeq_epi16_mask(v, _mm512_set1_epi16(short(one)))) << (32 * i);
    }
  } else {
    for (int i = 0; i < 4; i++) {
      const __m512i v = _mm512_loadu_si512(x + 16 * i);
      kept |= uint64_t(_mm512_test_epi32_mask(v, v)) << (16 * i);
      ones |= uint64_t(_mm512_cmpeq_epi32_mask(v, _mm512_set1_epi32(int(one)))) << (16 * i);
    }
  }
  strange |= kept ^ ones;
  return kept;
#else
  constexpr uint64_t kGather = 0x0102040810204080;  // eight bytes of 0 or 1 to the bits of the top
  uint8_t kept[64];
  bool odd = false;
  for (int i = 0; i < 64; i++) {
    kept[i] = x[i] != 0;
    odd |= (x[i] != 0) & (x[i] != one);
  }
  strange |= odd;
  uint64_t bits = 0;
  for (int i = 0; i < 8; i++) {
    uint64_t eight;
    std::memcpy(&eight, kept + 8 * i, 8);
    bits |= ((eight * kGather) >> 56) << (8 * i);
  }
  return bits;
#endif
}

// Packs `n` elements; returns whether all are zero or one.
template <class Out>
bool pack(const Out* x, int64_t n, Out one, uint8_t* bits) {
  uint64_t strange = 0;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const uint64_t kept = pack64(x + i, one, strange);
    std::memcpy(bits + i / 8, &kept, 8);
  }
  if (i < n) {
    Out rest[64] = {};
    std::copy(x + i, x + n, rest);
    const uint64_t kept = pack64(rest, one, strange);
    std::memcpy(bits + i / 8, &kept, (n - i + 7) / 8);
  }
  return !strange;
}

}  // namespace fx
