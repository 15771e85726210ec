// The storage operators: contiguous CPU tensors in; tensors of the right size written in place.
//
// `x`, `values` and `out` are of one integer dtype. Counts are checked against the sizes given, and
// again while reading, so that bits that change meanwhile, in a mapped file, overrun nothing.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "bits.h"

namespace fx::ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls `work(T{})` with the unsigned integer as wide as the elements of `x`.
template <class Work>
void with_width(const Tensor& x, const Work& work) {
  switch (x.scalar_type()) {
    case ScalarType::Char: return work(uint8_t());
    case ScalarType::Short: return work(uint16_t());
    case ScalarType::Int: return work(uint32_t());
    case ScalarType::Long: return work(uint64_t());
    default: STD_TORCH_CHECK(false, "expected int8, int16, int32 or int64");
  }
}

const uint8_t* bits_of(const Tensor& bits, int64_t elements) {
  STD_TORCH_CHECK(bits.is_contiguous() && bits.is_cpu(), "expected contiguous bits on the CPU");
  STD_TORCH_CHECK(
      bits.scalar_type() == ScalarType::Byte && bits.numel() == (elements + 7) / 8,
      "expected a byte of bits for every eight elements");
  return static_cast<const uint8_t*>(bits.const_data_ptr());
}

void check_plain(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() && x.is_cpu(), "expected a contiguous CPU tensor");
}

