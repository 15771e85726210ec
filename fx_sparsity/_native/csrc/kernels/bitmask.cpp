#include "bitmask.h"

#include "linear.h"

namespace fx {
namespace {

constexpr int64_t kAhead = 2048;  // bytes from what is read to what is prefetched

template <class Math>
class BitmaskPanels {
 public:
  using Value = typename Math::Value;

  class Panel {
   public:
    Panel(const uint8_t* mask, const Value* values) : mask_(mask), values_(values) {}

    typename Math::Step next() {
      // The processor's own prefetching stops at the end of a page.
      __builtin_prefetch(mask_ + kAhead / 2);
      __builtin_prefetch(reinterpret_cast<const char*>(values_) + kAhead);
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

  BitmaskPanels(const Bitmask& weight, const Call& call)
      : panels((call.result.outputs + kLanes - 1) / kLanes),
        steps((call.columns + Math::kGroup - 1) / Math::kGroup),
        mask_(weight.mask),
        values_(static_cast<const Value*>(weight.values)),
        offsets_(weight.offsets),
        stride_(weight.stride) {}

  Panel panel(int64_t p) const {
    const int64_t first = offsets_ ? offsets_[p] : p * stride_;
    return {mask_ + p * steps * sizeof(Mask<Math>), values_ + first};
  }

  const int64_t panels, steps;

 private:
  const uint8_t* mask_;
  const Value* values_;
  const int64_t* offsets_;
  const int64_t stride_;
};

}  // namespace

void linear(const Call& call, const Bitmask& weight) {
  linear(call, [&]<class Math>() { return BitmaskPanels<Math>(weight, call); });
}

}  // namespace fx
