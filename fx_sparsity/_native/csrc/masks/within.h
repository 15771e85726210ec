// Selection inside every block: N:M, per output row, and zeros_per_block.
#pragma once

#include <bit>

#include "geometry.h"
#include "select.h"
#include "write.h"

namespace fx {

constexpr int64_t kSmall = 32;  // blocks up to this size are ranked by comparing every pair
constexpr int64_t kLanes = 16;  // of them at a time

// Rows of a tensor's elements from `at` on, and their places in a buffer: bytes, 1 where kept.
template <class Source>
struct Window {
  Source source;
  int64_t at, stride;
  uint8_t* kept;
  int64_t kept_stride;

  uint32_t key(int64_t i, int64_t j) const { return source[at + i * stride + j]; }
  uint8_t& keep(int64_t i, int64_t j) const { return kept[i * kept_stride + j]; }
  Window right(int64_t j) const { return {source, at + j, stride, kept + j, kept_stride}; }
};

// One block of any size: `height` x `width` elements.
template <class Source>
void drop_in_one(Window<Source> window, int64_t height, int64_t width, int64_t zeros) {
  const int64_t size = height * width;
  Threshold threshold{0, 0, 0};
  if (zeros >= size) {
    threshold = {UINT32_MAX, size, size};
  } else if (zeros > 0) {
    std::vector<uint32_t> keys(size);
    for (int64_t i = 0; i < height; i++) {
      for (int64_t j = 0; j < width; j++) keys[i * width + j] = window.key(i, j);
    }
    threshold = threshold_of_buffer(keys.data(), size, zeros);
  }
  int64_t ties = threshold.ties;
  for (int64_t i = 0; i < height; i++) {
    for (int64_t j = 0; j < width; j++) {
      const uint32_t key = window.key(i, j);
      const bool tie = key == threshold.key && ties > 0;
      ties -= tie;
      window.keep(i, j) = !(key < threshold.key || tie);
    }
  }
}

// `kLanes` neighbouring blocks of `height` x `width` <= kSmall elements, a block a lane. An
// element's rank is the number of elements that go before it: smaller ones, and equal ones earlier
// ("below the key + 1"; no number has the largest key). `Width` fixes the width where it is not 0.
template <int Width, class Source>
void drop_in_lanes(
    Window<Source> window, int64_t height, int64_t width, const int64_t* zeros) {
  using Vector = uint32_t __attribute__((vector_size(4 * kLanes)));
  const int64_t wide = Width > 0 ? Width : width;
  const int64_t size = height * wide;
  Vector keys[kSmall], limit;
  for (int64_t l = 0; l < kLanes; l++) limit[l] = uint32_t(zeros[l]);
  for (int64_t i = 0; i < height; i++) {
    for (int64_t j = 0; j < wide; j++) {
      for (int64_t l = 0; l < kLanes; l++) keys[i * wide + j][l] = window.key(i, l * wide + j);
    }
  }
  for (int64_t e = 0; e < size; e++) {
    Vector rank = {};
    const Vector own = keys[e], next = own + 1;
    for (int64_t other = 0; other < e; other++) rank -= Vector(keys[other] < next);
    for (int64_t other = e + 1; other < size; other++) rank -= Vector(keys[other] < own);
    const Vector drop = Vector(rank < limit);
    uint8_t* kept = &window.keep(e / wide, e % wide);
    for (int64_t l = 0; l < kLanes; l++) kept[l * wide] = !drop[l];
  }
}

#if FX_AVX512
// In each group of `Group` bits, the bit `by` places further on, around the group.
template <int Group>
inline uint64_t turned(uint64_t bits, int by) {
  const uint64_t heads = ~0ull / (~0ull >> (64 - Group));  // the first of each group
  const uint64_t first = heads * ((1ull << (Group - by)) - 1);
  return (bits >> by & first) | (bits << (Group - by) & ~first);
}

// Contiguous groups of `Group` = 2, 4, 8 or 16 elements, 64 elements at a time; `count` is a
// multiple of that. `before[r]` tells whether the element r places further on goes before one:
// half of them by comparing, the others by looking back. Ranks are counted in planes of bits.
// Returns the key farthest from `kLeast`.
template <int Group, class Source>
uint32_t keep_in_registers(
    Source source, int64_t at, int64_t count, int64_t zeros, uint64_t* kept) {
  constexpr int kHalf = Group / 2, kPlanes = std::bit_width(unsigned(Group));
  __m512i partner[kHalf + 1], earlier[kHalf + 1];
  for (int r = 1; r <= kHalf; r++) {
    alignas(64) int32_t index[16];
    alignas(64) int32_t is_earlier[16];
    for (int i = 0; i < 16; i++) {
      index[i] = (i & ~(Group - 1)) | ((i + r) & (Group - 1));
      is_earlier[i] = index[i] < i;
    }
    partner[r] = _mm512_load_si512(index);
    earlier[r] = _mm512_load_si512(is_earlier);
  }
  const __m512i leasts = _mm512_set1_epi32(int32_t(Source::kLeast));
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 64) {
    uint64_t before[Group] = {};
#pragma GCC unroll 4
    for (int part = 0; part < 64; part += 16) {
      const __m512i keys = source.sixteen(at + i + part);
      most = _mm512_max_epu32(most, _mm512_sub_epi32(keys, leasts));
#pragma GCC unroll 8
      for (int r = 1; r <= kHalf; r++) {
        const __m512i other = _mm512_permutexvar_epi32(partner[r], keys);
        const __m512i own = _mm512_add_epi32(keys, earlier[r]);
        before[r] |= uint64_t(_mm512_cmplt_epu32_mask(other, own)) << part;
      }
    }
    uint64_t planes[kPlanes] = {};
#pragma GCC unroll 16
    for (int r = 1; r < Group; r++) {
      uint64_t carry = r <= kHalf ? before[r] : ~turned<Group>(before[Group - r], r);
      for (uint64_t& plane : planes) {
        const uint64_t next = plane & carry;
        plane ^= carry;
        carry = next;
      }
    }
    uint64_t above = 0, equal = ~0ull;  // ranks above the number of zeros, and those of that number
    for (int p = kPlanes - 1; p >= 0; p--) {
      const uint64_t digit = -(uint64_t(zeros) >> p & 1);
      above |= equal & planes[p] & ~digit;
      equal &= ~(planes[p] ^ digit);
    }
    kept[i / 64] = above | equal;
  }
  return _mm512_reduce_max_epu32(most);
}
#endif

