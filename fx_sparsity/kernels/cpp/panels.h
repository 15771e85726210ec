// The product of packed panels and tiles of activations, whatever the packing.
//
// A packing gives cursors: `packed.panel(p)` starts at a panel's first step, `next()` returns step
// after step, ready for the arithmetic's `widen`; `packed.steps` of them, one a group of inputs.
// Few rows are multiplied while the steps are read. For more rows a slice of some panels is
// expanded into the cache once, and every tile of rows is multiplied by it there.
#pragma once

#include <array>
#include <utility>

#include "activations.h"
#include "cpu.h"
#include "epilogue.h"

namespace fx {

// Calls `work.template operator()<N>()` for the N in [Low, High] that `n` is.
template <int Low, int High, class Work>
void with_number(int64_t n, const Work& work) {
  if constexpr (Low < High) {
    if (n > Low) return with_number<Low + 1, High>(n, work);
  }
  work.template operator()<Low>();
}

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

// Adds to the sums of `Rows` x `Panels` what `steps` expanded steps, side by side, make of a tile.
template <class Math, int Rows, int Panels>
void multiply_tile(
    const typename Math::Weights* weights, int64_t steps, const typename Math::Input* x,
    typename Math::Sum* sums) {
  typename Math::Sum sum[Rows][Panels];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; p++) sum[r][p] = sums[r * Panels + p];
  }
  for (int64_t i = 0; i < steps; i++, weights += Panels, x += Rows * Math::kGroup) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
      for (int p = 0; p < Panels; p++) {
        sum[r][p] = Math::dot(sum[r][p], weights[p], x + r * Math::kGroup);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; p++) sums[r * Panels + p] = sum[r][p];
  }
}

template <class Math>
void write(const PanelResult& result, int64_t row, const typename Math::Sum& sum) {
  result.write(row, std::bit_cast<std::conditional_t<Math::kInteger, Ints, Floats>>(sum));
}

template <class Cpu, class Math, class Packed>
void multiply_few(
    const Packed& packed, const Tiles<typename Math::Input>& tiles, const Result& result) {
  const int64_t grain = std::max<int64_t>(1, (1 << 12) / packed.steps);
  with_height<Cpu::kDirectRows>(tiles.height, [&]<int Rows>() {
    parallel_for(0, packed.panels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) {
        typename Math::Sum sums[Rows];
        constexpr int chains = std::max(1, Cpu::kChains / Rows);
        multiply_panel<Math, Rows, chains>(packed.panel(p), packed.steps, tiles.data, sums);
        const PanelResult columns(result, p);
        for (int64_t row = 0; row < result.rows; row++) write<Math>(columns, row, sums[row]);
      }
    });
  });
}

template <class Cpu, class Math, class Packed>
void multiply_many(
    const Packed& packed, const Tiles<typename Math::Input>& tiles, const Result& result) {
  using Weights = typename Math::Weights;
  using Sum = typename Math::Sum;
  constexpr int side = Cpu::kTilePanels;
  constexpr int64_t slice = (1 << 14) / sizeof(Weights);  // 16 KB a panel
  const int64_t height = tiles.height, sides = (packed.panels + side - 1) / side;
  parallel_for(0, sides, 1, [&](int64_t begin, int64_t end) {
    const Buffer<Weights> weights(slice * side);
    const Buffer<Sum> sums(tiles.count * height * side);
    for (int64_t s = begin; s < end; s++) {
      std::fill_n(sums.get(), tiles.count * height * side, Sum{});
      const int64_t first = s * side, present = std::min<int64_t>(side, packed.panels - first);
      if (present < side) std::fill_n(weights.get(), slice * side, Weights{});
      auto cursor = [&]<size_t... I>(std::index_sequence<I...>) {
        return std::array{packed.panel(std::min<int64_t>(first + I, packed.panels - 1))...};
      }(std::make_index_sequence<side>());
      for (int64_t at = 0; at < packed.steps; at += slice) {
        const int64_t steps = std::min(slice, packed.steps - at);
        for (int64_t i = 0; i < steps; i++) {
          for (int64_t p = 0; p < present; p++) {
            weights[i * side + p] = Math::widen(cursor[p].next());
          }
        }
        with_number<Cpu::kTileRows * 3 / 4, Cpu::kTileRows>(height, [&]<int Rows>() {
          for (int64_t t = 0; t < tiles.count; t++) {
            const auto* x = tiles.tile(t) + at * Rows * Math::kGroup;
            multiply_tile<Math, Rows, side>(weights.get(), steps, x, &sums[t * Rows * side]);
          }
        });
      }
      for (int64_t p = 0; p < present; p++) {
        const PanelResult columns(result, first + p);
        for (int64_t row = 0; row < result.rows; row++) {
          write<Math>(columns, row, sums[row * side + p]);
        }
      }
    }
  });
}

// Rows in a tile, so that the tiles are nearly full.
template <class Cpu>
int64_t tile_height(int64_t rows) {
  if (rows > Cpu::kDirectRows) {
    const int64_t tiles = (rows + Cpu::kTileRows - 1) / Cpu::kTileRows;
    return (rows + tiles - 1) / tiles;
  }
  int64_t height = 1;
  with_height<Cpu::kDirectRows>(rows, [&]<int Rows>() { height = Rows; });
  return height;
}

// result = activations of `rows` x `columns` times the packed weight.
template <class Cpu, class Math, class Packed, class X>
void multiply(const Packed& packed, const X* x, int64_t columns, const Result& result) {
  const auto tiles = tiles_of<Math::kGroup, typename Math::Input>(
      x, result.rows, columns, tile_height<Cpu>(result.rows));
  if (result.rows <= Cpu::kDirectRows) {
    multiply_few<Cpu, Math>(packed, tiles, result);
  } else {
    multiply_many<Cpu, Math>(packed, tiles, result);
  }
}

}  // namespace fx
