// Arguments of schedule_makespan and schedule_walk from Python, as numpy arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>

#include "longcat/check.h"
#include "longcat/schedule_search.h"

namespace longcat {

template <class T>
using Numbers = pybind11::array_t<T, pybind11::array::c_style>;

// Checked: an index that the search computes from these stays inside its array.
inline ScheduleCosts schedule_costs(const Numbers<int32_t>& placement, const Numbers<int64_t>& durations,
                                    const Numbers<int64_t>& transfers, const Numbers<int64_t>& saved,
                                    std::vector<int64_t> limits, const Numbers<int32_t>& orders) {
    LC_CHECK(durations.ndim() == 3 && durations.shape(0) == placement.size() && durations.shape(1) == 3,
             "schedule_search: durations must have shape [stages, 3, microbatches]");
    const auto stages = durations.shape(0), microbatches = durations.shape(2);
    for (const auto* table : {&transfers, &saved})
        LC_CHECK(table->ndim() == 2 && table->shape(0) == stages && table->shape(1) == microbatches,
                 "schedule_search: transfers and saved must have shape [stages, microbatches]");
    const auto devices = int32_t(limits.size());
    std::vector<int64_t> left(limits.size());
    for (pybind11::ssize_t stage = 0; stage < stages; ++stage) {
        const int32_t device = placement.at(stage);
        LC_CHECK(device >= 0 && device < devices, "schedule_search: placement must name devices that have a limit");
        left[size_t(device)] += 3 * microbatches;
    }
    LC_CHECK(orders.size() == stages * 3 * microbatches, "schedule_search: orders must hold every action once");
    std::vector<int64_t> count(size_t(stages) * 3);
    size_t device = 0;
    for (pybind11::ssize_t i = 0; i < orders.size(); ++i) {
        while (left[device] == 0) ++device;
        --left[device];
        const int32_t task = orders.at(i);
        LC_CHECK(task >= 0 && task < 3 * stages && placement.at(task / 3) == int32_t(device) &&
                     ++count[size_t(task)] <= microbatches,
                 "schedule_search: orders must hold every action once, on its device");
    }
    return {int(stages),      int(microbatches), placement.data(), durations.data(),
            transfers.data(), saved.data(),      std::move(limits)};
}

inline void bind_schedule_search(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "schedule_makespan",
        [](const Numbers<int32_t>& orders, const Numbers<int32_t>& placement, const Numbers<int64_t>& durations,
           const Numbers<int64_t>& transfers, const Numbers<int64_t>& saved, std::vector<int64_t> limits) {
            const auto costs = schedule_costs(placement, durations, transfers, saved, std::move(limits), orders);
            return schedule_makespan(costs, Orders(orders.data(), orders.data() + orders.size()));
        },
        py::arg("orders"), py::arg("placement"), py::arg("durations"), py::arg("transfers"), py::arg("saved"),
        py::arg("limits"));
    m.def(
        "schedule_walk",
        [](const Numbers<int32_t>& orders, const Numbers<int32_t>& placement, const Numbers<int64_t>& durations,
           const Numbers<int64_t>& transfers, const Numbers<int64_t>& saved, std::vector<int64_t> limits, int64_t moves,
           int reach, uint64_t seed) {
            const auto costs = schedule_costs(placement, durations, transfers, saved, std::move(limits), orders);
            LC_CHECK(reach >= 1, "schedule_search: reach must be at least 1");
            Orders found(orders.data(), orders.data() + orders.size());
            int64_t makespan;
            {
                py::gil_scoped_release unlocked;
                makespan = schedule_walk(costs, found, moves, reach, seed);
            }
            Numbers<int32_t> result(orders.size());
            std::copy(found.begin(), found.end(), result.mutable_data());
            return py::make_tuple(result, makespan);
        },
        py::arg("orders"), py::arg("placement"), py::arg("durations"), py::arg("transfers"), py::arg("saved"),
        py::arg("limits"), py::arg("moves"), py::arg("reach"), py::arg("seed"));
}

}  // namespace longcat
