// Sixteen columns at a time.
//
// Rows come at random from more memory than caches hold. So some positions at once are resolved to
// rows, without a branch on which of them are pruned, since no processor can foresee that; then
// these rows are read one after the other, each of them called for many rows ahead.
#include "embedding.h"

#include <algorithm>

#include "buffer.h"
#include "parallel.h"
#include "stored.h"

namespace fx {
namespace {

// Writes the first `count` of sixteen values; of a size known to the compiler where it can be.
template <class T>
void write(Floats values, T* to, int64_t count) {
  count == kLanes ? store_floats(values, to) : store_floats(values, to, count);
}

// The same from element `at` of the output on.
inline void store(Output out, int64_t at, Floats values, int64_t count) {
  out.is_bf16 ? write(values, static_cast<BFloat*>(out.data) + at, count)
              : write(values, static_cast<float*>(out.data) + at, count);
}

// A table, and how its rows are found and called for.
struct Rows : Table {
  bool contains(int64_t index) const { return uint64_t(index) < uint64_t(size); }

  // The row of an index that the table contains; negative if it was pruned.
  int32_t find(int64_t index) const {
    const int32_t row = remap[index];
    return row < kept ? row : -1;
  }

  // Both are always inline: g++ takes functions that only call for memory for functions that do
  // nothing, and drops them.

  // Calls for what `find` reads of any index, be it the table's or not.
  [[gnu::always_inline]] void fetch_remap(int64_t index) const {
    __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(remap) + sizeof *remap * index));
  }

  // Calls for a row, row 0 for -1; of a long one for its beginning, after which the processor
  // foresees the rest.
  [[gnu::always_inline]] void fetch(int64_t row) const {
    constexpr int64_t line = kCacheLine, most = 16 * line;
    row = std::max<int64_t>(row, 0);
    const uint8_t* const start = rows + row * row_bytes;
    const int64_t size = std::min(row_bytes, most);
#pragma GCC unroll 1
    for (int64_t i = 0; i < size; i += line) __builtin_prefetch(start + i);
    __builtin_prefetch(start + size - 1);
    if (affine) __builtin_prefetch(affine + 2 * row);
  }
};

constexpr int64_t kAhead = 32;     // rows from what is read to what is called for
constexpr int64_t kAtOnce = 1024;  // positions that are resolved before their rows are read

struct Sample {
  int32_t row;
  float weight;
};

struct Resolved {
  Sample* end;    // of the bag's samples, which follow those of the bag before
  int64_t count;  // of indices that are not padding
};

// Writes the samples of the positions [begin, end) from `to` on: of kept rows, for maxima of pruned
// ones as well, as row -1. If an index is none of the table's, the end is null. Positions up to
// `last` are to come.
template <class Index>
Resolved resolve(
    const Rows& table, const Index* indices, const Bags& bags, int64_t begin, int64_t end,
    int64_t last, Sample* to) {
  bool all_inside = true;
  int64_t count = 0;
  for (int64_t i = begin; i < end; i++) {
    const int64_t index = indices[i];
    table.fetch_remap(indices[std::min(i + kAhead, last)]);
    const bool inside = table.contains(index), counts = index != bags.padding;
    const int32_t row = inside ? table.find(index) : -1;
    *to = {row, bags.weights ? bags.weights[i] : 1.0f};
    to += counts & ((row >= 0) | (bags.mode == Mode::max));
    count += counts;
    all_inside &= inside;
  }
  return {all_inside ? to : nullptr, count};
}

