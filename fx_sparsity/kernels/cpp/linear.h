// The operator every packing registers: checks, and the arithmetic that the dtypes ask for.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "panels.h"

namespace fx {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The operator's arguments after the packed parts.
struct Options {
  std::optional<Tensor> scale, row_sums, bias;
  int64_t in_features, out_features;
  Quantizer quantizer;
  Activation activation;
};

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline void expect(const char* name, const Tensor& tensor, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
          tensor.numel() == size,
      name, " is not a contiguous CPU tensor of ", size, " elements of the expected dtype");
}

// The data of an optional vector, one element an output.
template <class T>
const T* vector_of(
    const char* name, const std::optional<Tensor>& tensor, ScalarType dtype, int64_t size) {
  if (!tensor) return nullptr;
  expect(name, *tensor, dtype, size);
  return data<T>(*tensor);
}

// [..., in] -> [..., out]. `packed.template operator()<Math>()` gives the weight's panels as Math
// reads them; they have been checked.
template <class Packed>
Tensor linear(Tensor x, ScalarType weight, const Options& options, const Packed& packed) {
  const ScalarType dtype = x.scalar_type();
  const bool is_bfloat = dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      x.is_cpu() && (is_bfloat || dtype == ScalarType::Float),
      "activations are not a CPU tensor of float32 or bfloat16");
  STD_TORCH_CHECK(
      x.dim() && x.size(-1) == options.in_features, "activations have ", x.dim() ? x.size(-1) : 0,
      " features, expected ", options.in_features);
  const bool coded = weight == ScalarType::Char, quantized = options.quantizer != Quantizer::none;
  STD_TORCH_CHECK(coded || weight == dtype, "activations and weight differ in dtype");
  STD_TORCH_CHECK(coded == options.scale.has_value(), "int8 weights, and only they, have a scale");
  STD_TORCH_CHECK(
      quantized == options.row_sums.has_value() && (coded || !quantized),
      "quantized activations need an int8 weight and its row_sums");

  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<int64_t> shape(x.dim(), options.out_features);
  for (int64_t d = 0; d + 1 < x.dim(); d++) shape[d] = x.size(d);
  Tensor y = torch::stable::new_empty(x, shape);
  if (!y.numel()) return y;

  const int64_t outputs = options.out_features;
  Result result{};
  result.y = y.data_ptr();
  result.is_bfloat = is_bfloat;
  result.rows = x.numel() / options.in_features;
  result.outputs = outputs;
  result.scale = vector_of<float>("scale", options.scale, ScalarType::Float, outputs);
  result.row_sums = vector_of<int32_t>("row_sums", options.row_sums, ScalarType::Int, outputs);
  result.bias = vector_of<void>("bias", options.bias, dtype, outputs);
  result.activation = options.activation;

  const auto with_cpu_and_data = [&](const auto& work) {
    with_cpu([&](auto cpu) {
      is_bfloat ? work(cpu, data<const BFloat>(x)) : work(cpu, data<const float>(x));
    });
  };
  with_cpu_and_data([&]<class Cpu, class X>(Cpu, const X* in) {
    const int64_t columns = options.in_features;
    using Float = std::conditional_t<
        std::is_same_v<X, BFloat>, typename Cpu::BF16, typename Cpu::F32>;
    using Codes = typename Cpu::template W8<X>;
    using Integer = typename Cpu::I8;
    if (!coded) {
      multiply<Cpu, Float>(packed.template operator()<Float>(), in, columns, result);
    } else if (!quantized) {
      multiply<Cpu, Codes>(packed.template operator()<Codes>(), in, columns, result);
    } else {
      const Quantized q = quantize(in, result.rows, columns, options.quantizer);
      result.x_scale = q.scale.get();
      result.x_zero_point = q.zero_point.get();
      multiply<Cpu, Integer>(packed.template operator()<Integer>(), q.codes.get(), columns, result);
    }
  });
  return y;
}

}  // namespace fx
