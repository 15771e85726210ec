// Elements as unsigned integers that sort as the elements do.
//
// Every weight dtype widens exactly to fp32, so one 32-bit key serves them all, and keys of tensors
// of different dtypes compare. Clearing the sign bit ranks by magnitude; otherwise negative numbers
// are mirrored below the positive ones, and -0.0 is +0.0.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__BMI2__)
#include <immintrin.h>
#define FX_AVX512 1
#else
#define FX_AVX512 0
#endif

namespace fx {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline uint32_t float_bits(float x) {
  return std::bit_cast<uint32_t>(x);
}

inline uint32_t float_bits(BFloat x) {
  return uint32_t(x.bits) << 16;
}

// Shifted into place, a half's exponent is short of fp32's by 112; a product mends that, denormals
// included. Infinity and NaN alone have a fixed exponent.
inline uint32_t float_bits(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<uint32_t>(scaled) | special | (uint32_t(x.bits & 0x8000u) << 16);
}

template <bool Signed>
constexpr uint32_t ordered(uint32_t bits) {
  if constexpr (!Signed) return bits & 0x7fffffffu;
  const uint32_t canonical = bits == 0x80000000u ? 0u : bits;
  return canonical ^ (uint32_t(int32_t(canonical) >> 31) | 0x80000000u);
}

#if FX_AVX512
inline __m512i float_bits16(const float* p) {
  return _mm512_loadu_si512(p);
}

inline __m512i float_bits16(const BFloat* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

inline __m512i float_bits16(const Half* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castps_si512(_mm512_cvtph_ps(half));
}

inline __m256 float8(const float* p) {
  return _mm256_loadu_ps(p);
}

inline __m256 float8(const BFloat* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline __m256 float8(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <bool Signed>
inline __m512i ordered16(__m512i bits) {
  if constexpr (!Signed) return _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i negative_zero = _mm512_set1_epi32(int32_t(0x80000000u));
  const __mmask16 is_zero = _mm512_cmpeq_epi32_mask(bits, negative_zero);
  bits = _mm512_mask_mov_epi32(bits, is_zero, _mm512_setzero_si512());
  return _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), negative_zero));
}
#endif

// The keys of a dense array of elements. Numbers have those from `kLeast` to `kMost`; NaN others.
template <class T, bool Signed>
struct Elements {
  static constexpr uint32_t kLeast = Signed ? ordered<true>(0xff800000u) : 0u;
  static constexpr uint32_t kMost = ordered<Signed>(0x7f800000u);
  const T* data;

  uint32_t operator[](int64_t i) const { return ordered<Signed>(float_bits(data[i])); }
#if FX_AVX512
  __m512i sixteen(int64_t i) const { return ordered16<Signed>(float_bits16(data + i)); }
#endif
};

// Keys that are computed already: those of block means, of which none is NaN.
struct Keys {
  static constexpr uint32_t kLeast = 0, kMost = UINT32_MAX;
  const uint32_t* data;

  uint32_t operator[](int64_t i) const { return data[i]; }
#if FX_AVX512
  __m512i sixteen(int64_t i) const { return _mm512_loadu_si512(data + i); }
#endif
};

// A mean as a key. Its fp64 bits keep the exponent whole, so that nothing under- or overflows, and
// 20 bits of the fraction (21 where no sign is needed): a relative difference of 1e-6 survives.
template <bool Signed>
inline uint32_t mean_key(double mean) {
  const uint64_t bits = std::bit_cast<uint64_t>(mean + 0.0);
  if constexpr (!Signed) return uint32_t(bits >> 31);
  return uint32_t((bits ^ (uint64_t(int64_t(bits) >> 63) | (1ull << 63))) >> 32);
}

#if FX_AVX512
template <bool Signed>
inline __m256i mean_keys8(__m512d means) {
  const __m512i bits = _mm512_castpd_si512(_mm512_add_pd(means, _mm512_setzero_pd()));
  if constexpr (!Signed) return _mm512_cvtepi64_epi32(_mm512_srli_epi64(bits, 31));
  const __m512i flip = _mm512_or_si512(_mm512_srai_epi64(bits, 63), _mm512_set1_epi64(1ll << 63));
  return _mm512_cvtepi64_epi32(_mm512_srli_epi64(_mm512_xor_si512(bits, flip), 32));
}
#endif

// Calls `work(keys, at, count)` for keys [begin, end), a few in memory at a time.
template <class Source, class Work>
void for_each_run(Source source, int64_t begin, int64_t end, const Work& work) {
  constexpr int64_t kRun = 1024;
  uint32_t keys[kRun];
  for (int64_t at = begin; at < end; at += kRun) {
    const int64_t count = std::min(kRun, end - at);
    int64_t i = 0;
#if FX_AVX512
    for (; i + 16 <= count; i += 16) _mm512_storeu_si512(keys + i, source.sixteen(at + i));
#endif
    for (; i < count; i++) keys[i] = source[at + i];
    work(keys, at, count);
  }
}

}  // namespace fx
