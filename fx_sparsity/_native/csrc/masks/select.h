// Exact selection of the k smallest of many keys, lowest index first among equals.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "keys.h"

namespace fx {

constexpr int64_t kChunk = 1 << 15;  // elements that a thread takes at a time
constexpr int64_t kSample = 1 << 15;
constexpr int64_t kDigits = 1 << 16;  // values of either half of a key
constexpr int kBinBits = 11;
constexpr int64_t kBins = 1 << kBinBits;  // that keys of a range are sorted into

inline int64_t chunks_of(int64_t n) {
  return (n + kChunk - 1) / kChunk;
}

// What goes: every key below `key`, and the first `ties` of the `equal` keys that equal it. How many
// of those each chunk has, where that is known already.
struct Threshold {
  uint32_t key;
  int64_t ties;
  int64_t equal;
  std::vector<int64_t> equal_per_chunk = {};
};

// What goes, once it is known where the last of the ties stands: equal keys before index `cut`.
struct Cut {
  uint32_t key;
  int64_t index;

  bool drops(uint32_t other, int64_t i) const { return other < key || (other == key && i < index); }
};

// A range of keys, cut into at most kBins bins of equal width.
struct Bins {
  uint32_t low;
  int shift;

  Bins(uint32_t low, uint32_t high)
      : low(low), shift(std::max(0, int(std::bit_width(high - low)) - kBinBits)) {}
  uint32_t operator()(uint32_t key) const { return (key - low) >> shift; }
};

// The bin that holds the k-th of `counts`; `k` becomes its rank within that bin.
template <class Counts>
int64_t bin_of_rank(const Counts& counts, int64_t& k) {
  int64_t bin = 0;
  for (; int64_t(counts[bin]) < k; bin++) k -= counts[bin];
  return bin;
}

// The threshold that drops `k` >= 1 of `n` keys in memory; they are reordered. Each round sorts the
// keys into bins over the range that is left, and goes on in the bin that holds the k-th.
inline Threshold threshold_of_buffer(uint32_t* keys, int64_t n, int64_t k) {
  uint32_t counts[kBins];
  while (true) {
    uint32_t low = keys[0], high = keys[0];
    for (int64_t i = 0; i < n; i++) {
      low = std::min(low, keys[i]);
      high = std::max(high, keys[i]);
    }
    if (low == high) return {low, k, n};
    const Bins bins(low, high);
    std::fill_n(counts, bins(high) + 1, 0u);
    for (int64_t i = 0; i < n; i++) counts[bins(keys[i])]++;
    const uint32_t bin = bin_of_rank(counts, k);
    int64_t left = 0;
    for (int64_t i = 0; i < n; i++) {
      const uint32_t key = keys[i];
      keys[left] = key;
      left += bins(key) == bin;
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

template <class Source>
Threshold threshold_by_counting(Source source, int64_t n, int64_t k) {
  std::vector<int64_t> counts(kDigits, 0);
  count_digits(source, n, -1, counts.data());
  const int64_t upper = bin_of_rank(counts, k);
  std::fill(counts.begin(), counts.end(), 0);
  count_digits(source, n, upper, counts.data());
  const int64_t lower = bin_of_rank(counts, k);
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
  const __m512i lows = _mm512_set1_epi32(int32_t(low)), ones = _mm512_set1_epi32(1);
  const __m512i widths = _mm512_set1_epi32(int32_t(high - low));
  const __m512i leasts = _mm512_set1_epi32(int32_t(least));
  const __m512i spans = _mm512_set1_epi32(int32_t(span));
  __m512i counts = _mm512_setzero_si512();
  for (; i + 16 <= end; i += 16) {
    const __m512i keys = source.sixteen(i);
    if constexpr (span != UINT32_MAX) {
      strange |= _mm512_cmpgt_epu32_mask(_mm512_sub_epi32(keys, leasts), spans);
    }
    const __mmask16 under = _mm512_cmplt_epu32_mask(keys, lows);
    counts = _mm512_mask_add_epi32(counts, under, counts, ones);
    const __mmask16 in = _mm512_cmple_epu32_mask(_mm512_sub_epi32(keys, lows), widths);
    _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(in, keys));
    found += __builtin_popcount(in);
  }
  less = _mm512_reduce_add_epi32(counts);
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
  std::vector<uint32_t> sample(kSample), copy;
  const double stride = double(n) / kSample, share = double(k) / double(n);
  const double spread = 4 * std::sqrt(kSample * share * (1 - share)) + 2;
  const int64_t first = int64_t(share * kSample - spread);
  const int64_t last = int64_t(share * kSample + spread);
  for (int64_t i = 0; i < kSample; i++) sample[i] = source[int64_t(double(i) * stride)];
  copy = sample;
  Bracket bracket;
  if (first > 0) bracket.low = threshold_of_buffer(copy.data(), kSample, first).key;
  if (last < kSample) bracket.high = threshold_of_buffer(sample.data(), kSample, last).key;
  return bracket;
}

// The keys of a bracket by chunks, how many each of its bins has, and how many keys lie below it.
// Given up where a chunk has more than an eighth of its keys there.
struct Candidates {
  std::vector<std::vector<uint32_t>> chunks;
  std::vector<int64_t> counts;
  int64_t below = 0;
  bool complete = true;
  bool nan = false;
};

template <class Source>
Candidates candidates_of(Source source, int64_t n, Bracket bracket) {
  const Bins bins(bracket.low, bracket.high);
  std::vector<std::vector<uint32_t>> found(chunks_of(n));
  std::vector<std::atomic<int64_t>> counts(kBins);
  std::atomic<int64_t> below{0};
  std::atomic<bool> crowded{false}, nan{false};
  torch::stable::parallel_for(0, chunks_of(n), 1, [&](int64_t begin, int64_t end) {
    const auto buffer = std::make_unique_for_overwrite<uint32_t[]>(kChunk + 16);
    std::vector<uint32_t> own(kBins, 0);
    int64_t less = 0;
    bool strange = false;
    for (int64_t c = begin; c < end && !crowded.load(std::memory_order_relaxed); c++) {
      const int64_t stop = std::min(n, (c + 1) * kChunk);
      const int64_t count = gather_between(
          source, c * kChunk, stop, bracket.low, bracket.high, buffer.get(), less, strange);
      if (count > kChunk / 8) crowded.store(true, std::memory_order_relaxed);
      found[c].assign(buffer.get(), buffer.get() + count);
      for (int64_t i = 0; i < count; i++) own[bins(buffer[i])]++;
    }
    below += less;
    for (int64_t b = 0; b < kBins; b++) {
      if (own[b]) counts[b].fetch_add(own[b], std::memory_order_relaxed);
    }
    if (strange) nan.store(true, std::memory_order_relaxed);
  });
  return {std::move(found), {counts.begin(), counts.end()}, below, !crowded, nan};
}

// The threshold that drops the `rank` smallest candidates, where there are as many.
inline std::optional<Threshold> threshold_among(
    const Candidates& candidates, Bracket bracket, int64_t rank) {
  const auto& counts = candidates.counts;
  if (rank < 1 || rank > std::accumulate(counts.begin(), counts.end(), int64_t(0))) return {};
  const Bins bins(bracket.low, bracket.high);
  const uint32_t bin = bin_of_rank(counts, rank);
  std::vector<uint32_t> keys;
  keys.reserve(counts[bin]);
  for (const auto& chunk : candidates.chunks) {
    for (const uint32_t key : chunk) {
      if (bins(key) == bin) keys.push_back(key);
    }
  }
  Threshold threshold = threshold_of_buffer(keys.data(), int64_t(keys.size()), rank);
  for (const auto& chunk : candidates.chunks) {
    threshold.equal_per_chunk.push_back(std::count(chunk.begin(), chunk.end(), threshold.key));
  }
  return threshold;
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
  const Bracket bracket = bracket_of(source, n, k);
  const Candidates candidates = candidates_of(source, n, bracket);
  if (candidates.nan || (!candidates.complete && any_nan(source, n))) return std::nullopt;
  std::optional<Threshold> threshold;
  if (candidates.complete) {
    threshold = threshold_among(candidates, bracket, k - candidates.below);
  }
  return threshold ? threshold : threshold_by_counting(source, n, k);
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
  const auto& [key, ties, equal, per_chunk] = *threshold;
  if (ties == equal) return Cut{key, n};
  return cut_at(
      source, per_chunk.empty() ? equal_per_chunk(source, n, key) : per_chunk, key, ties);
}

// Write the mask of [begin, end): `one` is kept, zero goes.
template <class Source, class Out>
void write_mask(Source source, int64_t begin, int64_t end, Cut cut, Out one, Out* mask) {
  const int64_t middle = std::clamp(cut.index, begin, end);
  for (int64_t i = begin; i < middle; i++) mask[i] = source[i] > cut.key ? one : Out(0);
  for (int64_t i = middle; i < end; i++) mask[i] = source[i] >= cut.key ? one : Out(0);
}

}  // namespace fx
