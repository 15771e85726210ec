// Packing of CPU tensors: checks, then the kernels. See panels.py.
#pragma once

#include <algorithm>

#include "linear_ops.h"
#include "pack.h"

namespace fx::ops {
namespace {

Dense dense_of(const Tensor& weight) {
  STD_TORCH_CHECK(
      weight.is_cpu() && weight.is_contiguous() && weight.dim() == 2,
      "expected a contiguous matrix on the CPU");
  dtype_of(weight);
  return {weight.const_data_ptr(), weight.size(0), weight.size(1), int64_t(weight.element_size())};
}

// How many elements of each panel are not zero: int64, one a panel.
void count_panels(Tensor weight, Tensor counts) {
  const Dense dense = dense_of(weight);
  data_of("counts", counts, ScalarType::Long, panels_of(dense.rows));
  fx::count_panels(dense, static_cast<int64_t*>(counts.mutable_data_ptr()));
}

// See pack.h.
int64_t most_of(Tensor weight, int64_t m) {
  STD_TORCH_CHECK(m > 0, "expected groups of one neighbour or more");
  return fx::most_of(dense_of(weight), m);
}

// The mask and the values of a weight, given where each panel's values begin and the last ones end.
void pack_panels(
    Tensor weight, int64_t n, int64_t m, Tensor offsets, Tensor mask, Tensor values) {
  const Dense dense = dense_of(weight);
  const int64_t group = group_of(dtype_of(weight)), panels = panels_of(dense.rows);
  STD_TORCH_CHECK(0 <= n && n <= m && m % group == 0, "expected n of m, in whole steps");
  const auto* from =
      static_cast<const int64_t*>(data_of("offsets", offsets, ScalarType::Long, panels + 1));
  STD_TORCH_CHECK(
      from[0] == 0 && std::is_sorted(from, from + panels + 1), "expected offsets that never decrease");
  data_of("mask", mask, ScalarType::Byte, panels * ceil_div(dense.columns, group) * 2 * group);
  data_of("values", values, weight.scalar_type(), from[panels]);
  fx::pack_panels(
      dense, {n, m}, from, static_cast<uint8_t*>(mask.mutable_data_ptr()),
      values.mutable_data_ptr());
}

}  // namespace
}  // namespace fx::ops
