// Arguments of schedule_makespan and schedule_walk from Python, as numpy arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "longcat/check.h"
#include "longcat/schedule_search.h"

namespace longcat {

template <class T>
using Numbers = pybind11::array_t<T, pybind11::array::c_style>;

// Checked: an index that a search computes from these stays inside its array.
inline ScheduleCosts schedule_costs(const Numbers<int32_t>& placement, const Numbers<int64_t>& durations,
                                    const Numbers<int64_t>& transfers, const Numbers<int64_t>& saved,
                                    std::vector<int64_t> limits) {
    LC_CHECK(durations.ndim() == 3 && durations.shape(0) == placement.size() && durations.shape(1) == 3,
             "schedule_search: durations must have shape [stages, 3, microbatches]");
    const auto stages = durations.shape(0), microbatches = durations.shape(2);
    for (const auto* table : {&transfers, &saved})
        LC_CHECK(table->ndim() == 2 && table->shape(0) == stages && table->shape(1) == microbatches,
                 "schedule_search: transfers and saved must have shape [stages, microbatches]");
    for (pybind11::ssize_t stage = 0; stage < stages; ++stage)
        LC_CHECK(placement.at(stage) >= 0 && placement.at(stage) < int32_t(limits.size()),
                 "schedule_search: placement must name devices that have a limit");
    return {int(stages),      int(microbatches), placement.data(), durations.data(),
            transfers.data(), saved.data(),      std::move(limits)};
}

inline Orders schedule_orders(const ScheduleCosts& costs, const Numbers<int32_t>& orders) {
    const int64_t each = 3 * int64_t(costs.microbatches), all = costs.stages * each;
    LC_CHECK(orders.size() == all, "schedule_search: orders must hold every action once");
    std::vector<int64_t> left(costs.limits.size());
    for (int stage = 0; stage < costs.stages; ++stage) left[size_t(costs.placement[stage])] += each;
    std::vector<bool> seen(static_cast<size_t>(all));
    size_t device = 0;
    for (pybind11::ssize_t i = 0; i < orders.size(); ++i) {
        while (left[device] == 0) ++device;
        --left[device];
        const int32_t action = orders.at(i);
        LC_CHECK(
            action >= 0 && action < all && !seen[size_t(action)] && costs.placement[action / each] == int32_t(device),
            "schedule_search: orders must hold every action once, on its device");
        seen[size_t(action)] = true;
    }
    return {orders.data(), orders.data() + orders.size()};
}

inline DispatchRules dispatch_rules(const ScheduleCosts& costs, std::vector<int32_t> entry, std::vector<int32_t> rank,
                                    std::vector<int32_t> urgency, std::vector<int64_t> kept) {
    const auto devices = int(costs.limits.size());
    bool is_v = costs.stages == 2 * devices;
    for (int stage = 0; is_v && stage < costs.stages; ++stage)
        is_v = costs.placement[stage] == std::min(stage, costs.stages - 1 - stage);
    LC_CHECK(is_v && devices > 0, "schedule_search: placement must be a V of two stages a device");
    std::vector<int32_t> sorted = entry, all(size_t(costs.microbatches));
    std::iota(all.begin(), all.end(), 0);
    std::sort(sorted.begin(), sorted.end());
    LC_CHECK(sorted == all && !all.empty(), "schedule_search: entry must name every microbatch once");
    LC_CHECK(rank.size() == all.size() && urgency.size() == 6 && kept.size() == costs.limits.size(),
             "schedule_search: rank must have one entry a microbatch, urgency six, kept one a device");
    return {std::move(entry), std::move(rank), std::move(urgency), std::move(kept)};
}

inline void bind_schedule_search(pybind11::module_& m) {
    namespace py = pybind11;
    m.def(
        "schedule_makespan",
        [](const Numbers<int32_t>& orders, const Numbers<int32_t>& placement, const Numbers<int64_t>& durations,
           const Numbers<int64_t>& transfers, const Numbers<int64_t>& saved, std::vector<int64_t> limits) {
            const auto costs = schedule_costs(placement, durations, transfers, saved, std::move(limits));
            return schedule_makespan(costs, schedule_orders(costs, orders));
        },
        py::arg("orders"), py::arg("placement"), py::arg("durations"), py::arg("transfers"), py::arg("saved"),
        py::arg("limits"));
    m.def(
        "schedule_walk",
        [](const Numbers<int32_t>& orders, const Numbers<int32_t>& placement, const Numbers<int64_t>& durations,
           const Numbers<int64_t>& transfers, const Numbers<int64_t>& saved, std::vector<int64_t> limits, int64_t moves,
           int reach, bool overtakes, uint64_t seed) {
            const auto costs = schedule_costs(placement, durations, transfers, saved, std::move(limits));
            LC_CHECK(reach >= 1, "schedule_search: reach must be at least 1");
            Orders found = schedule_orders(costs, orders);
            int64_t makespan;
            {
                py::gil_scoped_release unlocked;
                makespan = schedule_walk(costs, found, moves, reach, overtakes, seed);
            }
            return py::make_tuple(Numbers<int32_t>(py::ssize_t(found.size()), found.data()), makespan);
        },
        py::arg("orders"), py::arg("placement"), py::arg("durations"), py::arg("transfers"), py::arg("saved"),
        py::arg("limits"), py::arg("moves"), py::arg("reach"), py::arg("overtakes"), py::arg("seed"));
    m.def(
        "schedule_dispatch",
        [](const Numbers<int32_t>& placement, const Numbers<int64_t>& durations, const Numbers<int64_t>& transfers,
           const Numbers<int64_t>& saved, std::vector<int64_t> limits, std::vector<int32_t> entry,
           std::vector<int32_t> rank, std::vector<int32_t> urgency, std::vector<int64_t> kept) {
            const auto costs = schedule_costs(placement, durations, transfers, saved, std::move(limits));
            const auto rules =
                dispatch_rules(costs, std::move(entry), std::move(rank), std::move(urgency), std::move(kept));
            const Orders found = schedule_dispatch(costs, rules);
            return Numbers<int32_t>(py::ssize_t(found.size()), found.data());
        },
        py::arg("placement"), py::arg("durations"), py::arg("transfers"), py::arg("saved"), py::arg("limits"),
        py::arg("entry"), py::arg("rank"), py::arg("urgency"), py::arg("kept"));
}

}  // namespace longcat
