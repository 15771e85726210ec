// What every packing has to do: multiply with the arithmetic that the dtypes ask for.
#pragma once

#include "call.h"
#include "panels.h"

namespace fx {

// `packed.template operator()<Math>()` gives the weight's panels as Math reads them.
template <class Cpu, class X, class Packed>
void linear_on(const Call& call, const X* x, const Packed& packed) {
  using Float = std::conditional_t<std::is_same_v<X, BFloat>, typename Cpu::BF16, typename Cpu::F32>;
  using Codes = typename Cpu::template W8<X>;
  using Integer = typename Cpu::I8;
  const int64_t columns = call.columns;
  if (call.weight != Dtype::i8) {
    multiply<Float>(packed.template operator()<Float>(), x, columns, call.result);
  } else if (call.quantizer == Quantizer::none) {
    multiply<Codes>(packed.template operator()<Codes>(), x, columns, call.result);
  } else {
    Result result = call.result;
    const Quantized q = quantize(x, result.rows, columns, call.quantizer);
    result.x_scale = q.scale.get();
    result.x_zero_point = q.zero_point.get();
    multiply<Integer>(packed.template operator()<Integer>(), q.codes.get(), columns, result);
  }
}

template <class Packed>
void linear(const Call& call, const Packed& packed) {
  with_cpu([&]<class Cpu>(Cpu) {
    if (call.result.is_bfloat) {
      linear_on<Cpu>(call, static_cast<const BFloat*>(call.x), packed);
    } else {
      linear_on<Cpu>(call, static_cast<const float*>(call.x), packed);
    }
  });
}

}  // namespace fx
