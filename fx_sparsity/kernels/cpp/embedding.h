// Lookups in row-pruned tables: remap, dequantize and reduce in one pass, sixteen columns at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "vectors.h"

namespace fx {

// Sixteen values as they are stored, `Bits` each: fp32, bf16, signed 8-bit codes, or 4-bit codes of
// which the lower half of a byte is the first.
template <int Bits>
using Stored [[gnu::vector_size(kLanes * Bits / 8)]] = uint8_t;

inline Floats widen(Stored<32> values) {
  return std::bit_cast<Floats>(values);
}

inline Floats widen(Stored<16> values) {
#ifdef __AVX512F__
  return Floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(__m256i(values)), 16));
#else
  return to_floats(std::bit_cast<Halves>(values));
#endif
}

inline Floats widen(Stored<8> codes) {
#ifdef __AVX512F__
  return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(__m128i(codes))));
#else
  // Twice as wide in each step; in one step the compiler would take the codes one by one.
  using Codes [[gnu::vector_size(16)]] = int8_t;
  using Shorts [[gnu::vector_size(32)]] = int16_t;
  const auto shorts = __builtin_convertvector(std::bit_cast<Codes>(codes), Shorts);
  return to_floats(__builtin_convertvector(shorts, Ints));
#endif
}

inline Floats widen(Stored<4> codes) {
  using Pairs [[gnu::vector_size(16)]] = uint16_t;
#ifdef __AVX512F__
  const auto pairs = Pairs(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(std::bit_cast<int64_t>(codes))));
#else
  const auto pairs = __builtin_convertvector(codes, Pairs);
#endif
  return widen(std::bit_cast<Stored<8>>((pairs | pairs << 4) & 0x0f0f));
}

template <int Bits>
Floats load(const uint8_t* from) {
  return widen(load_as<Stored<Bits>>(from));
}

// The first `count` of sixteen values; the others are zero bits.
template <int Bits>
Floats load(const uint8_t* from, int64_t count) {
  if (count == kLanes) return load<Bits>(from);
  Stored<Bits> values{};
  std::memcpy(&values, from, (count * Bits + 7) / 8);
  return widen(values);
}

struct Output {
  void* data;
  bool is_bf16;

  // Writes the first `count` of sixteen values from element `at` on.
  void store(int64_t at, Floats values, int64_t count) const {
    if (is_bf16) {
      const Halves halves = to_bfloats(values);
      write(static_cast<uint16_t*>(data) + at, halves, count);
    } else {
      write(static_cast<float*>(data) + at, values, count);
    }
  }

 private:
  template <class T, class Vector>
  static void write(T* to, Vector values, int64_t count) {
    if (count == kLanes) {
      std::memcpy(to, &values, sizeof values);
    } else {
      std::memcpy(to, &values, count * sizeof(T));
    }
  }
};

// Indices or offsets of either width.
struct Integers {
  const void* data;
  bool is_wide;

