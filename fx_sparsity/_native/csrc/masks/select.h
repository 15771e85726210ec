// Exact selection of the k smallest of many keys, lowest index first among equals.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "keys.h"

namespace fx {

constexpr int64_t kChunk = 1 << 15;  // elements that a thread takes at a time
constexpr int64_t kSample = 1 << 15;
constexpr int64_t kDigits = 1 << 16;  // values of either half of a key

inline int64_t chunks_of(int64_t n) {
  return (n + kChunk - 1) / kChunk;
}

// What goes: every key below `key`, and the first `ties` of the `equal` keys that equal it.
struct Threshold {
  uint32_t key;
  int64_t ties;
  int64_t equal;
};

// What goes, once it is known where the last of the ties stands: equal keys before index `cut`.
struct Cut {
  uint32_t key;
  int64_t index;

  bool drops(uint32_t other, int64_t i) const { return other < key || (other == key && i < index); }
};

// The threshold that drops `k` >= 1 of `n` keys in memory; they are reordered. Each round sorts the
// keys into 2048 bins over the range that is left, and goes on in the bin that holds the k-th.
inline Threshold threshold_of_buffer(uint32_t* keys, int64_t n, int64_t k) {
  uint32_t counts[2048];
  while (true) {
    uint32_t low = keys[0], high = keys[0];
    for (int64_t i = 0; i < n; i++) {
      low = std::min(low, keys[i]);
      high = std::max(high, keys[i]);
    }
    if (low == high) return {low, k, n};
    const int shift = std::max(0, int(std::bit_width(high - low)) - 11);
    std::fill_n(counts, ((high - low) >> shift) + 1, 0u);
    for (int64_t i = 0; i < n; i++) counts[(keys[i] - low) >> shift]++;
    uint32_t bin = 0;
    for (; counts[bin] < k; bin++) k -= counts[bin];
    int64_t left = 0;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t key = keys[i];
      keys[left] = key;
      left += ((key - low) >> shift) == bin;
    }
    n = left;
  }
}

// Counts of one half of each key: the upper one (`prefix` < 0), or the lower one of the keys whose
// upper half is `prefix`. Adds to `counts`, of kDigits entries.
template <class Source>
void count_digits(Source source, int64_t n, int64_t prefix, int64_t* counts) {
  std::unique_ptr<std::atomic<int64_t>[]> shared(new std::atomic<int64_t>[kDigits]());
  torch::stable::parallel_for(0, chunks_of(n), 4, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> own(kDigits, 0);
    const int64_t last = std::min(n, end * kChunk);
    if (prefix < 0) {
      for (int64_t i = begin * kChunk; i < last; i++) own[source[i] >> 16]++;
    } else {
      for (int64_t i = begin * kChunk; i < last; i++) {
        const uint32_t key = source[i];
        if (key >> 16 == prefix) own[key & 0xffff]++;
      }
    }
    for (int64_t d = 0; d < kDigits; d++) {
      if (own[d]) shared[d].fetch_add(own[d], std::memory_order_relaxed);
    }
  });
  for (int64_t d = 0; d < kDigits; d++) counts[d] += shared[d].load(std::memory_order_relaxed);
}

// The digit that holds the k-th of `counts`; `k` becomes its rank within that digit.
inline int64_t digit_of_rank(const std::vector<int64_t>& counts, int64_t& k) {
  int64_t digit = 0;
  for (; counts[digit] < k; digit++) k -= counts[digit];
  return digit;
}

template <class Source>
Threshold threshold_by_counting(Source source, int64_t n, int64_t k) {
  std::vector<int64_t> counts(kDigits, 0);
  count_digits(source, n, -1, counts.data());
  const int64_t upper = digit_of_rank(counts, k);
  std::fill(counts.begin(), counts.end(), 0);
  count_digits(source, n, upper, counts.data());
  const int64_t lower = digit_of_rank(counts, k);
  return {uint32_t(upper << 16 | lower), k, counts[lower]};
}

