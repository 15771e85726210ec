// Applying a mask: a copy of a weight with zeros.
#pragma once

#include <cstdint>

namespace fx {

// out[i] = keep[i] ? x[i] : +0.0, by bits, so that infinities and NaN do not matter. `keep` holds
// zeros and ones.
template <class Bits>
void apply_mask(const Bits* x, const uint8_t* keep, Bits* out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) out[i] = x[i] & static_cast<Bits>(-keep[i]);
}

}  // namespace fx
