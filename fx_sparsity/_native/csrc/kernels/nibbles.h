// The arithmetic of 4-bit codes: a step is 16 outputs times 8 inputs, output by output, in 64 bytes.
//
// In each output's four bytes, the lower halves are the codes of the first four inputs, the upper
// halves those of the other four, so that either become a step of 8-bit codes by a mask alone.
// What such an arithmetic ("Math") has, beside the Input, Sum, dot and numbers of lanes_portable.h:
//   Bytes            64 bytes as packed
//   load(p) -> Bytes, expand(mask, p, fill) -> Bytes
//   fill(zero_points) -> Fill, the bytes of which expand makes what no bit of the mask is set for
//   widen(a, b) -> Weights, by the lower halves of `a` and the upper ones of `b`
//   kFactor          the number of times that sums are too large
//   place(j)         which of 8 inputs comes at place j among the activations that `dot` reads
// A level names them by its codes' activations: I4 by uint8, F4<X> by floats.
#pragma once

#include "cpu.h"

namespace fx {

using Codes16 [[gnu::vector_size(16)]] = int8_t;

// By way of a level's arithmetic of 8-bit codes.
template <class Eight, class Halves>
struct Nibbles : Eight {
  using Bytes = typename Eight::Step;
  static constexpr int kGroup = 8;
  static constexpr float kFactor = 1;
  struct Weights {
    typename Eight::Weights low, high;
  };
  static constexpr int place(int j) { return j; }
  static Bytes load(const uint8_t* p) { return Eight::load(reinterpret_cast<const int8_t*>(p)); }
  using Fill = Codes16;
  static Fill fill(const int8_t* zero_points) {
    const auto codes = load_as<Codes16>(zero_points);
    return (codes & 15) | (codes << 4);
  }
  static Bytes expand(uint64_t mask, const uint8_t* p, const Fill& fill) {
    const Bytes kept = Eight::expand(mask, reinterpret_cast<const int8_t*>(p));
    if (const Codes16 none{}; !std::memcmp(&fill, &none, sizeof none)) return kept;
    int8_t bytes[64];
    std::memcpy(bytes, &kept, sizeof bytes);
    for (int i = 0; i < 64; i++) bytes[i] = mask >> i & 1 ? bytes[i] : fill[i / 4];
    return Eight::load(bytes);
  }
  static Weights widen(const Bytes& a, const Bytes& b) {
    return {Eight::widen(Halves::low(a)), Eight::widen(Halves::high(b))};
  }
  static typename Eight::Sum dot(
      typename Eight::Sum sum, const Weights& w, const typename Eight::Input* x) {
    return Eight::dot(Eight::dot(sum, w.low, x), w.high, x + 4);
  }
};

struct PortableHalves {
  template <class Step>
  static Step low(Step step) {
    for (int8_t& byte : step.elements) byte = int8_t(int8_t(uint8_t(byte) << 4) >> 4);
    return step;
  }
  template <class Step>
  static Step high(Step step) {
    for (int8_t& byte : step.elements) byte = int8_t(byte >> 4);
    return step;
  }
};

template <class Cpu>
struct Int4Of {
  using I4 = Nibbles<typename Cpu::I8, PortableHalves>;
  template <class X>
  using F4 = Nibbles<typename Cpu::template W8<X>, PortableHalves>;
};

// The signed codes of four bits, for each of 16 bytes.
#define FX_SIGNED_CODES 0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1

#if FX_AVX2
struct Avx2Halves {
  static __m256i codes(__m256i halves) {
    const __m256i known = _mm256_setr_epi8(FX_SIGNED_CODES, FX_SIGNED_CODES);
    return _mm256_shuffle_epi8(known, _mm256_and_si256(halves, _mm256_set1_epi8(15)));
  }
  static avx2::Step low(const avx2::Step& s) { return {codes(s.low), codes(s.high)}; }
  static avx2::Step high(const avx2::Step& s) {
    return {codes(_mm256_srli_epi16(s.low, 4)), codes(_mm256_srli_epi16(s.high, 4))};
  }
};

template <>
struct Int4Of<Avx2> {
  using I4 = Nibbles<Avx2::I8, Avx2Halves>;
  template <class X>
  using F4 = Nibbles<Avx2::W8<X>, Avx2Halves>;
};
#endif

#if FX_AVX512_VNNI
struct Avx512Halves {
  static __m512i codes(__m512i halves) {
    const __m512i known = _mm512_broadcast_i32x4(_mm_setr_epi8(FX_SIGNED_CODES));
    return _mm512_shuffle_epi8(known, _mm512_and_si512(halves, _mm512_set1_epi8(15)));
  }
  static __m512i low(__m512i step) { return codes(step); }
  static __m512i high(__m512i step) { return codes(_mm512_srli_epi16(step, 4)); }
};

template <>
struct Int4Of<Avx512Vnni> {
  using I4 = Nibbles<Avx512Vnni::I8, Avx512Halves>;
  template <class X>
  using F4 = Nibbles<Avx512Vnni::W8<X>, Avx512Halves>;
};
#endif

#if FX_AVX512 && FX_VBMI2
namespace avx512 {

// One of 16 codes in each byte of its output.
inline __m512i lanes(const int8_t* codes) {
  const __m512i one = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m128i firsts = _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
  return _mm512_shuffle_epi8(one, _mm512_broadcast_i32x4(firsts));
}

struct NibbleSteps : Registers {
  using Bytes = __m512i;
  static constexpr int kGroup = 8;
  static constexpr int place(int j) { return j; }
  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  using Fill = __m512i;
  static Fill fill(const int8_t* zero_points) {
    const __m512i codes = lanes(zero_points);
    const __m512i lower = _mm512_set1_epi8(15), shifted = _mm512_slli_epi16(codes, 4);
    return _mm512_ternarylogic_epi32(lower, codes, shifted, 0xca);
  }
  // As in expand.h, but what is in the destination already stays where no bit is set.
  static Bytes expand(uint64_t mask, const uint8_t* p, Fill fill) {
    asm("vpexpandb %1, %0%{%2%}" : "+v"(fill) : "v"(_mm512_loadu_si512(p)), "Yk"(mask));
    return fill;
  }
};

// Codes sixteenfold: the upper halves as they are, the lower ones by a table that is looked up in by
// six bits of a byte, of which two are of no account.
struct I4 : NibbleSteps {
  using Input = uint8_t;
  using Sum = __m512i;
  static constexpr bool kInteger = true;
  static constexpr float kFactor = 16;
  struct Weights {
    __m512i low, high;
  };
  static Weights widen(Bytes a, Bytes b) {
    const __m512i known = _mm512_broadcast_i32x4(
        _mm_slli_epi16(_mm_and_si128(_mm_setr_epi8(FX_SIGNED_CODES), _mm_set1_epi8(15)), 4));
    return {_mm512_permutexvar_epi8(a, known), _mm512_and_si512(b, _mm512_set1_epi8(int8_t(0xf0)))};
  }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    sum = _mm512_dpbusd_epi32(sum, broadcast(x), w.low);
    return _mm512_dpbusd_epi32(sum, broadcast(x + 4), w.high);
  }
};

struct F4 : NibbleSteps, FloatSums {
  using Input = float;
  static constexpr float kFactor = 1;
  struct Weights {
    __m512 group[8];
  };
  static __m512 codes(__m512i step, int shift) {
    const __m512 known = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_setr_epi8(FX_SIGNED_CODES)));
    return _mm512_permutexvar_ps(_mm512_srli_epi32(step, shift), known);
  }
  static Weights widen(Bytes a, Bytes b) {
    return {{codes(a, 0), codes(a, 8), codes(a, 16), codes(a, 24),
             codes(b, 4), codes(b, 12), codes(b, 20), codes(b, 28)}};
  }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    for (int j = 0; j < 8; j++) sum = _mm512_fmadd_ps(w.group[j], _mm512_set1_ps(x[j]), sum);
    return sum;
  }
};

