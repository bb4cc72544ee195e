// Arguments of peak from Python.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/tensor_view.h"
#include "cpu/large_pages.h"
#include "longcat/check.h"
#include "longcat/peak.h"

namespace longcat {

inline void bind_peak(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "peak",
        [](const std::string& kind, const std::string& isa, int threads) {
            LC_CHECK(threads >= 1, "peak: threads must be at least 1");
            py::gil_scoped_release unlocked;
            return peak(kind, isa, threads);
        },
        py::arg("kind"), py::arg("isa"), py::arg("threads") = 1);
    m.def(
        "read_sections",
        [](const TensorView& memory, const TensorView& sections) {
            const auto* data = memory.whole<const char>("read_sections: memory", DType::uint8, {memory.shape.at(0)});
            const int64_t count = sections.shape.at(0);
            const auto* pairs = sections.whole<const int64_t>("read_sections: sections", DType::int64, {count, 2});
            for (int64_t i = 0; i < count; ++i) {
                const int64_t first = pairs[2 * i], bytes = pairs[2 * i + 1];
                LC_CHECK(first >= 0 && bytes >= 0 && (first | bytes) % 64 == 0 && first + bytes <= memory.shape[0],
                         "read_sections: sections must lie in memory, in steps of 64 bytes");
            }
            py::gil_scoped_release unlocked;
            return read_sections(data, pairs, count);
        },
        py::arg("memory"), py::arg("sections"));
    m.def(
        "prefer_large_pages",
        [](const TensorView& memory) {
            prefer_large_pages(memory.whole("prefer_large_pages: memory", DType::uint8, {memory.shape.at(0)}),
                               memory.shape[0]);
        },
        py::arg("memory"));
}

}  // namespace longcat
