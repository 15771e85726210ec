// The arithmetic of one step in one 512-bit register; see lanes_portable.h for what it is made of.
//
// Needs VNNI. What moves values to their places differs with VBMI2, and is a parameter, `Expander`.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "expand.h"
#include "lanes_portable.h"

#if FX_VBMI2 && defined(__AVX512BF16__)
#define FX_BF16 1
#else
#define FX_BF16 0
#endif

namespace fx {
namespace avx512 {

struct Registers {
  static constexpr int kChains = 8;
  static constexpr int kStreams = 8;
  static constexpr int kDirectRows = 16;
  static constexpr int kTileRows = 12;
  static constexpr int kTilePanels = 2;
};

template <class ValueT, class Expander>
struct Steps : Registers {
  // What takes more instructions leaves no time to read in more places.
  static constexpr int kStreams = std::is_same_v<Expander, Shuffles> ? 2 : 8;
  using Value = ValueT;
  using Step = __m512i;
  static Step load(const Value* p) { return _mm512_loadu_si512(p); }
  template <class Bits>
  static Step expand(Bits mask, const Value* p) {
    return Expander::expand(mask, p);
  }
};

struct FloatSums {
  using Sum = __m512;
  static constexpr bool kInteger = false;
  static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
};

inline __m512i broadcast(const void* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return _mm512_set1_epi32(bits);
}

struct F32 : Registers, FloatSums {
  using Value = float;
  using Input = float;
  using Step = __m512i;
  using Weights = __m512;
  static constexpr int kGroup = 1;
  static Step load(const Value* p) { return _mm512_loadu_si512(p); }
  static Step expand(uint16_t mask, const Value* p) { return fx::expand(mask, load(p)); }
  static Weights widen(Step step) { return _mm512_castsi512_ps(step); }
  static Sum dot(Sum sum, Weights w, const Input* x) {
    return _mm512_fmadd_ps(w, _mm512_set1_ps(*x), sum);
  }
};

// Values as fp32, in the order in which they lie: the two of an output side by side.
struct BF16AsPairs : Registers {
  using Value = BFloat;
  using Input = float;
  static constexpr int kChains = 4;
  static constexpr int kStreams = 4;
  static constexpr int kDirectRows = 8;
  static constexpr int kTileRows = 6;
  static constexpr int kGroup = 2;
  static constexpr bool kInteger = false;
  struct Step {
    __m512i low, high;  // outputs 0 to 7, 8 to 15
  };
  struct Weights {
    __m512 low, high;
  };
  using Sum = Weights;
  static __m512i load_half(const Value* p) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_cvtepu16_epi32(values);
  }
  static Step load(const Value* p) { return {load_half(p), load_half(p + 16)}; }
  static Step expand(uint32_t mask, const Value* p) {
    const auto low = uint16_t(mask), high = uint16_t(mask >> 16);
    return {fx::expand(low, load_half(p)), fx::expand(high, load_half(p + std::popcount(low)))};
  }
  static __m512 widen(__m512i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(half, 16)); }
  static Weights widen(const Step& step) { return {widen(step.low), widen(step.high)}; }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    double pair;
    std::memcpy(&pair, x, sizeof pair);
    const __m512 inputs = _mm512_castpd_ps(_mm512_set1_pd(pair));
    return {_mm512_fmadd_ps(w.low, inputs, sum.low), _mm512_fmadd_ps(w.high, inputs, sum.high)};
  }
  static Sum add(Sum a, Sum b) {
    return {_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)};
  }
  static __m512 lanes(const Sum& sum) {
    const __m512i first = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(1));
    return _mm512_add_ps(
        _mm512_permutex2var_ps(sum.low, first, sum.high),
        _mm512_permutex2var_ps(sum.low, second, sum.high));
  }
};

template <class Expander>
struct I8 : Steps<int8_t, Expander> {
  using Input = uint8_t;
  using Weights = __m512i;
  using Sum = __m512i;
  static constexpr int kGroup = 4;
  static constexpr bool kInteger = true;
  static Weights widen(__m512i step) { return step; }
  static Sum dot(Sum sum, Weights w, const Input* x) {
    return _mm512_dpbusd_epi32(sum, broadcast(x), w);
  }
  static Sum add(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
};

// The codes of input `j` of the group, as floats.
template <int j>
__m512 codes(__m512i step) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(step, 24 - 8 * j), 24));
}

