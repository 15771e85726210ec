#include "pack.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "vectors.h"

namespace fx {
namespace {

// Elements of 8 bits are integers; the others are floats, of which -0.0 is zero as well.
template <class T>
bool is_zero(T bits) {
  return sizeof(T) == 1 ? bits == 0 : T(bits << 1) == 0;
}

template <class Work>
void with_width(int64_t size, const Work& work) {
  if (size == 4) return work(uint32_t());
  if (size == 2) return work(uint16_t());
  work(uint8_t());
}

int64_t panels_of(const Dense& weight) { return (weight.rows + kLanes - 1) / kLanes; }

template <class T>
void pack_panel(const Dense& weight, int64_t panel, uint8_t* mask, T* values) {
  constexpr int group = 4 / sizeof(T);
  const int64_t columns = weight.columns, first = panel * kLanes;
  const int64_t lanes = std::min<int64_t>(kLanes, weight.rows - first);
  const T* const rows = static_cast<const T*>(weight.elements) + first * columns;
  for (int64_t column = 0; column < columns; column += group, mask += 2 * group) {
    const int64_t present = std::min<int64_t>(group, columns - column);
    T found[kLanes * group + 1];  // every element is written, the next one over it if it is zero
    int64_t count = 0;
    uint64_t bits = 0;
    for (int64_t lane = 0; lane < lanes; lane++) {
      T elements[group] = {};
      const T* const from = rows + lane * columns + column;
      // Of a size known to the compiler where it can be.
      present == group ? std::memcpy(elements, from, sizeof elements)
                       : std::memcpy(elements, from, size_t(present) * sizeof(T));
      for (int e = 0; e < group; e++) {
        const bool kept = !is_zero(elements[e]);
        found[count] = elements[e];
        count += kept;
        bits |= uint64_t(kept) << (lane * group + e);
      }
    }
    std::memcpy(mask, &bits, 2 * group);
    std::memcpy(values, found, size_t(count) * sizeof(T));
    values += count;
  }
}

}  // namespace

void count_panels(const Dense& weight, int64_t* counts) {
  with_width(weight.size, [&]<class T>(T) {
    parallel_for(0, panels_of(weight), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; panel++) {
        const int64_t first = panel * kLanes, last = std::min(first + kLanes, weight.rows);
        const T* const elements = static_cast<const T*>(weight.elements);
        int64_t count = 0;
        for (int64_t i = first * weight.columns; i < last * weight.columns; i++) {
          count += !is_zero(elements[i]);
        }
        counts[panel] = count;
      }
    });
  });
}

void pack_panels(const Dense& weight, const int64_t* offsets, uint8_t* mask, void* values) {
  with_width(weight.size, [&]<class T>(T) {
    constexpr int64_t group = 4 / sizeof(T);
    const int64_t bytes = (weight.columns + group - 1) / group * 2 * group;  // of a panel's mask
    parallel_for(0, panels_of(weight), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; panel++) {
        T* const to = static_cast<T*>(values) + offsets[panel];
        pack_panel(weight, panel, mask + panel * bytes, to);
      }
    });
  });
}

}  // namespace fx
