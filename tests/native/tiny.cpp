#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "tiny.h"

static int64_t count(torch::stable::Tensor x) {
  return kAnswer + x.numel();
}

STABLE_TORCH_LIBRARY(fx_sparsity_tiny, m) {
  m.def("count(Tensor x) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fx_sparsity_tiny, CPU, m) {
  m.impl("count", TORCH_BOX(&count));
}
