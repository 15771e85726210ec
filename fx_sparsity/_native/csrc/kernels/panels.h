// The product of packed panels and tiles of activations, whatever the packing.
//
// A packing gives cursors: `packed.panel(p)` starts at a panel's first step, `next()` returns step
// after step, ready for the arithmetic's `widen`; `packed.steps` of them, one a group of inputs.
// Few rows are multiplied while the steps are read; for more see expanded.h.
#pragma once

#include <array>
#include <utility>

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

// Sums of `Rows` rows while `Panels` of them are read side by side from panel `first` on: memory is
// faster where it is read in several places, and a sum has to wait for the one before it.
template <class Math, int Rows, int Panels, class Packed>
void multiply_panels(
    const Packed& packed, int64_t first, const typename Math::Input* x, const Result& result) {
  typename Math::Sum sum[Panels][Rows] = {};
  const auto cursors = [&]<size_t... p>(std::index_sequence<p...>) {
    return std::array{packed.panel(first + p)...};
  };
  auto panels = cursors(std::make_index_sequence<Panels>());
  for (int64_t i = 0; i < packed.steps; i++, x += Rows * Math::kGroup) {
#pragma GCC unroll 8
    for (int p = 0; p < Panels; p++) {
      const typename Math::Weights weights = Math::widen(panels[p].next());
#pragma GCC unroll 16
      for (int r = 0; r < Rows; r++) {
        sum[p][r] = Math::dot(sum[p][r], weights, x + r * Math::kGroup);
      }
    }
  }
  // A copy, since what is indexed by a variable does not stay in registers.
  typename Math::Sum sums[Panels][Rows];
#pragma GCC unroll 8
  for (int p = 0; p < Panels; p++) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) sums[p][r] = sum[p][r];
  }
  for (int p = 0; p < Panels; p++) {
    const PanelResult columns(result, first + p);
    for (int64_t row = 0; row < result.rows; row++) write<Math>(columns, row, sums[p][row]);
  }
}

template <class Math, class Packed>
void multiply_few(
    const Packed& packed, const Tiles<typename Math::Input>& tiles, const Result& result) {
  const int64_t grain = std::max<int64_t>(1, (1 << 12) / packed.steps);
  with_height<Math::kDirectRows>(tiles.height, [&]<int Rows>() {
    constexpr int side = std::max(1, Math::kStreams / Rows);
    parallel_for(0, packed.panels, grain, [&](int64_t begin, int64_t end) {
      int64_t p = begin;
      for (; p + side <= end; p += side) {
        multiply_panels<Math, Rows, side>(packed, p, tiles.data, result);
      }
      for (; p < end; p++) multiply_panels<Math, Rows, 1>(packed, p, tiles.data, result);
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
    const auto with_reader = [](const void* of, void (*work)(void*, Reader<Math>&), void* context) {
      ReaderOf<Math, Packed> reader(*static_cast<const Packed*>(of));
      work(context, reader);
    };
    multiply_expanded<Math>(packed.panels, packed.steps, tiles, result, &packed, with_reader);
  }
}

}  // namespace fx
