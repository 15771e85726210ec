// Which instructions the kernels use: the best that the machine has, or what FX_SPARSITY_CPU names.
//
// The library is compiled for the machine it runs on, or is the one of a wheel that fits it best, so
// that what was not compiled in the machine lacks as well. A weaker level is chosen only to test it,
// and compiled in where that may be meant (FX_EVERY_LEVEL), since all of them take twice as long to
// compile: in wheels, and where the variable is set.
#pragma once

#include <cstdlib>
#include <cstring>

#include "expand.h"
#include "fail.h"
#include "lanes_portable.h"
#if FX_EXPAND && defined(__AVX512VNNI__)
#include "lanes_avx512.h"
#define FX_AVX512 1
#else
#define FX_AVX512 0
#endif
#if FX_AVX512 && (defined(FX_EVERY_LEVEL) || !FX_VBMI2)
#define FX_AVX512_VNNI 1
#else
#define FX_AVX512_VNNI 0
#endif
#if defined(__AVX2__) && defined(__FMA__) && (defined(FX_EVERY_LEVEL) || !FX_AVX512)
#include "lanes_avx2.h"
#define FX_AVX2 1
#else
#define FX_AVX2 0
#endif
#if defined(FX_EVERY_LEVEL) || (!FX_AVX512 && !FX_AVX2)
#define FX_PORTABLE 1
#else
#define FX_PORTABLE 0
#endif

namespace fx {

// Calls `work(Cpu{})` with one of the levels.
template <class Work>
auto with_cpu(const Work& work) {
  const char* const named = std::getenv("FX_SPARSITY_CPU");
  const char* const name = named ? named : "";
  const auto is = [name](const char* level) { return !*name || !std::strcmp(name, level); };
#if FX_AVX512 && FX_VBMI2
  if (is("avx512")) {
#if FX_BF16
    if (!fma_is_faster()) return work(Avx512Bf16{});
#endif
    return work(Avx512Vbmi2{});
  }
#endif
#if FX_AVX512_VNNI
  if (is("avx512_vnni")) return work(Avx512Vnni{});
#endif
#if FX_AVX2
  if (is("avx2")) return work(Avx2{});
#endif
#if FX_PORTABLE
  if (is("portable")) return work(Portable{});
#endif
  fail(
      "FX_SPARSITY_CPU is '", name,
      "', which is none of the levels of this machine that were compiled in: avx512, avx512_vnni, "
      "avx2, portable; weaker ones are if it is set before kernels are loaded");
}

}  // namespace fx
