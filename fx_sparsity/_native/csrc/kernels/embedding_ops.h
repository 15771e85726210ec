// The operators over row-pruned tables. What Python has checked when the table was built is checked
// here again only as far as memory safety needs it.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "embedding.h"
#include "tensors.h"

namespace fx::ops {
namespace {

Integers integers(const Tensor& x) {
  const bool is_wide = x.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(
      is_wide || x.scalar_type() == ScalarType::Int,
      "expected indices and offsets of int32 or int64");
  return {x.const_data_ptr(), is_wide};
}

ScalarType scalar_type_of(const std::string& dtype) {
  if (dtype == "bfloat16") return ScalarType::BFloat16;
  STD_TORCH_CHECK(dtype == "float32", "expected a result of float32 or bfloat16");
  return ScalarType::Float;
}

Output output(const Tensor& x) {
  return {x.mutable_data_ptr(), x.scalar_type() == ScalarType::BFloat16};
}

int64_t bits_of(const Tensor& rows) {
  switch (rows.scalar_type()) {
    case ScalarType::Float: return 32;
    case ScalarType::BFloat16: return 16;
    case ScalarType::Char: return 8;
    case ScalarType::Byte: return 4;
    default: STD_TORCH_CHECK(false, "expected rows of float32, bfloat16, int8 or uint8");
  }
}

Table table_of(
    const Tensor& rows, const std::optional<Tensor>& affine, const Tensor& remap, int64_t columns) {
  const int64_t bits = bits_of(rows), row_bytes = (columns * bits + 7) / 8;
  STD_TORCH_CHECK(
      rows.is_cpu() && rows.is_contiguous() && rows.dim() == 2 &&
          rows.size(1) * int64_t(rows.element_size()) == row_bytes,
      "expected contiguous rows of ", row_bytes, " bytes on the CPU");
  STD_TORCH_CHECK(
      remap.is_cpu() && remap.is_contiguous() && remap.scalar_type() == ScalarType::Int,
      "expected a contiguous remap of int32 on the CPU");
  const float* scales = nullptr;
  if (bits <= 8) {
    STD_TORCH_CHECK(
        affine && affine->is_cpu() && affine->is_contiguous() &&
            affine->scalar_type() == ScalarType::Float && affine->numel() == 2 * rows.size(0),
        "expected a scale and a zero point of float32 for each row of codes");
    scales = static_cast<const float*>(affine->const_data_ptr());
  }
  return {
      static_cast<const uint8_t*>(rows.const_data_ptr()),
      scales,
      static_cast<const int32_t*>(remap.const_data_ptr()),
      remap.numel(),
      rows.size(0),
      columns,
      row_bytes,
      bits};
}

// Raises where the first position that holds no index of the table is not the end.
void expect_inside(const Table& table, Integers indices, int64_t end, int64_t outside) {
  STD_TORCH_CHECK(
      outside == end, "index ", indices[outside], " at position ", outside,
      " is out of range for a table of ", table.size, " rows");
}

Tensor row_pruned_embedding(
    Tensor indices, Tensor rows, std::optional<Tensor> affine, Tensor remap, int64_t columns,
    std::string dtype) {
  const Table table = table_of(rows, affine, remap, columns);
  indices = torch::stable::contiguous(indices);
  const Integers positions = integers(indices);
  std::vector<int64_t> shape(indices.sizes().begin(), indices.sizes().end());
  shape.push_back(columns);
  Tensor result = empty(shape, scalar_type_of(dtype));
  const Output out = output(result);
  expect_inside(table, positions, indices.numel(), look_up(table, positions, indices.numel(), out));
  return result;
}

// Positions at which bags begin, and at last where the last one ends.
std::vector<int64_t> bounds_of(
    const Tensor& indices, const std::optional<Tensor>& offsets, bool include_last_offset) {
  std::vector<int64_t> bounds;
  bounds.reserve(1 + (offsets ? offsets->numel() : indices.size(0)));
  if (!offsets) {
    STD_TORCH_CHECK(indices.dim() == 2, "expected offsets, or indices of two dimensions");
    for (int64_t bag = 0; bag <= indices.size(0); bag++) bounds.push_back(bag * indices.size(1));
    return bounds;
  }
  STD_TORCH_CHECK(
      indices.dim() == 1 && offsets->dim() == 1 && offsets->numel() >= include_last_offset,
      "expected indices and offsets of one dimension");
  const Integers stored = integers(*offsets);
  for (int64_t bag = 0; bag < offsets->numel(); bag++) bounds.push_back(stored[bag]);
  if (!include_last_offset) bounds.push_back(indices.numel());
  STD_TORCH_CHECK(
      (bounds.size() == 1 || bounds.front() == 0) && bounds.back() <= indices.numel() &&
          std::is_sorted(bounds.begin(), bounds.end()),
      "expected offsets that begin with 0, never decrease and end within ", indices.numel(),
      " indices");
  if (bounds.size() == 1) bounds.front() = 0;
  return bounds;
}

Tensor row_pruned_embedding_bag(
    Tensor indices, std::optional<Tensor> offsets, std::optional<Tensor> per_sample_weights,
    Tensor rows, std::optional<Tensor> affine, Tensor remap, int64_t columns, std::string dtype,
    int64_t mode, int64_t padding_idx, bool include_last_offset) {
  const Table table = table_of(rows, affine, remap, columns);
  indices = torch::stable::contiguous(indices);
  const Integers positions = integers(indices);
  if (offsets) offsets = torch::stable::contiguous(*offsets);
  const std::vector<int64_t> bounds = bounds_of(indices, offsets, include_last_offset);
  const int64_t count = bounds.size() - 1;
  Bags bags{bounds.data(), nullptr, padding_idx, Mode(mode)};
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "expected mode 0 (sum), 1 (mean) or 2 (max)");
  if (per_sample_weights) {
    per_sample_weights = torch::stable::contiguous(*per_sample_weights);
    STD_TORCH_CHECK(
        bags.mode == Mode::sum && per_sample_weights->scalar_type() == ScalarType::Float &&
            per_sample_weights->numel() == indices.numel(),
        "expected per_sample_weights of float32 for each index, and mode 0 (sum)");
    bags.weights = static_cast<const float*>(per_sample_weights->const_data_ptr());
  }
  Tensor result = empty({count, columns}, scalar_type_of(dtype));
  const Output out = output(result);
  expect_inside(table, positions, bounds.back(), reduce_bags(table, positions, bags, count, out));
  return result;
}

}  // namespace
}  // namespace fx::ops
