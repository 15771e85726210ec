// The mask operators: contiguous CPU tensors of fp32, fp16 or bf16 in; a mask written in place.
//
// `signed` ranks elements by value, else by magnitude. In a mask of a floating dtype 1 is kept.
// Sizes and counts are the caller's to check.
#include <algorithm>
#include <cstring>
#include <numeric>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "apply.h"
#include "bits.h"
#include "blocks.h"
#include "scratch.h"
#include "select.h"
#include "within.h"
#include "write.h"

namespace fx::ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls `work(const T*)` with the elements of `x`.
template <class Work>
void with_elements(const Tensor& x, const Work& work) {
  STD_TORCH_CHECK(x.is_contiguous() && x.is_cpu(), "expected a contiguous CPU tensor");
  const void* data = x.const_data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Float: return work(static_cast<const float*>(data));
    case ScalarType::Half: return work(static_cast<const Half*>(data));
    case ScalarType::BFloat16: return work(static_cast<const BFloat*>(data));
    default: STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
}

// Calls `work(source)` with the keys of the elements of `x`.
template <class Work>
void with_keys(const Tensor& x, bool is_signed, const Work& work) {
  with_elements(x, [&]<class T>(const T* data) {
    is_signed ? work(Elements<T, true>{data}) : work(Elements<T, false>{data});
  });
}

// Calls `work(Out* mask, Out one)`.
template <class Work>
void with_mask(const Tensor& mask, const Work& work) {
  STD_TORCH_CHECK(mask.is_contiguous() && mask.is_cpu(), "expected a contiguous CPU mask");
  void* data = mask.mutable_data_ptr();
  switch (mask.scalar_type()) {
    case ScalarType::Bool: return work(static_cast<uint8_t*>(data), uint8_t(1));
    case ScalarType::Half: return work(static_cast<uint16_t*>(data), uint16_t(0x3c00));
    case ScalarType::BFloat16: return work(static_cast<uint16_t*>(data), uint16_t(0x3f80));
    case ScalarType::Float: return work(static_cast<uint32_t*>(data), uint32_t(0x3f800000));
    default: STD_TORCH_CHECK(false, "expected a bool, float32, float16 or bfloat16 mask");
  }
}

// `n` elements as a grid of blocks of one.
Geometry elements(int64_t n) {
  return {1, 1, n, 1, 1, false};
}

// Writes the bits of a grid's blocks, if there are any; returns whether there are.
bool write_kept(const std::optional<Bits>& bits, const Geometry& g, const Tensor& mask) {
  if (!bits) return false;
  with_mask(mask, [&](auto* out, auto one) { write_blocks(*bits, g, one, out); });
  return true;
}

template <class T>
constexpr uint32_t infinity_bits() {
  return std::is_same_v<T, Half> ? 0x7c00 : std::is_same_v<T, BFloat> ? 0x7f80 : 0x7f800000;
}

bool has_nan(Tensor x) {
  std::atomic<bool> found{false};
  with_elements(x, [&]<class T>(const T* data) {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    constexpr Bits infinity = infinity_bits<T>(), magnitude = Bits(-1) >> 1;
    const Bits* bits = reinterpret_cast<const Bits*>(data);
    torch::stable::parallel_for(0, chunks_of(x.numel()), 1, [&](int64_t begin, int64_t end) {
      const int64_t stop = std::min(x.numel(), end * kChunk);
      Bits nan = 0;
      for (int64_t i = begin * kChunk; i < stop; i++) nan |= Bits((bits[i] & magnitude) > infinity);
      if (nan) found.store(true, std::memory_order_relaxed);
    });
  });
  return found;
}

// Drops exactly the `k` smallest elements; false, and nothing is written, where one is NaN.
bool drop_elements(Tensor x, bool is_signed, int64_t k, Tensor mask) {
  std::optional<Bits> kept;
  with_keys(x, is_signed, [&](auto source) { kept = keep_largest(source, x.numel(), k); });
  return write_kept(kept, elements(x.numel()), mask);
}

// Drops every element below `key` and the first `ties` of those at it; returns how many of the
// ties were used up.
int64_t drop_below(Tensor x, bool is_signed, int64_t key, int64_t ties, Tensor mask) {
  const int64_t n = x.numel();
  int64_t equal = 0;
  std::optional<Bits> kept;
  with_keys(x, is_signed, [&](auto source) {
    const std::vector<int64_t> counts = equal_per_chunk(source, n, uint32_t(key));
    equal = std::accumulate(counts.begin(), counts.end(), int64_t(0));
    kept = kept_by(source, n, cut_at(source, counts, uint32_t(key), ties));
  });
  write_kept(kept, elements(n), mask);
  return std::min(ties, equal);
}

// Adds to `counts` how often each upper half of a key occurs, or each lower half under `prefix`.
void count_keys(Tensor x, bool is_signed, int64_t prefix, Tensor counts) {
  with_keys(x, is_signed, [&](auto source) {
    count_digits(source, x.numel(), prefix, static_cast<int64_t*>(counts.mutable_data_ptr()));
  });
}

// Which blocks are kept where the `k` of the smallest means go; nothing where a mean is NaN.
std::optional<Bits> keep_blocks(const Tensor& x, int64_t norm, const Geometry& g, int64_t k) {
  std::optional<Bits> kept;
  with_elements(x, [&](const auto* data) {
    switch (Norm(norm)) {
      case Norm::value: kept = fx::keep_blocks<Norm::value>(data, g, k); break;
      case Norm::magnitude: kept = fx::keep_blocks<Norm::magnitude>(data, g, k); break;
      case Norm::square: kept = fx::keep_blocks<Norm::square>(data, g, k); break;
    }
  });
  return kept;
}

