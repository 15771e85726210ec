// The product of panels of 4-bit codes and activations, whatever the packing.
//
// A packing gives cursors: `packed.panel(p)` starts at a panel's first step, `begin(g)` is called
// before the first step of each group, `next()` returns the Weights of step after step, see
// nibbles.h. Where it kTakesOffsets, they are codes less their zero points. A run is some steps of
// one group: their sum is scaled and added to the total.
#pragma once

#include <array>
#include <utility>

#include "int4.h"
#include "nibbles.h"
#include "parallel.h"

namespace fx {

constexpr int64_t kMostSteps = 64;  // of a run: 32-bit sums do not overflow, and caches hold it

// Calls `work.template operator()<N>()` for the least power of two N that holds `n`.
template <int Most, int N = 1, class Work>
void with_rows(int64_t n, const Work& work) {
  if constexpr (2 * N <= Most) {
    if (n > N) return with_rows<Most, 2 * N>(n, work);
  }
  work.template operator()<N>();
}

// The runs of a row.
struct Runs {
  Runs(int64_t columns, int64_t groups)
      : steps((columns / groups + 7) / 8),
        in_group((steps + kMostSteps - 1) / kMostSteps),
        count(groups * in_group) {}

  // Runs of `length` steps each, over `all` of them.
  static Runs even(int64_t length, int64_t all) {
    Runs runs(8 * length, 1);
    runs.count = all / length;
    return runs;
  }

  // Of run `i` of a group.
  int64_t length(int64_t i) const { return std::min(kMostSteps, steps - i * kMostSteps); }

  int64_t steps, in_group, count;
};

// Tiles of `height` rows: step by step, row by row 8 activations, in the order of the arithmetic.
// And the sum of those of each run, [tiles, runs, height], where there are zero points.
template <class Math>
struct Activations {
  using Input = typename Math::Input;
  using Number = std::conditional_t<Math::kInteger, int32_t, float>;

  template <class X>
  Activations(const X* x, int64_t rows, int64_t columns, const Runs& runs, int64_t height, bool sum)
      : count((rows + height - 1) / height),
        height(height),
        steps(runs.count / runs.in_group * runs.steps),
        runs(runs),
        values_(count * steps * height * 8),
        sums_(sum ? count * runs.count * height : 0) {
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        for (int64_t r = 0; r < height; r++) {
          const int64_t row = t * height + r;
          lay_out(row < rows ? x + row * columns : nullptr, columns, values(t) + r * 8);
        }
        if (sum) sum_up(t);
      }
    });
  }

  Input* values(int64_t tile) const { return values_.get() + tile * steps * height * 8; }
  Number* sums(int64_t tile) const { return sums_.get() + tile * runs.count * height; }

  const int64_t count, height, steps;
  const Runs runs;

 private:
  static void convert(uint8_t from, uint8_t& to) { to = from; }
  static void convert(BFloat from, BFloat& to) { to = from; }
  template <class X>
  static void convert(X from, float& to) { to = to_float(from); }
  static int32_t number(uint8_t x) { return x; }
  template <class X>
  static float number(X x) { return to_float(x); }

  template <class X>
  void lay_out(const X* row, int64_t columns, Input* to) {
    const int64_t whole = row ? columns / 8 : 0;
    for (int64_t step = 0; step < whole; step++, row += 8, to += height * 8) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) convert(row[Math::place(j)], to[j]);
    }
    int64_t rest = row ? columns % 8 : 0;
    for (int64_t step = whole; step < steps; step++, to += height * 8, rest = 0) {
      for (int j = 0; j < 8; j++) {
        const int place = Math::place(j);
        place < rest ? convert(row[place], to[j]) : void(to[j] = Input{});
      }
    }
  }

  void sum_up(int64_t tile) {
    const Input* x = values(tile);
    Number* to = sums(tile);
    for (int64_t run = 0; run < runs.count; run++, to += height) {
      std::fill_n(to, height, Number{});
      for (int64_t i = runs.length(run % runs.in_group); i > 0; i--) {
        for (int64_t r = 0; r < height; r++) {
          for (int j = 0; j < 8; j++) to[r] += number(*x++);
        }
      }
    }
  }

  Buffer<Input> values_;
  Buffer<Number> sums_;
};

// Those that a packing leaves to be taken off the sums.
template <class Packed>
const int8_t* zero_points(const Groups4& groups) {
  return Packed::kTakesOffsets ? nullptr : groups.zero_points;
}

