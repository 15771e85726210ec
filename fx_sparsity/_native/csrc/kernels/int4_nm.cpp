#include "grouped.h"
#include "select.h"

namespace fx {
namespace {

constexpr int64_t kAhead = 512;  // bytes from what is read to what is prefetched

template <class Math>
class NMPanels {
 public:
  static constexpr bool kTakesOffsets = true;

  class Panel {
   public:
    Panel(const uint8_t* values, const int8_t* zero_points)
        : values_(values), zero_points_(zero_points) {}

    void begin(int64_t group) {
      if (zero_points_) offsets_ = Math::offsets(zero_points_ + group * kLanes);
    }

    typename Math::Weights next() {
      __builtin_prefetch(values_ + kAhead);
      const auto weights = Math::widen(values_, offsets_);
      values_ += 48;
      return weights;
    }

   private:
    const uint8_t* values_;
    const int8_t* zero_points_;
    typename Math::Offsets offsets_{};
  };

  NMPanels(const NMInt4& weight, const Groups4& groups, const Call& call)
      : values_(weight.values),
        zero_points_(groups.zero_points),
        bytes_((call.columns + 7) / 8 * 48),
        points_(groups.count * kLanes) {}

  Panel panel(int64_t p) const {
    return {values_ + p * bytes_, zero_points_ ? zero_points_ + p * points_ : nullptr};
  }

 private:
  const uint8_t* values_;
  const int8_t* zero_points_;
  const int64_t bytes_, points_;  // of a panel
};

}  // namespace

void linear(const Call& call, const Groups4& groups, const NMInt4& weight) {
  linear<SelectOf>(
      call, groups, [&]<class Math>() { return NMPanels<Math>(weight, groups, call); });
}

}  // namespace fx
