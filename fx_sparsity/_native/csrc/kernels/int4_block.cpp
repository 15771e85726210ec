#include "grouped.h"

namespace fx {
namespace {

constexpr int64_t kSteps = 4;     // of a block
constexpr int64_t kAhead = 2048;  // bytes from what is read to what is prefetched

// The tiles of `Rows` of one row of blocks; `length` steps have a scale of their own.
template <class Math, int Rows>
void multiply_row(
    const BlockInt4& weight, const Groups4& groups, int64_t row, int64_t panels, int64_t columns, int64_t length,
    const Activations<Math>& tiles, const Result& result) {
  const int64_t in_group = groups.count == 1 ? tiles.steps : columns / groups.count / 8;
  const int64_t last = std::min(2 * row + 1, panels - 1);  // nothing is written for another
  const PanelScales<Math> scales[2] = {
      {groups, groups.zero_points, 2 * row}, {groups, groups.zero_points, last}};
  for (int64_t t = 0; t < tiles.count; t++) {
    Floats total[2][Rows] = {};
    for (int64_t b = weight.offsets[row]; b < weight.offsets[row + 1]; b++) {
      const uint8_t* values = weight.values + b * kSteps * 128;
      const int64_t first = weight.index[b] * kSteps;
      const auto* x = tiles.values(t) + first * Rows * 8;
      for (int64_t at = 0; at < kSteps; at += length) {
        typename Math::Sum sum[2][Rows] = {};
        for (int64_t i = 0; i < length; i++, x += Rows * 8) {
#pragma GCC unroll 2
          for (int p = 0; p < 2; p++, values += 64) {
            __builtin_prefetch(values + kAhead);
            const auto bytes = Math::load(values);
            const typename Math::Weights weights = Math::widen(bytes, bytes);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; r++) sum[p][r] = Math::dot(sum[p][r], weights, x + r * 8);
          }
        }
        const int64_t group = std::min((first + at) / in_group, groups.count - 1);
        const auto* sums = tiles.sums(t) + (first + at) / length * Rows;
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
#pragma GCC unroll 4
          for (int r = 0; r < Rows; r++) total[p][r] += scales[p].scaled(group, sum[p][r], sums + r);
        }
      }
    }
    Floats totals[2][Rows];  // see multiply_panels
#pragma GCC unroll 2
    for (int p = 0; p < 2; p++) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; r++) totals[p][r] = total[p][r];
    }
    for (int64_t panel = 2 * row; panel <= last; panel++) {
      write<Math>(groups, result, panel, t * Rows, Rows, totals[panel - 2 * row], 1);
    }
  }
}

template <class Math, class X>
void multiply_blocks(
    const BlockInt4& weight, const Groups4& groups, const X* x, int64_t columns,
    const Result& result) {
  const int64_t panels = (result.outputs + kLanes - 1) / kLanes;
  const int64_t size = columns / groups.count;
  const int64_t length = groups.count == 1 || size % (8 * kSteps) == 0 ? kSteps : 1;
  const int64_t steps = ((columns + 7) / 8 + kSteps - 1) / kSteps * kSteps;
  const Runs runs = Runs::even(length, steps);
  const bool sum = groups.zero_points != nullptr;
  with_rows<4>(result.rows, [&]<int Rows>() {
    const Activations<Math> tiles(x, result.rows, columns, runs, Rows, sum);
    parallel_for(0, (panels + 1) / 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        multiply_row<Math, Rows>(weight, groups, row, panels, columns, length, tiles, result);
      }
    });
  });
}

}  // namespace

void linear(const Call& call, const Groups4& groups, const BlockInt4& weight) {
  with_arithmetic<Int4Of>(call, [&]<class Math>(const auto* x, const Result& result) {
    multiply_blocks<Math>(weight, groups, x, call.columns, result);
  });
}

}  // namespace fx
