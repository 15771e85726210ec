// Exact selection of the k smallest of many keys, lowest index first among equals.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "bits.h"

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
    for_each_run(source, begin * kChunk, last, [&](const uint32_t* keys, int64_t, int64_t count) {
      if (prefix < 0) {
        for (int64_t i = 0; i < count; i++) own[keys[i] >> 16]++;
      } else {
        for (int64_t i = 0; i < count; i++) {
          if (keys[i] >> 16 == prefix) own[keys[i] & 0xffff]++;
        }
      }
    });
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

// Whether one of the keys [begin, end) is that of a NaN.
template <class Source>
bool has_nan(Source source, int64_t begin, int64_t end) {
  constexpr uint32_t least = Source::kLeast, span = Source::kMost - least;
  if (span == UINT32_MAX) return false;
  uint32_t nan = 0;
  for_each_run(source, begin, end, [&](const uint32_t* keys, int64_t, int64_t count) {
    for (int64_t i = 0; i < count; i++) nan |= keys[i] - least > span;
  });
  return nan != 0;
}

template <class Source>
bool any_nan(Source source, int64_t n) {
  std::atomic<bool> found{false};
  torch::stable::parallel_for(0, chunks_of(n), 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(n, end * kChunk);
    if (has_nan(source, begin * kChunk, last)) found.store(true, std::memory_order_relaxed);
  });
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

// What sorts keys by a bracket, a chunk at a time: into bits of those that do not lie below it, and
// bits of those inside it, whose keys it gathers.
class Sorter {
 public:
  explicit Sorter(Bracket bracket) : bracket_(bracket) {}

  template <class Source>
  std::vector<uint32_t> sort(
      Source source, int64_t begin, int64_t end, uint64_t* kept, uint64_t* inside) {
    constexpr uint32_t least = Source::kLeast, span = Source::kMost - least;
    const auto [low, high] = bracket_;
    uint32_t* keys = keys_.get();
    int64_t found = 0, i = begin;
    uint32_t farthest = 0;
#if FX_AVX512
    const __m512i lows = _mm512_set1_epi32(int32_t(low)), highs = _mm512_set1_epi32(int32_t(high));
    const __m512i leasts = _mm512_set1_epi32(int32_t(least));
    __m512i most = _mm512_setzero_si512();
    for (; i + 64 <= end; i += 64) {
      uint64_t from_low = 0, to_high = 0;
      for (int part = 0; part < 64; part += 16) {
        const __m512i own = source.sixteen(i + part);
        most = _mm512_max_epu32(most, _mm512_sub_epi32(own, leasts));
        const __mmask16 above = _mm512_cmpge_epu32_mask(own, lows);
        const __mmask16 in = _mm512_mask_cmple_epu32_mask(above, own, highs);
        _mm512_storeu_si512(keys + found, _mm512_maskz_compress_epi32(in, own));
        found += __builtin_popcount(in);
        from_low |= uint64_t(above) << part;
        to_high |= uint64_t(in) << part;
      }
      kept[(i - begin) / 64] = from_low;
      inside[(i - begin) / 64] = to_high;
    }
    farthest = _mm512_reduce_max_epu32(most);
#endif
    for (; i < end; i += 64) {
      uint8_t from_low[64] = {}, in[64] = {};
      for (int64_t j = 0; j < std::min<int64_t>(64, end - i); j++) {
        const uint32_t key = source[i + j];
        farthest = std::max(farthest, key - least);
        from_low[j] = key >= low;
        in[j] = key - low <= high - low;
        keys[found] = key;
        found += in[j];
      }
      kept[(i - begin) / 64] = bits_of_bytes(from_low);
      inside[(i - begin) / 64] = bits_of_bytes(in);
    }
    nan |= farthest > span;
    return {keys, keys + found};
  }

  bool nan = false;

