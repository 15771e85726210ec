// The arithmetic of 4-bit codes of which two of every four neighbours are kept: activations move to
// where the codes lie.
//
// A step is 16 outputs times 8 inputs, in 48 bytes: of each output four times 6 bits, the lowest
// first, which are two of the first four inputs and two of the others. Of the 6 bits, two say which
// of the four inputs it is, the other four are the code. What such an arithmetic has:
//   offsets(zero_points) -> Offsets, what is taken off the codes of 16 outputs
//   widen(p, offsets) -> Weights; reads 64 bytes
// and what arithmetics of nibbles.h have, but for what they do with bytes.
#pragma once

#include "nibbles.h"

namespace fx {

// By way of steps without gaps, for a level's arithmetic of 8-bit codes.
template <class Eight>
struct Spread : Eight {
  static constexpr int kGroup = 8;
  static constexpr float kFactor = 1;
  using Offsets = Codes16;
  struct Weights {
    typename Eight::Weights first, second;
  };
  static constexpr int place(int j) { return j; }
  static Offsets offsets(const int8_t* zero_points) { return load_as<Codes16>(zero_points); }
  static Weights widen(const uint8_t* p, const Offsets& offsets) {
    int8_t first[64] = {}, second[64] = {};
    for (int o = 0; o < kLanes; o++, p += 3) {
      const int bits = p[0] | p[1] << 8 | p[2] << 16;
      for (int kept = 0; kept < 4; kept++) {
        const int field = bits >> (6 * kept);
        const int code = int8_t(uint8_t(field << 2)) >> 4;
        int8_t* const to = (kept < 2 ? first : second) + 4 * o + (field & 3);
        *to = int8_t(*to + code - offsets[o]);
      }
    }
    return {Eight::widen(Eight::load(first)), Eight::widen(Eight::load(second))};
  }
  static typename Eight::Sum dot(
      typename Eight::Sum sum, const Weights& w, const typename Eight::Input* x) {
    return Eight::dot(Eight::dot(sum, w.first, x), w.second, x + 4);
  }
};

template <class Cpu>
struct SelectOf {
  using I4 = Spread<typename Cpu::I8>;
  template <class X>
  using F4 = Spread<typename Cpu::template W8<X>>;
};

#if FX_AVX512 && FX_VBMI2
namespace avx512 {

struct SelectSteps : Registers {
  static constexpr int kGroup = 8;
  static constexpr float kFactor = 1;
  static constexpr int place(int j) { return j; }
  using Offsets = __m512i;
  struct Fields {
    __m512i codes, places;  // four bytes an output
  };
  static Offsets offsets(const int8_t* zero_points) { return lanes(zero_points); }
  static Fields read(const uint8_t* p, Offsets offsets) {
    // Six bytes in each eight, and from there six bits in each byte.
    const __m512i spread = _mm512_set_epi64(
        0x31302f2e2d2c2b2a, 0x2b2a292827262524, 0x2524232221201f1e, 0x1f1e1d1c1b1a1918,
        0x1918171615141312, 0x131211100f0e0d0c, 0x0d0c0b0a09080706, 0x0706050403020100);
    const __m512i shifts = _mm512_set1_epi64(0x2a241e18120c0600);
    const __m512i fields = _mm512_multishift_epi64_epi8(
        shifts, _mm512_permutexvar_epi8(spread, _mm512_loadu_si512(p)));
    alignas(64) static constexpr auto known = [] {
      std::array<int8_t, 64> codes{};
      for (int i = 0; i < 64; i++) codes[i] = int8_t((i / 4 + 8) % 16 - 8);
      return codes;
    }();
    const __m512i codes =
        _mm512_permutexvar_epi8(fields, _mm512_load_si512(known.data()));
    // The lowest two bits, and 4 for the other four inputs.
    const __m512i places = _mm512_ternarylogic_epi32(
        fields, _mm512_set1_epi8(3), _mm512_set1_epi32(0x04040000), 0xea);
    return {_mm512_sub_epi8(codes, offsets), places};
  }
};

struct SelectI4 : SelectSteps {
  using Input = uint8_t;
  using Sum = __m512i;
  using Weights = Fields;
  static constexpr bool kInteger = true;
  static Weights widen(const uint8_t* p, Offsets offsets) { return read(p, offsets); }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    int64_t inputs;
    std::memcpy(&inputs, x, sizeof inputs);
    const __m512i moved = _mm512_permutexvar_epi8(w.places, _mm512_set1_epi64(inputs));
    return _mm512_dpbusd_epi32(sum, moved, w.codes);
  }
};

struct SelectF4 : SelectSteps, FloatSums {
  using Input = float;
  struct Weights {
    __m512 codes[4];
    __m512i places[4];
  };
  static Weights widen(const uint8_t* p, Offsets offsets) {
    const Fields f = read(p, offsets);
    return {{avx512::codes<0>(f.codes), avx512::codes<1>(f.codes), avx512::codes<2>(f.codes),
             avx512::codes<3>(f.codes)},
            {f.places, _mm512_srli_epi32(f.places, 8), _mm512_srli_epi32(f.places, 16),
             _mm512_srli_epi32(f.places, 24)}};
  }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    // Of an index four bits count, and the eight inputs are there twice.
    const __m512 inputs = _mm512_broadcast_f32x8(_mm256_loadu_ps(x));
    for (int j = 0; j < 4; j++) {
      sum = _mm512_fmadd_ps(w.codes[j], _mm512_permutexvar_ps(w.places[j], inputs), sum);
    }
    return sum;
  }
};

#if FX_BF16
struct SelectB4 : SelectSteps, FloatSums {
  using Input = BFloat;
  struct Weights {
    __m512i codes[2], places[2];
  };
  // Bytes `first` and `first` + 1 of each output, as 16-bit numbers.
  static __m512i pair(__m512i bytes, int first) {
    const __m512i one = _mm512_srli_epi32(bytes, 8 * first);
    return _mm512_shuffle_epi8(one, _mm512_broadcast_i32x4(_mm_setr_epi8(
        0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1)));
  }
  // Differences of two codes have five bits, of which as many are looked at.
  static __m512i floats(__m512i pair) {
    alignas(64) static constexpr auto known = [] {
      std::array<uint16_t, 32> halves{};
      for (int i = 0; i < 32; i++) {
        halves[i] = uint16_t(std::bit_cast<uint32_t>(float((i + 16) % 32 - 16)) >> 16);
      }
      return halves;
    }();
    return _mm512_permutexvar_epi16(pair, _mm512_load_si512(known.data()));
  }
  static Weights widen(const uint8_t* p, Offsets offsets) {
    const Fields f = read(p, offsets);
    return {{floats(pair(f.codes, 0)), floats(pair(f.codes, 2))},
            {pair(f.places, 0), pair(f.places, 2)}};
  }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    const __m512i inputs =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    for (int j = 0; j < 2; j++) {
      const __m512i moved = _mm512_permutexvar_epi16(w.places[j], inputs);
      sum = _mm512_dpbf16_ps(sum, __m512bh(w.codes[j]), __m512bh(moved));
    }
    return sum;
  }
};
#endif

}  // namespace avx512

template <>
struct SelectOf<Avx512Vbmi2> {
  using I4 = avx512::SelectI4;
  template <class X>
  using F4 = avx512::SelectF4;
};

#if FX_BF16
template <>
struct SelectOf<Avx512Bf16> {
  using I4 = avx512::SelectI4;
  template <class X>
  using F4 = std::conditional_t<std::is_same_v<X, BFloat>, avx512::SelectB4, avx512::SelectF4>;
};
#endif
#endif

}  // namespace fx
