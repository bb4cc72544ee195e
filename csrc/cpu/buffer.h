// Memory on cache lines, uninitialised.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace longcat {

template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t count) : data_(static_cast<T*>(::operator new(size_t(count + 1) * sizeof(T), kLine))) {}
    T* data() const { return data_.get(); }

  private:
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(T* pointer) const { ::operator delete(pointer, kLine); }
    };
    std::unique_ptr<T, Free> data_;
};

}  // namespace longcat
