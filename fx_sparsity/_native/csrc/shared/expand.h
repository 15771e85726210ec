// Expanding 64 bytes: the first elements at `p` go to the places whose bit is set, others are zero.
//
// AVX-512 has an instruction for elements of 32 bits; for those of 16 and 8 bits VBMI2 has, and what
// is called `Shuffles` does the same without it. All read 64 bytes, however many bits are set.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__)
#define FX_EXPAND 1
#if defined(__AVX512VBMI2__)
#define FX_VBMI2 1
#else
#define FX_VBMI2 0
#endif

#include <immintrin.h>

#include <bit>
#include <cstdint>

namespace fx {

// Two traps: with a memory operand vpexpand is microcoded, and it waits for whatever was in its
// destination. So load first, and expand in place; the compiler would do neither.
inline __m512i expand(uint16_t mask, __m512i v) {
  asm("vpexpandd %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(mask));
  return v;
}

#if FX_VBMI2
struct Vbmi2 {
  static __m512i expand(uint32_t mask, const void* p) {
    __m512i v = _mm512_loadu_si512(p);
    asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(mask));
    return v;
  }
  static __m512i expand(uint64_t mask, const void* p) {
    __m512i v = _mm512_loadu_si512(p);
    asm("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(mask));
    return v;
  }
};
#endif

// Each quarter of the register is loaded from where its elements begin, and shuffled in itself.
struct Shuffles {
  static __m512i expand(uint32_t mask, const void* p) {
    const __m512i values = quarters<uint8_t>(mask, static_cast<const uint16_t*>(p));
    const __m512i bits = _mm512_mask_blend_epi16(
        mask, pairs(0x0f0e, 0), pairs(0x0202 * kWords + 0x0f0e, 0x0202 * kWords));
    const __m512i places = sums(bits, kWords, 0x0706 * kWords);
    return _mm512_maskz_mov_epi16(mask, _mm512_shuffle_epi8(values, places));
  }

  static __m512i expand(uint64_t mask, const void* p) {
    const __m512i values = quarters<uint16_t>(mask, static_cast<const uint8_t*>(p));
    const __m512i bits =
        _mm512_mask_blend_epi8(mask, pairs(15, 0), pairs(kBytes + 15, kBytes));
    return _mm512_maskz_shuffle_epi8(mask, values, sums(bits, kBytes, 7 * kBytes));
  }

 private:
  static constexpr int64_t kBytes = 0x0101010101010101, kWords = 0x0001000100010001;

  // The four quarters, each with as many elements as a `Bits` of the mask has bits set.
  template <class Bits, class Mask, class Element>
  static __m512i quarters(Mask mask, const Element* p) {
    const auto load = [&p, mask](int quarter) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      p += std::popcount(Bits(mask >> (8 * int(sizeof(Bits)) * quarter)));
      return v;
    };
    __m512i v = _mm512_zextsi128_si512(load(0));
    v = _mm512_inserti32x4(v, load(1), 1);
    v = _mm512_inserti32x4(v, load(2), 2);
    return _mm512_inserti32x4(v, load(3), 3);
  }

  // The place of an element is the number of bits before it in its quarter. Bits are summed up for
  // eight bytes by a product, whose last sum is added to the next eight; a bit of a 16-bit element
  // counts two for each of its bytes. Sums begin at 15, or at 14 and 15, and so are places once 16
  // is taken off: a shuffle looks at the lowest four bits alone.
  static __m512i sums(__m512i bits, int64_t ones, int64_t last) {
    constexpr int64_t none = int64_t(0x8080808080808080);
    const __m512i eights = _mm512_mullo_epi64(bits, _mm512_set1_epi64(ones));
    return _mm512_add_epi8(eights, _mm512_shuffle_epi8(eights, pairs(none, last)));
  }

  static __m512i pairs(int64_t first, int64_t second) {
    return _mm512_set_epi64(second, first, second, first, second, first, second, first);
  }
};

}  // namespace fx

#else
#define FX_EXPAND 0
#define FX_VBMI2 0
#endif
