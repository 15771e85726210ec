// Activations as the kernels read them: quantized where asked for, and laid out in tiles.
#pragma once

#include "buffer.h"
#include "vectors.h"

namespace fx {

// Tiles of `height` rows; in a tile, group by group of inputs, row by row the inputs of the group.
// So a kernel reads a tile from front to back; rows of a matrix would lie a power of two apart,
// where few of them fit into the first cache. What is missing in the last tile and group is 0.
template <class Input>
struct Tiles {
  const Input* data;
  int64_t count, height, groups, group;
  Buffer<Input> own;

  const Input* tile(int64_t t) const { return data + t * height * groups * group; }
};

// Lays out `rows` x `columns` of `x` in tiles of `height` rows.
template <int Group, class Input, class X>
Tiles<Input> tiles_of(const X* x, int64_t rows, int64_t columns, int64_t height);

enum class Quantizer { none, token_symmetric, token_affine, tensor_affine };

// Codes from 0 on that stand for (code - zero_point) * scale, where scale and zero point are one a
// row.
struct Quantized {
  Buffer<uint8_t> codes;
  Buffer<float> scale;
  Buffer<int32_t> zero_point;
};

// Quantizes activations of fp32 or bf16, `rows` x `columns`.
template <class X>
Quantized quantize(const X* x, int64_t rows, int64_t columns, Quantizer quantizer);

}  // namespace fx
