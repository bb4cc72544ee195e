// Search among the orders of a pipeline schedule: the fast form of longcat_model/pipeline/schedules/walk.py and
// dispatch.py, which define it. Both count time in integers and draw the same random numbers, so they give the same
// orders.
#pragma once

#include <cstdint>
#include <vector>

namespace longcat {

// Sizes and costs; every device does the F, I and W of its stages once for each microbatch.
struct ScheduleCosts {
    int stages, microbatches;
    const int32_t* placement;     // [stages] -> device
    const int64_t* durations;     // [stages, 3, microbatches] of F, I and W
    const int64_t* transfers;     // [stages, microbatches] from a stage to the one after, and back
    const int64_t* saved;         // [stages, microbatches] held from F until W
    std::vector<int64_t> limits;  // [devices] of what is held
};

// Rows of all devices one after another; an entry is (3 * stage + (0: F, 1: I, 2: W)) * microbatches + microbatch.
using Orders = std::vector<int32_t>;

// When the last action ends; -1 where a limit is exceeded or the devices wait for each other for ever.
int64_t schedule_makespan(const ScheduleCosts& costs, const Orders& orders);

// Moves one action at a time to another place of its row, at most `reach` places away, and keeps the move unless the
// schedule gets longer. A microbatch may pass another at a stage only where it `overtakes`. Gives the makespan; -1
// where `orders` already have none.
int64_t schedule_walk(const ScheduleCosts& costs, Orders& orders, int64_t moves, int reach, bool overtakes,
                      uint64_t seed);

// What devices go by that choose for themselves.
struct DispatchRules {
    std::vector<int32_t> entry;    // the order in which the first stage takes microbatches
    std::vector<int32_t> rank;     // [microbatches] the lowest comes first of those that are equally urgent
    std::vector<int32_t> urgency;  // [2, 3] halves of the stages; F, I, W: the lowest comes first
    std::vector<int64_t> kept;     // [devices] what its first stage leaves free at least
};

// The schedule of a V placement where every device, once free, does what is most urgent of what is ready and fits its
// memory (dispatch.py defines it); empty where a microbatch never fits.
Orders schedule_dispatch(const ScheduleCosts& costs, const DispatchRules& rules);

}  // namespace longcat
