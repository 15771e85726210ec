// Exchanging single kept and pruned weights of a row, and refitting kept ones: its error only falls.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace fx {

// One row: values v, mask, and gradient g = (w - v) H, which exchanges keep up to date.
struct Row {
  float* v;
  uint8_t* keep;
  float* g;
  const float* h;        // [width, width], symmetric
  const float* inverse;  // of its diagonal
  int64_t width;

  const float* row_of(int64_t j) const { return h + j * width; }

  struct Exchange {
    float change = 0;
    int64_t gone = -1, back = -1;
  };

  // The best exchange that brings back `j`, if it is better than `best`.
  void try_back(int64_t j, int64_t begin, int64_t end, float least, Exchange& best) const {
    const float* const hj = row_of(j);
    for (int64_t k = begin; k < end; k++) {
      if (!keep[k]) continue;
      const float g_after = g[j] + v[k] * hj[k];
      const float worth = g_after * g_after * inverse[j];
      const float change = 2 * v[k] * g[k] + v[k] * v[k] * row_of(k)[k] - worth;
      const bool gains = worth > 0 && change < -least * worth;
      if (gains && change < best.change) best = {change, k, j};
    }
  }

  // The pruned weight of a cell that lowers the error most on its own; -1: none is pruned.
  int64_t most_promising(int64_t begin, int64_t end) const {
    int64_t best = -1;
    float most = -1;
    for (int64_t j = begin; j < end; j++) {
      if (keep[j]) continue;
      const float promise = g[j] * g[j] * inverse[j];
      if (promise > most) {
        most = promise;
        best = j;
      }
    }
    return best;
  }

  // Adds `step` to v[j].
  void move(int64_t j, float step) {
    const float* const hj = row_of(j);
    for (int64_t i = 0; i < width; i++) g[i] -= step * hj[i];
    v[j] += step;
  }

  // Moves v[j] to where it is best.
  void refit(int64_t j) { move(j, g[j] * inverse[j]); }

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
    move(best.gone, -v[best.gone]);
    v[best.gone] = 0;
    keep[best.gone] = 0;
    refit(best.back);
    keep[best.back] = 1;
    return true;
  }
};

// Cell by cell: exchanges, one in a narrow cell and in a wide one until nothing is gained; then every
// kept weight is refitted.
inline void exchange(
    float* values, uint8_t* mask, float* gradient, const float* matrix, int64_t rows, int64_t width,
    int64_t cell, int64_t narrow, float least) {
  std::vector<float> inverse(width);
  for (int64_t j = 0; j < width; j++) inverse[j] = 1 / matrix[j * width + j];
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t at = r * width;
      Row row{values + at, mask + at, gradient + at, matrix, inverse.data(), width};
      for (int64_t start = 0; start < width; start += cell) {
        const int64_t stop = std::min(start + cell, width);
        int64_t left = stop - start <= narrow ? 1 : width;
        while (left-- > 0 && row.improve(start, stop, narrow, least)) continue;
        for (int64_t j = start; j < stop; j++) {
          if (row.keep[j]) row.refit(j);
        }
      }
    }
  });
}

}  // namespace fx
