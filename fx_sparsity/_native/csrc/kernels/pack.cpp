#include "pack.h"

#include <algorithm>
#include <cstring>

#include "buffer.h"
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

// Which elements of a row, or of a missing one, are kept, a byte each, up to a multiple of m.
template <class T>
void keep(const T* row, int64_t columns, Groups groups, uint8_t* kept) {
  for (int64_t first = 0; first < columns; first += groups.m, kept += groups.m) {
    int64_t count = 0;
    for (int64_t i = 0; i < groups.m; i++) {
      kept[i] = row && first + i < columns && !is_zero(row[first + i]);
      count += kept[i];
    }
    for (int64_t i = 0; count < groups.n; i++) {
      count += !kept[i];
      kept[i] = 1;
    }
  }
}

template <class T>
void pack_panel(
    const Dense& weight, Groups groups, int64_t panel, uint8_t* mask, T* values, const T* end) {
  constexpr int group = 4 / sizeof(T);
  const bool regular = groups.m > 0;
  const int64_t columns = weight.columns, first = panel * kLanes;
  const int64_t padded = regular ? (columns + groups.m - 1) / groups.m * groups.m : columns;
  const int64_t present = std::min<int64_t>(kLanes, weight.rows - first);
  const int64_t lanes = regular ? kLanes : present;
  const T* const rows = static_cast<const T*>(weight.elements) + first * columns;
  const Buffer<uint8_t> kept(regular ? lanes * padded : 0);
  for (int64_t lane = 0; regular && lane < lanes; lane++) {
    keep(lane < present ? rows + lane * columns : nullptr, columns, groups, &kept[lane * padded]);
  }
  for (int64_t column = 0; column < padded; column += group) {
    const int64_t there = std::clamp<int64_t>(columns - column, 0, group);
    T found[kLanes * group + 1];  // every element is written, the next one over it if it is not kept
    int64_t count = 0;
    uint64_t bits = 0;
    for (int64_t lane = 0; lane < lanes; lane++) {
      T elements[group] = {};
      const T* const from = rows + lane * columns + column;
      if (lane < present) {
        // Of a size known to the compiler where it can be.
        there == group ? std::memcpy(elements, from, sizeof elements)
                       : std::memcpy(elements, from, size_t(there) * sizeof(T));
      }
      for (int e = 0; e < group; e++) {
        const bool zero = is_zero(elements[e]);
        const bool keeps = regular ? kept[lane * padded + column + e] : !zero;
        found[count] = zero ? T(0) : elements[e];
        count += keeps;
        bits |= uint64_t(keeps) << (lane * group + e);
      }
    }
    if (count > end - values) fail("a panel has more values than there is room for");
    std::memcpy(values, found, size_t(count) * sizeof(T));
    values += count;
    if (there) {
      std::memcpy(mask, &bits, 2 * group);
      mask += 2 * group;
    }
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

int64_t most_of(const Dense& weight, int64_t m) {
  int64_t most = 0;
  with_width(weight.size, [&]<class T>(T) {
    parallel_for(0, weight.rows, 16, [&](int64_t begin, int64_t end) {
      int64_t found = 0;
      for (int64_t row = begin; row < end; row++) {
        const T* const from = static_cast<const T*>(weight.elements) + row * weight.columns;
        for (int64_t first = 0; first < weight.columns; first += m) {
          int64_t count = 0;
          const int64_t last = std::min(first + m, weight.columns);
          for (int64_t i = first; i < last; i++) count += !is_zero(from[i]);
          found = std::max(found, count);
        }
      }
      int64_t known = __atomic_load_n(&most, __ATOMIC_RELAXED);
      while (known < found && !__atomic_compare_exchange_n(
                                  &most, &known, found, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      }
    });
  });
  return most;
}

void pack_panels(
    const Dense& weight, Groups groups, const int64_t* offsets, uint8_t* mask, void* values) {
  with_width(weight.size, [&]<class T>(T) {
    constexpr int64_t group = 4 / sizeof(T);
    const int64_t bytes = (weight.columns + group - 1) / group * 2 * group;  // of a panel's mask
    T* const to = static_cast<T*>(values);
    parallel_for(0, panels_of(weight), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; panel++) {
        const int64_t first = offsets[panel], last = offsets[panel + 1];
        pack_panel(weight, groups, panel, mask + panel * bytes, to + first, to + last);
      }
    });
  });
}

}  // namespace fx
