// Tensors as one bit an element and the elements whose bit is set, packed. Elements are unsigned
// integers of 1, 2, 4 or 8 bytes: what they mean does not matter here. Bits are low bit first.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "expand.h"

namespace fx {

constexpr int64_t kWord = 64;       // elements that share a word of bits
constexpr int64_t kCache = 1 << 20;  // bytes; what is larger does not stay in a core's cache
constexpr int64_t kAhead = 1 << 11;  // bytes between what is read and what is asked for ahead
constexpr int64_t kWords = 1 << 10;  // words that a thread takes at a time

inline int64_t chunks_of(int64_t elements) {
  return (elements + kWord * kWords - 1) / (kWord * kWords);
}

// The bits of elements [64 * word, 64 * word + 64) out of `bytes` bytes; missing ones are unset.
inline uint64_t word_of(const uint8_t* bits, int64_t bytes, int64_t word) {
  uint64_t value = 0;
  const int64_t left = bytes - 8 * word;
  if (left >= 8) {  // a size known to the compiler: one instruction, where the other is a call
    std::memcpy(&value, bits + 8 * word, 8);
  } else {
    std::memcpy(&value, bits + 8 * word, size_t(left));
  }
  return value;
}

// Where the values of each chunk of elements start; the last entry is how many there are in all.
inline std::vector<int64_t> starts_of(const uint8_t* bits, int64_t elements) {
  const int64_t bytes = (elements + 7) / 8, chunks = chunks_of(elements);
  std::vector<int64_t> starts(size_t(chunks + 1), 0);
  torch::stable::parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t last = std::min((bytes + 7) / 8, (chunk + 1) * kWords);
      int64_t count = 0;
      for (int64_t w = chunk * kWords; w < last; w++) count += std::popcount(word_of(bits, bytes, w));
      starts[size_t(chunk + 1)] = count;
    }
  });
  for (size_t i = 1; i < starts.size(); i++) starts[i] += starts[i - 1];
  return starts;
}

#if FX_EXPAND

#if FX_VBMI2
using Expander = Vbmi2;
#else
using Expander = Shuffles;
#endif