// Reduces columns [column, column + 16 * Vectors) of the samples [first, last) into `result`. Of the
// last sixteen columns there are only `width`.
template <class Level, int Bits, bool Max, int Vectors>
[[gnu::always_inline]] inline void reduce_columns(
    const Rows table, const Sample* first, const Sample* last, int64_t column, int64_t width,
    Floats* result) {
  const int64_t start = column * Bits / 8;
  Floats values[Vectors] = {};
  for (const Sample* sample = first; sample < last; sample++) {
    if (column == 0) table.fetch(sample[kAhead].row);
    const int64_t row = sample->row;
    if (Max && row < 0) {
      for (auto& value : values) value = sample == first || value < 0 ? Floats{} : value;
      continue;
    }
    const uint8_t* const from = table.rows + row * table.row_bytes + start;
    float factor = Max ? 1.0f : sample->weight, zero_point = 0.0f;
    if constexpr (Bits <= 8) {
      factor *= table.affine[2 * row];
      zero_point = table.affine[2 * row + 1];
    }
    for (int v = 0; v < Vectors; v++) {
      const auto stored = load<Level, Bits>(from + v * sizeof(Stored<Bits>), width);
      const Floats value = (stored - zero_point) * factor;
      if constexpr (Max) {
        values[v] = sample == first || value > values[v] ? value : values[v];
      } else {
        values[v] += value;
      }
    }
  }
  std::copy_n(values, Vectors, result);
}

// The bag of the samples [first, last), into the output from element `at` on. After them there are
// kAhead more, or rows 0 in their place.
template <class Level, int Bits, bool Max>
void reduce_bag(
    const Rows& table, const Sample* first, const Sample* last, float divisor, Output out,
    int64_t at) {
  constexpr int kVectors = 4;
  const int64_t columns = table.columns;
  Floats values[kVectors];
  const auto finish = [&](int64_t column, int64_t width) {
    for (int64_t v = 0; v * kLanes < width; v++) {
      const int64_t count = std::min<int64_t>(kLanes, width - v * kLanes);
      store(out, at + column + v * kLanes, values[v] / divisor, count);
    }
  };
  int64_t column = 0;
  for (constexpr int64_t width = kVectors * kLanes; column + width <= columns; column += width) {
    reduce_columns<Level, Bits, Max, kVectors>(table, first, last, column, kLanes, values);
    finish(column, width);
  }
  for (; column < columns; column += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, columns - column);
    reduce_columns<Level, Bits, Max, 1>(table, first, last, column, width, values);
    finish(column, width);
  }
}

// Bags [first, last), each into its row of the output. Returns false if an index of theirs is none
// of the table's.
template <class Level, int Bits>
bool reduce_bags(
    const Rows& table, Integers indices, const Bags& bags, int64_t first, int64_t last,
    Output out) {
  const int64_t* const bounds = bags.bounds;
  int64_t most = kAtOnce;
  for (int64_t bag = first; bag < last; bag++) most = std::max(most, bounds[bag + 1] - bounds[bag]);
  const Buffer<Sample> samples(most + kAhead);
  const Buffer<Resolved> resolved(kAtOnce);
  const auto reduce =
      bags.mode == Mode::max ? reduce_bag<Level, Bits, true> : reduce_bag<Level, Bits, false>;
  for (int64_t bag = first, next = first; bag < last;) {
    const int64_t begin = bag;
    Sample* end = samples.get();
    do {
      Resolved& bag_of = resolved[next - begin];
      const auto resolve_in = [&](const auto* data) {
        const int64_t from = bounds[next], to = bounds[next + 1];
        return resolve(table, data, bags, from, to, bounds[last] - 1, end);
      };
      bag_of = indices.is_wide ? resolve_in(static_cast<const int64_t*>(indices.data))
                               : resolve_in(static_cast<const int32_t*>(indices.data));
      end = bag_of.end;
      if (!end) return false;
      next++;
    } while (next < last && next - begin < kAtOnce && bounds[next + 1] - bounds[begin] <= kAtOnce);
    std::fill_n(end, kAhead, Sample{});
    for (int64_t i = 0; i < kAhead; i++) table.fetch(samples[i].row);
    const Sample* sample = samples.get();
    for (; bag < next; bag++) {
      const auto [stop, count] = resolved[bag - begin];
      const float divisor = bags.mode == Mode::mean && count ? float(count) : 1.0f;
      reduce(table, sample, stop, divisor, out, bag * table.columns);
      sample = stop;
    }
  }
  return true;
}

