// Selection inside every block: N:M, per output row, and zeros_per_block.
#pragma once

#include "blocks.h"

namespace fx {

constexpr int64_t kSmall = 32;  // blocks up to this size are ranked by comparing every pair
constexpr int64_t kLanes = 16;  // of them at a time

// Which blocks lose elements, by their index in the grid: all, or those that a cut drops.
struct Chosen {
  const uint32_t* keys;  // null: all
  Cut cut;

  bool operator()(int64_t block) const { return !keys || cut.drops(keys[block], block); }
};

// One block of any size: `height` x `width` elements, `stride` apart from row to row.
template <class Source, class Out>
void drop_in_one(
    Source source, int64_t at, int64_t height, int64_t width, int64_t stride, int64_t zeros,
    Out one, Out* mask) {
  const int64_t size = height * width;
  Threshold threshold{0, 0, 0};
  if (zeros >= size) {
    threshold = {UINT32_MAX, size, size};
  } else if (zeros > 0) {
    std::vector<uint32_t> keys(size);
    for (int64_t i = 0; i < height; i++) {
      for (int64_t j = 0; j < width; j++) keys[i * width + j] = source[at + i * stride + j];
    }
    threshold = threshold_of_buffer(keys.data(), size, zeros);
  }
  int64_t ties = threshold.ties;
  for (int64_t i = 0; i < height; i++) {
    const int64_t row = at + i * stride;
    for (int64_t j = 0; j < width; j++) {
      const uint32_t key = source[row + j];
      const bool tie = key == threshold.key && ties > 0;
      ties -= tie;
      mask[row + j] = key < threshold.key || tie ? Out(0) : one;
    }
  }
}

// `kLanes` neighbouring blocks of `height` x `width` <= kSmall elements, a block a lane. An
// element's rank is the number of elements that go before it: smaller ones, and equal ones earlier
// ("below the key + 1"; no number has the largest key). `Width` fixes the width where it is not 0.
template <int Width, class Source, class Out>
void drop_in_lanes(
    Source source, int64_t at, int64_t height, int64_t width, int64_t stride,
    const int64_t* zeros, Out one, Out* mask) {
  using Vector = uint32_t __attribute__((vector_size(4 * kLanes)));
  const int64_t wide = Width > 0 ? Width : width;
  const int64_t size = height * wide;
  Vector keys[kSmall], limit;
  for (int64_t l = 0; l < kLanes; l++) limit[l] = uint32_t(zeros[l]);
  for (int64_t i = 0; i < height; i++) {
    const int64_t row = at + i * stride;
    for (int64_t j = 0; j < wide; j++) {
      for (int64_t l = 0; l < kLanes; l++) keys[i * wide + j][l] = source[row + l * wide + j];
    }
  }
  for (int64_t e = 0; e < size; e++) {
    Vector rank = {};
    const Vector own = keys[e], next = own + 1;
    for (int64_t other = 0; other < e; other++) rank -= Vector(keys[other] < next);
    for (int64_t other = e + 1; other < size; other++) rank -= Vector(keys[other] < own);
    const Vector drop = Vector(rank < limit);
    Out* out = mask + at + e / wide * stride + e % wide;
    for (int64_t l = 0; l < kLanes; l++) out[l * wide] = drop[l] ? Out(0) : one;
  }
}

#if FX_AVX512
inline void store_mask16(uint8_t* mask, __mmask16 keep, uint8_t one) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(mask), _mm_maskz_set1_epi8(keep, char(one)));
}
inline void store_mask16(uint16_t* mask, __mmask16 keep, uint16_t one) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask), _mm256_maskz_set1_epi16(keep, short(one)));
}
inline void store_mask16(uint32_t* mask, __mmask16 keep, uint32_t one) {
  _mm512_storeu_si512(mask, _mm512_maskz_set1_epi32(keep, int32_t(one)));
}

