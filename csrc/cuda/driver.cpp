#include "cuda/driver.h"

#include <dlfcn.h>

#include <stdexcept>

#include "cuda/driver_api.h"

namespace longcat::cuda {
namespace {

using api::Driver;

struct Loaded {
    Driver driver{};
    std::string why_not;
};

template <class Function>
void find(void* library, const char* name, Function& function, std::string& why_not) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr && why_not.empty())
        why_not = std::string("the NVIDIA driver is too old: it has no ") + name;
}

Loaded load() {
    Loaded loaded;
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        loaded.why_not = "no NVIDIA driver is installed (libcuda.so.1)";
        return loaded;
    }
    Driver& d = loaded.driver;
#define LC_FIND(name) find(library, #name, d.name, loaded.why_not)
    LC_FIND(cuInit), LC_FIND(cuGetErrorName), LC_FIND(cuGetErrorString), LC_FIND(cuDeviceGetCount);
    LC_FIND(cuDeviceGet), LC_FIND(cuDeviceGetAttribute), LC_FIND(cuDevicePrimaryCtxRetain);
    LC_FIND(cuCtxPushCurrent_v2), LC_FIND(cuCtxPopCurrent_v2), LC_FIND(cuModuleLoadData), LC_FIND(cuModuleUnload);
    LC_FIND(cuModuleGetFunction), LC_FIND(cuFuncSetAttribute), LC_FIND(cuLaunchKernelEx), LC_FIND(cuMemsetD8Async);
    LC_FIND(cuTensorMapEncodeTiled);
#undef LC_FIND
    if (!loaded.why_not.empty()) return loaded;
    int count = 0;
    const bool works = d.cuInit(0) == 0 && d.cuDeviceGetCount(&count) == 0 && count > 0;
    if (!works) loaded.why_not = "the NVIDIA driver finds no GPU";
    return loaded;
}

const Loaded& loaded() {
    static const Loaded once = load();
    return once;
}

const Driver& driver() {
    if (!loaded().why_not.empty()) throw std::runtime_error("longcat_kernels: " + loaded().why_not);
    return loaded().driver;
}

void check(int result, const std::string& doing) {
    if (result == 0) return;
    const char *name = nullptr, *text = nullptr;
    driver().cuGetErrorName(result, &name);
    driver().cuGetErrorString(result, &text);
    throw std::runtime_error(doing + ": " + (name != nullptr ? name : "CUDA error " + std::to_string(result)) + " (" +
                             (text != nullptr ? text : "unknown") + ")");
}

int attribute(int which, int device) {
    int value = 0;
    check(driver().cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
    return value;
}

// The thread's current context for the length of a scope.
class Current {
  public:
    explicit Current(void* context) { check(driver().cuCtxPushCurrent_v2(context), "cuCtxPushCurrent"); }
    ~Current() {
        void* before = nullptr;
        driver().cuCtxPopCurrent_v2(&before);
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
};

}  // namespace

std::string why_not_driver() { return loaded().why_not; }

Module::Module(std::string op, const std::string& cubin, int device_index) : op_(std::move(op)) {
    int device = 0;
    check(driver().cuDeviceGet(&device, device_index), op_ + ": device " + std::to_string(device_index));
    device_ = {attribute(api::kMultiprocessors, device), attribute(api::kMajor, device),
               attribute(api::kMinor, device)};
    // Torch uses the primary context and keeps it for the life of the process: so may we, without a release.
    check(driver().cuDevicePrimaryCtxRetain(&context_, device), op_ + ": cuDevicePrimaryCtxRetain");
    const Current current(context_);
    check(driver().cuModuleLoadData(&module_, cubin.data()), op_ + ": cuModuleLoadData");
}

Module::~Module() {
    // At the end of a process the driver may be gone already; its errors mean nothing then.
    void* before = nullptr;
    if (module_ == nullptr || driver().cuCtxPushCurrent_v2(context_) != 0) return;
    driver().cuModuleUnload(module_);
    driver().cuCtxPopCurrent_v2(&before);
}

void* Module::kernel(const Launch& launch) {
    void*& function = kernels_[launch.kernel];
    if (function != nullptr) return function;
    void* found = nullptr;
    check(driver().cuModuleGetFunction(&found, module_, launch.kernel), op_ + ": " + launch.kernel);
    if (launch.shared_bytes > 48 * 1024)
        check(driver().cuFuncSetAttribute(found, api::kMaxDynamicShared, int(launch.shared_bytes)),
              op_ + ": shared memory of " + launch.kernel);
    return function = found;
}

DriverQueue::DriverQueue(Module& module, uintptr_t stream) : module_(module), stream_(reinterpret_cast<void*>(stream)) {
    check(driver().cuCtxPushCurrent_v2(module_.context_), module_.op_ + ": cuCtxPushCurrent");
}

DriverQueue::~DriverQueue() {
    void* before = nullptr;
    driver().cuCtxPopCurrent_v2(&before);
}

void DriverQueue::start(const Launch& launch, const void* params) {
    api::LaunchAttribute attributes[2] = {};
    api::LaunchConfig config = {};
    config.grid[0] = launch.x, config.grid[1] = launch.y, config.grid[2] = 1;
    config.block[0] = launch.threads, config.block[1] = 1, config.block[2] = 1;
    config.shared_bytes = launch.shared_bytes, config.stream = stream_, config.attributes = attributes;
    if (launch.cluster > 0) {
        api::LaunchAttribute& cluster = attributes[config.attribute_count++];
        cluster.id = api::kClusterDimension;
        cluster.value.cluster[0] = launch.cluster, cluster.value.cluster[1] = 1, cluster.value.cluster[2] = 1;
    }
    if (launch.cooperative) {
        api::LaunchAttribute& cooperative = attributes[config.attribute_count++];
        cooperative.id = api::kCooperative, cooperative.value.cooperative = 1;
    }
    void* arguments[] = {const_cast<void*>(params)};
    check(driver().cuLaunchKernelEx(&config, module_.kernel(launch), arguments, nullptr),
          module_.op_ + ": " + launch.kernel);
}

void DriverQueue::zero(void* memory, size_t bytes) {
    check(driver().cuMemsetD8Async(reinterpret_cast<uintptr_t>(memory), 0, bytes, stream_),
          module_.op_ + ": cuMemsetD8Async");
}

TensorMap DriverQueue::tensor_map(const void* matrix, int64_t rows, int64_t columns, int box_rows) {
    TensorMap map = {};
    const uint64_t sides[2] = {uint64_t(columns), uint64_t(rows)}, stride[1] = {uint64_t(columns) * 2};
    const uint32_t box[2] = {64, uint32_t(box_rows)}, steps[2] = {1, 1};
    check(driver().cuTensorMapEncodeTiled(&map, api::kTensorFloat16, 2, const_cast<void*>(matrix), sides, stride, box,
                                          steps, api::kInterleaveNone, api::kSwizzle128, api::kPromotion256,
                                          api::kFillZero),
          module_.op_ + ": cuTensorMapEncodeTiled");
    return map;
}

}  // namespace longcat::cuda
