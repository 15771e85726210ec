// SparseGPT's sweep over neighbouring columns (arXiv 2301.00774, algorithm 1, the inner loop).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace fx {

constexpr int64_t kLanes = 16;  // rows that are swept side by side
constexpr int64_t kTogether = 4;  // columns that are brought up to date together
constexpr int64_t kMostInGroup = 32;

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Flags __attribute__((vector_size(kLanes * sizeof(int32_t))));  // 0 or -1

// N:M groups: how many elements, zeros of a whole group, zeros of a ragged one at the end.
struct Groups {
  int64_t size, zeros, last;
};

// Which of the `n` weights of a group stay: not the `zeros` cheapest, lowest index first among
// equals. `scale` is 1 / U_jj.
inline void choose(const Lanes* w, const float* scale, int64_t n, int64_t zeros, Flags* keep) {
  Lanes costs[kMostInGroup];
  Flags rank[kMostInGroup] = {};
  for (int64_t i = 0; i < n; i++) costs[i] = (w[i] * scale[i]) * (w[i] * scale[i]);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < i; j++) {
      const Flags cheaper = costs[i] < costs[j];
      rank[j] -= cheaper;
      rank[i] += 1 + cheaper;
    }
  }
  for (int64_t i = 0; i < n; i++) keep[i] = rank[i] >= int32_t(zeros);
}

// Sweeps `w`, a column of lanes for each column, with U's columns, [width, stride], at `u`.
// `errors` get w / U_jj of what goes. With groups `keep` is written, else read.
inline void sweep_lanes(
    Lanes* w, Flags* keep, Lanes* errors, const float* u, const float* scale, int64_t width,
    Groups groups) {
  const int64_t step = groups.size ? groups.size : kTogether;
  for (int64_t start = 0; start < width; start += step) {
    const int64_t stop = std::min(start + step, width);
    for (int64_t first = start; first < stop; first += kTogether) {
      Lanes now[kTogether] = {};
      const int64_t count = std::min(kTogether, stop - first);
      for (int64_t q = 0; q < count; q++) now[q] = w[first + q];
      const float* const at = u + first * width;
      if (count == kTogether) {
        for (int64_t j = 0; j < start; j++) {
          for (int64_t q = 0; q < kTogether; q++) now[q] -= errors[j] * at[q * width + j];
        }
      } else {
        for (int64_t j = 0; j < start; j++) {
          for (int64_t q = 0; q < count; q++) now[q] -= errors[j] * at[q * width + j];
        }
      }
      for (int64_t q = 0; q < count; q++) w[first + q] = now[q];
    }
    if (groups.size) {
      const int64_t n = stop - start;
      choose(w + start, scale + start, n, n == groups.size ? groups.zeros : groups.last, keep + start);
    }
    for (int64_t j = start; j < stop; j++) {
      const Lanes none = {};
      errors[j] = keep[j] ? none : w[j] * scale[j];
      for (int64_t i = j + 1; i < stop; i++) w[i] -= errors[j] * u[i * width + j];
    }
  }
}

// Prunes `weight`, [rows, width], where `mask` is 0, and updates what is right of it by U, `factor`.
// With groups the mask is written, else read.
inline void sweep(
    float* weight, uint8_t* mask, const float* factor, int64_t rows, int64_t width, Groups groups) {
  std::vector<float> u(width * width), scale(width);
  for (int64_t i = 0; i < width; i++) {
    scale[i] = 1 / factor[i * width + i];
    for (int64_t j = i; j < width; j++) u[j * width + i] = factor[i * width + j];
  }
  const int64_t tasks = (rows + kLanes - 1) / kLanes;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Lanes> w(width), errors(width);
    std::vector<Flags> keep(width);
    for (int64_t task = begin; task < end; task++) {
      const int64_t row = task * kLanes, count = std::min(kLanes, rows - row);
      float* const source = weight + row * width;
      uint8_t* const bits = mask + row * width;
      for (int64_t l = 0; l < count; l++) {
        for (int64_t j = 0; j < width; j++) {
          w[j][l] = source[l * width + j];
          if (!groups.size) keep[j][l] = -int32_t(bits[l * width + j]);
        }
      }
      sweep_lanes(w.data(), keep.data(), errors.data(), u.data(), scale.data(), width, groups);
      for (int64_t l = 0; l < count; l++) {
        for (int64_t j = 0; j < width; j++) {
          source[l * width + j] = keep[j][l] ? w[j][l] : 0.0f;
          bits[l * width + j] = keep[j][l] != 0;
        }
      }
    }
  });
}

}  // namespace fx
