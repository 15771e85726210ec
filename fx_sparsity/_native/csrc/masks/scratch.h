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

// `n` values, of any content. Where there is much, the system is asked for large pages: that it
// makes small ones, and clears each, would take longer than to write all of it.
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
#ifdef __linux__
    if (memory) madvise(memory, whole, MADV_HUGEPAGE);  // advice: without it all works as well
#endif
  }
  if (!memory) throw std::bad_alloc();
  return Scratch<T>(static_cast<T*>(memory));
}

}  // namespace fx
