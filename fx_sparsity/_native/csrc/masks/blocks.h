// Whole blocks: the mean of each as a key, and the mask that drops some of them.
#pragma once

#include "geometry.h"
#include "select.h"

namespace fx {

enum class Norm : int64_t { value = 0, magnitude = 1, square = 2 };

constexpr int64_t kStripWidth = 2048;  // columns whose fp64 sums stay in the nearest caches

inline int64_t blocks_per_strip(const Geometry& g) {
  return std::max<int64_t>(1, kStripWidth / g.block_width);
}

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

// Writes the sums of neighbouring fours of `count` elements in a row.
template <Norm N, class T>
void sum_fours(const T* row, int64_t count, double* sums) {
  int64_t j = 0;
#if FX_AVX512
  for (; j + 32 <= count; j += 32) {
    const __m512d fours = sums_of_fours(
        scores8<N>(row + j), scores8<N>(row + j + 8), scores8<N>(row + j + 16),
        scores8<N>(row + j + 24));
    _mm512_storeu_pd(sums + j / 4, fours);
  }
#endif
  for (; j < count; j += 4) {
    sums[j / 4] = (score<N>(row[j]) + score<N>(row[j + 1])) +
        (score<N>(row[j + 2]) + score<N>(row[j + 3]));
  }
}

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
  for_each_strip(g, blocks_per_strip(g), [&](const Strip& s) {
    const int64_t wide = s.whole * g.block_width + s.ragged;
    const auto buffer = std::make_unique_for_overwrite<double[]>(wide);
    double* sums = buffer.get();
    const T* top = data + s.at;
    uint32_t* out = keys + s.block;
    const int64_t columns = s.whole * g.block_width;
    if (s.height == 1 && g.block_width == 4) {
      sum_fours<N>(top, columns, sums);
      sum_columns<N>(top + columns, 1, s.ragged, g.width, sums + columns);
    } else {
      sum_columns<N>(top, s.height, wide, g.width, sums);
      add_columns(sums, s.whole, g.block_width);
    }
    const int64_t size = ragged ? s.height * g.block_width : 0;
    bool bad = keys_of_sums<is_signed>(sums, s.whole, size, out);
    if (s.ragged) {
      double* rest = sums + columns;
      add_columns(rest, 1, s.ragged);
      bad |= keys_of_sums<is_signed>(rest, 1, s.height * s.ragged, out + s.whole);
    }
    if (bad) nan.store(true, std::memory_order_relaxed);
  });
  return nan;
}

// One row of a mask: each block's value `Width` times (0: `width`).
template <int Width, class Out>
void expand_row(
    const uint32_t* keys, int64_t first, int64_t count, int64_t width, Cut cut, Out one,
    Out* mask) {
  const int64_t size = Width > 0 ? Width : width;
  for (int64_t b = 0; b < count; b++) {
    const Out value = cut.drops(keys[b], first + b) ? Out(0) : one;
    for (int64_t j = 0; j < size; j++) mask[b * size + j] = value;
  }
}

// Drop the `k` blocks of the smallest keys.
template <class Out>
void drop_blocks(const uint32_t* keys, const Geometry& g, int64_t k, Out one, Out* mask) {
  const Cut cut = *cut_smallest(Keys{keys}, g.blocks(), k);
  const auto expand = g.block_width == 1 ? expand_row<1, Out>
      : g.block_width == 2               ? expand_row<2, Out>
      : g.block_width == 4               ? expand_row<4, Out>
      : g.block_width == 8               ? expand_row<8, Out>
      : g.block_width == 16              ? expand_row<16, Out>
                                         : expand_row<0, Out>;
  for_each_strip(g, blocks_per_strip(g), [&](const Strip& s) {
    Out* top = mask + s.at;
    expand(keys + s.block, s.block, s.whole, g.block_width, cut, one, top);
    if (s.ragged) {
      const int64_t last = s.block + s.whole;
      expand_row<0>(keys + last, last, 1, s.ragged, cut, one, top + s.whole * g.block_width);
    }
    const size_t bytes = (s.whole * g.block_width + s.ragged) * sizeof(Out);
    for (int64_t i = 1; i < s.height; i++) std::memcpy(top + i * g.width, top, bytes);
  });
}

}  // namespace fx
