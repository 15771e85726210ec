// All operators on CPU tensors, in one file: torch's headers take longer to compile than they do.
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>

#include "embedding_ops.h"
#include "fail.h"
#include "int4_ops.h"
#include "linear_ops.h"
#include "pack_ops.h"

void fx::fail(const char* first, const char* second, const char* third) {
  throw std::runtime_error(std::string(first) + second + third);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fx_sparsity, m) {
  m.def("count_panels(Tensor weight, Tensor(a!) counts) -> ()");
  m.def("most_of(Tensor weight, int m) -> int");
  m.def(
      "pack_panels(Tensor weight, int n, int m, Tensor offsets, Tensor(a!) mask, Tensor(b!) values)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fx_sparsity, CPU, m) {
  m.impl("count_panels", TORCH_BOX(&fx::ops::count_panels));
  m.impl("most_of", TORCH_BOX(&fx::ops::most_of));
  m.impl("pack_panels", TORCH_BOX(&fx::ops::pack_panels));
  m.impl("bitmask_linear", TORCH_BOX(&fx::ops::bitmask_linear));
  m.impl("nm_linear", TORCH_BOX(&fx::ops::nm_linear));
  m.impl("block_linear", TORCH_BOX(&fx::ops::block_linear));
  m.impl("dense_linear.int4", TORCH_BOX(&fx::ops::dense_linear_int4));
  m.impl("nm_linear.int4", TORCH_BOX(&fx::ops::nm_linear_int4));
  m.impl("bitmask_linear.int4", TORCH_BOX(&fx::ops::bitmask_linear_int4));
  m.impl("block_linear.int4", TORCH_BOX(&fx::ops::block_linear_int4));
  m.impl("row_pruned_embedding", TORCH_BOX(&fx::ops::row_pruned_embedding));
  m.impl("row_pruned_embedding_bag", TORCH_BOX(&fx::ops::row_pruned_embedding_bag));
}
