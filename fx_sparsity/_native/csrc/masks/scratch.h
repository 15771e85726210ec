// Memory that lives as long as a call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fx {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Scratch = std::unique_ptr<T[], Free>;

// Asks the system for large pages where memory that nobody wrote yet covers them: that it makes small
// ones, and clears each, would take longer than to write all of it. Advice: without it all works.
inline void prefer_large_pages(void* memory, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (at + kPage - 1) / kPage * kPage, last = (at + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// `n` values, of any content.
template <class T>
Scratch<T> scratch(int64_t n) {
  constexpr size_t kPage = 2 << 20;
  const size_t bytes = size_t(n) * sizeof(T);
  void* memory;
  if (bytes < kPage) {
    memory = std::malloc(bytes ? bytes : 1);
  } else {
    const size_t whole = (bytes + kPage - 1) / kPage * kPage;
    memory = std::aligned_alloc(kPage, whole);
    prefer_large_pages(memory, whole);
  }
  if (!memory) throw std::bad_alloc();
  return Scratch<T>(static_cast<T*>(memory));
}

}  // namespace fx
