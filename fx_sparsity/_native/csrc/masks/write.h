// Masks are written last of all, from bits, once nothing can fail any more.
#pragma once

#include <vector>

#include "bits.h"
#include "geometry.h"

namespace fx {

constexpr int64_t kStreamed = 1 << 24;  // bytes of a mask that caches do not hold until it is read

// Copies to memory that a cache need not hold: what is overwritten is not read before.
inline void stream(uint8_t* to, const uint8_t* from, size_t bytes) {
#if FX_AVX512
  const size_t head = std::min<size_t>(bytes, -reinterpret_cast<uintptr_t>(to) % 64);
  std::memcpy(to, from, head);
  size_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

// A thread's row of a mask. When it is gone, other threads see what this one has streamed.
template <class Out>
struct Row {
  std::vector<Out> elements;

#if FX_AVX512
  Row() = default;
  Row(const Row&) = default;
  ~Row() { _mm_sfence(); }
#endif
};

// Of the lowest 64 / Width bits each `Width` times.
template <int Width>
inline uint64_t stretch(uint64_t bits) {
  if constexpr (Width == 1) return bits;
  constexpr uint64_t kOnes = ~0ull;
  bits &= kOnes >> (64 - 64 / Width);
  for (int half = 32 / Width; half; half /= 2) {  // of each run, the upper half moves away
    const uint64_t lowest = kOnes >> (64 - half), period = kOnes / (kOnes >> (64 - half * Width));
    bits = (bits | bits << (half * (Width - 1))) & lowest * period;
  }
  return bits * (kOnes >> (64 - Width));
}

// One row of a mask: `count` bits from `first` on, each `Width` times (0: `width`).
template <int Width, class Out>
void write_row(const Bits& bits, int64_t first, int64_t count, int64_t width, Out one, Out* row) {
  int64_t b = 0;
  if constexpr (Width > 0) {
    constexpr int64_t kStep = 64 / Width;
    for (; b + kStep <= count; b += kStep) {
      unpack64(stretch<Width>(bits.from(first + b)), one, row + b * Width);
    }
  }
  for (; b < count; b++) std::fill_n(row + b * width, width, bits[first + b] ? one : Out(0));
}

template <class Out>
void write_row(const Bits& bits, int64_t first, int64_t count, int64_t width, Out one, Out* row) {
  switch (width) {
    case 1: return write_row<1>(bits, first, count, width, one, row);
    case 2: return write_row<2>(bits, first, count, width, one, row);
    case 4: return write_row<4>(bits, first, count, width, one, row);
    case 8: return write_row<8>(bits, first, count, width, one, row);
    case 16: return write_row<16>(bits, first, count, width, one, row);
    case 32: return write_row<32>(bits, first, count, width, one, row);
    default: return write_row<0>(bits, first, count, width, one, row);
  }
}

// Keeps the edges that belong to no block.
template <class Out>
void keep_edges(const Geometry& g, Out one, Out* mask) {
  if (!g.dense) return;
  const int64_t right = g.columns() * g.block_width;
  for (int64_t i = 0; i < g.batch * g.height; i++) {
    const int64_t from = i % g.height < g.rows() * g.block_height ? right : 0;
    std::fill(mask + i * g.width + from, mask + (i + 1) * g.width, one);
  }
}

// Writes a mask. `fill(strip, i, row)` gives the i-th row of each strip; only the first where they
// are all `alike`. What belongs to no block is kept.
template <class Out, class Fill>
void write_strips(
    const Geometry& g, int64_t per_strip, bool alike, Out one, Out* mask, const Fill& fill) {
  keep_edges(g, one, mask);
  const int64_t elements = g.batch * g.height * g.width;
  const bool streamed = elements * int64_t(sizeof(Out)) >= kStreamed;
  for_each_strip(g, per_strip, [&, row = Row<Out>()](const Strip& s) mutable {
    row.elements.resize(s.wide);
    const auto* from = reinterpret_cast<const uint8_t*>(row.elements.data());
    const size_t bytes = s.wide * sizeof(Out);
    for (int64_t i = 0; i < s.height; i++) {
      if (i == 0 || !alike) fill(s, i, row.elements.data());
      auto* to = reinterpret_cast<uint8_t*>(mask + s.at + i * g.width);
      streamed ? stream(to, from, bytes) : void(std::memcpy(to, from, bytes));
    }
  });
}

// Writes whole blocks: all of one is kept, or nothing. `bits` are those of the grid.
template <class Out>
void write_blocks(const Bits& bits, const Geometry& g, Out one, Out* mask) {
  write_strips(g, g.blocks_per_strip(), true, one, mask, [&](const Strip& s, int64_t, Out* row) {
    write_row(bits, s.block, s.whole, g.block_width, one, row);
    Out* last = row + s.whole * g.block_width;
    write_row<0>(bits, s.block + s.whole, s.ragged > 0, s.ragged, one, last);
  });
}

}  // namespace fx
