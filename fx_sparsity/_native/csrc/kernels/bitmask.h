// The packings "bitmask" and "nm": a mask of one bit an element, and the values it keeps. See
// bitmask.py and nm.py.
#pragma once

#include "call.h"

namespace fx {

struct Bitmask {
  const uint8_t* mask;
  const void* values;
  const int64_t* offsets;  // where each panel's values begin; null: at multiples of `stride`
  int64_t stride;
};

void linear(const Call& call, const Bitmask& weight);

}  // namespace fx
