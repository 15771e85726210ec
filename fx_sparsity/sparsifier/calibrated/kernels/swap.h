// Exchanging single kept and pruned weights of a row for as long as its error falls.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace fx {

// One row: values v, mask, and gradient g = (w - v) H, which exchanges keep up to date.
struct SwapRow {
  float* v;
  uint8_t* keep;
  float* g;
  const float* h;  // [width, width], symmetric
  int64_t width;

  const float* row_of(int64_t j) const { return h + j * width; }

  struct Exchange {
    float change = 0;
    int64_t gone = -1, back = -1;
  };

  // The best exchange that brings back `j`, if it is better than `best`.
  void try_back(int64_t j, int64_t begin, int64_t end, float least, Exchange& best) const {
    const float* const hj = row_of(j);
    const float inverse = 1 / hj[j];
    for (int64_t k = begin; k < end; k++) {
      if (!keep[k]) continue;
      const float g_after = g[j] + v[k] * hj[k];
      const float worth = g_after * g_after * inverse;
      const float change = 2 * v[k] * g[k] + v[k] * v[k] * row_of(k)[k] - worth;
      if (change < best.change && change < -least * worth) best = {change, k, j};
    }
  }

  // The pruned weight of a cell that lowers the error most on its own; -1: none is pruned.
  int64_t most_promising(int64_t begin, int64_t end) const {
    int64_t best = -1;
    float most = -1;
    for (int64_t j = begin; j < end; j++) {
      if (keep[j]) continue;
      const float promise = g[j] * g[j] / row_of(j)[j];
      if (promise > most) {
        most = promise;
        best = j;
      }
    }
    return best;
  }

  void exchange(const Exchange& e) {
    const float* const hk = row_of(e.gone);
    const float* const hj = row_of(e.back);
    const float gone = v[e.gone];
    const float value = (g[e.back] + gone * hj[e.gone]) / hj[e.back];
    for (int64_t i = 0; i < width; i++) g[i] += gone * hk[i] - value * hj[i];
    v[e.gone] = 0;
    v[e.back] = value;
    keep[e.gone] = 0;
    keep[e.back] = 1;
  }

  // Makes the best exchange within [begin, end); false: there is none.
  bool improve(int64_t begin, int64_t end, int64_t narrow, float least) {
    Exchange best;
    if (end - begin <= narrow) {
      for (int64_t j = begin; j < end; j++) {
        if (!keep[j]) try_back(j, begin, end, least, best);
      }
    } else if (const int64_t j = most_promising(begin, end); j >= 0) {
      try_back(j, begin, end, least, best);
    }
    if (best.gone < 0) return false;
    exchange(best);
    return true;
  }
};

// Exchanges within cells of `cell` columns: in each pass once in a narrow cell, in a wide one until
// nothing is gained.
inline void swap(
    float* values, uint8_t* mask, float* gradient, const float* matrix, int64_t rows, int64_t width,
    int64_t cell, int64_t passes, int64_t narrow, float least) {
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      SwapRow row{values + r * width, mask + r * width, gradient + r * width, matrix, width};
      bool improved = true;
      for (int64_t pass = 0; pass < passes && improved; pass++) {
        improved = false;
        for (int64_t start = 0; start < width; start += cell) {
          const int64_t stop = std::min(start + cell, width);
          const int64_t most = cell <= narrow ? 1 : width;
          for (int64_t i = 0; i < most && row.improve(start, stop, narrow, least); i++) {
            improved = true;
          }
        }
      }
    }
  });
}

}  // namespace fx
