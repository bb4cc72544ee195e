// Arguments from Python without torch's headers: what a torch.Tensor says of itself, read through its public
// attributes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "longcat/dtypes.h"

namespace longcat {

struct TensorView {
    void* data = nullptr;
    std::vector<int64_t> shape, strides;  // strides in elements
    DType dtype = DType::other;
    std::string device;  // "cpu", "cuda"

    bool is_contiguous() const {
        int64_t expected = 1;
        for (size_t axis = shape.size(); axis-- > 0; expected *= shape[axis])
            if (shape[axis] != 1 && strides[axis] != expected) return expected == 0;
        return true;
    }

    // The elements, after a check of their type.
    template <class T>
    T* as(DType expected) const {
        LC_CHECK(dtype == expected && device == "cpu", "tensor has the wrong dtype or device");
        return static_cast<T*>(data);
    }
};

inline DType dtype_named(const std::string& name) {
    if (name == "torch.float32") return DType::float32;
    if (name == "torch.bfloat16") return DType::bfloat16;
    if (name == "torch.float16") return DType::float16;
    if (name == "torch.int64") return DType::int64;
    if (name == "torch.bool") return DType::boolean;
    return DType::other;
}

}  // namespace longcat

namespace pybind11::detail {

template <>
struct type_caster<longcat::DType> {
    PYBIND11_TYPE_CASTER(longcat::DType, const_name("torch.dtype"));

    bool load(handle source, bool) {
        value = longcat::dtype_named(str(source));
        return value != longcat::DType::other;
    }
};

template <>
struct type_caster<longcat::TensorView> {
    PYBIND11_TYPE_CASTER(longcat::TensorView, const_name("torch.Tensor"));

    bool load(handle source, bool) {
        if (!hasattr(source, "data_ptr")) return false;
        value.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<uintptr_t>());
        value.shape = source.attr("shape").cast<std::vector<int64_t>>();
        value.strides = source.attr("stride")().cast<std::vector<int64_t>>();
        value.dtype = longcat::dtype_named(str(source.attr("dtype")));
        value.device = str(source.attr("device").attr("type"));
        return true;
    }
};

}  // namespace pybind11::detail
