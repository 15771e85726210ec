// What the operators share: torch's tensors, over its stable C interface.
#pragma once

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

namespace fx::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An empty tensor on the CPU. torch::stable::empty looks its operator up by name at each call, which
// takes longer than a small product.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * std::max<int64_t>(1, shape[d]);
  }
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

}  // namespace fx::ops
