// The arithmetic of one step in one 512-bit register; see lanes_portable.h for what it is made of.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "lanes_portable.h"

namespace fx {
namespace avx512 {

// vpexpand moves the first values into the lanes whose bit is set. Two traps: with a memory operand
// it is microcoded, and it waits for whatever was in its destination. So load first, and expand in
// place; the compiler would do neither.
inline __m512i expand(__mmask16 mask, const float* p) {
  __m512i v = _mm512_loadu_si512(p);
  asm("vpexpandd %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(mask));
  return v;
}

inline __m512i expand(__mmask32 mask, const BFloat* p) {
  __m512i v = _mm512_loadu_si512(p);
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(mask));
  return v;
}

inline __m512i expand(__mmask64 mask, const int8_t* p) {
  __m512i v = _mm512_loadu_si512(p);
  asm("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(mask));
  return v;
}

struct Registers {
  static constexpr int kChains = 8;
  static constexpr int kDirectRows = 16;
  static constexpr int kTileRows = 12;
  static constexpr int kTilePanels = 2;
};

template <class ValueT>
struct Steps : Registers {
  using Value = ValueT;
  using Step = __m512i;
  static Step load(const Value* p) { return _mm512_loadu_si512(p); }
  template <class Bits>
  static Step expand(Bits mask, const Value* p) {
    return avx512::expand(mask, p);
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

struct F32 : Steps<float>, FloatSums {
  using Input = float;
  using Weights = __m512;
  static constexpr int kGroup = 1;
  static Weights widen(Step step) { return _mm512_castsi512_ps(step); }
  static Sum dot(Sum sum, Weights w, const Input* x) {
    return _mm512_fmadd_ps(w, _mm512_set1_ps(*x), sum);
  }
};

struct BF16 : Steps<BFloat>, FloatSums {
  using Input = BFloat;
  using Weights = __m512i;
  static constexpr int kGroup = 2;
  static Weights widen(Step step) { return step; }
  static Sum dot(Sum sum, Weights w, const Input* x) {
    return _mm512_dpbf16_ps(sum, __m512bh(w), __m512bh(broadcast(x)));
  }
};

// The same without vdpbf16ps, which some processors execute at a quarter of the rate of vfmaddps.
struct BF16ByFma : Steps<BFloat>, FloatSums {
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

struct I8 : Steps<int8_t> {
  using Input = uint8_t;
  using Weights = __m512i;
  using Sum = __m512i;
  static constexpr int kGroup = 4;
  static constexpr bool kInteger = true;
  static Weights widen(Step step) { return step; }
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

template <class X>
struct W8;

template <>
struct W8<float> : Steps<int8_t>, FloatSums {
  using Input = float;
  static constexpr int kGroup = 4;
  struct Weights {
    __m512 group[4];
  };
  static Weights widen(Step s) { return {{codes<0>(s), codes<1>(s), codes<2>(s), codes<3>(s)}}; }
  static Sum dot(Sum sum, const Weights& w, const Input* x) {
    for (int j = 0; j < 4; j++) sum = _mm512_fmadd_ps(w.group[j], _mm512_set1_ps(x[j]), sum);
    return sum;
  }
};

// Codes have 8 bits, and so has bf16: the upper half of their floats is all of them.
template <>
struct W8<BFloat> : Steps<int8_t>, FloatSums {
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

}  // namespace avx512

struct Avx512 {
  using F32 = avx512::F32;
  using BF16 = avx512::BF16;
  using I8 = avx512::I8;
  template <class X>
  using W8 = avx512::W8<X>;
};

struct Avx512ByFma : Avx512 {
  using BF16 = avx512::BF16ByFma;
  template <class X>
  using W8 = avx512::W8<float>;
};

// Whether two fp32 products take less time than one of bf16 pairs: measured once, in some 10 us.
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

}  // namespace fx
