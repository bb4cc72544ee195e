// What a launcher needs of a device: kernels by name, in the order of a stream. The driver is one such queue, the
// tests' emulation another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/rvq_params.cuh"
#include "longcat/check.h"

namespace longcat::cuda {

struct Device {
    int multiprocessors, major, minor;  // compute capability
};

struct Launch {
    const char* kernel;
    unsigned x, y = 1;  // grid
    unsigned threads = 0, shared_bytes = 0;
    unsigned cluster = 0;  // blocks, where the kernel's source does not fix it
    bool cooperative = false;
};

class Queue {
  public:
    virtual ~Queue() = default;
    virtual Device device() const = 0;
    virtual void zero(void* memory, size_t bytes) = 0;

    // A row-major float16 matrix, copied in boxes of `box_rows` rows and 64 columns with the 128-byte swizzle.
    virtual TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int box_rows) = 0;

    // A kernel's one parameter is a struct.
    template <class Params>
    void run(const Launch& launch, const Params& params) {
        if (launch.x != 0 && launch.y != 0) start(launch, &params);
    }

  protected:
    virtual void start(const Launch& launch, const void* params) = 0;
};

// Hands out aligned pieces of a workspace; from null it only counts.
class Arena {
  public:
    explicit Arena(void* base) : next_(reinterpret_cast<uintptr_t>(base)), base_(next_) {}

    template <class T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(next_);
        next_ += (uintptr_t(count) * sizeof(T) + 255) / 256 * 256;
        return piece;
    }

    int64_t used() const { return int64_t(next_ - base_); }

  private:
    uintptr_t next_, base_;
};

inline unsigned blocks_of(int64_t count, int64_t size) {
    const int64_t blocks = (count + size - 1) / size;
    LC_CHECK(blocks < (int64_t(1) << 31), "cuda: a grid must have fewer than 2^31 blocks");
    return unsigned(blocks);
}

}  // namespace longcat::cuda
