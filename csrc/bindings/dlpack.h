// What a tensor is, asked in C: the part of DLPack's exchange table (github.com/dmlc/dlpack, version 1.3) that reads.
// torch.Tensor has the table in newer torch only.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "longcat/dtypes.h"

namespace longcat {

struct DlpackTensor {
    void* data;
    int32_t device_type, device_index;
    int32_t axes;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;  // the tensor's own; strides in elements
    uint64_t byte_offset;
};

using DlpackReader = int (*)(void* tensor, DlpackTensor* out);  // 0, or -1 with a Python error

struct DlpackExchange {
    uint32_t major_version, minor_version;
    void *older_table, *allocate, *own, *give;
    DlpackReader read;
};

// How tensors of a type are read, or null. Of the types of one process one qualifies, torch.Tensor: a subclass may say
// other things of itself than its memory does, and is asked by its attributes.
inline DlpackReader dlpack_reader(PyTypeObject* type) {
    static PyTypeObject* owner = nullptr;
    static DlpackReader reader = nullptr;
    if (type == owner) return reader;
    if (owner != nullptr || type->tp_dict == nullptr) return nullptr;
    PyObject* const capsule = PyDict_GetItemString(type->tp_dict, "__dlpack_c_exchange_api__");
    if (capsule == nullptr || PyCapsule_IsValid(capsule, "dlpack_exchange_api") == 0) return nullptr;
    const auto* table = static_cast<const DlpackExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (table->major_version != 1 || table->read == nullptr) return nullptr;
    Py_INCREF(type);
    owner = type, reader = table->read;
    return reader;
}

inline DType dtype_of(const DlpackTensor& tensor) {
    enum { integer = 0, natural = 1, floating = 2, bfloat = 4, boolean = 6 };
    if (tensor.lanes != 1) return DType::other;
    switch (tensor.code << 8 | tensor.bits) {
        case floating << 8 | 32:
            return DType::float32;
        case bfloat << 8 | 16:
            return DType::bfloat16;
        case floating << 8 | 16:
            return DType::float16;
        case integer << 8 | 64:
            return DType::int64;
        case integer << 8 | 32:
            return DType::int32;
        case boolean << 8 | 8:
            return DType::boolean;
        case natural << 8 | 8:
            return DType::uint8;
        default:
            return DType::other;
    }
}

inline const char* device_of(const DlpackTensor& tensor) {
    enum { cpu = 1, cuda = 2, pinned = 3 };
    return tensor.device_type == cpu || tensor.device_type == pinned ? "cpu"
           : tensor.device_type == cuda                              ? "cuda"
                                                                     : "other";
}

}  // namespace longcat