// Whether to write `bytes` bytes past the caches.
bool past_cache_for(const void* to, int64_t bytes) {
  return bytes > kCache && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// Writes how many bits are set before each chunk of elements, and in all.
void count_bits(Tensor bits, Tensor counts) {
  check_plain(counts);
  const std::vector<int64_t> starts = starts_of(bits_of(bits, 8 * bits.numel()), 8 * bits.numel());
  STD_TORCH_CHECK(
      counts.scalar_type() == ScalarType::Long && counts.numel() == int64_t(starts.size()),
      "expected room for a count before each chunk, and one in all");
  std::copy(starts.begin(), starts.end(), static_cast<int64_t*>(counts.mutable_data_ptr()));
}

// Sets the bit of every element that is not all zero bits; returns how many.
int64_t find_bits(Tensor x, Tensor bits) {
  check_plain(x);
  const int64_t n = x.numel(), bytes = (n + 7) / 8;
  uint8_t* out = const_cast<uint8_t*>(bits_of(bits, n));
  std::atomic<int64_t> found{0};
  with_width(x, [&]<class T>(T) {
    const T* data = static_cast<const T*>(x.const_data_ptr());
    for_chunks(n, [&](int64_t chunk) {
      const int64_t last = std::min(bytes, (chunk + 1) * 8 * kWords);
      int64_t count = 0;
      for (int64_t byte = chunk * 8 * kWords; byte < last; byte += 8) {
        const uint64_t word = nonzero(data + 8 * byte, std::min(kWord, n - 8 * byte));
        std::memcpy(out + byte, &word, size_t(std::min<int64_t>(8, last - byte)));
        count += std::popcount(word);
      }
      found.fetch_add(count, std::memory_order_relaxed);
    });
  });
  return found;
}

// Writes the elements whose bit is set, in order.
void pack(Tensor x, Tensor bits, Tensor values) {
  check_plain(x);
  check_plain(values);
  const int64_t n = x.numel(), bytes = (n + 7) / 8;
  const uint8_t* from = bits_of(bits, n);
  const std::vector<int64_t> starts = starts_of(from, n);
  STD_TORCH_CHECK(
      x.scalar_type() == values.scalar_type() && starts.back() == values.numel(),
      "expected a value for every bit that is set");
  with_width(x, [&]<class T>(T) {
    const T* data = static_cast<const T*>(x.const_data_ptr());
    T* out = static_cast<T*>(values.mutable_data_ptr());
    for_chunks(n, [&](int64_t chunk) {
      T *to = out + starts[size_t(chunk)], *end = out + starts[size_t(chunk + 1)];
      const int64_t last = std::min((n + 63) / 64, (chunk + 1) * kWords);
      for (int64_t w = chunk * kWords; w < last; w++) {
        const uint64_t word = word_of(from, bytes, w);
        if (std::popcount(word) > end - to) return;
        compress(data + kWord * w, word, to);
        to += std::popcount(word);
      }
    });
  });
}

// Undoes `pack`, given what `count_bits` writes; what has no bit becomes zero. Values beyond the bits
// are ignored.
void unpack(Tensor bits, Tensor counts, Tensor values, Tensor out) {
  check_plain(counts);
  check_plain(values);
  check_plain(out);
  const int64_t n = out.numel(), bytes = (n + 7) / 8;
  const uint8_t* from = bits_of(bits, n);
  STD_TORCH_CHECK(
      counts.scalar_type() == ScalarType::Long && counts.numel() == chunks_of(n) + 1,
      "expected a count before each chunk, and one in all");
  const int64_t* starts = static_cast<const int64_t*>(counts.const_data_ptr());
  STD_TORCH_CHECK(
      out.scalar_type() == values.scalar_type() && starts[0] == 0 &&
          std::is_sorted(starts, starts + counts.numel()) &&
          starts[chunks_of(n)] <= values.numel(),
      "expected a value for every bit that is set");
  with_width(out, [&]<class T>(T) {
    const T* data = static_cast<const T*>(values.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const bool past_cache = past_cache_for(to, n * int64_t(sizeof(T)));
    const T* all = data + values.numel();
    std::atomic<bool> as_counted{true};
    for_chunks(n, [&](int64_t chunk) {
      const T *next = data + starts[chunk], *end = data + starts[chunk + 1];
      const int64_t last = std::min((n + 63) / 64, (chunk + 1) * kWords);
      for (int64_t w = chunk * kWords; w < last; w++) {
        const uint64_t word = word_of(from, bytes, w);
        if (std::popcount(word) > end - next) break;
        expand(next, all - next, word, std::min(kWord, n - kWord * w), past_cache, to + kWord * w);
        next += std::popcount(word);
      }
      if (next != end) as_counted.store(false, std::memory_order_relaxed);
      written();
    });
    STD_TORCH_CHECK(as_counted, "expected as many bits as were counted: the file was changed");
  });
}

// Whether two of every four bits are set, and in what is left of the last byte's, two and no more.
bool two_of_four(Tensor bits, int64_t elements) {
  const uint8_t* from = bits_of(bits, elements);
  const int64_t bytes = (elements + 7) / 8;
  std::atomic<bool> all{true};
  for_chunks(elements, [&](int64_t chunk) {
    const int64_t last = std::min((bytes + 7) / 8, (chunk + 1) * kWords);
    uint64_t wrong = 0;
    for (int64_t w = chunk * kWords; w < last; w++) {
      const uint64_t word = word_of(from, bytes, w);
      const uint64_t pairs = word - ((word >> 1) & 0x5555555555555555);
      const uint64_t fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333);
      const int64_t there = std::min(kWord, elements - kWord * w);
      const uint64_t mask = there == kWord ? ~uint64_t(0) : (uint64_t(1) << there) - 1;
      wrong |= fours ^ (0x2222222222222222 & mask);
    }
    if (wrong) all.store(false, std::memory_order_relaxed);
  });
  return all;
}

struct Matrix {
  int64_t rows, width, h, w;
};

Matrix matrix_of(const Tensor& x, const Tensor& blocks) {
  check_plain(x);
  check_plain(blocks);
  STD_TORCH_CHECK(
      x.dim() == 2 && blocks.dim() == 3 && x.scalar_type() == blocks.scalar_type() &&
          blocks.size(1) > 0 && blocks.size(2) > 0 && x.size(0) % blocks.size(1) == 0 &&
          x.size(1) % blocks.size(2) == 0,
      "expected a matrix, and blocks that divide it");
  return {x.size(0), x.size(1), blocks.size(1), blocks.size(2)};
}

// How many of the bits [begin, end) are set.
int64_t count_between(const uint8_t* bits, int64_t begin, int64_t end) {
  int64_t count = 0;
  while (begin < end) {
    if (begin % kWord == 0 && end - begin >= kWord) {
      count += std::popcount(word_of(bits, end / 8, begin / kWord));
      begin += kWord;
    } else {
      count += (bits[begin / 8] >> (begin % 8)) & 1;
      begin++;
    }
  }
  return count;
}

// Where the blocks of each row of blocks start; the last entry is how many there are in all.
std::vector<int64_t> block_starts(const uint8_t* bits, int64_t down, int64_t across) {
  std::vector<int64_t> starts(size_t(down + 1), 0);
  for (int64_t r = 0; r < down; r++) {
    starts[size_t(r + 1)] =
        starts[size_t(r)] + count_between(bits, r * across, (r + 1) * across);
  }
  return starts;
}

// Calls `work(row of blocks, places)` for every row of blocks, in parallel. `places` has the number
// of each block among those whose bit is set, or -1.
template <class Work>
void for_block_rows(const Tensor& bits, const Matrix& m, int64_t blocks, const Work& work) {
  const int64_t down = m.rows / m.h, across = m.width / m.w;
  const uint8_t* from = bits_of(bits, down * across);
  const std::vector<int64_t> starts = block_starts(from, down, across);
  STD_TORCH_CHECK(starts.back() == blocks, "expected a block for every bit that is set");
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, m.h * m.width));
  torch::stable::parallel_for(0, down, grain, [&](int64_t first, int64_t last) {
    std::vector<int64_t> places(size_t(across), -1);
    for (int64_t r = first; r < last; r++) {
      int64_t next = starts[size_t(r)];
      for (int64_t c = 0; c < across; c++) {
        const int64_t i = r * across + c;
        const bool has = ((from[i / 8] >> (i % 8)) & 1) && next < starts[size_t(r + 1)];
        places[size_t(c)] = has ? next++ : -1;
      }
      work(r, places);
    }
  });
}

