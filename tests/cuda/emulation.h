// Runs device code on the CPU: a fiber for each CUDA thread of one block, blocks one after the other; of a cooperative
// launch, all blocks at once. A thread runs until it waits at a barrier, so that a missing barrier shows as a wrong
// result, always the same one; a barrier that not all threads reach is an error. Asynchronous copies happen as late as
// they may: when waited for.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/queue.h"

namespace longcat::cuda {

using Kernel = std::function<void(const void* params)>;

// Every block of the grid, each thread calling `body`.
void emulate(const Launch& launch, const std::function<void()>& body);

class EmulatedQueue : public Queue {
  public:
    EmulatedQueue(const std::map<std::string, Kernel>& kernels, int multiprocessors)
        : kernels_(kernels), multiprocessors_(multiprocessors) {}

    Device device() const override { return {multiprocessors_, 0, 0}; }  // of the oldest kind: the plain kernels
    void zero(void* memory, size_t bytes) override { std::memset(memory, 0, bytes); }
    TensorMap tensor_map(const void*, int64_t, int64_t, int) override { return {}; }

  protected:
    void start(const Launch& launch, const void* params) override {
        const Kernel& kernel = kernels_.at(launch.kernel);
        emulate(launch, [&] { kernel(params); });
    }

  private:
    const std::map<std::string, Kernel>& kernels_;
    int multiprocessors_;
};

}  // namespace longcat::cuda