#if FX_BF16
// Of an output's four bytes the first and the third make a pair, and so do the others.
struct B4 : NibbleSteps, FloatSums {
  using Input = BFloat;
  static constexpr float kFactor = 1;
  struct Weights {
    __m512i pair[4];
  };
  static constexpr int place(int j) { return (j & 4) | (j & 1) << 1 | (j & 2) >> 1; }
  static __m512i codes(__m512i step, int shift) {
    const __m512 floats = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_setr_epi8(FX_SIGNED_CODES)));
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(floats), 16));
    return _mm512_permutexvar_epi16(
        _mm512_srli_epi16(step, shift), _mm512_broadcast_i64x4(halves));
  }
  static Weights widen(Bytes a, Bytes b) {
    return {{codes(a, 0), codes(a, 8), codes(b, 4), codes(b, 12)}};
  }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    for (int j = 0; j < 4; j++) {
      sum = _mm512_dpbf16_ps(sum, __m512bh(w.pair[j]), __m512bh(broadcast(x + 2 * j)));
    }
    return sum;
  }
};
#endif

}  // namespace avx512

template <>
struct Int4Of<Avx512Vbmi2> {
  using I4 = avx512::I4;
  template <class X>
  using F4 = avx512::F4;
};

#if FX_BF16
template <>
struct Int4Of<Avx512Bf16> {
  using I4 = avx512::I4;
  template <class X>
  using F4 = std::conditional_t<std::is_same_v<X, BFloat>, avx512::B4, avx512::F4>;
};
#endif
#endif

#undef FX_SIGNED_CODES

}  // namespace fx
