// Arguments from Python without torch's headers: what a torch.Tensor says of itself, read through its public
// attributes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
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
            if (shape[axis] != 1 && strides[axis] != expected) return is_empty();
        return true;
    }

    bool is_empty() const { return std::find(shape.begin(), shape.end(), 0) != shape.end(); }

    // The elements of a contiguous tensor, after a check that it is one of this type and shape: a kernel trusts both.
    template <class T = void>
    T* whole(const char* name, DType expected, std::initializer_list<int64_t> sides) const {
        require(
            name,
            dtype == expected && is_contiguous() && std::equal(shape.begin(), shape.end(), sides.begin(), sides.end()),
            "contiguous, of the dtype and the shape that the other arguments give");
        return static_cast<T*>(data);
    }

    // The elements of a matrix, after a check that it is one of this type.
    template <class T = void>
    T* matrix(const char* name, DType expected) const {
        require(name, dtype == expected && shape.size() == 2, "a matrix of the right dtype");
        return static_cast<T*>(data);
    }

  private:
    void require(const char* name, bool condition, const char* rule) const {
        LC_CHECK(condition && device == "cpu", std::string(name) + " must be on the CPU and " + rule);
    }
};

// More threads than this help nobody and cost memory each; results do not depend on the number.
inline int at_most_threads(int wanted) { return std::min(wanted, 1024); }

inline DType dtype_named(const std::string& name) {
    if (name == "torch.float32") return DType::float32;
    if (name == "torch.bfloat16") return DType::bfloat16;
    if (name == "torch.float16") return DType::float16;
    if (name == "torch.int64") return DType::int64;
    if (name == "torch.int32") return DType::int32;
    if (name == "torch.bool") return DType::boolean;
    if (name == "torch.uint8") return DType::uint8;
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