// The rows of the positions [begin, end), into the output. Returns false if an index is none of the
// table's.
template <class Level, int Bits>
bool look_up(const Rows& table, Integers indices, int64_t begin, int64_t end, Output out) {
  const int64_t columns = table.columns, bytes = columns * (out.is_bf16 ? 2 : 4);
  const bool copies = Bits == (out.is_bf16 ? 16 : 32);
  const Buffer<uint8_t> zeros(table.row_bytes);  // a pruned row
  std::fill_n(zeros.get(), table.row_bytes, 0);
  const float no_affine[2] = {};
  int32_t rows[kAtOnce + kAhead];
  for (int64_t first = begin; first < end; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, end - first);
    for (int64_t i = 0; i < count; i++) {
      const int64_t index = indices[first + i];
      table.fetch_remap(indices[std::min(first + i + kAhead, end - 1)]);
      if (!table.contains(index)) return false;
      rows[i] = table.find(index);
    }
    std::fill_n(rows + count, kAhead, -1);
    for (int64_t i = 0; i < kAhead; i++) table.fetch(rows[i]);
    for (int64_t i = 0; i < count; i++) {
      table.fetch(rows[i + kAhead]);
      const int64_t row = rows[i], at = (first + i) * columns;
      const uint8_t* const from = row < 0 ? zeros.get() : table.rows + row * table.row_bytes;
      if (copies) {
        std::memcpy(static_cast<uint8_t*>(out.data) + (first + i) * bytes, from, bytes);
        continue;
      }
      const float* const affine = row < 0 || Bits > 8 ? no_affine : table.affine + 2 * row;
      for (int64_t column = 0; column < columns; column += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, columns - column);
        Floats value = load<Level, Bits>(from + column * Bits / 8, width);
        if (Bits <= 8) value = (value - affine[1]) * affine[0];
        store(out, at + column, value, width);
      }
    }
  }
  return true;
}

// Calls `work.operator()<Level, Bits>()`: for this machine, and the bits of a value.
template <class Work>
void with_rows(int64_t bits, const Work& work) {
  with_cpu([&](auto cpu) {
    using Level = decltype(rows_of(cpu));
    switch (bits) {
      case 32: return work.template operator()<Level, 32>();
      case 16: return work.template operator()<Level, 16>();
      case 8: return work.template operator()<Level, 8>();
      default: return work.template operator()<Level, 4>();
    }
  });
}

// Threads share positions [0, count): `work(begin, end)`, which returns false if an index of those
// it serves is none of the table's. Returns the first such position, or `count`.
template <class Work>
int64_t share(const Rows& table, Integers indices, int64_t count, const Work& work) {
  constexpr int64_t kGrain = 1 << 14;  // columns worth a thread's while
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, table.columns));
  bool all_inside = true;
  parallel_for(0, std::max<int64_t>(1, count), grain, [&](int64_t begin, int64_t end) {
    if (!work(begin, std::min(end, count))) __atomic_store_n(&all_inside, false, __ATOMIC_RELAXED);
  });
  int64_t at = all_inside ? count : 0;
  while (at < count && table.contains(indices[at])) at++;
  return at;
}

}  // namespace

int64_t look_up(const Table& table, Integers indices, int64_t count, Output out) {
  const Rows rows{table};
  int64_t outside = count;
  with_rows(table.bits, [&]<class Level, int Bits>() {
    outside = share(rows, indices, count, [&](int64_t begin, int64_t end) {
      return look_up<Level, Bits>(rows, indices, begin, end, out);
    });
  });
  return outside;
}

int64_t reduce_bags(
    const Table& table, Integers indices, const Bags& bags, int64_t count, Output out) {
  const Rows rows{table};
  const int64_t* const bounds = bags.bounds;
  int64_t outside = bounds[count];
  with_rows(table.bits, [&]<class Level, int Bits>() {
    // A bag belongs to the thread whose share it begins in.
    const auto first_of = [&](int64_t position) {
      return std::lower_bound(bounds, bounds + count, position) - bounds;
    };
    outside = share(rows, indices, bounds[count], [&](int64_t begin, int64_t end) {
      const int64_t last = end == bounds[count] ? count : first_of(end);
      return reduce_bags<Level, Bits>(rows, indices, bags, first_of(begin), last, out);
    });
  });
  return outside;
}

}  // namespace fx