// Copies the blocks [n, h, w] out of the matrix `x` whose bit is set.
void gather_blocks(Tensor x, Tensor bits, Tensor blocks) {
  const Matrix m = matrix_of(x, blocks);
  with_width(x, [&]<class T>(T) {
    const T* data = static_cast<const T*>(x.const_data_ptr());
    T* out = static_cast<T*>(blocks.mutable_data_ptr());
    for_block_rows(bits, m, blocks.size(0), [&](int64_t r, const std::vector<int64_t>& places) {
      for (int64_t i = 0; i < m.h; i++) {
        const T* row = data + (r * m.h + i) * m.width;
        for (const int64_t place : places) {
          if (place >= 0) std::copy_n(row, m.w, out + (place * m.h + i) * m.w);
          row += m.w;
        }
      }
    });
  });
}

// Calls `work(size)` with `bytes` as a number that the compiler knows, if it is a small power of two,
// and as it is otherwise.
template <class Work>
void with_small(int64_t bytes, const Work& work) {
  switch (bytes) {
    case 2: return work(std::integral_constant<int64_t, 2>());
    case 4: return work(std::integral_constant<int64_t, 4>());
    case 8: return work(std::integral_constant<int64_t, 8>());
    case 16: return work(std::integral_constant<int64_t, 16>());
    case 32: return work(std::integral_constant<int64_t, 32>());
    default: return work(bytes);
  }
}

