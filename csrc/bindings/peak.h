// Arguments of peak from Python.
#pragma once

#include <pybind11/pybind11.h>

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
}

}  // namespace longcat
