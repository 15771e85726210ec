// Packing a dense weight as "bitmask" or "nm": see bitmask.py and nm.py.
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

// The most elements that are not zero among `m` neighbours, from a multiple of `m` on.
int64_t most_of(const Dense& weight, int64_t m);

// What is kept besides the elements that are not zero: of every `m` neighbours as many of the first
// zeros as make it `n`; none if `m` is 0.
struct Groups {
  int64_t n, m;
};

// Writes the mask, and the values of each panel from its offset on, which end at the next one's.
void pack_panels(
    const Dense& weight, Groups groups, const int64_t* offsets, uint8_t* mask, void* values);

}  // namespace fx