// Whether a key is that of a NaN.
template <class Source>
bool any_nan(Source source, int64_t n) {
  constexpr uint32_t least = Source::kLeast, span = Source::kMost - least;
  if (span == UINT32_MAX) return false;
  std::atomic<bool> found{false};
  torch::stable::parallel_for(0, chunks_of(n), 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(n, end * kChunk);
    uint32_t nan = 0;
    for (int64_t i = begin * kChunk; i < last; i++) nan |= source[i] - least > span;
    if (nan) found.store(true, std::memory_order_relaxed);
  });
  return found;
}

// Keys of [begin, end) that lie in low..high, appended to `out`; returns how many. `below` counts
// the smaller ones; `nan` tells of a NaN. `out` has room for all of them and 16 more.
template <class Source>
int64_t gather_between(
    Source source, int64_t begin, int64_t end, uint32_t low, uint32_t high, uint32_t* out,
    int64_t& below, bool& nan) {
  constexpr uint32_t least = Source::kLeast, span = Source::kMost - least;
  int64_t found = 0, less = 0, i = begin;
  uint32_t strange = 0;
#if FX_AVX512
  const __m512i lows = _mm512_set1_epi32(int32_t(low));
  const __m512i widths = _mm512_set1_epi32(int32_t(high - low));
  const __m512i leasts = _mm512_set1_epi32(int32_t(least));
  const __m512i spans = _mm512_set1_epi32(int32_t(span));
  for (; i + 16 <= end; i += 16) {
    const __m512i keys = source.sixteen(i);
    strange |= _mm512_cmpgt_epu32_mask(_mm512_sub_epi32(keys, leasts), spans);
    less += __builtin_popcount(_mm512_cmplt_epu32_mask(keys, lows));
    const __mmask16 in = _mm512_cmple_epu32_mask(_mm512_sub_epi32(keys, lows), widths);
    if (in) {
      _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(in, keys));
      found += __builtin_popcount(in);
    }
  }
#endif
  for (; i < end; i++) {
    const uint32_t key = source[i];
    strange |= key - least > span;
    less += key < low;
    out[found] = key;
    found += key - low <= high - low;
  }
  below += less;
  nan |= strange != 0;
  return found;
}

// Keys low..high that very likely hold the k-th smallest of `n`: four standard deviations to
// either side of its place in a sample.
struct Bracket {
  uint32_t low = 0, high = UINT32_MAX;
};

template <class Source>
Bracket bracket_of(Source source, int64_t n, int64_t k) {
  std::vector<uint32_t> sample(kSample);
  const double stride = double(n) / kSample, share = double(k) / double(n);
  const double spread = 4 * std::sqrt(kSample * share * (1 - share)) + 2;
  const int64_t first = int64_t(share * kSample - spread);
  const int64_t last = int64_t(share * kSample + spread);
  const auto key_of_rank = [&](int64_t rank) {
    for (int64_t i = 0; i < kSample; i++) sample[i] = source[int64_t(double(i) * stride)];
    return threshold_of_buffer(sample.data(), kSample, rank).key;
  };
  Bracket bracket;
  if (first > 0) bracket.low = key_of_rank(first);
  if (last < kSample) bracket.high = key_of_rank(last);
  return bracket;
}

// The keys of a bracket, and how many lie below it. Given up where they are more than an eighth.
struct Candidates {
  std::vector<uint32_t> keys;
  int64_t below = 0;
  bool complete = true;
  bool nan = false;
};

