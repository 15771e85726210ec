#include "int4.h"

#include "grouped.h"

namespace fx {
namespace {

constexpr int64_t kAhead = 512;  // bytes from what is read to what is prefetched

template <class Math>
class DensePanels {
 public:
  static constexpr bool kTakesOffsets = false;

  class Panel {
   public:
    explicit Panel(const uint8_t* values) : values_(values) {}

    void begin(int64_t) {}

    typename Math::Weights next() {
      __builtin_prefetch(values_ + kAhead);
      const auto bytes = Math::load(values_);
      values_ += 64;
      return Math::widen(bytes, bytes);
    }

   private:
    const uint8_t* values_;
  };

  DensePanels(const DenseInt4& weight, const Call& call)
      : values_(weight.values), bytes_((call.columns + 7) / 8 * 64) {}

  Panel panel(int64_t p) const { return Panel(values_ + p * bytes_); }

 private:
  const uint8_t* values_;
  const int64_t bytes_;  // of a panel
};

}  // namespace

void linear(const Call& call, const Groups4& groups, const DenseInt4& weight) {
  linear<Int4Of>(call, groups, [&]<class Math>() { return DensePanels<Math>(weight, call); });
}

}  // namespace fx
