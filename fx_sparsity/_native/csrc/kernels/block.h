// The packing "block": dense blocks of one or two panels, and where they stand. See block.py.
#pragma once

#include "call.h"

namespace fx {

struct Block {
  const void* values;
  const int32_t* index;
  const int64_t* offsets;
  int64_t steps, height;  // of a block, which is 1 step of 1 panel, or more steps of 2 panels
};

void linear(const Call& call, const Block& weight);

}  // namespace fx
