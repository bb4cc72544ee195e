// Memory on cache lines, uninitialised, and sizes of it.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace longcat {

constexpr int64_t kLine = 64;  // bytes that the caches take at once

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// Of rows of so many units of four bytes: an odd number of cache lines, so that they do not meet in one cache set.
inline int64_t odd_pitch(int64_t units) { return (ceil_div(units, kLine / 4) | 1) * (kLine / 4); }

template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(::operator new(size_t(count + 1) * sizeof(T), kAlignment))) {}
    T* data() const { return data_.get(); }

  private:
    static constexpr std::align_val_t kAlignment{size_t(kLine)};
    struct Free {
        void operator()(T* pointer) const { ::operator delete(pointer, kAlignment); }
    };
    std::unique_ptr<T, Free> data_;
};

}  // namespace longcat
