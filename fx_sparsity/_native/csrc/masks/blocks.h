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

// Keys of `count` blocks of `width` columns from the sums of their columns, which are used up.
// `size` turns a block's sum into its mean; where all blocks are of one size (0), sums rank as
// means do. True if a mean is NaN.
template <bool Signed>
bool reduce_columns(double* sums, int64_t count, int64_t width, int64_t size, uint32_t* keys) {
  for (; width % 2 == 0; width /= 2) {
    const int64_t half = count * width / 2;
#pragma GCC ivdep  // what is written was read before
    for (int64_t i = 0; i < half; i++) sums[i] = sums[2 * i] + sums[2 * i + 1];
  }
  if (width > 1) {
    for (int64_t b = 0; b < count; b++) {
      double sum = sums[b * width];
      for (int64_t j = 1; j < width; j++) sum += sums[b * width + j];
      sums[b] = sum;
    }
  }
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
    for (int64_t j = 0; j < wide; j++) sums[j] = score<N>(top[j]);
    for (int64_t i = 1; i < s.height; i++) {
      const T* row = top + i * g.width;
      for (int64_t j = 0; j < wide; j++) sums[j] += score<N>(row[j]);
    }
    uint32_t* out = keys + s.block;
    const int64_t size = ragged ? s.height * g.block_width : 0;
    bool bad = reduce_columns<is_signed>(sums, s.whole, g.block_width, size, out);
    if (s.ragged) {
      double* rest = sums + s.whole * g.block_width;
      bad |= reduce_columns<is_signed>(rest, 1, s.ragged, s.height * s.ragged, out + s.whole);
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
