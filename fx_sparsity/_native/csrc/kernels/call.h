// A call of a linear layer, whatever the packing of its weight.
#pragma once

#include "activations.h"
#include "epilogue.h"

namespace fx {

enum class Dtype { f32, bf16, i8 };

// Activations of fp32 or bf16, [rows, columns], and what becomes of them.
struct Call {
  const void* x;
  int64_t columns;
  Dtype weight;
  Quantizer quantizer;
  Result result;  // says also whether x is bf16
};

}  // namespace fx
