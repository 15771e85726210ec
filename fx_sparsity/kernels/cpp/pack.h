// Packing a dense weight as "bitmask": see bitmask.py.
#pragma once

#include <cstdint>

namespace fx {

// A row-major weight of fp32, bf16 or int8, known by its size.
struct Dense {
  const void* elements;
  int64_t rows, columns;
  int64_t size;  // of an element, in bytes
};

// Writes how many elements of each panel are not zero.
void count_panels(const Dense& weight, int64_t* counts);

// Writes the mask, and the values of each panel from its offset on, as many as were counted.
void pack_panels(const Dense& weight, const int64_t* offsets, uint8_t* mask, void* values);

}  // namespace fx
