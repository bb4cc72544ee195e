// A libcuda.so.1 without a GPU, for tests: device memory is the host's, plain kernels run emulated, and every launch is
// written down, as is every call. What the real driver would refuse, it refuses.
#include <sstream>

#include "cuda/driver_api.h"
#include "kernels.h"

namespace {

using namespace longcat::cuda;

struct Function {
    std::string name;
    int shared_bytes = 48 * 1024;
};

int multiprocessors = 4, major = 7;
bool runs_kernels = true;
int depth = 0;  // of contexts pushed
std::string log_text, calls_text;
std::map<std::string, Function> functions;

void note(const char* call) { calls_text += std::string(call) + "\n"; }

void note(const char* call, const void* stream) {
    calls_text += std::string(call) + " on " + std::to_string(reinterpret_cast<uintptr_t>(stream)) + "\n";
}

constexpr int kInvalidValue = 1, kInvalidContext = 201, kInvalidImage = 200;

}  // namespace

extern "C" {

// The device to be: kernels of newer ones than the emulation has are only written down.
void fake_device(int sm_count, int compute_major) {
    multiprocessors = sm_count, major = compute_major, runs_kernels = compute_major < 8, log_text.clear();
    calls_text.clear();
}

const char* fake_log() { return log_text.c_str(); }
const char* fake_calls() { return calls_text.c_str(); }  // every function of the driver, in order
int fake_depth() { return depth; }

int cuInit(unsigned) {
    note("cuInit");
    return 0;
}

int cuGetErrorName(int error, const char** name) {
    note("cuGetErrorName");
    *name = error == kInvalidImage ? "CUDA_ERROR_INVALID_IMAGE" : "CUDA_ERROR_INVALID_VALUE";
    return 0;
}

int cuGetErrorString(int error, const char** text) {
    note("cuGetErrorString");
    *text = error == kInvalidImage ? "device kernel image is invalid" : "invalid argument";
    return 0;
}

int cuDeviceGetCount(int* count) {
    note("cuDeviceGetCount");
    return *count = 1, 0;
}

int cuDeviceGet(int* device, int index) {
    note("cuDeviceGet");
    return *device = index, index == 0 ? 0 : kInvalidValue;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    note("cuDeviceGetAttribute");
    *value = attribute == api::kMultiprocessors ? multiprocessors : attribute == api::kMajor ? major : 0;
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    note("cuDevicePrimaryCtxRetain");
    return *context = &multiprocessors, 0;
}

int cuCtxPushCurrent_v2(void* context) {
    note("cuCtxPushCurrent_v2");
    return ++depth, context == &multiprocessors ? 0 : kInvalidContext;
}

int cuCtxPopCurrent_v2(void** context) {
    note("cuCtxPopCurrent_v2");
    return --depth, *context = &multiprocessors, 0;
}

int cuModuleLoadData(void** module, const void* image) {
    note("cuModuleLoadData");
    *module = &functions;
    return std::memcmp(image, "cubin", 5) == 0 ? 0 : kInvalidImage;
}

int cuModuleUnload(void*) {
    note("cuModuleUnload");
    return 0;
}

int cuModuleGetFunction(void** function, void*, const char* name) {
    note("cuModuleGetFunction");
    functions[name].name = name;
    *function = &functions[name];
    return 0;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    note("cuFuncSetAttribute");
    if (attribute != api::kMaxDynamicShared || value > 227 * 1024) return kInvalidValue;
    return static_cast<Function*>(function)->shared_bytes = value, 0;
}

int cuLaunchKernelEx(const api::LaunchConfig* config, void* function, void** arguments, void**) {
    note("cuLaunchKernelEx", config->stream);
    const Function& known = *static_cast<Function*>(function);
    std::ostringstream line;
    line << known.name << " " << config->grid[0] << "x" << config->grid[1] << " of " << config->block[0] << ", "
         << config->shared_bytes << " bytes, stream " << reinterpret_cast<uintptr_t>(config->stream) << "\n";
    log_text += line.str();
    if (depth != 1 || config->grid[0] == 0 || config->grid[1] == 0 || config->grid[2] != 1 ||
        int(config->shared_bytes) > known.shared_bytes || config->block[0] * config->block[1] > 1024)
        return kInvalidValue;
    if (!runs_kernels) return 0;
    const auto kernel = emulated_kernels().find(known.name);
    if (kernel == emulated_kernels().end()) return kInvalidValue;
    Launch launch = {known.name.c_str(), config->grid[0], config->grid[1], config->block[0], config->shared_bytes};
    for (unsigned i = 0; i < config->attribute_count; ++i)
        launch.cooperative |= config->attributes[i].id == api::kCooperative && config->attributes[i].value.cooperative;
    emulate(launch, [&] { kernel->second(arguments[0]); });
    return 0;
}

int cuMemsetD8Async(unsigned long long address, unsigned char value, size_t bytes, void* stream) {
    note("cuMemsetD8Async", stream);
    if (runs_kernels) std::memset(reinterpret_cast<void*>(address), value, bytes);
    return 0;
}

// The rules of the driver's manual for a float16 matrix with the 128-byte swizzle.
int cuTensorMapEncodeTiled(void*, int type, uint32_t rank, void* address, const uint64_t* sides,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                           int swizzle, int, int fill) {
    note("cuTensorMapEncodeTiled");
    const bool good = type == api::kTensorFloat16 && rank == 2 && reinterpret_cast<uintptr_t>(address) % 16 == 0 &&
                      sides[0] > 0 && sides[1] > 0 && strides[0] % 16 == 0 && strides[0] >= 2 * sides[0] &&
                      box[0] * 2 <= 128 && box[1] > 0 && box[1] <= 256 && steps[0] == 1 && steps[1] == 1 &&
                      interleave == api::kInterleaveNone && swizzle == api::kSwizzle128 && fill == api::kFillZero;
    std::ostringstream line;
    line << "map " << sides[1] << "x" << sides[0] << " boxes " << box[1] << "x" << box[0] << "\n";
    log_text += line.str();
    return good ? 0 : kInvalidValue;
}

}  // extern "C"
