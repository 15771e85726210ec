// Lookups in row-pruned tables: remap, dequantize and reduce. See embedding_ops.py.
#pragma once

#include <cstdint>

namespace fx {

struct Output {
  void* data;
  bool is_bf16;  // else fp32
};

// Indices or offsets of either width.
struct Integers {
  const void* data;
  bool is_wide;

  int64_t operator[](int64_t i) const {
    return is_wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Table {
  const uint8_t* rows;   // those that are kept, `row_bytes` each
  const float* affine;   // of codes: a scale and a zero point for each row
  const int32_t* remap;  // index -> row; anything else than a row means that it was pruned
  int64_t size;          // indices
  int64_t kept;          // rows
  int64_t columns;
  int64_t row_bytes;
  int64_t bits;  // of a value
};

enum class Mode : int64_t { sum = 0, mean = 1, max = 2 };

struct Bags {
  const int64_t* bounds;  // positions at which bags begin, and at last where the last one ends
  const float* weights;   // of each position; may be null
  int64_t padding;        // the index that is left out; negative: none
  Mode mode;
};

// The rows of `count` positions, into the output. Returns the first position whose index is none of
// the table's; `count` if all are.
int64_t look_up(const Table& table, Integers indices, int64_t count, Output out);

// `count` bags, each into its row of the output; returns as `look_up` does, of the positions that are
// in bags.
int64_t reduce_bags(
    const Table& table, Integers indices, const Bags& bags, int64_t count, Output out);

}  // namespace fx