inline uint64_t lowest(int64_t count) {
  return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

// What one vector register holds of elements T: its mask, and the instructions on it.
template <class T>
struct Lanes {
  static constexpr int64_t count = 64 / int64_t(sizeof(T));

  static __m512i load(uint64_t mask, const T* from) {
    if constexpr (sizeof(T) == 1) return _mm512_maskz_loadu_epi8(mask, from);
    if constexpr (sizeof(T) == 2) return _mm512_maskz_loadu_epi16(__mmask32(mask), from);
    if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_epi32(__mmask16(mask), from);
    if constexpr (sizeof(T) == 8) return _mm512_maskz_loadu_epi64(__mmask8(mask), from);
  }
  static void store(T* to, uint64_t mask, __m512i v) {
    if constexpr (sizeof(T) == 1) _mm512_mask_storeu_epi8(to, mask, v);
    if constexpr (sizeof(T) == 2) _mm512_mask_storeu_epi16(to, __mmask32(mask), v);
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(to, __mmask16(mask), v);
    if constexpr (sizeof(T) == 8) _mm512_mask_storeu_epi64(to, __mmask8(mask), v);
  }
  static uint64_t nonzero(__m512i v) {
    if constexpr (sizeof(T) == 1) return _mm512_test_epi8_mask(v, v);
    if constexpr (sizeof(T) == 2) return _mm512_test_epi16_mask(v, v);
    if constexpr (sizeof(T) == 4) return _mm512_test_epi32_mask(v, v);
    if constexpr (sizeof(T) == 8) return _mm512_test_epi64_mask(v, v);
  }
  // The first elements at `from`, of which 64 bytes may be read, in the places of the mask's bits.
  static __m512i expand(uint64_t mask, const T* from) {
    if constexpr (sizeof(T) == 1) return Expander::expand(mask, from);
    if constexpr (sizeof(T) == 2) return Expander::expand(uint32_t(mask), from);
    const __m512i v = _mm512_loadu_si512(from);
    if constexpr (sizeof(T) == 4) return fx::expand(uint16_t(mask), v);
    if constexpr (sizeof(T) == 8) return _mm512_maskz_expand_epi64(__mmask8(mask), v);
  }

  // How many elements `compress` takes: without VBMI2 those of 8 and 16 bits are widened.
  static constexpr int64_t compressed = FX_VBMI2 ? count : std::min<int64_t>(16, count);

  // Writes the elements of `x` whose bit is set to `values`.
  static void compress(uint64_t mask, const T* x, T* values) {
    const uint64_t found = lowest(std::popcount(mask));
    if constexpr (compressed == count) {
      store(values, found, packed(mask, load(mask, x)));
    } else if constexpr (sizeof(T) == 2) {
      const __m256i v = _mm256_maskz_loadu_epi16(__mmask16(mask), x);
      const __m512i wide = Lanes<uint32_t>::packed(mask, _mm512_cvtepu16_epi32(v));
      _mm512_mask_cvtepi32_storeu_epi16(values, __mmask16(found), wide);
    } else {
      const __m128i v = _mm_maskz_loadu_epi8(__mmask16(mask), x);
      const __m512i wide = Lanes<uint32_t>::packed(mask, _mm512_cvtepu8_epi32(v));
      _mm512_mask_cvtepi32_storeu_epi8(values, __mmask16(found), wide);
    }
  }

  static __m512i packed(uint64_t mask, __m512i v) {
#if FX_VBMI2
    if constexpr (sizeof(T) == 1) return _mm512_maskz_compress_epi8(mask, v);
    if constexpr (sizeof(T) == 2) return _mm512_maskz_compress_epi16(__mmask32(mask), v);
#endif
    if constexpr (sizeof(T) == 4) return _mm512_maskz_compress_epi32(__mmask16(mask), v);
    if constexpr (sizeof(T) == 8) return _mm512_maskz_compress_epi64(__mmask8(mask), v);
  }
};

// Which of `count` <= 64 elements have a bit set.
template <class T>
uint64_t nonzero(const T* x, int64_t count) {
  using L = Lanes<T>;
  uint64_t found = 0;
  for (int64_t i = 0; i < count; i += L::count) {
    found |= L::nonzero(L::load(lowest(std::min(L::count, count - i)), x + i)) << i;
  }
  return found;
}

// Writes the elements whose bit is set to `values`.
template <class T>
void compress(const T* x, uint64_t word, T* values) {
  constexpr int64_t step = Lanes<T>::compressed;
  for (int64_t i = 0; i < kWord && word; i += step) {
    const uint64_t mask = word & lowest(step);
    Lanes<T>::compress(mask, x + i, values);
    values += std::popcount(mask);
    word = step < 64 ? word >> (step % 64) : 0;
  }
}

// Undoes `compress` for `count` <= 64 elements; what has no bit becomes zero. Of `values`, `left`
// may be read. `past_cache`, for an `out` that 64 divides, saves the reading of memory that is about
// to be overwritten; `written` ends a run of such calls.
template <class T>
void expand(
    const T* values, int64_t left, uint64_t word, int64_t count, bool past_cache, T* out) {
  using L = Lanes<T>;
  if (count == kWord && left >= kWord) {  // no load reaches beyond 64 elements
    _mm_prefetch(reinterpret_cast<const char*>(values) + kAhead, _MM_HINT_T0);
    for (int64_t i = 0; i < kWord; i += L::count) {
      const uint64_t mask = (word >> i) & lowest(L::count);
      const __m512i v = L::expand(mask, values);
      if (past_cache) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), v);
      } else {
        _mm512_storeu_si512(out + i, v);
      }
      values += std::popcount(mask);
    }
    return;
  }
  for (int64_t i = 0; i < count; i += L::count) {
    const uint64_t mask = (word >> i) & lowest(L::count);
    const int found = std::popcount(mask);
    T padded[L::count] = {};
    std::memcpy(padded, values, size_t(found) * sizeof(T));
    L::store(out + i, lowest(count - i), L::expand(mask, padded));
    values += found;
  }
}

// Copies bytes, or writes zeros where there is no `from`.
inline void copy(const void* from, int64_t bytes, bool past_cache, void* to) {
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  int64_t i = 0;
  if (past_cache && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (; i + 64 <= bytes; i += 64) {
      if (source) _mm_prefetch(source + i + kAhead, _MM_HINT_T0);
      const __m512i v = source ? _mm512_loadu_si512(source + i) : _mm512_setzero_si512();
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), v);
    }
  }
  if (source) {
    std::memcpy(target + i, source + i, size_t(bytes - i));
  } else {
    std::memset(target + i, 0, size_t(bytes - i));
  }
}

inline void written() {
  _mm_sfence();
}

#else

template <class T>
uint64_t nonzero(const T* x, int64_t count) {
  uint64_t found = 0;
  for (int64_t i = 0; i < count; i++) found |= uint64_t(x[i] != 0) << i;
  return found;
}

template <class T>
void compress(const T* x, uint64_t word, T* values) {
  for (; word; word &= word - 1) *values++ = x[std::countr_zero(word)];
}

template <class T>
void expand(const T* values, int64_t, uint64_t word, int64_t count, bool, T* out) {
  std::fill_n(out, count, T(0));
  for (; word; word &= word - 1) out[std::countr_zero(word)] = *values++;
}

inline void copy(const void* from, int64_t bytes, bool, void* to) {
  if (from) {
    std::memcpy(to, from, size_t(bytes));
  } else {
    std::memset(to, 0, size_t(bytes));
  }
}

inline void written() {}

#endif

// Calls `work(chunk)` for every chunk of elements, in parallel.
template <class Work>
void for_chunks(int64_t elements, const Work& work) {
  torch::stable::parallel_for(0, chunks_of(elements), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) work(chunk);
  });
}

}  // namespace fx
