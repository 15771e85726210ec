// The packing "bitmask": a mask of one bit an element, and the values it keeps. See bitmask.py.
#include "linear.h"

namespace fx {
namespace {

template <class Math>
class BitmaskPanels {
 public:
  using Value = typename Math::Value;

  class Panel {
   public:
    Panel(const uint8_t* mask, const Value* values) : mask_(mask), values_(values) {}

    typename Math::Step next() {
      const auto mask = load_as<Mask<Math>>(mask_);
      const typename Math::Step step = Math::expand(mask, values_);
      mask_ += sizeof mask;
      values_ += std::popcount(mask);
      return step;
    }

   private:
    const uint8_t* mask_;
    const Value* values_;
  };

  BitmaskPanels(
      const Tensor& mask, const Tensor& values, const Tensor& offsets, int64_t panels,
      int64_t columns)
      : panels(panels),
        steps((columns + Math::kGroup - 1) / Math::kGroup),
        mask_(data<const uint8_t>(mask)),
        values_(data<const Value>(values)),
        offsets_(data<const int64_t>(offsets)) {
    expect("mask", mask, ScalarType::Byte, panels * steps * sizeof(Mask<Math>));
    expect("offsets", offsets, ScalarType::Long, panels + 1);
    const int64_t padding = 64 / sizeof(Value);  // what `expand` may read past the last value
    STD_TORCH_CHECK(
        values.is_cpu() && values.is_contiguous() && values.numel() == offsets_[panels] + padding,
        "values do not end where the offsets say");
  }

  Panel panel(int64_t p) const {
    return {mask_ + p * steps * sizeof(Mask<Math>), values_ + offsets_[p]};
  }

  const int64_t panels, steps;

 private:
  const uint8_t* mask_;
  const Value* values_;
  const int64_t* offsets_;
};

Tensor bitmask_linear(
    Tensor x, Tensor mask, Tensor values, Tensor offsets, std::optional<Tensor> scale,
    std::optional<Tensor> row_sums, std::optional<Tensor> bias, int64_t in_features,
    int64_t out_features, std::string quantize_input, std::string activation) {
  const Options options{
      scale,        row_sums, bias, in_features, out_features, quantizer_of(quantize_input),
      activation_of(activation)};
  const int64_t panels = (out_features + kLanes - 1) / kLanes;
  return linear(x, values.scalar_type(), options, [&]<class Math>() {
    return BitmaskPanels<Math>(mask, values, offsets, panels, in_features);
  });
}

}  // namespace
}  // namespace fx

STABLE_TORCH_LIBRARY_IMPL(fx_sparsity, CPU, m) {
  m.impl("bitmask_linear", TORCH_BOX(&fx::bitmask_linear));
}
