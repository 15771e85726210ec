#include "grouped.h"

namespace fx {
namespace {

constexpr int64_t kAhead = 512;  // bytes from what is read to what is prefetched

template <class Math>
class MaskedPanels {
 public:
  static constexpr bool kTakesOffsets = false;

  class Panel {
   public:
    Panel(const uint8_t* mask, const uint8_t* values, const int8_t* zero_points)
        : mask_(mask), low_(values), high_(values), zero_points_(zero_points) {}

    void begin(int64_t group) {
      if (zero_points_) fill_ = Math::fill(zero_points_ + group * kLanes);
    }

    typename Math::Weights next() {
      __builtin_prefetch(mask_ + kAhead / 2);
      __builtin_prefetch(low_ + kAhead);
      const auto low = load_as<uint64_t>(mask_), high = load_as<uint64_t>(mask_ + 8);
      const auto first = Math::expand(low, low_, fill_), second = Math::expand(high, high_, fill_);
      mask_ += 16;
      low_ += std::popcount(low);
      high_ += std::popcount(high);
      return Math::widen(first, second);
    }

   private:
    const uint8_t *mask_, *low_, *high_;
    const int8_t* zero_points_;
    typename Math::Fill fill_{};
  };

  MaskedPanels(const BitmaskInt4& weight, const Groups4& groups, const Call& call)
      : weight_(weight),
        zero_points_(groups.zero_points),
        bytes_((call.columns + 7) / 8 * 16),
        points_(groups.count * kLanes) {}

  Panel panel(int64_t p) const {
    return {
        weight_.mask + p * bytes_, weight_.values + weight_.offsets[p],
        zero_points_ ? zero_points_ + p * points_ : nullptr};
  }

 private:
  const BitmaskInt4& weight_;
  const int8_t* zero_points_;
  const int64_t bytes_, points_;  // of a panel's mask, and its zero points
};

}  // namespace

void linear(const Call& call, const Groups4& groups, const BitmaskInt4& weight) {
  linear<Int4Of>(
      call, groups, [&]<class Math>() { return MaskedPanels<Math>(weight, groups, call); });
}

}  // namespace fx
