// The packing "bitmask": a mask of one bit an element, and the values it keeps. See bitmask.py.
#pragma once

#include "linear.h"

namespace fx {

struct Bitmask {
  const uint8_t* mask;
  const void* values;
  const int64_t* offsets;
};

void linear(const Call& call, const Bitmask& weight);

}  // namespace fx