  int64_t operator[](int64_t i) const {
    return is_wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Table {
  const uint8_t* rows;   // those that are kept, `row_bytes` each
  const float* affine;   // of codes: a scale and a zero point for each row
  const int32_t* remap;  // index -> row; anything else than a row means that it was pruned
  int64_t size;          // indices
  int64_t kept;          // rows
  int64_t columns;
  int64_t row_bytes;

  // The row of an index, or -1.
  int64_t find(int64_t index) const {
    const int64_t row = remap[index];
    return uint64_t(row) < uint64_t(kept) ? row : -1;
  }
};

// Positions [begin, end) of the indices, all of them checked, as one thread reads them. Rows come at
// random from more memory than caches hold: while one is read, that of `kAhead` positions later is
// on its way, and the remap entry of as many after that.
class Reader {
 public:
  Reader(const Table& table, Integers indices, int64_t begin, int64_t end)
      : table(table), indices(indices), begin(begin), end(end) {
    for (int64_t i = begin; i < std::min(end, begin + kAhead); i++) fetch(i);
  }

  const Table table;
  const Integers indices;
  const int64_t begin, end;

  // To be called with each position before its row is read.
  void prefetch(int64_t i) const {
    if (i + 2 * kAhead < end) __builtin_prefetch(table.remap + indices[i + 2 * kAhead]);
    if (i + kAhead < end) fetch(i + kAhead);
  }

 private:
  static constexpr int64_t kAhead = 8;
  static constexpr int64_t kLine = 64;            // bytes
  static constexpr int64_t kStream = 16 * kLine;  // what follows is fetched by the processor itself

  void fetch(int64_t i) const {
    const int64_t row = table.find(indices[i]);
    if (row < 0) return;
    const uint8_t* start = table.rows + row * table.row_bytes;
    const uint8_t* stop = start + std::min(table.row_bytes, kStream);
    for (const uint8_t* line = start; line < stop; line += kLine) __builtin_prefetch(line);
    if (table.affine) __builtin_prefetch(table.affine + 2 * row);
  }
};

// The position of the first index in [begin, end) that is none of the table; `end` if all are.
inline int64_t first_outside(Integers indices, int64_t begin, int64_t end, int64_t size) {
  const auto scan = [&](const auto* data, auto limit) {
    bool outside = false;
    for (int64_t i = begin; i < end; i++) outside |= decltype(limit)(data[i]) >= limit;
    int64_t at = outside ? begin : end;
    while (at < end && decltype(limit)(data[at]) < limit) at++;
    return at;
  };
  if (indices.is_wide) return scan(static_cast<const int64_t*>(indices.data), uint64_t(size));
  return scan(static_cast<const int32_t*>(indices.data), uint32_t(size));
}

enum class Mode : int64_t { sum = 0, mean = 1, max = 2 };

struct Bags {
  const float* weights;  // of each position; may be null
  int64_t padding;       // the index that is left out; negative: none
  Mode mode;
};

// Reduces columns [column, column + 16 * Vectors) of the bag at positions [begin, end) into `result`;
// returns how many indices were not padding. Of the last sixteen columns there are only `width`.
template <int Bits, bool Max, int Vectors>
[[gnu::always_inline]] inline int64_t reduce_columns(
    const Reader& reader, const Bags& bags, int64_t begin, int64_t end, int64_t column,
    int64_t width, Floats* result) {
  const Table table = reader.table;
  const int64_t start = column * Bits / 8;
  Floats values[Vectors] = {};
  int64_t count = 0;
  for (int64_t i = begin; i < end; i++) {
    if (column == 0) reader.prefetch(i);
    const int64_t index = reader.indices[i];
    if (index == bags.padding) continue;
    count++;
    const int64_t row = table.find(index);
    if (row < 0) {
      for (int v = 0; Max && v < Vectors; v++) {
        values[v] = count == 1 ? Floats{} : values[v] < 0 ? Floats{} : values[v];
      }
      continue;
    }
    const uint8_t* from = table.rows + row * table.row_bytes + start;
    float factor = !Max && bags.weights ? bags.weights[i] : 1.0f, zero_point = 0.0f;
    if constexpr (Bits <= 8) {
      factor *= table.affine[2 * row];
      zero_point = table.affine[2 * row + 1];
    }
    for (int v = 0; v < Vectors; v++) {
      const Floats value =
          (load<Bits>(from + v * sizeof(Stored<Bits>), width) - zero_point) * factor;
      if constexpr (Max) {
        values[v] = count == 1 ? value : value > values[v] ? value : values[v];
      } else {
        values[v] += value;
      }
    }
  }
  std::copy_n(values, Vectors, result);
  return count;
}

// The bag at positions [begin, end), into the output from element `at` on.
template <int Bits, bool Max>
void reduce_bag(
    const Reader& reader, const Bags& bags, int64_t begin, int64_t end, Output out, int64_t at) {
  constexpr int kVectors = 4;
  const int64_t columns = reader.table.columns;
  Floats values[kVectors];
  const auto finish = [&](int64_t column, int64_t count, int64_t width) {
    for (int64_t v = 0; v * kLanes < width; v++) {
      if (bags.mode == Mode::mean && count) values[v] /= float(count);
      out.store(at + column + v * kLanes, values[v], std::min<int64_t>(kLanes, width - v * kLanes));
    }
  };
  int64_t column = 0;
  for (constexpr int64_t width = kVectors * kLanes; column + width <= columns; column += width) {
    finish(
        column,
        reduce_columns<Bits, Max, kVectors>(reader, bags, begin, end, column, kLanes, values),
        width);
  }
  for (; column + kLanes <= columns; column += kLanes) {
    finish(
        column, reduce_columns<Bits, Max, 1>(reader, bags, begin, end, column, kLanes, values),
        kLanes);
  }
  if (const int64_t rest = columns - column) {
    finish(
        column, reduce_columns<Bits, Max, 1>(reader, bags, begin, end, column, rest, values), rest);
  }
}

// The rows of the positions of `reader`, into the output.
template <int Bits>
void look_up(const Reader& reader, Output out) {
  const Table table = reader.table;
  const bool copies = Bits == (out.is_bf16 ? 16 : 32);
  for (int64_t i = reader.begin; i < reader.end; i++) {
    reader.prefetch(i);
    const int64_t row = table.find(reader.indices[i]);
    uint8_t* to = static_cast<uint8_t*>(out.data) + i * table.columns * (out.is_bf16 ? 2 : 4);
    if (row < 0) {
      std::memset(to, 0, table.columns * (out.is_bf16 ? 2 : 4));
      continue;
    }
    const uint8_t* from = table.rows + row * table.row_bytes;
    if (copies) {
      std::memcpy(to, from, table.row_bytes);
      continue;
    }
    for (int64_t column = 0; column < table.columns; column += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, table.columns - column);
      Floats value = load<Bits>(from + column * Bits / 8, count);
      if constexpr (Bits <= 8) {
        value = (value - table.affine[2 * row + 1]) * table.affine[2 * row];
      }
      out.store(i * table.columns + column, value, count);
    }
  }
}

}  // namespace fx
