// A tiling in its canonical form: [batch, height, width] elements, blocks in the last two.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace fx {

constexpr int64_t kGrain = 1 << 15;  // elements worth a thread's while
constexpr int64_t kStripWidth = 2048;  // columns of which an fp64 stays in the nearest caches

struct Geometry {
  int64_t batch, height, width;
  int64_t block_height, block_width;
  bool dense;  // ragged edges belong to no block; otherwise they are blocks of what they have

  int64_t rows() const { return grid(height, block_height); }
  int64_t columns() const { return grid(width, block_width); }
  int64_t blocks() const { return batch * rows() * columns(); }
  int64_t block_size() const { return block_height * block_width; }
  int64_t strips(int64_t per_strip) const {
    return batch * rows() * ((columns() + per_strip - 1) / per_strip);
  }
  int64_t blocks_per_strip() const { return std::max<int64_t>(1, kStripWidth / block_width); }

  // The same blocks in the same order; rows that they fill exactly become one long row.
  Geometry flattened() const {
    if (block_height > 1 || width % block_width) return *this;
    return {1, 1, batch * height * width, 1, block_width, dense};
  }

 private:
  int64_t grid(int64_t size, int64_t extent) const {
    return dense ? size / extent : (size + extent - 1) / extent;
  }
};

// Neighbouring blocks in one row of the grid.
struct Strip {
  int64_t index;   // among all strips
  int64_t at;      // the first element's offset
  int64_t block;   // the first block's index in the grid
  int64_t height;  // real rows
  int64_t whole;   // blocks of the full width
  int64_t ragged;  // width of the narrower block after them; 0: there is none
  int64_t wide;    // columns of all of them
};

// Calls `work(strip)` in parallel for strips of at most `per_strip` blocks that make up the grid.
// Each thread has a copy of `work`, and so of the buffers that it holds.
template <class Work>
void for_each_strip(const Geometry& g, int64_t per_strip, const Work& work) {
  const int64_t strips = (g.columns() + per_strip - 1) / per_strip;
  const int64_t grain = std::max<int64_t>(1, kGrain / (per_strip * g.block_size()));
  const int64_t tasks = g.strips(per_strip);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    Work own = work;
    for (int64_t task = begin; task < end; task++) {
      const int64_t block_row = task / strips, first = task % strips * per_strip;
      const int64_t row = block_row % g.rows() * g.block_height;
      const int64_t left = first * g.block_width;
      const int64_t count = std::min(per_strip, g.columns() - first);
      const int64_t wide = std::min(count * g.block_width, g.width - left);
      own(Strip{
          task,
          (block_row / g.rows() * g.height + row) * g.width + left,
          block_row * g.columns() + first,
          std::min(g.block_height, g.height - row),
          wide / g.block_width,
          wide % g.block_width,
          wide});
    }
  });
}

}  // namespace fx
