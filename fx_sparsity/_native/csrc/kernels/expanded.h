// Many rows: slices of some panels are expanded into the cache, and there every tile of rows is
// multiplied by them. Compiled once, in expanded.cpp, for all packings.
#pragma once

#include "activations.h"
#include "cpu.h"
#include "epilogue.h"

namespace fx {

// Reads some panels side by side.
template <class Math>
class Reader {
 public:
  // Begins with panel `first` and the `count` - 1 after it; at most kMostPanels.
  virtual void start(int64_t first, int64_t count) = 0;
  // Writes the next `steps` of each, a step of every panel after the other; `stride` weights from
  // step to step.
  virtual void read(int64_t steps, int64_t stride, typename Math::Weights* weights) = 0;

 protected:
  ~Reader() = default;
};

constexpr int kMostPanels = 2;

template <class Math>
constexpr int kLeastTileRows = Math::kTileRows * 3 / 4;

// Calls `work(context, reader)` with a new reader of a packed weight, one a thread.
template <class Math>
using WithReader =
    void (*)(const void* packed, void (*work)(void*, Reader<Math>&), void* context);

template <class Math>
void multiply_expanded(
    int64_t panels, int64_t steps, const Tiles<typename Math::Input>& tiles, const Result& result,
    const void* packed, WithReader<Math> with_reader);

// A reader of a packing's cursors.
template <class Math, class Packed>
class ReaderOf final : public Reader<Math> {
 public:
  explicit ReaderOf(const Packed& packed)
      : packed_(packed), cursors_{packed.panel(0), packed.panel(0)} {}

  void start(int64_t first, int64_t count) override {
    count_ = count;
    for (int64_t p = 0; p < count; p++) cursors_[p] = packed_.panel(first + p);
  }

  void read(int64_t steps, int64_t stride, typename Math::Weights* weights) override {
    for (int64_t p = 0; p < count_; p++) {
      typename Packed::Panel cursor = cursors_[p];
      for (int64_t i = 0; i < steps; i++) weights[i * stride + p] = Math::widen(cursor.next());
      cursors_[p] = cursor;
    }
  }

 private:
  const Packed& packed_;
  typename Packed::Panel cursors_[kMostPanels];
  int64_t count_ = 0;
};

template <class Math>
void write(const PanelResult& result, int64_t row, const typename Math::Sum& sum) {
  using Lanes = std::conditional_t<Math::kInteger, Ints, Floats>;
  if constexpr (requires { Math::lanes(sum); }) {
    result.write(row, std::bit_cast<Lanes>(Math::lanes(sum)));
  } else {
    result.write(row, std::bit_cast<Lanes>(sum));
  }
}

}  // namespace fx
