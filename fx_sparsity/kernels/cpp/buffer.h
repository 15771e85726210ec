// Memory for one call, aligned to a cache line, not initialized.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace fx {

constexpr size_t kCacheLine = 64;

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(
            ::operator new(size_t(size) * sizeof(T), std::align_val_t(kCacheLine)))) {}

  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Delete {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(kCacheLine)); }
  };
  std::unique_ptr<T, Delete> data_;
};

}  // namespace fx
