// What follows the product: scales, bias, activation, and the rounding to the result's dtype.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace fx {

enum class Activation { none, relu, gelu, gelu_tanh, silu };

// e^x to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, and the series of e^r (as in Cephes).
inline Floats exp(Floats x) {
  x = at_most(at_least(x, -87.0f), 88.0f);
  const Floats n = round(x * 0x1.715476p0f);
  const Floats r = x - n * 0x1.63p-1f + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * std::bit_cast<Floats>((to_ints(n) + 127) << 23);
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

// x Phi(x). The tail 1 - Phi(|x|) by formula 7.1.26 of Abramowitz and Stegun, error below 1e-7.
inline Floats gelu(Floats x) {
  const Floats z = (x < 0.0f ? -x : x) * 0x1.6a09e6p-1f;  // |x| / sqrt 2
  const Floats t = 1.0f / (1.0f + 0.3275911f * z);
  Floats p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Floats tail = 0.5f * p * t * exp(-z * z);
  return x < 0.0f ? x * tail : x - x * tail;
}

// x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2 u).
inline Floats gelu_tanh(Floats x) {
  return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
}

inline Floats activate(Activation activation, Floats x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return at_least(x, 0.0f);
    case Activation::gelu: return gelu(x);
    case Activation::gelu_tanh: return gelu_tanh(x);
    case Activation::silu: return x * sigmoid(x);
  }
  return x;
}

// The result, [rows, outputs], and all that is applied on the way to it.
struct Result {
  void* y;
  bool is_bfloat;  // y and bias are bf16, else fp32
  int64_t rows, outputs;
  const float* scale;          // [outputs] of int8 codes, or null
  const int32_t* row_sums;     // [outputs] of int8 codes, where activations are quantized
  const void* bias;            // [outputs], or null
  const float* x_scale;        // [rows] of quantized activations
  const int32_t* x_zero_point; // [rows], of codes that start at 0
  Activation activation;
};

// The result's 16 columns that one panel makes, or those of them that exist.
class PanelResult {
 public:
  // Not inlined, like `finish`: every kernel has one.
  __attribute__((noinline)) PanelResult(const Result& result, int64_t panel)
      : result_(result),
        first_(panel * kLanes),
        count_(std::min<int64_t>(kLanes, result.outputs - first_)) {
    scale_ = result.scale ? load_floats(result.scale + first_, count_) : Floats{} + 1.0f;
    if (result.row_sums) std::memcpy(&row_sums_, result.row_sums + first_, count_ * sizeof(int32_t));
    if (!result.bias) return;
    bias_ = result.is_bfloat ? load_floats(static_cast<const BFloat*>(result.bias) + first_, count_)
                             : load_floats(static_cast<const float*>(result.bias) + first_, count_);
  }

  void write(int64_t row, Floats sum) const { finish(row, sum * scale_); }

  // Every code of the row is too large by its zero point, so that the sum is by that times the
  // sum of the weights.
  void write(int64_t row, Ints sum) const {
    const Ints product = sum - row_sums_ * result_.x_zero_point[row];
    finish(row, to_floats(product) * (result_.x_scale[row] * scale_));
  }

 private:
  // Not inlined: every kernel ends here, and it is long.
  __attribute__((noinline)) void finish(int64_t row, Floats y) const {
    y = activate(result_.activation, y + bias_);
    const int64_t at = row * result_.outputs + first_;
    if (result_.is_bfloat) {
      store_floats(y, static_cast<BFloat*>(result_.y) + at, count_);
    } else {
      store_floats(y, static_cast<float*>(result_.y) + at, count_);
    }
  }

  const Result& result_;
  int64_t first_, count_;
  Floats scale_{}, bias_{};
  Ints row_sums_{};
};

}  // namespace fx
