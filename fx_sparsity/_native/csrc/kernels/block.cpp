#include "block.h"

#include <algorithm>

#include "linear.h"

namespace fx {
namespace {

constexpr int64_t kAhead = 4096;  // bytes from what is read to what is called for

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
    // The processor's own prefetching stops at the end of a page. Into the second cache, since few
    // lines can be on their way to the first.
    __builtin_prefetch(reinterpret_cast<const char*>(weights) + kAhead, 0, 2);
    step[p] = Math::widen(Math::load(weights));
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; p++) sum[r][p] = Math::dot(sum[r][p], step[p], x + r * Math::kGroup);
  }
}

// `Streams` rows of blocks times one tile: memory is faster where it is read in several places.
// With few sums several steps run at once, each with sums of its own, since a sum has to wait for
// the one before it.
template <class Math, int Rows, int Panels, int Chains, int Streams>
void multiply_rows(
    const Blocks<Math>& blocks, const typename Blocks<Math>::Row* rows,
    const typename Math::Input* x, typename Math::Sum* sums) {
  typename Math::Sum sum[Streams][Chains][Rows][Panels] = {};
  constexpr int64_t values = Panels * kLanes * Math::kGroup, inputs = Rows * Math::kGroup;
  // Block `b` of a stream, its steps chain by chain.
  const auto multiply_block = [&](int stream, const typename Math::Value* weights, int64_t b)
                                  __attribute__((always_inline)) {
    const int64_t first = rows[stream].index[b] * blocks.steps;
    const int64_t steps = std::min(blocks.steps, blocks.groups - first);
    const typename Math::Input* in = x + first * inputs;
    int64_t i = 0;
    for (; i + Chains <= steps; i += Chains) {
#pragma GCC unroll 8
      for (int chain = 0; chain < Chains; chain++) {
        const int64_t step = i + chain;
        multiply_step<Math>(weights + step * values, in + step * inputs, sum[stream][chain]);
      }
    }
    for (; i < steps; i++) {
      multiply_step<Math>(weights + i * values, in + i * inputs, sum[stream][0]);
    }
  };
  // Block `b`; of blocks that are a step `chains` of them, from there on.
  const auto multiply_at = [&](int stream, int64_t b, int chains) __attribute__((always_inline)) {
    const typename Math::Value* weights = rows[stream].values + b * blocks.steps * values;
    if constexpr (Panels == 1) {
#pragma GCC unroll 8
      for (int chain = 0; chain < chains; chain++) {
        const typename Math::Input* in = x + rows[stream].index[b + chain] * inputs;
        multiply_step<Math>(weights + chain * values, in, sum[stream][chain]);
      }
    } else {
      multiply_block(stream, weights, b);
    }
  };
  constexpr int64_t at_once = Panels == 1 ? Chains : 1;  // blocks
  int64_t common = rows[0].count;
  for (int s = 1; s < Streams; s++) common = std::min(common, rows[s].count);
  int64_t b = 0;
  for (; b + at_once <= common; b += at_once) {
#pragma GCC unroll 2
    for (int s = 0; s < Streams; s++) multiply_at(s, b, at_once);
  }
#pragma GCC unroll 2
  for (int s = 0; s < Streams; s++) {
    int64_t rest = b;
    for (; rest + at_once <= rows[s].count; rest += at_once) multiply_at(s, rest, at_once);
    for (; rest < rows[s].count; rest++) multiply_at(s, rest, 1);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 2
      for (int p = 0; p < Panels; p++) {
        typename Math::Sum& total = sums[(s * Rows + r) * Panels + p] = sum[s][0][r][p];
#pragma GCC unroll 8
        for (int chain = 1; chain < Chains; chain++) total = Math::add(total, sum[s][chain][r][p]);
      }
    }
  }
}

template <class Math>
using MultiplyRows = void (*)(
    const Blocks<Math>&, const typename Blocks<Math>::Row*, const typename Math::Input*,
    typename Math::Sum*);

constexpr int kMostStreams = 2;

// All rows of blocks times all tiles: the blocks of a row stay in cache from tile to tile.
template <class Math>
void multiply_blocks(
    const Blocks<Math>& blocks, const Tiles<typename Math::Input>& tiles, const Result& result,
    int64_t streams, MultiplyRows<Math> multiply_rows) {
  const int64_t height = blocks.height, rows = (blocks.panels + height - 1) / height;
  const int64_t grain = std::max<int64_t>(1, (1 << 12) / blocks.groups);
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const Buffer<typename Math::Sum> sums(streams * tiles.height * height);
    const int64_t stride = (end - begin + streams - 1) / streams;  // rows between streams
    for (int64_t r = begin; r < begin + stride; r++) {
      typename Blocks<Math>::Row together[kMostStreams] = {};  // without blocks where there is none
      for (int64_t s = 0; s < streams && r + s * stride < end; s++) {
        together[s] = blocks.row(r + s * stride);
      }
      for (int64_t t = 0; t < tiles.count; t++) {
        multiply_rows(blocks, together, tiles.tile(t), sums.get());
        const int64_t first = t * tiles.height, present = std::min(tiles.height, result.rows - first);
        for (int64_t row = r, s = 0; row < end && s < streams; row += stride, s++) {
          for (int64_t p = 0; p < height && row * height + p < blocks.panels; p++) {
            const PanelResult columns(result, row * height + p);
            for (int64_t i = 0; i < present; i++) {
              write<Math>(columns, first + i, sums[(s * tiles.height + i) * height + p]);
            }
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
    constexpr int streams = Rows == 1 ? kMostStreams : 1;
    const auto tiles = tiles_of<Math::kGroup, typename Math::Input>(x, result.rows, columns, Rows);
    multiply_blocks(
        blocks, tiles, result, streams,
        blocks.height == 1 ? multiply_rows<Math, Rows, 1, one, streams>
                           : multiply_rows<Math, Rows, 2, two, streams>);
  });
}

}  // namespace

void linear(const Call& call, const Block& weight) {
  linear(call, [&]<class Math>() { return Blocks<Math>(weight, call); });
}

}  // namespace fx
