#include "block.h"

#include <algorithm>

namespace fx {
namespace {

constexpr int64_t kAhead = 2048;  // bytes from what is read to what is prefetched

template <class Math>
class Blocks {
 public:
  using Value = typename Math::Value;

  Blocks(const Block& block, const Call& call)
      : panels((call.result.outputs + kLanes - 1) / kLanes),
        groups((call.columns + Math::kGroup - 1) / Math::kGroup),
        steps(block.steps),
        height(block.height),
        values_(static_cast<const Value*>(block.values)),
        index_(block.index),
        offsets_(block.offsets) {}

  // The blocks of one row.
  struct Row {
    const Value* values;
    const int32_t* index;
    int64_t count;
  };

  Row row(int64_t r) const {
    const int64_t first = offsets_[r];
    return {
        values_ + first * steps * height * kLanes * Math::kGroup, index_ + first,
        offsets_[r + 1] - first};
  }

  const int64_t panels, groups;
  const int64_t steps, height;  // of a block

 private:
  const Value* values_;
  const int32_t* index_;
  const int64_t* offsets_;
};

// Adds to the sums of `Rows` x `Panels` what a step at `weights` makes of the activations at `x`.
template <class Math, int Rows, int Panels>
[[gnu::always_inline]] inline void multiply_step(
    const typename Math::Value* weights, const typename Math::Input* x,
    typename Math::Sum (&sum)[Rows][Panels]) {
  typename Math::Weights step[Panels];
#pragma GCC unroll 2
  for (int p = 0; p < Panels; p++, weights += kLanes * Math::kGroup) {
    // The processor's own prefetching stops at the end of a page.
    __builtin_prefetch(reinterpret_cast<const char*>(weights) + kAhead);
    step[p] = Math::widen(Math::load(weights));
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; p++) sum[r][p] = Math::dot(sum[r][p], step[p], x + r * Math::kGroup);
  }
}

// A row of blocks times one tile. With few sums several steps run at once, each with sums of its
// own, since a sum has to wait for the one before it.
template <class Math, int Rows, int Panels, int Chains>
void multiply_row(
    const Blocks<Math>& blocks, const typename Blocks<Math>::Row& row,
    const typename Math::Input* x, typename Math::Sum* sums) {
  typename Math::Sum sum[Chains][Rows][Panels] = {};
  constexpr int64_t values = Panels * kLanes * Math::kGroup, inputs = Rows * Math::kGroup;
  const typename Math::Value* weights = row.values;
  if constexpr (Panels == 1) {  // a block is a step
    int64_t b = 0;
    for (; b + Chains <= row.count; b += Chains) {
#pragma GCC unroll 8
      for (int chain = 0; chain < Chains; chain++, weights += values) {
        multiply_step<Math>(weights, x + row.index[b + chain] * inputs, sum[chain]);
      }
    }
    for (; b < row.count; b++, weights += values) {
      multiply_step<Math>(weights, x + row.index[b] * inputs, sum[0]);
    }
  } else {
    for (int64_t b = 0; b < row.count; b++) {
      const int64_t first = row.index[b] * blocks.steps;
      const int64_t steps = std::min(blocks.steps, blocks.groups - first);
      const typename Math::Input* in = x + first * inputs;
      int64_t i = 0;
      for (; i + Chains <= steps; i += Chains) {
#pragma GCC unroll 8
        for (int chain = 0; chain < Chains; chain++) {
          multiply_step<Math>(weights + (i + chain) * values, in + (i + chain) * inputs, sum[chain]);
        }
      }
      for (; i < steps; i++) multiply_step<Math>(weights + i * values, in + i * inputs, sum[0]);
      weights += blocks.steps * values;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; p++) {
      typename Math::Sum& total = sums[r * Panels + p] = sum[0][r][p];
#pragma GCC unroll 8
      for (int chain = 1; chain < Chains; chain++) total = Math::add(total, sum[chain][r][p]);
    }
  }
}

template <class Math>
using MultiplyRow = void (*)(
    const Blocks<Math>&, const typename Blocks<Math>::Row&, const typename Math::Input*,
    typename Math::Sum*);

// All rows of blocks times all tiles: the blocks of a row stay in cache from tile to tile.
template <class Math>
void multiply_blocks(
    const Blocks<Math>& blocks, const Tiles<typename Math::Input>& tiles, const Result& result,
    MultiplyRow<Math> multiply_row) {
  const int64_t height = blocks.height, rows = (blocks.panels + height - 1) / height;
  const int64_t grain = std::max<int64_t>(1, (1 << 12) / blocks.groups);
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const Buffer<typename Math::Sum> sums(tiles.height * height);
    for (int64_t r = begin; r < end; r++) {
      const auto row = blocks.row(r);
      for (int64_t t = 0; t < tiles.count; t++) {
        multiply_row(blocks, row, tiles.tile(t), sums.get());
        const int64_t first = t * tiles.height, present = std::min(tiles.height, result.rows - first);
        for (int64_t p = 0; p < height && r * height + p < blocks.panels; p++) {
          const PanelResult columns(result, r * height + p);
          for (int64_t i = 0; i < present; i++) {
            write<Math>(columns, first + i, sums[i * height + p]);
          }
        }
      }
    }
  });
}

template <class Math, class X>
void multiply(const Blocks<Math>& blocks, const X* x, int64_t columns, const Result& result) {
  constexpr int most = std::min(8, Math::kTileRows);  // twelve rows are no faster, only more code
  with_height<most>(result.rows, [&]<int Rows>() {
    constexpr int one = std::clamp(2 * Math::kChains / Rows, 1, 4), two = std::max(1, one / 2);
    const auto tiles = tiles_of<Math::kGroup, typename Math::Input>(x, result.rows, columns, Rows);
    multiply_blocks(
        blocks, tiles, result,
        blocks.height == 1 ? multiply_row<Math, Rows, 1, one> : multiply_row<Math, Rows, 2, two>);
  });
}

}  // namespace

void linear(const Call& call, const Block& weight) {
  linear(call, [&]<class Math>() { return Blocks<Math>(weight, call); });
}

}  // namespace fx