// Drops the `k` blocks of the smallest means; false, and nothing is written, where a mean is NaN.
// Edges that belong to no block are kept.
bool drop_blocks(
    Tensor x, int64_t norm, int64_t k, int64_t batch, int64_t height, int64_t width,
    int64_t block_height, int64_t block_width, bool dense, Tensor mask) {
  const Geometry g = Geometry{batch, height, width, block_height, block_width, dense}.flattened();
  return write_kept(keep_blocks(x, norm, g, k), g, mask);
}

// Drops the `zeros` smallest elements of the `k` blocks of the smallest means; false, and nothing
// is written, where a mean or an element is NaN. `count_missing` counts a ragged block's missing
// elements among its zeros. Edges that belong to no block are kept.
bool drop_within(
    Tensor x, int64_t norm, int64_t k, int64_t zeros, bool count_missing, int64_t batch,
    int64_t height, int64_t width, int64_t block_height, int64_t block_width, bool dense,
    Tensor mask) {
  const Geometry g = Geometry{batch, height, width, block_height, block_width, dense}.flattened();
  std::optional<Bits> spared;
  if (k < g.blocks()) {
    spared = keep_blocks(x, norm, g, k);
    if (!spared) return false;
  }
  const Loss loss{zeros, count_missing, spared ? &*spared : nullptr};
  bool ranked = false;
  with_keys(x, Norm(norm) == Norm::value, [&](auto source) {
    with_mask(mask, [&](auto* out, auto one) {
      ranked = fx::drop_within(source, g, loss, one, out);
    });
  });
  return ranked;
}

// Sets the bit of every element that is kept, the lowest first; returns whether all elements are
// zero or one.
bool pack_mask(Tensor mask, Tensor bits) {
  const int64_t n = mask.numel(), bytes = (n + 7) / 8;
  STD_TORCH_CHECK(bits.numel() == bytes && bits.is_contiguous(), "expected a bit for each element");
  uint8_t* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  std::atomic<bool> plain{true};
  with_mask(mask, [&]<class Out>(const Out* data, Out one) {
    torch::stable::parallel_for(0, chunks_of(n), 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kChunk, last = std::min(n, end * kChunk);
      if (!pack(data + first, last - first, one, to + first / 8)) {
        plain.store(false, std::memory_order_relaxed);
      }
    });
  });
  return plain;
}

// Writes `x` with zeros where the boolean `keep` is false.
void apply_mask(Tensor x, Tensor keep, Tensor out) {
  const int64_t n = x.numel();
  STD_TORCH_CHECK(keep.numel() == n && keep.is_contiguous() && keep.scalar_type() == ScalarType::Bool,
                  "expected a contiguous boolean for each element");
  STD_TORCH_CHECK(out.numel() == n && out.is_contiguous() && out.scalar_type() == x.scalar_type(),
                  "expected a contiguous output like the weight");
  const uint8_t* kept = static_cast<const uint8_t*>(keep.const_data_ptr());
  void* written = out.mutable_data_ptr();
  with_elements(x, [&]<class T>(const T* data) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    if (written != data) prefer_large_pages(written, n * sizeof(T));
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      fx::apply_mask(reinterpret_cast<const Bits*>(data), kept, static_cast<Bits*>(written), begin,
                     end);
    });
  });
}

}  // namespace
}  // namespace fx::ops

#define FX_GEOMETRY \
  "int batch, int height, int width, int block_height, int block_width, bool dense"

STABLE_TORCH_LIBRARY(fx_sparsity_masks, m) {
  m.def("has_nan(Tensor x) -> bool");
  m.def("drop_elements(Tensor x, bool signed, int k, Tensor(a!) mask) -> bool");
  m.def("drop_below(Tensor x, bool signed, int key, int ties, Tensor(a!) mask) -> int");
  m.def("count_keys(Tensor x, bool signed, int prefix, Tensor(a!) counts) -> ()");
  m.def("drop_blocks(Tensor x, int norm, int k, " FX_GEOMETRY ", Tensor(a!) mask) -> bool");
  m.def(
      "drop_within(Tensor x, int norm, int k, int zeros, bool count_missing, " FX_GEOMETRY
      ", Tensor(a!) mask) -> bool");
  m.def("pack_mask(Tensor mask, Tensor(a!) bits) -> bool");
  m.def("apply_mask(Tensor x, Tensor keep, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fx_sparsity_masks, CPU, m) {
  m.impl("has_nan", TORCH_BOX(&fx::ops::has_nan));
  m.impl("drop_elements", TORCH_BOX(&fx::ops::drop_elements));
  m.impl("drop_below", TORCH_BOX(&fx::ops::drop_below));
  m.impl("count_keys", TORCH_BOX(&fx::ops::count_keys));
  m.impl("drop_blocks", TORCH_BOX(&fx::ops::drop_blocks));
  m.impl("drop_within", TORCH_BOX(&fx::ops::drop_within));
  m.impl("pack_mask", TORCH_BOX(&fx::ops::pack_mask));
  m.impl("apply_mask", TORCH_BOX(&fx::ops::apply_mask));
}
