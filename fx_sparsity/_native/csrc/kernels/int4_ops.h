// The operators of 4-bit packings on CPU tensors: checks, then the kernels. See ops.py.
#pragma once

#include "int4.h"
#include "linear_ops.h"

namespace fx::ops {
namespace {

// Checks what these operators share, and runs `kernel(call, groups)`.
template <class Kernel>
Tensor int4_linear(
    Tensor x, const Tensor& zero_points, const Optional& scale, const Optional& row_sums,
    const Optional& bias, int64_t in_features, int64_t out_features,
    const std::string& quantize_input, const std::string& activation, const Kernel& kernel) {
  Prepared made = prepare(x, bias, in_features, out_features, quantize_input, activation);
  const Call& call = made.call;
  STD_TORCH_CHECK(scale.has_value(), "4-bit weights have a scale");
  STD_TORCH_CHECK(
      (call.quantizer != Quantizer::none) == row_sums.has_value(),
      "quantized activations need row_sums, others take none");
  const int64_t panel = panels_of(out_features) * kLanes;
  Groups4 groups{};
  groups.count = scale->numel() / panel;
  STD_TORCH_CHECK(
      groups.count == 1 || (groups.count > 0 && in_features % (8 * groups.count) == 0),
      "groups of inputs are not equal, and multiples of 8");
  groups.is_bfloat = scale->scalar_type() == ScalarType::BFloat16;
  groups.scale = data_of(
      "scale", scale, groups.is_bfloat ? ScalarType::BFloat16 : ScalarType::Float,
      panel * groups.count);
  if (zero_points.numel()) {
    groups.zero_points = static_cast<const int8_t*>(
        data_of("zero_points", zero_points, ScalarType::Char, panel * groups.count));
  }
  groups.row_sums =
      static_cast<const float*>(data_of("row_sums", row_sums, ScalarType::Float, out_features));
  if (call.result.rows) kernel(call, groups);
  return made.y;
}

const uint8_t* bytes_of(const char* name, const Tensor& part, int64_t size) {
  return static_cast<const uint8_t*>(data_of(name, part, ScalarType::Byte, size));
}

Tensor dense_linear_int4(
    Tensor x, Tensor values, Tensor zero_points, Optional scale, Optional row_sums, Optional bias,
    int64_t in_features, int64_t out_features, std::string quantize_input,
    std::string activation) {
  const int64_t size = panels_of(out_features) * ceil_div(in_features, 8) * 64;
  const DenseInt4 packed{bytes_of("values", values, size)};
  return int4_linear(
      x, zero_points, scale, row_sums, bias, in_features, out_features, quantize_input, activation,
      [&](const Call& call, const Groups4& groups) { fx::linear(call, groups, packed); });
}

Tensor nm_linear_int4(
    Tensor x, Tensor values, Tensor zero_points, Optional scale, Optional row_sums, Optional bias,
    int64_t in_features, int64_t out_features, std::string quantize_input,
    std::string activation) {
  const int64_t size = panels_of(out_features) * ceil_div(in_features, 8) * 48;
  const NMInt4 packed{bytes_of("values", values, size + 16)};
  return int4_linear(
      x, zero_points, scale, row_sums, bias, in_features, out_features, quantize_input, activation,
      [&](const Call& call, const Groups4& groups) { fx::linear(call, groups, packed); });
}

Tensor bitmask_linear_int4(
    Tensor x, Tensor mask, Tensor values, Tensor offsets, Tensor zero_points, Optional scale,
    Optional row_sums, Optional bias, int64_t in_features, int64_t out_features,
    std::string quantize_input, std::string activation) {
  const int64_t panels = panels_of(out_features);
  BitmaskInt4 packed{};
  packed.mask = bytes_of("mask", mask, panels * ceil_div(in_features, 8) * 16);
  packed.offsets =
      static_cast<const int64_t*>(data_of("offsets", offsets, ScalarType::Long, panels + 1));
  packed.values = bytes_of("values", values, packed.offsets[panels] + 64);
  return int4_linear(
      x, zero_points, scale, row_sums, bias, in_features, out_features, quantize_input, activation,
      [&](const Call& call, const Groups4& groups) { fx::linear(call, groups, packed); });
}

Tensor block_linear_int4(
    Tensor x, Tensor values, Tensor index, Tensor offsets, Tensor zero_points, Optional scale,
    Optional row_sums, Optional bias, int64_t in_features, int64_t out_features,
    std::string quantize_input, std::string activation) {
  const int64_t rows = ceil_div(panels_of(out_features), 2);
  BlockInt4 packed{};
  packed.offsets =
      static_cast<const int64_t*>(data_of("offsets", offsets, ScalarType::Long, rows + 1));
  const int64_t blocks = packed.offsets[rows];
  packed.index = static_cast<const int32_t*>(data_of("index", index, ScalarType::Int, blocks));
  packed.values = bytes_of("values", values, blocks * 512);
  return int4_linear(
      x, zero_points, scale, row_sums, bias, in_features, out_features, quantize_input, activation,
      [&](const Call& call, const Groups4& groups) { fx::linear(call, groups, packed); });
}

}  // namespace
}  // namespace fx::ops
