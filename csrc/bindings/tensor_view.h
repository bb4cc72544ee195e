// Arguments from Python without torch's headers: what a torch.Tensor says of itself, in C where it can (dlpack.h), else
// by its public attributes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "bindings/dlpack.h"
#include "longcat/dtypes.h"

namespace longcat {

struct TensorView {
    void* data = nullptr;
    std::vector<int64_t> shape, strides;  // strides in elements
    DType dtype = DType::other;
    std::string device;                 // "cpu", "cuda"
    std::string wanted_device = "cpu";  // where the callee needs it

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
        LC_CHECK(condition && device == wanted_device,
                 std::string(name) + " must be on the " + (wanted_device == "cpu" ? "CPU" : "GPU") + " and " + rule);
    }
};

// A tensor whose elements are a CUDA device's.
struct CudaTensorView : TensorView {
    int device_index = 0;
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

// The type that a torch.dtype names. Its text takes long to make, and there is one object of each for ever.
inline DType dtype_of(pybind11::handle dtype) {
    static std::unordered_map<PyObject*, DType> known;
    const auto found = known.find(dtype.ptr());
    if (found != known.end()) return found->second;
    return known[dtype.inc_ref().ptr()] = dtype_named(pybind11::str(dtype));
}

// The type of operands in products: that of the tensors, unless bfloat16 is asked for where they are float32.
inline DType product_dtype(const char* name, DType dtype, const std::optional<DType>& asked) {
    const DType products = asked.value_or(dtype);
    LC_CHECK(products == dtype || (dtype == DType::float32 && products == DType::bfloat16),
             std::string(name) + " must be the dtype of the tensors, or bfloat16 where they are float32");
    return products;
}

// An attribute by a name that Python has hashed before.
inline pybind11::object attribute(pybind11::handle source, PyObject* name) {
    PyObject* value = PyObject_GetAttr(source.ptr(), name);
    if (value == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(value);
}

// What a method without arguments gives.
inline pybind11::object called(pybind11::handle source, PyObject* name) {
    PyObject* value = PyObject_CallMethodNoArgs(source.ptr(), name);
    if (value == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(value);
}

// The numbers of a tuple.
inline std::vector<int64_t> numbers(const pybind11::object& tuple) {
    if (!PyTuple_Check(tuple.ptr())) throw pybind11::type_error("a shape and strides must be tuples");
    std::vector<int64_t> values(size_t(PyTuple_GET_SIZE(tuple.ptr())));
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), Py_ssize_t(i)));
        if (values[i] == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    }
    return values;
}

}  // namespace longcat

namespace pybind11::detail {

template <>
struct type_caster<longcat::DType> {
    PYBIND11_TYPE_CASTER(longcat::DType, const_name("torch.dtype"));

    bool load(handle source, bool) {
        value = longcat::dtype_of(source);
        return value != longcat::DType::other;
    }
};

template <>
struct type_caster<longcat::TensorView> {
    PYBIND11_TYPE_CASTER(longcat::TensorView, const_name("torch.Tensor"));

    bool load(handle source, bool) { return load_by_dlpack(source) || load_by_attributes(source); }

  private:
    bool load_by_dlpack(handle source) {
        const longcat::DlpackReader read = longcat::dlpack_reader(Py_TYPE(source.ptr()));
        longcat::DlpackTensor found{};
        if (read == nullptr) return false;
        if (read(source.ptr(), &found) != 0) {
            PyErr_Clear();  // a dtype that DLPack does not know
            return false;
        }
        value.data = static_cast<char*>(found.data) + found.byte_offset;
        value.shape.assign(found.shape, found.shape + found.axes);
        value.strides.assign(found.strides, found.strides + found.axes);
        value.dtype = longcat::dtype_of(found);
        value.device = longcat::device_of(found);
        return true;
    }

    bool load_by_attributes(handle source) {
        static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
        static PyObject* const shape = PyUnicode_InternFromString("shape");
        static PyObject* const stride = PyUnicode_InternFromString("stride");
        static PyObject* const dtype = PyUnicode_InternFromString("dtype");
        static PyObject* const is_cpu = PyUnicode_InternFromString("is_cpu");
        if (PyObject_HasAttr(source.ptr(), data_ptr) == 0) return false;
        value.data = PyLong_AsVoidPtr(longcat::called(source, data_ptr).ptr());
        if (value.data == nullptr && PyErr_Occurred() != nullptr) throw error_already_set();
        value.shape = longcat::numbers(longcat::attribute(source, shape));
        value.strides = longcat::numbers(longcat::called(source, stride));
        value.dtype = longcat::dtype_of(longcat::attribute(source, dtype));
        const bool on_cpu = longcat::attribute(source, is_cpu).ptr() == Py_True;
        value.device = on_cpu ? "cpu" : str(source.attr("device").attr("type")).cast<std::string>();
        return true;
    }
};

template <>
struct type_caster<longcat::CudaTensorView> {
    PYBIND11_TYPE_CASTER(longcat::CudaTensorView, const_name("torch.Tensor"));

    bool load(handle source, bool convert) {
        type_caster<longcat::TensorView> view;
        if (!view.load(source, convert)) return false;
        static_cast<longcat::TensorView&>(value) = static_cast<longcat::TensorView&>(view);
        value.wanted_device = "cuda";
        const object index = source.attr("device").attr("index");
        value.device_index = index.is_none() ? 0 : index.cast<int>();
        return true;
    }
};

}  // namespace pybind11::detail
