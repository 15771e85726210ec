// Masks as bits: the lowest bit first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "keys.h"
#include "scratch.h"

namespace fx {

// A bit for each of `n` things, set where it is kept. Threads write to words of their own.
class Bits {
 public:
  explicit Bits(int64_t n) : words_(scratch<uint64_t>(n / 64 + 2)) {}

  bool operator[](int64_t i) const { return words_[i / 64] >> (i % 64) & 1; }
  uint64_t* words(int64_t i) { return words_.get() + i / 64; }

  // The 64 from the i-th on; those after the last are anything.
  uint64_t from(int64_t i) const {
    const uint64_t* word = words_.get() + i / 64;
    const int shift = i % 64;
    return shift ? word[0] >> shift | word[1] << (64 - shift) : word[0];
  }

 private:
  Scratch<uint64_t> words_;
};

// The lowest bits of 64 bytes of 0 or 1.
inline uint64_t bits_of_bytes(const uint8_t* bytes) {
#if FX_AVX512
  const __m512i v = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(v, v);
#else
  constexpr uint64_t kGather = 0x0102040810204080;  // eight bytes to the bits of the top
  uint64_t bits = 0;
  for (int i = 0; i < 8; i++) {
    uint64_t eight;
    std::memcpy(&eight, bytes + 8 * i, 8);
    bits |= ((eight * kGather) >> 56) << (8 * i);
  }
  return bits;
#endif
}

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
  uint8_t kept[64];
  bool odd = false;
  for (int i = 0; i < 64; i++) {
    kept[i] = x[i] != 0;
    odd |= (x[i] != 0) & (x[i] != one);
  }
  strange |= odd;
  return bits_of_bytes(kept);
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

// The opposite: 64 elements from their bits.
template <class Out>
inline void unpack64(uint64_t kept, Out one, Out* x) {
#if FX_AVX512
  if constexpr (sizeof(Out) == 1) {
    _mm512_storeu_si512(x, _mm512_maskz_set1_epi8(kept, char(one)));
  } else if constexpr (sizeof(Out) == 2) {
    for (int i = 0; i < 2; i++) {
      const __mmask32 part = uint32_t(kept >> (32 * i));
      _mm512_storeu_si512(x + 32 * i, _mm512_maskz_set1_epi16(part, short(one)));
    }
  } else {
    for (int i = 0; i < 4; i++) {
      const __mmask16 part = uint16_t(kept >> (16 * i));
      _mm512_storeu_si512(x + 16 * i, _mm512_maskz_set1_epi32(part, int(one)));
    }
  }
#else
  constexpr uint64_t kOnes = 0x0101010101010101, kOwnBit = 0x8040201008040201;
  uint8_t bytes[64];
  for (int i = 0; i < 8; i++) {
    const uint64_t own = (kept >> (8 * i) & 0xff) * kOnes & kOwnBit;
    const uint64_t eight = (own + 0x7f * kOnes) >> 7 & kOnes;  // no byte carries into the next
    std::memcpy(bytes + 8 * i, &eight, 8);
  }
  for (int i = 0; i < 64; i++) x[i] = bytes[i] ? one : Out(0);
#endif
}

}  // namespace fx
