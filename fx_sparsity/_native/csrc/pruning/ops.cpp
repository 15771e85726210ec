// The inner loops of calibrated pruning, row by row: contiguous CPU tensors of fp32, boolean masks
// where 1 is kept. Shapes are the caller's to check.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "exchange.h"
#include "sweep.h"

namespace fx::ops {
namespace {

using torch::stable::Tensor;

const float* read(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() && x.is_cpu(), "expected a contiguous CPU tensor");
  return static_cast<const float*>(x.const_data_ptr());
}

template <class T>
T* write(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() && x.is_cpu(), "expected a contiguous CPU tensor");
  return static_cast<T*>(x.mutable_data_ptr());
}

void sweep(
    Tensor weight, Tensor mask, Tensor factor, int64_t group, int64_t zeros, int64_t last) {
  fx::sweep(
      write<float>(weight), write<uint8_t>(mask), read(factor), weight.size(0), weight.size(1),
      fx::Groups{group, zeros, last});
}

void exchange(
    Tensor values, Tensor mask, Tensor gradient, Tensor matrix, int64_t cell, int64_t narrow,
    double least) {
  fx::exchange(
      write<float>(values), write<uint8_t>(mask), write<float>(gradient), read(matrix),
      values.size(0), values.size(1), cell, narrow, float(least));
}

}  // namespace
}  // namespace fx::ops

STABLE_TORCH_LIBRARY(fx_sparsity_pruning, m) {
  m.def(
      "sweep(Tensor(a!) weight, Tensor(b!) mask, Tensor factor, int group, int zeros, int last) "
      "-> ()");
  m.def(
      "exchange(Tensor(a!) values, Tensor(b!) mask, Tensor(c!) gradient, Tensor matrix, int cell, "
      "int narrow, float least) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fx_sparsity_pruning, CPU, m) {
  m.impl("exchange", TORCH_BOX(&fx::ops::exchange));
  m.impl("sweep", TORCH_BOX(&fx::ops::sweep));
}
