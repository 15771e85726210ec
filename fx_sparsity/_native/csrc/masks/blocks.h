// Whole blocks: the mean of each as a key, and which of them are kept.
#pragma once

#include "geometry.h"
#include "select.h"

namespace fx {

enum class Norm : int64_t { value = 0, magnitude = 1, square = 2 };

template <Norm N, class T>
inline double score(T x) {
  const double value = std::bit_cast<float>(float_bits(x));
  if constexpr (N == Norm::square) return value * value;
  if constexpr (N == Norm::magnitude) return std::abs(value);
  return value;
}

#if FX_AVX512
// Scores of 8 elements in a row.
template <Norm N, class T>
inline __m512d scores8(const T* data) {
  const __m512d values = _mm512_cvtps_pd(float8(data));
  if constexpr (N == Norm::square) return _mm512_mul_pd(values, values);
  if constexpr (N == Norm::magnitude) return _mm512_abs_pd(values);
  return values;
}

// Sums of neighbouring fours, of 32 values in a row.
inline __m512d sums_of_fours(__m512d a, __m512d b, __m512d c, __m512d d) {
  const __m512d twos = _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
  const __m512d more = _mm512_add_pd(_mm512_unpacklo_pd(c, d), _mm512_unpackhi_pd(c, d));
  const __m512i left = _mm512_setr_epi64(0, 4, 1, 5, 8, 12, 9, 13);
  const __m512i right = _mm512_setr_epi64(2, 6, 3, 7, 10, 14, 11, 15);
  return _mm512_add_pd(
      _mm512_permutex2var_pd(twos, left, more), _mm512_permutex2var_pd(twos, right, more));
}
#endif

// Adds the columns of `Rows` rows to sums; writes them where there are none yet.
template <Norm N, int Rows, class T>
void add_rows(const T* top, int64_t wide, int64_t stride, bool fresh, double* sums) {
  int64_t j = 0;
#if FX_AVX512
  const __mmask8 old = fresh ? 0 : 0xff;
  for (; j + 8 <= wide; j += 8) {
    __m512d sum = _mm512_maskz_loadu_pd(old, sums + j);
    for (int i = 0; i < Rows; i++) sum = _mm512_add_pd(sum, scores8<N>(top + i * stride + j));
    _mm512_storeu_pd(sums + j, sum);
  }
#endif
  for (; j < wide; j++) {
    double sum = fresh ? 0 : sums[j];
    for (int i = 0; i < Rows; i++) sum += score<N>(top[i * stride + j]);
    sums[j] = sum;
  }
}

// Writes the sums of the columns of a strip of `wide` columns.
template <Norm N, class T>
void sum_columns(const T* top, int64_t height, int64_t wide, int64_t stride, double* sums) {
  int64_t i = 0;
  for (; i + 4 <= height; i += 4) {  // sums are loaded and stored once for four rows
    add_rows<N, 4>(top + i * stride, wide, stride, i == 0, sums);
  }
  for (; i < height; i++) add_rows<N, 1>(top + i * stride, wide, stride, i == 0, sums);
}

// The keys of the means of neighbouring fours, computed whenever they are asked for.
template <Norm N, class T>
struct Fours {
  static constexpr bool kSigned = N == Norm::value;
  static constexpr uint32_t kLeast = kSigned ? 0x000fffffu : 0u;
  static constexpr uint32_t kMost = kSigned ? 0xfff00000u : 0xffe00000u;
  const T* data;

  uint32_t operator[](int64_t i) const {
    const T* x = data + 4 * i;
    const double sum = (score<N>(x[0]) + score<N>(x[1])) + (score<N>(x[2]) + score<N>(x[3]));
    return mean_key<kSigned>(sum);
  }
#if FX_AVX512
  __m512i sixteen(int64_t i) const {
    const T* x = data + 4 * i;
    return _mm512_inserti64x4(_mm512_castsi256_si512(eight(x)), eight(x + 32), 1);
  }