template <class Expander>
struct W8 : Steps<int8_t, Expander>, FloatSums {
  using Input = float;
  static constexpr int kGroup = 4;
  struct Weights {
    __m512 group[4];
  };
  static Weights widen(__m512i s) {
    return {{codes<0>(s), codes<1>(s), codes<2>(s), codes<3>(s)}};
  }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    for (int j = 0; j < 4; j++) sum = _mm512_fmadd_ps(w.group[j], _mm512_set1_ps(x[j]), sum);
    return sum;
  }
};

#if FX_VBMI2
struct BF16ByFma : Steps<BFloat, Vbmi2>, FloatSums {
  using Input = float;
  static constexpr int kGroup = 2;
  struct Weights {
    __m512 group[2];
  };
  static Weights widen(Step step) {
    const __m512i upper = _mm512_and_si512(step, _mm512_set1_epi32(int32_t(0xffff0000u)));
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(step, 16)), _mm512_castsi512_ps(upper)}};
  }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    sum = _mm512_fmadd_ps(w.group[0], _mm512_set1_ps(x[0]), sum);
    return _mm512_fmadd_ps(w.group[1], _mm512_set1_ps(x[1]), sum);
  }
};
#endif

#if FX_BF16
struct BF16 : Steps<BFloat, Vbmi2>, FloatSums {
  using Input = BFloat;
  using Weights = __m512i;
  static constexpr int kGroup = 2;
  static Weights widen(Step step) { return step; }
  static Sum dot(Sum sum, Weights w, const Input* x) {
    return _mm512_dpbf16_ps(sum, __m512bh(w), __m512bh(broadcast(x)));
  }
};

// Codes have 8 bits, and so has bf16: the upper half of their floats is all of them.
struct W8ByBF16 : Steps<int8_t, Vbmi2>, FloatSums {
  using Input = BFloat;
  static constexpr int kGroup = 4;
  struct Weights {
    __m512i pair[2];
  };
  static __m512i pair(__m512 low, __m512 high) {
    const __m512i shifted = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
    return _mm512_or_si512(shifted, _mm512_castps_si512(high));
  }
  static Weights widen(Step s) {
    return {{pair(codes<0>(s), codes<1>(s)), pair(codes<2>(s), codes<3>(s))}};
  }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    sum = _mm512_dpbf16_ps(sum, __m512bh(w.pair[0]), __m512bh(broadcast(x)));
    return _mm512_dpbf16_ps(sum, __m512bh(w.pair[1]), __m512bh(broadcast(x + 2)));
  }
};
#endif

}  // namespace avx512

struct Avx512Vnni {
  using F32 = avx512::F32;
  using BF16 = avx512::BF16AsPairs;
  using I8 = avx512::I8<Shuffles>;
  template <class X>
  using W8 = avx512::W8<Shuffles>;
};

#if FX_VBMI2
struct Avx512Vbmi2 {
  using F32 = avx512::F32;
  using BF16 = avx512::BF16ByFma;
  using I8 = avx512::I8<Vbmi2>;
  template <class X>
  using W8 = avx512::W8<Vbmi2>;
};
#endif

#if FX_BF16
struct Avx512Bf16 : Avx512Vbmi2 {
  using BF16 = avx512::BF16;
  template <class X>
  using W8 = std::conditional_t<std::is_same_v<X, BFloat>, avx512::W8ByBF16, avx512::W8<Vbmi2>>;
};

// Whether two fp32 products take less time than one of bf16 pairs, which some processors execute at
// a quarter of the rate: measured once, in some 10 us.
inline bool fma_is_faster() {
  static const bool faster = [] {
    const auto least = [](auto chain) {
      int64_t best = INT64_MAX;
      for (int run = 0; run < 5; run++) {
        const auto start = int64_t(__rdtsc());
        chain();
        best = std::min(best, int64_t(__rdtsc()) - start);
      }
      return best;
    };
    const auto run = [](auto math, const auto* x) {
      using Math = decltype(math);
      typename Math::Weights weights = Math::widen(_mm512_setzero_si512());
      typename Math::Sum sums[12] = {};
      for (int i = 0; i < 200; i++) {
#pragma GCC unroll 12
        for (auto& sum : sums) {
          sum = Math::dot(sum, weights, x);
          asm volatile("" : "+v"(sum));
        }
      }
    };
    const float floats[2] = {};
    const BFloat halves[2] = {};
    const int64_t by_fma = least([&] { run(avx512::BF16ByFma{}, floats); });
    return by_fma < least([&] { run(avx512::BF16{}, halves); });
  }();
  return faster;
}
#endif

}  // namespace fx