// As many groups of `group` elements in a row as registers take; returns how many elements that is.
// `nan` tells of a NaN among them.
template <class Source>
int64_t keep_in_row(
    [[maybe_unused]] Source source, [[maybe_unused]] int64_t at, [[maybe_unused]] int64_t count,
    [[maybe_unused]] int64_t group, [[maybe_unused]] int64_t zeros,
    [[maybe_unused]] uint64_t* kept, [[maybe_unused]] bool& nan) {
#if FX_AVX512
  const int64_t whole = count / 64 * 64;
  uint32_t farthest;
  switch (group) {
    case 2: farthest = keep_in_registers<2>(source, at, whole, zeros, kept); break;
    case 4: farthest = keep_in_registers<4>(source, at, whole, zeros, kept); break;
    case 8: farthest = keep_in_registers<8>(source, at, whole, zeros, kept); break;
    case 16: farthest = keep_in_registers<16>(source, at, whole, zeros, kept); break;
    default: return 0;
  }
  nan |= farthest > Source::kMost - Source::kLeast;
  return whole;
#else
  return 0;
#endif
}

template <class Source>
void drop_in_lanes(
    Window<Source> window, int64_t height, int64_t width, const int64_t* zeros) {
  switch (width) {
    case 1: return drop_in_lanes<1>(window, height, width, zeros);
    case 4: return drop_in_lanes<4>(window, height, width, zeros);
    default: return drop_in_lanes<0>(window, height, width, zeros);
  }
}

// What each chosen block loses: its `zeros` smallest elements, or all that a ragged one has. Its
// missing elements count among them if `count_missing`.
struct Loss {
  int64_t zeros;
  bool count_missing;
  const Bits* spared;  // blocks that lose nothing; null: there are none

  int64_t of(int64_t block, int64_t missing = 0) const {
    if (spared && (*spared)[block]) return 0;
    return count_missing ? zeros - missing : zeros;
  }
};

// The blocks of a strip from the `b`-th on.
template <class Source>
void drop_in_strip(
    const Strip& s, const Geometry& g, const Loss& loss, int64_t b, Window<Source> window) {
  const bool small = g.block_size() <= kSmall && s.height == g.block_height;
  for (; small && b + kLanes <= s.whole; b += kLanes) {
    int64_t own[kLanes];
    for (int64_t l = 0; l < kLanes; l++) own[l] = loss.of(s.block + b + l);
    drop_in_lanes(window.right(b * g.block_width), s.height, g.block_width, own);
  }
  for (; b < s.whole + (s.ragged > 0); b++) {
    const int64_t wide = b < s.whole ? g.block_width : s.ragged;
    const int64_t own = loss.of(s.block + b, g.block_size() - s.height * wide);
    drop_in_one(window.right(b * g.block_width), s.height, wide, own);
  }
}

// Writes the mask in which every block has its loss; false, and nothing is written, where a key is
// that of a NaN. Each row of a strip has words of its own for its bits.
template <class Source, class Out>
bool drop_within(Source source, const Geometry& g, const Loss& loss, Out one, Out* mask) {
  const int64_t per_strip = std::max<int64_t>(1, kStripWidth / g.block_size() / 16 * 16);
  const int64_t widest = std::min(per_strip * g.block_width, g.width);
  const int64_t row_bits = (widest + 63) / 64 * 64;
  const auto place = [&](const Strip& s, int64_t i) {
    return (s.index * g.block_height + i) * row_bits;
  };
  Bits bits(g.strips(per_strip) * g.block_height * row_bits);
  std::atomic<bool> nan{false};
  for_each_strip(g, per_strip, [&, kept = std::vector<uint8_t>()](const Strip& s) mutable {
    uint64_t* words = bits.words(place(s, 0));
    bool strange = false;
    int64_t done = 0;
    if (g.block_height == 1 && !loss.spared) {
      const int64_t count = s.whole * g.block_width;
      done = keep_in_row(source, s.at, count, g.block_width, loss.zeros, words, strange);
    }
    if (done < s.wide) {
      for (int64_t i = 0; i < s.height; i++) {
        const int64_t row = s.at + i * g.width;
        strange |= has_nan(source, row + done, row + s.wide);
      }
      if (!strange) {
        kept.resize(s.height * row_bits);
        const Window<Source> window{source, s.at, g.width, kept.data(), row_bits};
        drop_in_strip(s, g, loss, done / g.block_width, window);
        for (int64_t w = done / 64; w < s.height * row_bits / 64; w++) {
          words[w] = bits_of_bytes(kept.data() + 64 * w);
        }
      }
    }
    if (strange) nan.store(true, std::memory_order_relaxed);
  });
  if (nan) return false;
  write_strips(g, per_strip, false, one, mask, [&](const Strip& s, int64_t i, Out* row) {
    write_row<1>(bits, place(s, i), s.wide, 1, one, row);
  });
  return true;
}

}  // namespace fx
