// The arithmetic of one step, for any processor; and what each of the other files has to define.
//
// An arithmetic ("Math") says how a step, 16 outputs times a group of inputs, meets activations:
//   Value     a packed weight element
//   Input     an activation, as the tiles of activations.h hold it
//   kGroup    inputs a step, and consecutive activations that `dot` reads
//   Step      16 * kGroup elements as packed, output by output
//   Weights   a step ready for `dot`; made once, used for every row
//   Sum       16 sums of 64 bytes: fp32, or int32 where kInteger; or more, see `lanes`
//   load(p) -> Step, expand(mask, p) -> Step, widen(step) -> Weights
//   dot(sum, weights, input) -> sum, add(sum, sum) -> sum
//   lanes(sum) -> the 16 sums, for a Sum that holds more
// and how much its registers hold:
//   kChains      sums that hide the latency of `dot`
//   kStreams     panels that are expanded side by side for one row
//   kDirectRows  rows that one pass over packed steps can serve
//   kTileRows, kTilePanels  rows and panels whose sums expanded steps are added to
// A level ("Cpu") names its arithmetics by what is multiplied, weight by activation:
//   F32 fp32, BF16 bf16, I8 int8 by uint8, W8<float> and W8<BFloat> int8 codes by activations.
#pragma once

#include "vectors.h"

namespace fx {

template <int Bits> struct MaskOf;
template <> struct MaskOf<16> { using type = uint16_t; };
template <> struct MaskOf<32> { using type = uint32_t; };
template <> struct MaskOf<64> { using type = uint64_t; };

// One bit an element of a step.
template <class Math>
using Mask = typename MaskOf<kLanes * Math::kGroup>::type;

namespace portable {

inline float widened(float x) { return x; }
inline float widened(BFloat x) { return to_float(x); }
inline int8_t widened(int8_t x) { return x; }

struct Registers {
  static constexpr int kChains = 2;
  static constexpr int kStreams = 2;
  static constexpr int kDirectRows = 1;
  static constexpr int kTileRows = 4;
  static constexpr int kTilePanels = 1;
};

template <class ValueT, class InputT, int Group, class SumT>
struct Math : Registers {
  using Value = ValueT;
  using Input = InputT;
  using Sum = SumT;
  static constexpr int kGroup = Group;
  static constexpr bool kInteger = std::is_same_v<Sum, Ints>;
  struct Step {
    Value elements[kLanes * Group];
  };
  struct Weights {
    Sum group[Group];
  };

  static Step load(const Value* p) { return load_as<Step>(p); }

  template <class Bits>
  static Step expand(Bits mask, const Value* p) {
    Step step{};
    for (int i = 0; mask; i++, mask >>= 1) {
      if (mask & 1) step.elements[i] = *p++;
    }
    return step;
  }

  static Weights widen(const Step& step) {
    Weights weights;
    for (int j = 0; j < Group; j++) {
      for (int i = 0; i < kLanes; i++) weights.group[j][i] = widened(step.elements[i * Group + j]);
    }
    return weights;
  }

  static Sum dot(Sum sum, const Weights& weights, const Input* x) {
    for (int j = 0; j < Group; j++) sum += weights.group[j] * x[j];
    return sum;
  }

  static Sum add(Sum a, Sum b) { return a + b; }
};

}  // namespace portable

struct Portable {
  using F32 = portable::Math<float, float, 1, Floats>;
  using BF16 = portable::Math<BFloat, float, 2, Floats>;
  using I8 = portable::Math<int8_t, uint8_t, 4, Ints>;
  template <class X>
  using W8 = portable::Math<int8_t, float, 4, Floats>;
};

}  // namespace fx
