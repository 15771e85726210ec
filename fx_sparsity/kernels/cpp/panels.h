// The product of packed panels and tiles of activations, whatever the packing.
//
// A packing gives cursors: `packed.panel(p)` starts at a panel's first step, `next()` returns step
// after step, ready for the arithmetic's `widen`; `packed.steps` of them, one a group of inputs.
// Few rows are multiplied while the steps are read; for more see expanded.h.
#pragma once

#include "expanded.h"
#include "parallel.h"

namespace fx {

// Calls `work.template operator()<N>()` for the least N of 1, 2, 4, 8, 12 and 16 that holds `n`.
template <int Most, int N = 1, class Work>
void with_height(int64_t n, const Work& work) {
  constexpr int next = N < 8 ? 2 * N : N + 4;
  if constexpr (next <= Most) {
    if (n > N) return with_height<Most, next>(n, work);
  }
  work.template operator()<N>();
}

// Sums of `Rows` rows while a panel is read. For few rows several steps run at once, each with sums
// of its own, since a sum has to wait for the one before it.
template <class Math, int Rows, int Chains, class Panel>
void multiply_panel(
    Panel panel, int64_t steps, const typename Math::Input* x, typename Math::Sum* sums) {
  typename Math::Sum sum[Rows][Chains] = {};
  const auto step = [&](int chain) __attribute__((always_inline)) {
    const typename Math::Weights weights = Math::widen(panel.next());
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
      sum[r][chain] = Math::dot(sum[r][chain], weights, x + r * Math::kGroup);
    }
    x += Rows * Math::kGroup;
  };
  int64_t i = 0;
  for (; i + Chains <= steps; i += Chains) {
#pragma GCC unroll 8
    for (int chain = 0; chain < Chains; chain++) step(chain);
  }
  for (; i < steps; i++) step(0);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 8
    for (int chain = 1; chain < Chains; chain++) sum[r][0] = Math::add(sum[r][0], sum[r][chain]);
    sums[r] = sum[r][0];
  }
}

template <class Math, class Packed>
void multiply_few(
    const Packed& packed, const Tiles<typename Math::Input>& tiles, const Result& result) {
  const int64_t grain = std::max<int64_t>(1, (1 << 12) / packed.steps);
  with_height<Math::kDirectRows>(tiles.height, [&]<int Rows>() {
    parallel_for(0, packed.panels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        typename Math::Sum sums[Rows];
        constexpr int chains = std::max(1, Math::kChains / Rows);
        multiply_panel<Math, Rows, chains>(packed.panel(p), packed.steps, tiles.data, sums);
        const PanelResult columns(result, p);
        for (int64_t row = 0; row < result.rows; row++) write<Math>(columns, row, sums[row]);
      }
    });
  });
}

// Rows in a tile, so that the tiles are nearly full.
template <class Math>
int64_t tile_height(int64_t rows) {
  if (rows > Math::kDirectRows) {
    const int64_t tiles = (rows + Math::kTileRows - 1) / Math::kTileRows;
    return std::max<int64_t>(kLeastTileRows<Math>, (rows + tiles - 1) / tiles);
  }
  int64_t height = 1;
  with_height<Math::kDirectRows>(rows, [&]<int Rows>() { height = Rows; });
  return height;
}

// result = activations of `rows` x `columns` times the packed weight.
template <class Math, class Packed, class X>
void multiply(const Packed& packed, const X* x, int64_t columns, const Result& result) {
  const auto tiles = tiles_of<Math::kGroup, typename Math::Input>(
      x, result.rows, columns, tile_height<Math>(result.rows));
  if (result.rows <= Math::kDirectRows) {
    multiply_few<Math>(packed, tiles, result);
  } else {
    multiply_expanded<Math>(packed.panels, packed.steps, tiles, result, [&] {
      return std::unique_ptr<Reader<Math>>(new ReaderOf<Math, Packed>(packed));
    });
  }
}

}  // namespace fx