template <class Source>
Candidates candidates_of(Source source, int64_t n, Bracket bracket) {
  std::vector<std::vector<uint32_t>> found(chunks_of(n));
  std::atomic<int64_t> below{0};
  std::atomic<bool> crowded{false}, nan{false};
  torch::stable::parallel_for(0, chunks_of(n), 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> buffer(kChunk + 16);
    int64_t less = 0;
    bool strange = false;
    for (int64_t c = begin; c < end && !crowded.load(std::memory_order_relaxed); c++) {
      const int64_t stop = std::min(n, (c + 1) * kChunk);
      const int64_t count = gather_between(
          source, c * kChunk, stop, bracket.low, bracket.high, buffer.data(), less, strange);
      if (count > kChunk / 8) crowded.store(true, std::memory_order_relaxed);
      found[c].assign(buffer.data(), buffer.data() + count);
    }
    below += less;
    if (strange) nan.store(true, std::memory_order_relaxed);
  });
  Candidates candidates{{}, below, !crowded, nan};
  for (const auto& part : found) {
    candidates.keys.insert(candidates.keys.end(), part.begin(), part.end());
  }
  return candidates;
}

// The threshold that drops the `k` smallest of `n` keys, 0 < k <= n. A sample brackets it, and one
// pass gathers what the bracket holds. Where it misses, or holds too much (ties), keys are counted.
// Nothing where a key is that of a NaN.
template <class Source>
std::optional<Threshold> threshold_of(Source source, int64_t n, int64_t k) {
  if (n <= 4 * kSample) {
    if (any_nan(source, n)) return std::nullopt;
    std::vector<uint32_t> all(n);
    for (int64_t i = 0; i < n; i++) all[i] = source[i];
    return threshold_of_buffer(all.data(), n, k);
  }
  Candidates candidates = candidates_of(source, n, bracket_of(source, n, k));
  if (candidates.nan || (!candidates.complete && any_nan(source, n))) return std::nullopt;
  const int64_t rank = k - candidates.below, count = int64_t(candidates.keys.size());
  if (candidates.complete && rank >= 1 && rank <= count) {
    return threshold_of_buffer(candidates.keys.data(), count, rank);
  }
  return threshold_by_counting(source, n, k);
}

// How many keys of each chunk equal `key`.
template <class Source>
std::vector<int64_t> equal_per_chunk(Source source, int64_t n, uint32_t key) {
  std::vector<int64_t> counts(chunks_of(n));
  torch::stable::parallel_for(0, chunks_of(n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      uint32_t count = 0;
      const int64_t stop = std::min(n, (c + 1) * kChunk);
      for (int64_t i = c * kChunk; i < stop; i++) count += source[i] == key;
      counts[c] = count;
    }
  });
  return counts;
}

// Where the last of the `ties` that go stands, of the keys that equal `key`.
template <class Source>
Cut cut_at(Source source, const std::vector<int64_t>& equal, uint32_t key, int64_t ties) {
  size_t chunk = 0;
  for (; chunk < equal.size() && equal[chunk] < ties; chunk++) ties -= equal[chunk];
  int64_t i = int64_t(chunk) * kChunk;
  for (; chunk < equal.size() && ties > 0; i++) ties -= source[i] == key;
  return {key, i};
}

// The cut that drops exactly `k` of `n` keys; nothing where one of them is that of a NaN.
template <class Source>
std::optional<Cut> cut_smallest(Source source, int64_t n, int64_t k) {
  if (k <= 0 || k >= n) {
    if (any_nan(source, n)) return std::nullopt;
    return k <= 0 ? Cut{0, 0} : Cut{UINT32_MAX, n};
  }
  const auto threshold = threshold_of(source, n, k);
  if (!threshold) return std::nullopt;
  const auto [key, ties, equal] = *threshold;
  if (ties == equal) return Cut{key, n};
  return cut_at(source, equal_per_chunk(source, n, key), key, ties);
}

// Write the mask of [begin, end): `one` is kept, zero goes.
template <class Source, class Out>
void write_mask(Source source, int64_t begin, int64_t end, Cut cut, Out one, Out* mask) {
  const int64_t middle = std::clamp(cut.index, begin, end);
  for (int64_t i = begin; i < middle; i++) mask[i] = source[i] > cut.key ? one : Out(0);
  for (int64_t i = middle; i < end; i++) mask[i] = source[i] >= cut.key ? one : Out(0);
}

}  // namespace fx