// Undoes `gather_blocks`; what belongs to no block becomes zero. Blocks whose rows are whole cache
// lines are written one after another, as they are read; of others, row by row of `out` is put
// together first.
void scatter_blocks(Tensor bits, Tensor blocks, Tensor out) {
  const Matrix m = matrix_of(out, blocks);
  const int64_t size = out.element_size(), piece = m.w * size, width = m.width * size;
  const char* data = static_cast<const char*>(blocks.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const bool past_cache = past_cache_for(to, m.rows * width);
  for_block_rows(bits, m, blocks.size(0), [&](int64_t r, const std::vector<int64_t>& places) {
    char* row = to + r * m.h * width;
    if (piece % 64 == 0) {
      for (const int64_t place : places) {
        for (int64_t i = 0; i < m.h; i++) {
          const char* from = place < 0 ? nullptr : data + (place * m.h + i) * piece;
          copy(from, piece, past_cache, row + i * width);
        }
        row += piece;
      }
    } else {
      std::vector<char> line(size_t(width), 0);
      with_small(piece, [&](auto bytes) {
        for (int64_t i = 0; i < m.h; i++, row += width) {
          char* next = line.data();
          for (const int64_t place : places) {
            if (place < 0) {
              std::memset(next, 0, size_t(bytes));
            } else {
              std::memcpy(next, data + (place * m.h + i) * bytes, size_t(bytes));
            }
            next += bytes;
          }
          copy(line.data(), width, past_cache, row);
        }
      });
    }
    written();
  });
}

// Clears the elements of `x` that are not to be kept; returns how many are.
int64_t keep_only(Tensor x, Tensor keep) {
  check_plain(x);
  check_plain(keep);
  STD_TORCH_CHECK(
      keep.scalar_type() == ScalarType::Bool && keep.numel() == x.numel(),
      "expected a boolean for every element");
  const uint8_t* from = static_cast<const uint8_t*>(keep.const_data_ptr());
  std::atomic<int64_t> kept{0};
  with_width(x, [&]<class T>(T) {
    T* data = static_cast<T*>(x.mutable_data_ptr());
    for_chunks(x.numel(), [&](int64_t chunk) {
      const int64_t last = std::min(x.numel(), (chunk + 1) * kWord * kWords);
      int64_t count = 0;
      for (int64_t i = chunk * kWord * kWords; i < last; i++) {
        data[i] &= T(-T(from[i]));
        count += from[i];
      }
      kept.fetch_add(count, std::memory_order_relaxed);
    });
  });
  return kept;
}

// Copies a tensor.
void copy_tensor(Tensor x, Tensor out) {
  check_plain(x);
  check_plain(out);
  const int64_t bytes = x.numel() * x.element_size();
  STD_TORCH_CHECK(bytes == out.numel() * out.element_size(), "expected tensors of one size");
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const bool past_cache = past_cache_for(to, bytes);
  for_chunks(bytes, [&](int64_t chunk) {
    const int64_t start = chunk * kWord * kWords;
    copy(from + start, std::min(kWord * kWords, bytes - start), past_cache, to + start);
    written();
  });
}

}  // namespace
}  // namespace fx::ops

STABLE_TORCH_LIBRARY(fx_sparsity_storage, m) {
  m.def("count_bits(Tensor bits, Tensor(a!) counts) -> ()");
  m.def("find_bits(Tensor x, Tensor(a!) bits) -> int");
  m.def("pack(Tensor x, Tensor bits, Tensor(a!) values) -> ()");
  m.def("unpack(Tensor bits, Tensor counts, Tensor values, Tensor(a!) out) -> ()");
  m.def("two_of_four(Tensor bits, int elements) -> bool");
  m.def("gather_blocks(Tensor x, Tensor bits, Tensor(a!) blocks) -> ()");
  m.def("scatter_blocks(Tensor bits, Tensor blocks, Tensor(a!) out) -> ()");
  m.def("keep_only(Tensor(a!) x, Tensor keep) -> int");
  m.def("copy(Tensor x, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fx_sparsity_storage, CPU, m) {
  m.impl("count_bits", TORCH_BOX(&fx::ops::count_bits));
  m.impl("find_bits", TORCH_BOX(&fx::ops::find_bits));
  m.impl("pack", TORCH_BOX(&fx::ops::pack));
  m.impl("unpack", TORCH_BOX(&fx::ops::unpack));
  m.impl("two_of_four", TORCH_BOX(&fx::ops::two_of_four));
  m.impl("gather_blocks", TORCH_BOX(&fx::ops::gather_blocks));
  m.impl("scatter_blocks", TORCH_BOX(&fx::ops::scatter_blocks));
  m.impl("keep_only", TORCH_BOX(&fx::ops::keep_only));
  m.impl("copy", TORCH_BOX(&fx::ops::copy_tensor));
}
