// The operators of the packings on CPU tensors: checks, then the kernels. See ops.py.
//
// Packed parts were checked when they were made; here only what costs nothing is looked at again.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "bitmask.h"
#include "block.h"
#include "tensors.h"

namespace fx::ops {
namespace {

using Optional = std::optional<Tensor>;

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  STD_TORCH_CHECK(name == "silu", "unknown activation '", name, "'");
  return Activation::silu;
}

Quantizer quantizer_of(const std::string& name) {
  if (name == "none") return Quantizer::none;
  if (name == "token_symmetric") return Quantizer::token_symmetric;
  if (name == "token_affine") return Quantizer::token_affine;
  STD_TORCH_CHECK(name == "tensor_affine", "unknown quantizer '", name, "'");
  return Quantizer::tensor_affine;
}

Dtype dtype_of(const Tensor& values) {
  switch (values.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Char: return Dtype::i8;
    default: STD_TORCH_CHECK(false, "the weight is neither float32 nor bfloat16 nor int8");
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t panels_of(int64_t out_features) { return ceil_div(out_features, kLanes); }

// Inputs in a group, for each Dtype.
int64_t group_of(Dtype dtype) { return dtype == Dtype::f32 ? 1 : dtype == Dtype::bf16 ? 2 : 4; }

// The data of a part, which has to be a contiguous CPU tensor of `size` elements of `dtype`.
const void* data_of(const char* name, const Tensor& part, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(
      part.is_cpu() && part.is_contiguous() && part.scalar_type() == dtype && part.numel() == size,
      name, " is not a contiguous CPU tensor of ", size, " elements of the dtype expected");
  return part.const_data_ptr();
}

const void* data_of(const char* name, const Optional& part, ScalarType dtype, int64_t size) {
  return part ? data_of(name, *part, dtype, size) : nullptr;
}

// The result, and a call without what it needs to know of the weight.
struct Prepared {
  Tensor x, y;
  Call call;
};

// Checks what all operators share.
Prepared prepare(
    Tensor x, const Optional& bias, int64_t in_features, int64_t out_features,
    const std::string& quantize_input, const std::string& activation) {
  const ScalarType dtype = x.scalar_type();
  const bool is_bfloat = dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      x.is_cpu() && (is_bfloat || dtype == ScalarType::Float),
      "activations are not a CPU tensor of float32 or bfloat16");
  STD_TORCH_CHECK(
      x.dim() > 0 && x.size(x.dim() - 1) == in_features, "the last dimension of the activations is ",
      "not ", in_features);
  STD_TORCH_CHECK(in_features > 0 && out_features > 0, "the weight has no elements");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<int64_t> shape(x.dim(), out_features);
  for (int64_t d = 0; d + 1 < x.dim(); d++) shape[d] = x.size(d);
  Tensor y = empty(shape, dtype);

  Call call{};
  call.x = x.const_data_ptr();
  call.columns = in_features;
  call.quantizer = quantizer_of(quantize_input);
  Result& result = call.result;
  result.y = y.mutable_data_ptr();
  result.is_bfloat = is_bfloat;
  result.rows = x.numel() / in_features;
  result.outputs = out_features;
  result.bias = data_of("bias", bias, dtype, out_features);
  result.activation = activation_of(activation);
  return {x, y, call};
}

// Checks what operators of weights with a scale an output share, and runs `kernel(call)`.
template <class Kernel>
Tensor linear(
    Tensor x, Dtype weight, const Optional& scale, const Optional& row_sums, const Optional& bias,
    int64_t in_features, int64_t out_features, const std::string& quantize_input,
    const std::string& activation, const Kernel& kernel) {
  Prepared made = prepare(x, bias, in_features, out_features, quantize_input, activation);
  Call& call = made.call;
  const bool coded = weight == Dtype::i8, quantized = call.quantizer != Quantizer::none;
  STD_TORCH_CHECK(
      coded || weight == (call.result.is_bfloat ? Dtype::bf16 : Dtype::f32),
      "activations and weight differ in dtype");
  STD_TORCH_CHECK(coded == scale.has_value(), "int8 weights, and only they, have a scale");
  STD_TORCH_CHECK(
      quantized == row_sums.has_value() && (coded || !quantized),
      "quantized activations need an int8 weight and its row_sums, others take none");
  call.weight = weight;
  call.result.scale =
      static_cast<const float*>(data_of("scale", scale, ScalarType::Float, out_features));
  call.result.row_sums =
      static_cast<const int32_t*>(data_of("row_sums", row_sums, ScalarType::Int, out_features));
  if (call.result.rows) kernel(call);
  return made.y;
}

Tensor bitmask_linear(
    Tensor x, Tensor mask, Tensor values, Tensor offsets, Optional scale, Optional row_sums,
    Optional bias, int64_t in_features, int64_t out_features, std::string quantize_input,
    std::string activation) {
  const Dtype weight = dtype_of(values);
  const int64_t group = group_of(weight), panels = panels_of(out_features);
  const int64_t bytes = panels * ceil_div(in_features, group) * 2 * group;
  Bitmask packed{};
  packed.mask = static_cast<const uint8_t*>(data_of("mask", mask, ScalarType::Byte, bytes));
  packed.offsets =
      static_cast<const int64_t*>(data_of("offsets", offsets, ScalarType::Long, panels + 1));
  const int64_t padding = 16 * group;  // elements that a kernel may read past the last value
  packed.values =
      data_of("values", values, values.scalar_type(), packed.offsets[panels] + padding);
  return linear(
      x, weight, scale, row_sums, bias, in_features, out_features, quantize_input, activation,
      [&](const Call& call) { fx::linear(call, packed); });
}

Tensor nm_linear(
    Tensor x, Tensor mask, Tensor values, Optional scale, Optional row_sums, Optional bias,
    int64_t in_features, int64_t out_features, std::string quantize_input,
    std::string activation) {
  const Dtype weight = dtype_of(values);
  const int64_t group = group_of(weight), panels = panels_of(out_features);
  const int64_t bytes = panels * ceil_div(in_features, group) * 2 * group;
  const int64_t total = values.numel() - 16 * group;  // less what may be read past the last value
  STD_TORCH_CHECK(total >= 0 && total % panels == 0, "values are not as many in each panel");
  Bitmask packed{};
  packed.mask = static_cast<const uint8_t*>(data_of("mask", mask, ScalarType::Byte, bytes));
  packed.values = data_of("values", values, values.scalar_type(), values.numel());
  packed.stride = total / panels;
  return linear(
      x, weight, scale, row_sums, bias, in_features, out_features, quantize_input, activation,
      [&](const Call& call) { fx::linear(call, packed); });
}

Tensor block_linear(
    Tensor x, Tensor values, Tensor index, Tensor offsets, Optional scale, Optional row_sums,
    Optional bias, int64_t in_features, int64_t out_features, std::string quantize_input,
    std::string activation) {
  const Dtype weight = dtype_of(values);
  STD_TORCH_CHECK(values.dim() == 5, "values are not [blocks, steps, panels, lanes, group]");
  Block packed{};
  packed.steps = values.size(1);
  packed.height = values.size(2);
  STD_TORCH_CHECK(
      packed.height == 1 ? packed.steps == 1 : packed.height == 2 && packed.steps % 4 == 0,
      "values are in blocks that no kernel knows");
  const int64_t rows = ceil_div(panels_of(out_features), packed.height);
  packed.offsets =
      static_cast<const int64_t*>(data_of("offsets", offsets, ScalarType::Long, rows + 1));
  const int64_t blocks = packed.offsets[rows];
  packed.index = static_cast<const int32_t*>(data_of("index", index, ScalarType::Int, blocks));
  const int64_t size = packed.steps * packed.height * kLanes * group_of(weight);
  packed.values = data_of("values", values, values.scalar_type(), blocks * size);
  return linear(
      x, weight, scale, row_sums, bias, in_features, out_features, quantize_input, activation,
      [&](const Call& call) { fx::linear(call, packed); });
}

}  // namespace
}  // namespace fx::ops
