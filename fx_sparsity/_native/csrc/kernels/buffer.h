// Memory for one call, aligned to a cache line, not initialized.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace fx {

constexpr size_t kCacheLine = 64;

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(size_t(size) * sizeof(T), kAligned))) {}
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() { ::operator delete(data_, kAligned); }

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAligned{kCacheLine};
  T* data_ = nullptr;
};

}  // namespace fx
