// Linear layers of 4-bit codes, whose scales and zero points are one a group of inputs. See
// int4.py.
#pragma once

#include "call.h"

namespace fx {

// Of all packings: an output's codes c stand for (c - zero point) * scale.
struct Groups4 {
  const void* scale;          // [panels, count, 16]
  bool is_bfloat;             // the scales are bf16, else fp32
  const int8_t* zero_points;  // [panels, count, 16]; null where all are 0
  const float* row_sums;      // [outputs] of what codes stand for, where activations are quantized
  int64_t count;              // groups in a row
};

// Panel by panel 64 bytes a step, see nibbles.h.
struct DenseInt4 {
  const uint8_t* values;
};

// Panel by panel 48 bytes a step, see select.h; 16 more may be read.
struct NMInt4 {
  const uint8_t* values;
};

// A bit for each code, 16 bytes a step: those of the first four inputs, and those of the others. The
// codes that are kept lie in two streams in the same bytes: in the lower halves those of all first
// four inputs of a panel, in the upper halves the others.
struct BitmaskInt4 {
  const uint8_t* mask;
  const uint8_t* values;   // 64 more may be read
  const int64_t* offsets;  // where each panel's begin
};

// Blocks of 4 steps, each of 2 panels of 64 bytes, see nibbles.h; row of blocks by row of blocks.
struct BlockInt4 {
  const uint8_t* values;
  const int32_t* index;    // of each block along the inputs
  const int64_t* offsets;  // where the blocks of each row of blocks begin
};

void linear(const Call& call, const Groups4& groups, const DenseInt4& weight);
void linear(const Call& call, const Groups4& groups, const NMInt4& weight);
void linear(const Call& call, const Groups4& groups, const BitmaskInt4& weight);
void linear(const Call& call, const Groups4& groups, const BlockInt4& weight);

}  // namespace fx
