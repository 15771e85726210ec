// The packing "block": dense blocks of one or two panels, and where they stand. See block.py.
#include "linear.h"

namespace fx {
namespace {

template <class Math>
class Blocks {
 public:
  Blocks(
      const Tensor& values, const Tensor& index, const Tensor& offsets, int64_t out_features,
      int64_t in_features)
      : panels((out_features + kLanes - 1) / kLanes),
        groups((in_features + Math::kGroup - 1) / Math::kGroup),
        steps(values.dim() == 5 ? values.size(1) : 0),
        height(values.dim() == 5 ? values.size(2) : 0),
        values_(data<const typename Math::Value>(values)),
        index_(data<const int32_t>(index)),
        offsets_(data<const int64_t>(offsets)) {
    const bool known = (height == 1 && steps == 1) || (height == 2 && steps > 0 && steps % 4 == 0);
    STD_TORCH_CHECK(known, "values are in blocks that no kernel knows");
    const int64_t rows = (panels + height - 1) / height;
    expect("offsets", offsets, ScalarType::Long, rows + 1);
    expect("index", index, ScalarType::Int, offsets_[rows]);
    expect(
        "values", values, values.scalar_type(),
        offsets_[rows] * steps * height * kLanes * Math::kGroup);
  }

  // The blocks of one row.
  struct Row {
    const typename Math::Value* values;
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
  const typename Math::Value* values_;
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
  for (int p = 0; p < Panels; p++) {
    step[p] = Math::widen(Math::load(weights + p * kLanes * Math::kGroup));
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
    const typename Math::Input* x, typename Math::Sum (&sums)[Rows][Panels]) {
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
      sums[r][p] = sum[0][r][p];
#pragma GCC unroll 8
      for (int chain = 1; chain < Chains; chain++) sums[r][p] = Math::add(sums[r][p], sum[chain][r][p]);
    }
  }
}

// All rows of blocks times all tiles: the blocks of a row stay in cache from tile to tile.
template <class Cpu, class Math, int Rows, int Panels>
void multiply_blocks(
    const Blocks<Math>& blocks, const Tiles<typename Math::Input>& tiles, const Result& result) {
  constexpr int chains = std::clamp(2 * Cpu::kChains / (Rows * Panels), 1, 4);
  const int64_t rows = (blocks.panels + Panels - 1) / Panels;
  const int64_t grain = std::max<int64_t>(1, (1 << 12) / blocks.groups);
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const auto row = blocks.row(r);
      for (int64_t t = 0; t < tiles.count; t++) {
        typename Math::Sum sums[Rows][Panels];
        multiply_row<Math, Rows, Panels, chains>(blocks, row, tiles.tile(t), sums);
        const int64_t present = std::min<int64_t>(Rows, result.rows - t * Rows);
        for (int p = 0; p < Panels && r * Panels + p < blocks.panels; p++) {
          const PanelResult columns(result, r * Panels + p);
          for (int64_t i = 0; i < present; i++) write<Math>(columns, t * Rows + i, sums[i][p]);
        }
      }
    }
  });
}

template <class Cpu, class Math, class X>
void multiply(const Blocks<Math>& blocks, const X* x, int64_t columns, const Result& result) {
  constexpr int most = std::min(8, Cpu::kTileRows);  // twelve rows are no faster, only more code
  with_height<most>(result.rows, [&]<int Rows>() {
    const auto tiles =
        tiles_of<Math::kGroup, typename Math::Input>(x, result.rows, columns, Rows);
    if (blocks.height == 1) {
      multiply_blocks<Cpu, Math, Rows, 1>(blocks, tiles, result);
    } else {
      multiply_blocks<Cpu, Math, Rows, 2>(blocks, tiles, result);
    }
  });
}

Tensor block_linear(
    Tensor x, Tensor values, Tensor index, Tensor offsets, std::optional<Tensor> scale,
    std::optional<Tensor> row_sums, std::optional<Tensor> bias, int64_t in_features,
    int64_t out_features, std::string quantize_input, std::string activation) {
  const Options options{
      scale,        row_sums, bias, in_features, out_features, quantizer_of(quantize_input),
      activation_of(activation)};
  return linear(x, values.scalar_type(), options, [&]<class Math>() {
    return Blocks<Math>(values, index, offsets, out_features, in_features);
  });
}

}  // namespace
}  // namespace fx

STABLE_TORCH_LIBRARY_IMPL(fx_sparsity, CPU, m) {
  m.impl("block_linear", TORCH_BOX(&fx::block_linear));
}
