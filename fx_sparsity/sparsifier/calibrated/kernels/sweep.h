// SparseGPT's sweep over neighbouring columns (arXiv 2301.00774, algorithm 1, the inner loop).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace fx {

constexpr int64_t kLanes = 16;  // floats that rows of scratch memory are padded to

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// N:M groups: how many elements, zeros of a whole group, zeros of a ragged one at the end.
struct Groups {
  int64_t size, zeros, last;
};

// Marks the `zeros` cheapest of `n` weights as gone, lowest index first among equals.
inline void choose(const float* w, const float* diagonal, int64_t n, int64_t zeros, uint8_t* keep) {
  float costs[32];
  for (int64_t i = 0; i < n; i++) {
    const float scaled = w[i] / diagonal[i];
    costs[i] = scaled * scaled;
  }
  for (int64_t i = 0; i < n; i++) {
    int64_t rank = 0;
    for (int64_t j = 0; j < n; j++) rank += costs[j] < costs[i] || (costs[j] == costs[i] && j < i);
    keep[i] = rank >= zeros;
  }
}

// Prunes `weight`, [rows, width], where `mask` is 0, and updates what is right of it. With groups
// the mask is written, else read. `errors`, zeros before, get w / U_jj of what goes.
inline void sweep(
    float* weight, uint8_t* mask, const float* factor, int64_t rows, int64_t width, Groups groups,
    float* errors) {
  // Rows of U start at a multiple of the lanes: what is left of the diagonal is zero anyway.
  const int64_t stride = padded(width);
  std::vector<float> u(width * stride, 0.0f), diagonal(width);
  for (int64_t j = 0; j < width; j++) {
    std::copy(factor + j * width + j, factor + (j + 1) * width, u.data() + j * stride + j);
    diagonal[j] = factor[j * width + j];
  }
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(stride, 0.0f);
    float* w = scratch.data();
    for (int64_t row = begin; row < end; row++) {
      float* const source = weight + row * width;
      float* const error = errors + row * width;
      uint8_t* const keep = mask + row * width;
      std::copy(source, source + width, w);
      for (int64_t j = 0; j < width; j++) {
        if (groups.size && j % groups.size == 0) {
          const int64_t n = std::min(groups.size, width - j);
          choose(w + j, &diagonal[j], n, n == groups.size ? groups.zeros : groups.last, keep + j);
        }
        if (keep[j]) continue;
        const float e = w[j] / diagonal[j];
        const float* const uj = u.data() + j * stride;
        error[j] = e;
        for (int64_t i = j / kLanes * kLanes; i < stride; i += kLanes) {
          for (int64_t l = 0; l < kLanes; l++) w[i + l] -= e * uj[i + l];
        }
      }
      for (int64_t j = 0; j < width; j++) source[j] = keep[j] ? w[j] : 0.0f;
    }
  });
}

}  // namespace fx
