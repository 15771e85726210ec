#include "activations.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "parallel.h"

namespace fx {
namespace {

inline void convert(float from, float& to) { to = from; }
inline void convert(BFloat from, float& to) { to = to_float(from); }
inline void convert(BFloat from, BFloat& to) { to = from; }
inline void convert(uint8_t from, uint8_t& to) { to = from; }

struct Range {
  float smallest = 0, largest = 0;  // NaN both if there is one
};

inline Range join(Range a, Range b) {
  const auto pick = [](float a, float b, bool first) { return a != a || first ? a : b; };
  return {pick(a.smallest, b.smallest, a.smallest < b.smallest),
          pick(a.largest, b.largest, a.largest > b.largest)};
}

// The range of a row and of 0.
template <class X>
Range range_of(const X* x, int64_t size) {
  Floats smallest{}, largest{};
  Ints nan{};
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats v = load_floats(x + i, size - i);
    smallest = v < smallest ? v : smallest;
    largest = v > largest ? v : largest;
    nan |= v != v;
  }
  Range range;
  for (int i = 0; i < kLanes; i++) {
    if (nan[i]) return {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::quiet_NaN()};
    range.smallest = std::min(range.smallest, smallest[i]);
    range.largest = std::max(range.largest, largest[i]);
  }
  return range;
}

inline float rounded_as(float, float x) { return x; }
inline float rounded_as(BFloat, float x) {
  return to_float(BFloat{to_bfloats(Floats{} + x)[0]});
}

// One scale and zero point, and where the codes end.
struct Affine {
  float scale, zero_point, last;
  bool zero_point_first;  // added before rounding
};

// As `activations.quantize` says, in the same arithmetic; codes and zero points are shifted to
// start at 0.
template <class X>
Affine affine_of(Range range, Quantizer quantizer) {
  const auto as_x = [](float x) { return rounded_as(X{}, x); };
  const auto clamped = [](float x, float most) { return x < 0 ? 0 : x > most ? most : x; };
  constexpr float eps = std::numeric_limits<float>::epsilon();
  const auto not_below = [](float x, float low) { return x < low ? low : x; };
  switch (quantizer) {
    case Quantizer::token_symmetric: {
      const float reach = not_below(range.largest, -range.smallest);
      return {not_below(as_x(reach / 127.5f), eps), 128, 255, false};
    }
    case Quantizer::token_affine: {
      const float span = as_x(range.largest - range.smallest);
      const float scale = not_below(as_x(span / 255), eps);
      const float below = std::nearbyint(as_x(range.smallest / scale));
      return {scale, clamped(-below, 255), 255, false};
    }
    default: {
      double scale = (double(range.largest) - range.smallest) / 127;
      if (std::isinf(1.0f / float(scale))) scale = 0.1;
      const float zero_point = clamped(float(std::nearbyint(-range.smallest / scale)), 127);
      return {float(scale < 6.1e-5 ? 6.1e-5 : scale), zero_point, 127, true};
    }
  }
}

template <class X>
void quantize_row(const X* x, int64_t size, const Affine& affine, uint8_t* codes) {
  const float inverse = 1.0f / affine.scale;
  const float before = affine.zero_point_first ? affine.zero_point : 0;
  const float after = affine.zero_point - before;
  for (int64_t i = 0; i < size; i += kLanes) {
    Floats scaled = load_floats(x + i, size - i) * inverse;
    asm("" : "+m"(scaled));  // rounded here, as in plain torch, and not first in the sum
    const Floats v = round(scaled + before) + after;
    const Bytes bytes =
        __builtin_convertvector(to_ints(at_most(at_least(v, 0.0f), affine.last)), Bytes);
    std::memcpy(codes + i, &bytes, std::min<int64_t>(kLanes, size - i));
  }
}

}  // namespace

template <int Group, class Input, class X>
Tiles<Input> tiles_of(const X* x, int64_t rows, int64_t columns, int64_t height) {
  const int64_t groups = (columns + Group - 1) / Group, count = (rows + height - 1) / height;
  if constexpr (std::is_same_v<X, Input>) {
    if (rows == 1 && height == 1 && columns % Group == 0) return {x, 1, 1, groups, Group, {}};
  }
  Buffer<Input> own(count * height * groups * Group);
  Input* const to = own.get();
  constexpr int64_t chunk = 128;  // groups, so that what is written stays in the first cache
  const int64_t chunks = (groups + chunk - 1) / chunk;
  const int64_t grain = std::max<int64_t>(1, (1 << 13) / (chunk * Group * height));
  parallel_for(0, count * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t tile = task / chunks, first = task % chunks * chunk;
      const int64_t stop = std::min(groups, first + chunk), whole = std::min(stop, columns / Group);
      for (int64_t r = 0; r < height; r++) {
        const int64_t row = tile * height + r;
        Input* out = to + (tile * groups * height + first * height + r) * Group;
        const X* in = x + row * columns + first * Group;
        int64_t g = first;
        if (row < rows) {
          for (; g < whole; g++, out += height * Group, in += Group) {
            for (int j = 0; j < Group; j++) convert(in[j], out[j]);
          }
        }
        for (; g < stop; g++, out += height * Group) {
          for (int j = 0; j < Group; j++) {
            const bool real = row < rows && g * Group + j < columns;
            real ? convert(x[row * columns + g * Group + j], out[j]) : void(out[j] = Input{});
          }
        }
      }
    }
  });
  return {to, count, height, groups, Group, std::move(own)};
}

template <class X>
Quantized quantize(const X* x, int64_t rows, int64_t columns, Quantizer quantizer) {
  Quantized q{Buffer<uint8_t>(rows * columns), Buffer<float>(rows), Buffer<int32_t>(rows)};
  Buffer<Range> ranges(rows);
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / columns);
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      ranges[row] = range_of(x + row * columns, columns);
    }
  });
  Range all;
  for (int64_t row = 0; row < rows; row++) all = join(all, ranges[row]);
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const Range range = quantizer == Quantizer::tensor_affine ? all : ranges[row];
      const Affine affine = affine_of<X>(range, quantizer);
      q.scale[row] = affine.scale;
      q.zero_point[row] = int32_t(affine.zero_point == affine.zero_point ? affine.zero_point : 0);
      quantize_row(x + row * columns, columns, affine, &q.codes[row * columns]);
    }
  });
  return q;
}

// By group: fp32 weights; bf16; int8.
template Tiles<float> tiles_of<1>(const float*, int64_t, int64_t, int64_t);
template Tiles<float> tiles_of<2>(const BFloat*, int64_t, int64_t, int64_t);
template Tiles<BFloat> tiles_of<2>(const BFloat*, int64_t, int64_t, int64_t);
template Tiles<float> tiles_of<4>(const float*, int64_t, int64_t, int64_t);
template Tiles<float> tiles_of<4>(const BFloat*, int64_t, int64_t, int64_t);
template Tiles<BFloat> tiles_of<4>(const BFloat*, int64_t, int64_t, int64_t);
template Tiles<uint8_t> tiles_of<4>(const uint8_t*, int64_t, int64_t, int64_t);

template Quantized quantize(const float*, int64_t, int64_t, Quantizer);
template Quantized quantize(const BFloat*, int64_t, int64_t, Quantizer);

}  // namespace fx
