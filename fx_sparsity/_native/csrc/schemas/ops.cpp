// The schemas of the operators that lowered programs call, for processes without Python: there,
// fx_sparsity's Python code defines them, and nobody may define them twice.
#include <string>

#include <torch/csrc/stable/library.h>

namespace {

void define_linear(torch::stable::detail::StableLibrary& m, const char* start) {
  const std::string schema = std::string(start) +
      ", Tensor? scale, Tensor? row_sums, Tensor? bias, int in_features, int out_features, "
      "str quantize_input, str activation) -> Tensor";
  m.def(schema.c_str());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fx_sparsity, m) {
  define_linear(m, "bitmask_linear(Tensor x, Tensor mask, Tensor values, Tensor offsets");
  define_linear(m, "nm_linear(Tensor x, Tensor mask, Tensor values");
  define_linear(m, "block_linear(Tensor x, Tensor values, Tensor index, Tensor offsets");
  define_linear(m, "dense_linear.int4(Tensor x, Tensor values, Tensor zero_points");
  define_linear(m, "nm_linear.int4(Tensor x, Tensor values, Tensor zero_points");
  define_linear(
      m,
      "bitmask_linear.int4(Tensor x, Tensor mask, Tensor values, Tensor offsets, "
      "Tensor zero_points");
  define_linear(
      m,
      "block_linear.int4(Tensor x, Tensor values, Tensor index, Tensor offsets, "
      "Tensor zero_points");
  m.def(
      "row_pruned_embedding(Tensor indices, Tensor rows, Tensor? affine, Tensor remap, int columns, "
      "str dtype) -> Tensor");
  m.def(
      "row_pruned_embedding_bag(Tensor indices, Tensor? offsets, Tensor? per_sample_weights, "
      "Tensor rows, Tensor? affine, Tensor remap, int columns, str dtype, int mode, "
      "int padding_idx, bool include_last_offset) -> Tensor");
}
