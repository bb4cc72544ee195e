// The CUDA driver, loaded when first used: a machine without it, and a build without a CUDA toolkit, are fine.
#pragma once

#include <string>
#include <unordered_map>

#include "cuda/queue.h"

namespace longcat::cuda {

// Why no kernel can run here; empty where one can.
std::string why_not_driver();

// The kernels of a cubin on one device. Loading it and its kernels is all that it keeps.
class Module {
  public:
    Module(std::string op, const std::string& cubin, int device_index);
    ~Module();
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;

  private:
    friend class DriverQueue;
    void* kernel(const Launch& launch);

    std::string op_;
    void *context_ = nullptr, *module_ = nullptr;
    Device device_{};
    std::unordered_map<std::string, void*> kernels_;
};

class DriverQueue : public Queue {
  public:
    // Its calls go to `stream` of the module's device, whatever the thread's current device is.
    DriverQueue(Module& module, uintptr_t stream);
    ~DriverQueue() override;

    Device device() const override { return module_.device_; }
    void zero(void* memory, size_t bytes) override;
    TensorMap tensor_map(const void* matrix, int64_t rows, int64_t columns, int box_rows) override;

  protected:
    void start(const Launch& launch, const void* params) override;

  private:
    Module& module_;
    void* stream_;
};

}  // namespace longcat::cuda