 private:
  static constexpr int64_t kRoom = kChunk + 16;  // a register is stored whole
  Bracket bracket_;
  std::unique_ptr<uint32_t[]> keys_ = std::make_unique_for_overwrite<uint32_t[]>(kRoom);
};

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
Candidates candidates_of(Source source, int64_t n, Bracket bracket, Bits& kept, Bits& inside) {
  const Bins bins(bracket.low, bracket.high);
  std::vector<std::vector<uint32_t>> found(chunks_of(n));
  std::vector<std::atomic<int64_t>> counts(kBins);
  std::atomic<int64_t> below{0};
  std::atomic<bool> crowded{false}, nan{false};
  torch::stable::parallel_for(0, chunks_of(n), 1, [&](int64_t begin, int64_t end) {
    Sorter sorter(bracket);
    std::vector<uint32_t> own(kBins, 0);
    int64_t less = 0;
    for (int64_t c = begin; c < end && !crowded.load(std::memory_order_relaxed); c++) {
      const int64_t first = c * kChunk, last = std::min(n, first + kChunk);
      const uint64_t* words = kept.words(first);
      found[c] = sorter.sort(source, first, last, kept.words(first), inside.words(first));
      if (int64_t(found[c].size()) > kChunk / 8) crowded.store(true, std::memory_order_relaxed);
      less += last - first;
      for (int64_t w = 0; w < (last - first + 63) / 64; w++) less -= std::popcount(words[w]);
      for (const uint32_t key : found[c]) own[bins(key)]++;
    }
    below += less;
    for (int64_t b = 0; b < kBins; b++) {
      if (own[b]) counts[b].fetch_add(own[b], std::memory_order_relaxed);
    }
    if (sorter.nan) nan.store(true, std::memory_order_relaxed);
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
    const auto equal = std::count(chunk.begin(), chunk.end(), threshold.key);
    threshold.equal_per_chunk.push_back(equal);
  }
  return threshold;
}

// How many keys of each chunk equal `key`.
template <class Source>
std::vector<int64_t> equal_per_chunk(Source source, int64_t n, uint32_t key) {
  std::vector<int64_t> counts(chunks_of(n));
  torch::stable::parallel_for(0, chunks_of(n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      uint32_t equal = 0;
      const int64_t first = c * kChunk, last = std::min(n, first + kChunk);
      for_each_run(source, first, last, [&](const uint32_t* keys, int64_t, int64_t count) {
        for (int64_t i = 0; i < count; i++) equal += keys[i] == key;
      });
      counts[c] = equal;
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

template <class Source>
Cut cut_of(Source source, int64_t n, const Threshold& threshold) {
  const auto& [key, ties, equal, per_chunk] = threshold;
  if (ties == equal) return {key, n};
  return cut_at(
      source, per_chunk.empty() ? equal_per_chunk(source, n, key) : per_chunk, key, ties);
}

// A bit for each of `n` keys, set where a cut leaves it.
template <class Source>
Bits kept_by(Source source, int64_t n, Cut cut) {
  Bits bits(n);
  torch::stable::parallel_for(0, chunks_of(n), 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(n, end * kChunk);
    const auto work = [&](const uint32_t* keys, int64_t at, int64_t count) {
      for (int64_t i = 0; i < count; i += 64) {
        uint8_t kept[64] = {};
        const int64_t some = std::min<int64_t>(64, count - i);
        const int64_t middle = std::clamp<int64_t>(cut.index - at - i, 0, some);
        for (int64_t j = 0; j < middle; j++) kept[j] = keys[i + j] > cut.key;
        for (int64_t j = middle; j < some; j++) kept[j] = keys[i + j] >= cut.key;
        *bits.words(at + i) = bits_of_bytes(kept);
      }
    };
    for_each_run(source, begin * kChunk, last, work);
  });
  return bits;
}

// The first bits of `bits` at the places where `places` are set.
inline uint64_t deposit(uint64_t bits, uint64_t places) {
#ifdef __BMI2__
  return _pdep_u64(bits, places);
#else
  uint64_t found = 0;
  for (; places; places &= places - 1, bits >>= 1) {
    if (bits & 1) found |= places & -places;
  }
  return found;
#endif
}

// Which of `count` <= 64 keys lie below `key`, and which equal it.
struct Order {
  uint64_t below = 0, equal = 0;

  Order(const uint32_t* keys, int64_t count, uint32_t key) {
    int64_t i = 0;
#if FX_AVX512
    const __m512i limit = _mm512_set1_epi32(int32_t(key));
    do {
      const __mmask16 some = _bzhi_u32(0xffff, uint32_t(count - i));
      const __m512i own = _mm512_maskz_loadu_epi32(some, keys + i);
      below |= uint64_t(_mm512_mask_cmplt_epu32_mask(some, own, limit)) << i;
      equal |= uint64_t(_mm512_mask_cmpeq_epu32_mask(some, own, limit)) << i;
      i += 16;
    } while (i < count);  // hardly ever
#else
    for (; i < count; i++) {
      below |= uint64_t(keys[i] < key) << i;
      equal |= uint64_t(keys[i] == key) << i;
    }
#endif
  }
};

// Clears the bits in `kept` of the candidates, those `inside`, that a cut drops.
inline void drop_candidates(
    const std::vector<std::vector<uint32_t>>& chunks, int64_t n, Cut cut, Bits& inside,
    Bits& kept) {
  torch::stable::parallel_for(0, chunks_of(n), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      const uint32_t* keys = chunks[c].data();
      const int64_t last = std::min(n, (c + 1) * kChunk);
      for (int64_t i = c * kChunk; i < last; i += 64) {
        const uint64_t places = *inside.words(i);
        const int64_t count = std::popcount(places);
        const int64_t early = std::clamp<int64_t>(cut.index - i, 0, 64);
        const uint64_t before = early == 64 ? ~0ull : (1ull << early) - 1;
        const Order order(keys, count, cut.key);
        *kept.words(i) &= ~(deposit(order.below, places) | (deposit(order.equal, places) & before));
        keys += count;
      }
    }
  });
}

// A bit for each of `n` keys: cleared for the `k` smallest. Nothing where one is that of a NaN.
//
// A sample brackets the threshold, and one pass tells what lies below the bracket, and gathers what
// lies inside. Where it misses, or holds too much (ties), keys are counted.
template <class Source>
std::optional<Bits> keep_largest(Source source, int64_t n, int64_t k) {
  if (k <= 0 || k >= n) {
    if (any_nan(source, n)) return std::nullopt;
    return kept_by(source, n, k <= 0 ? Cut{0, 0} : Cut{UINT32_MAX, n});
  }
  if (n <= 4 * kSample) {
    if (any_nan(source, n)) return std::nullopt;
    std::vector<uint32_t> all(n);
    for (int64_t i = 0; i < n; i++) all[i] = source[i];
    return kept_by(source, n, cut_of(source, n, threshold_of_buffer(all.data(), n, k)));
  }
  const Bracket bracket = bracket_of(source, n, k);
  Bits kept(n), inside(n);
  const Candidates candidates = candidates_of(source, n, bracket, kept, inside);
  if (candidates.nan || (!candidates.complete && any_nan(source, n))) return std::nullopt;
  if (candidates.complete) {
    if (const auto threshold = threshold_among(candidates, bracket, k - candidates.below)) {
      drop_candidates(candidates.chunks, n, cut_of(source, n, *threshold), inside, kept);
      return kept;
    }
  }
  return kept_by(source, n, cut_of(source, n, threshold_by_counting(source, n, k)));
}

}  // namespace fx