// Contiguous groups of `Group` = 2, 4, 8 or 16 elements, 16 elements at a time: each element meets
// its group by rotation. `count` is a multiple of 16.
template <int Group, class Source, class Out>
void drop_in_registers(
    Source source, int64_t at, int64_t count, int64_t zeros, Out one, Out* mask) {
  __m512i partner[Group];
  __m512i earlier[Group];
  for (int r = 1; r < Group; r++) {
    alignas(64) int32_t index[16];
    alignas(64) int32_t is_earlier[16];
    for (int i = 0; i < 16; i++) {
      index[i] = (i & ~(Group - 1)) | ((i + r) & (Group - 1));
      is_earlier[i] = index[i] < i;
    }
    partner[r] = _mm512_load_si512(index);
    earlier[r] = _mm512_load_si512(is_earlier);
  }
  const __m512i ones = _mm512_set1_epi32(1), limit = _mm512_set1_epi32(int32_t(zeros));
  for (int64_t i = at; i < at + count; i += 16) {
    const __m512i keys = source.sixteen(i);
    __m512i rank = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int r = 1; r < Group; r++) {
      const __m512i other = _mm512_permutexvar_epi32(partner[r], keys);
      const __mmask16 before =
          _mm512_cmplt_epu32_mask(other, _mm512_add_epi32(keys, earlier[r]));
      rank = _mm512_mask_add_epi32(rank, before, rank, ones);
    }
    store_mask16(mask + i, _mm512_cmpge_epi32_mask(rank, limit), one);
  }
}
#endif

// As many groups of `group` elements in a row as registers take; returns how many elements that is.
template <class Source, class Out>
int64_t drop_in_row(
    Source source, int64_t at, int64_t count, int64_t group, int64_t zeros, Out one, Out* mask) {
#if FX_AVX512
  const int64_t whole = count / 16 * 16;
  switch (group) {
    case 2: drop_in_registers<2>(source, at, whole, zeros, one, mask); return whole;
    case 4: drop_in_registers<4>(source, at, whole, zeros, one, mask); return whole;
    case 8: drop_in_registers<8>(source, at, whole, zeros, one, mask); return whole;
    case 16: drop_in_registers<16>(source, at, whole, zeros, one, mask); return whole;
    default: break;
  }
#endif
  return 0;
}

template <class Source, class Out>
void drop_in_lanes(
    Source source, int64_t at, int64_t height, int64_t width, int64_t stride,
    const int64_t* zeros, Out one, Out* mask) {
  switch (width) {
    case 1: return drop_in_lanes<1>(source, at, height, width, stride, zeros, one, mask);
    case 4: return drop_in_lanes<4>(source, at, height, width, stride, zeros, one, mask);
    default: return drop_in_lanes<0>(source, at, height, width, stride, zeros, one, mask);
  }
}

// From every chosen block drop its `zeros` smallest elements, or all that a ragged block has. Its
// missing elements count among them if `count_missing`.
template <class Source, class Out>
void drop_within(
    Source source, const Geometry& g, int64_t zeros, bool count_missing, Chosen chosen, Out one,
    Out* mask) {
  const int64_t per_strip = std::max<int64_t>(1, kStripWidth / g.block_size() / 16 * 16);
  const bool small = g.block_size() <= kSmall;
  for_each_strip(g, per_strip, [&](const Strip& s) {
    int64_t b = 0;
    if (s.height == 1 && g.block_height == 1 && !chosen.keys) {
      const int64_t count = s.whole * g.block_width;
      b = drop_in_row(source, s.at, count, g.block_width, zeros, one, mask) / g.block_width;
    }
    for (; small && s.height == g.block_height && b + kLanes <= s.whole; b += kLanes) {
      int64_t own[kLanes];
      for (int64_t l = 0; l < kLanes; l++) own[l] = chosen(s.block + b + l) ? zeros : 0;
      const int64_t at = s.at + b * g.block_width;
      drop_in_lanes(source, at, s.height, g.block_width, g.width, own, one, mask);
    }
    for (; b < s.whole + (s.ragged > 0); b++) {
      const int64_t wide = b < s.whole ? g.block_width : s.ragged;
      const int64_t missing = count_missing ? g.block_size() - s.height * wide : 0;
      const int64_t own = chosen(s.block + b) ? zeros - missing : 0;
      drop_in_one(source, s.at + b * g.block_width, s.height, wide, g.width, own, one, mask);
    }
  });
}

}  // namespace fx
