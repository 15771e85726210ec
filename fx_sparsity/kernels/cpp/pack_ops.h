// Packing of CPU tensors: checks, then the kernels. See bitmask.py.
#pragma once

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

// The mask and the values of a weight, given where each panel's values begin and the last ones end.
void pack_panels(Tensor weight, Tensor offsets, Tensor mask, Tensor values) {
  const Dense dense = dense_of(weight);
  const int64_t group = group_of(dtype_of(weight)), panels = panels_of(dense.rows);
  const auto* from =
      static_cast<const int64_t*>(data_of("offsets", offsets, ScalarType::Long, panels + 1));
  data_of(
      "mask", mask, ScalarType::Byte, panels * ceil_div(dense.columns, group) * 2 * group);
  data_of("values", values, weight.scalar_type(), from[panels]);
  fx::pack_panels(
      dense, from, static_cast<uint8_t*>(mask.mutable_data_ptr()), values.mutable_data_ptr());
}

}  // namespace
}  // namespace fx::ops