 private:
  static __m256i eight(const T* x) {
    return mean_keys8<kSigned>(
        sums_of_fours(scores8<N>(x), scores8<N>(x + 8), scores8<N>(x + 16), scores8<N>(x + 24)));
  }
#endif
};

// Replaces the sums of `count` blocks of `width` columns by one sum a block.
inline void add_columns(double* sums, int64_t count, int64_t width) {
#if FX_AVX512
  for (; width % 4 == 0 && count * width % 32 == 0; width /= 4) {
    for (int64_t i = 0; i < count * width; i += 32) {
      const double* from = sums + i;
      const __m512d fours = sums_of_fours(
          _mm512_loadu_pd(from), _mm512_loadu_pd(from + 8), _mm512_loadu_pd(from + 16),
          _mm512_loadu_pd(from + 24));
      _mm512_storeu_pd(sums + i / 4, fours);
    }
  }
#endif
  for (; width % 2 == 0; width /= 2) {
    const int64_t half = count * width / 2;
#pragma GCC ivdep  // what is written was read before
    for (int64_t i = 0; i < half; i++) sums[i] = sums[2 * i] + sums[2 * i + 1];
  }
  if (width == 1) return;
  for (int64_t b = 0; b < count; b++) {
    double sum = sums[b * width];
    for (int64_t j = 1; j < width; j++) sum += sums[b * width + j];
    sums[b] = sum;
  }
}

// Keys of `count` blocks from their sums, which are used up. `size` turns a block's sum into its
// mean; where all blocks are of one size (0), sums rank as means do. True if a mean is NaN.
template <bool Signed>
bool keys_of_sums(double* sums, int64_t count, int64_t size, uint32_t* keys) {
  if (size) {
    for (int64_t b = 0; b < count; b++) sums[b] /= double(size);
  }
  uint64_t nan = 0;
  for (int64_t b = 0; b < count; b++) {
    nan |= sums[b] != sums[b];
    keys[b] = mean_key<Signed>(sums[b]);
  }
  return nan != 0;
}

// Keys of all block means, row-major over the grid. True if a mean is NaN.
template <Norm N, class T>
bool block_keys(const T* data, const Geometry& g, uint32_t* keys) {
  constexpr bool is_signed = N == Norm::value;
  const bool ragged = g.height % g.block_height || g.width % g.block_width;
  std::atomic<bool> nan{false};
  const auto work = [&, buffer = std::vector<double>()](const Strip& s) mutable {
    buffer.resize(s.wide);
    double* sums = buffer.data();
    const T* top = data + s.at;
    uint32_t* out = keys + s.block;
    const int64_t columns = s.whole * g.block_width;
    sum_columns<N>(top, s.height, s.wide, g.width, sums);
    add_columns(sums, s.whole, g.block_width);
    const int64_t size = ragged ? s.height * g.block_width : 0;
    bool bad = keys_of_sums<is_signed>(sums, s.whole, size, out);
    if (s.ragged) {
      double* rest = sums + columns;
      add_columns(rest, 1, s.ragged);
      bad |= keys_of_sums<is_signed>(rest, 1, s.height * s.ragged, out + s.whole);
    }
    if (bad) nan.store(true, std::memory_order_relaxed);
  };
  for_each_strip(g, g.blocks_per_strip(), work);
  return nan;
}

// A bit for each block of the grid: cleared for the `k` of the smallest means. Nothing where a mean
// is NaN.
template <Norm N, class T>
std::optional<Bits> keep_blocks(const T* data, const Geometry& g, int64_t k) {
  if (g.block_height == 1 && g.block_width == 4 && g.width % 4 == 0) {
    return keep_largest(Fours<N, T>{data}, g.blocks(), k);
  }
  const Scratch<uint32_t> keys = scratch<uint32_t>(g.blocks());
  if (block_keys<N>(data, g, keys.get())) return std::nullopt;
  return keep_largest(Keys{keys.get()}, g.blocks(), k);
}

}  // namespace fx