// What the sums of one panel's runs are multiplied with.
template <class Math>
class PanelScales {
 public:
  // `zero_points` are null where there are none, or the packing takes them off.
  PanelScales(const Groups4& groups, const int8_t* zero_points, int64_t panel)
      : groups_(groups), zero_points_(zero_points), at_(panel * groups.count * kLanes) {}

  // The scaled sum of a run of group `g`; `x` is the sum of its activations, not read without zero
  // points.
  Floats scaled(
      int64_t g, const typename Math::Sum& sum,
      const typename Activations<Math>::Number* x) const {
    using Lanes = std::conditional_t<Math::kInteger, Ints, Floats>;
    const int64_t at = at_ + g * kLanes;
    Lanes lanes = std::bit_cast<Lanes>(sum);
    if (zero_points_) {
      const auto factor = typename Activations<Math>::Number(Math::kFactor);
      lanes -= __builtin_convertvector(zero_points(at), Lanes) * (factor * *x);
    }
    const Floats scale = groups_.is_bfloat
        ? load_floats(static_cast<const BFloat*>(groups_.scale) + at)
        : load_floats(static_cast<const float*>(groups_.scale) + at);
    return scale * __builtin_convertvector(lanes, Floats);
  }

 private:
  Ints zero_points(int64_t at) const {
    using Codes [[gnu::vector_size(16)]] = int8_t;
    using Shorts [[gnu::vector_size(32)]] = int16_t;
    const auto codes = load_as<Codes>(zero_points_ + at);
    // Twice as wide in each step; in one step the compiler would take the codes one by one.
    return __builtin_convertvector(__builtin_convertvector(codes, Shorts), Ints);
  }

  const Groups4& groups_;
  const int8_t* const zero_points_;
  const int64_t at_;
};

// Writes one panel's totals of the rows of a tile, from row `first` on.
template <class Math>
void write(const Groups4& groups, const Result& result, int64_t panel, int64_t first,
           int64_t height, const Floats* totals, int64_t stride) {
  const PanelResult columns(result, panel);
  const int64_t outputs = std::min<int64_t>(kLanes, result.outputs - panel * kLanes);
  Floats sums{};
  if (groups.row_sums) sums = load_floats(groups.row_sums + panel * kLanes, outputs);
  for (int64_t r = 0; r < std::min(height, result.rows - first); r++) {
    Floats total = totals[r * stride] * (1 / Math::kFactor);
    if (groups.row_sums) {  // codes of activations start at 0
      total = (total - sums * float(result.x_zero_point[first + r])) * result.x_scale[first + r];
    }
    columns.write(first + r, total);
  }
}

// One tile of `Rows`, while `Panels` are read side by side.
template <class Math, int Rows, int Panels, class Packed>
void multiply_panels(
    const Packed& packed, const Groups4& groups, int64_t first, const Activations<Math>& tiles,
    const Result& result) {
  Floats total[Panels][Rows] = {};
  const auto cursors = [&]<size_t... p>(std::index_sequence<p...>) {
    return std::array{packed.panel(first + p)...};
  };
  auto panels = cursors(std::make_index_sequence<Panels>());
  const auto scales = [&]<size_t... p>(std::index_sequence<p...>) {
    return std::array{PanelScales<Math>(groups, zero_points<Packed>(groups), first + p)...};
  }(std::make_index_sequence<Panels>());
  const auto* x = tiles.values(0);
  const auto* sums = tiles.sums(0);
  for (int64_t g = 0; g < groups.count; g++) {
#pragma GCC unroll 8
    for (int p = 0; p < Panels; p++) panels[p].begin(g);
    for (int64_t run = 0; run < tiles.runs.in_group; run++, sums += Rows) {
      typename Math::Sum sum[Panels][Rows] = {};
      for (int64_t i = tiles.runs.length(run); i > 0; i--, x += Rows * 8) {
#pragma GCC unroll 8
        for (int p = 0; p < Panels; p++) {
          const typename Math::Weights weights = panels[p].next();
#pragma GCC unroll 8
          for (int r = 0; r < Rows; r++) sum[p][r] = Math::dot(sum[p][r], weights, x + r * 8);
        }
      }
#pragma GCC unroll 8
      for (int p = 0; p < Panels; p++) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) total[p][r] += scales[p].scaled(g, sum[p][r], sums + r);
      }
    }
  }
  // A copy, since what is indexed by a variable does not stay in registers.
  Floats totals[Panels][Rows];
#pragma GCC unroll 8
  for (int p = 0; p < Panels; p++) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) totals[p][r] = total[p][r];
  }
  for (int p = 0; p < Panels; p++) {
    write<Math>(groups, result, first + p, 0, Rows, totals[p], 1);
  }
}

