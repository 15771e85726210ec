// Whole blocks: the mean of each as a key, and the mask that drops some of them.
#pragma once

#include "geometry.h"
#include "select.h"

namespace fx {

enum class Norm : int64_t { value = 0, magnitude = 1, square = 2 };

constexpr int64_t kStripWidth = 4096;  // columns whose fp64 sums stay in the nearest caches

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

// Keys of `count` blocks of `Width` columns (0: `width`) from the sums of their columns. True if a
// mean is NaN.
template <int Width, bool Signed>
bool reduce_columns(
    const double* sums, int64_t count, int64_t width, int64_t height, uint32_t* keys) {
  bool nan = false;
  for (int64_t b = 0; b < count; b++) {
    double sum = 0;
    if constexpr (Width > 0) {
      for (int j = 0; j < Width; j++) sum += sums[b * Width + j];
    } else {
      const double* p = sums + b * width;
      double part[8] = {};
      int64_t j = 0;
      for (; j + 8 <= width; j += 8) {
        for (int l = 0; l < 8; l++) part[l] += p[j + l];
      }
      for (; j < width; j++) part[0] += p[j];
      for (double x : part) sum += x;
    }
    const double mean = sum / double(height * width);
    nan |= mean != mean;
    keys[b] = mean_key<Signed>(mean);
  }
  return nan;
}

// Keys of all block means, row-major over the grid. True if a mean is NaN.
template <Norm N, class T>
bool block_keys(const T* data, const Geometry& g, uint32_t* keys) {
  constexpr bool is_signed = N == Norm::value;
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
    const auto reduce = g.block_width == 1 ? reduce_columns<1, is_signed>
        : g.block_width == 2               ? reduce_columns<2, is_signed>
        : g.block_width == 4               ? reduce_columns<4, is_signed>
                                           : reduce_columns<0, is_signed>;
    bool bad = reduce(sums, s.whole, g.block_width, s.height, out);
    if (s.ragged) {
      sums += s.whole * g.block_width;
      bad |= reduce_columns<0, is_signed>(sums, 1, s.ragged, s.height, out + s.whole);
    }
    if (bad) nan.store(true, std::memory_order_relaxed);
  });
  return nan;
}

// One row of a mask: each block's value `Width` times (0: `width`).
template <int Width, class Out>
void expand_row(
    const uint32_t* keys, int64_t first, int64_t count, int64_t width, Cut cut, Out one, Out* mask) {
  const int64_t size = Width > 0 ? Width : width;
  for (int64_t b = 0; b < count; b++) {
    const Out value = cut.drops(keys[b], first + b) ? Out(0) : one;
    for (int64_t j = 0; j < size; j++) mask[b * size + j] = value;
  }
}

// Drop the `k` blocks of the smallest keys.
template <class Out>
void drop_blocks(const uint32_t* keys, const Geometry& g, int64_t k, Out one, Out* mask) {
  const Cut cut = cut_smallest(Keys{keys}, g.blocks(), k);
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