// Tiles of `Rows` one after the other, while a run of a panel lies in the cache.
template <class Math, int Rows, class Packed>
void multiply_tiles(
    const Packed& packed, const Groups4& groups, int64_t begin, int64_t end,
    const Activations<Math>& tiles, const Result& result) {
  const Buffer<typename Math::Weights> weights(kMostSteps);
  const Buffer<Floats> totals(tiles.count * Rows);
  for (int64_t p = begin; p < end; p++) {
    std::fill_n(totals.get(), tiles.count * Rows, Floats{});
    auto panel = packed.panel(p);
    const PanelScales<Math> scales(groups, zero_points<Packed>(groups), p);
    int64_t at = 0;
    for (int64_t index = 0; index < tiles.runs.count; index++) {
      const int64_t group = index / tiles.runs.in_group, run = index % tiles.runs.in_group;
      const int64_t length = tiles.runs.length(run);
      if (!run) panel.begin(group);
      for (int64_t i = 0; i < length; i++) weights[i] = panel.next();
      for (int64_t t = 0; t < tiles.count; t++) {
        const auto* x = tiles.values(t) + at * Rows * 8;
        typename Math::Sum sum[Rows] = {};
        for (int64_t i = 0; i < length; i++, x += Rows * 8) {
#pragma GCC unroll 8
          for (int r = 0; r < Rows; r++) sum[r] = Math::dot(sum[r], weights[i], x + r * 8);
        }
        const auto* sums = tiles.sums(t) + index * Rows;
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
          totals[t * Rows + r] += scales.scaled(group, sum[r], sums + r);
        }
      }
      at += length;
    }
    for (int64_t t = 0; t < tiles.count; t++) {
      write<Math>(groups, result, p, t * Rows, Rows, &totals[t * Rows], 1);
    }
  }
}

// result = activations times the packed weight.
template <class Math, class Packed, class X>
void multiply(
    const Packed& packed, const Groups4& groups, const X* x, int64_t columns,
    const Result& result) {
  constexpr int most = Math::kTileRows >= 8 ? 8 : 4;
  const int64_t panels = (result.outputs + kLanes - 1) / kLanes;
  const Runs runs(columns, groups.count);
  const bool sum = zero_points<Packed>(groups) != nullptr;
  const int64_t grain = std::max<int64_t>(1, (1 << 12) / (groups.count * runs.steps));
  if (result.rows > most) {
    const Activations<Math> tiles(x, result.rows, columns, runs, most, sum);
    return parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      multiply_tiles<Math, most>(packed, groups, begin, end, tiles, result);
    });
  }
  with_rows<most>(result.rows, [&]<int Rows>() {
    constexpr int side = Rows == 1 ? 4 : Rows < 8 ? 2 : 1;
    const Activations<Math> tiles(x, result.rows, columns, runs, Rows, sum);
    parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      int64_t p = begin;
      for (; p + side <= end; p += side) {
        multiply_panels<Math, Rows, side>(packed, groups, p, tiles, result);
      }
      for (; p < end; p++) multiply_panels<Math, Rows, 1>(packed, groups, p, tiles, result);
    });
  });
}

// Calls `work.template operator()<Math>(x, result)` with the arithmetic, one of a level's
// Arithmetics, that activations ask for, and with these as it takes them.
template <template <class> class Arithmetics, class Work>
void with_arithmetic(const Call& call, const Work& work) {
  const auto by = [&]<class Cpu, class X>(Cpu, const X* x) {
    using Integer = typename Arithmetics<Cpu>::I4;
    using Float = typename Arithmetics<Cpu>::template F4<X>;
    if (call.quantizer == Quantizer::none) return work.template operator()<Float>(x, call.result);
    Result result = call.result;
    const Quantized q = quantize(x, result.rows, call.columns, call.quantizer);
    result.x_scale = q.scale.get();
    result.x_zero_point = q.zero_point.get();
    const uint8_t* const codes = q.codes.get();
    work.template operator()<Integer>(codes, result);
  };
  with_cpu([&]<class Cpu>(Cpu cpu) {
    call.result.is_bfloat ? by(cpu, static_cast<const BFloat*>(call.x))
                          : by(cpu, static_cast<const float*>(call.x));
  });
}

// `packed.template operator()<Math>()` gives the weight's panels as Math reads them.
template <template <class> class Arithmetics, class Packed>
void linear(const Call& call, const Groups4& groups, const Packed& packed) {
  with_arithmetic<Arithmetics>(call, [&]<class Math>(const auto* x, const Result& result) {
    multiply<Math>(packed.template operator()<Math>(), groups, x, call.columns, result);
  });
}

}  // namespace fx
