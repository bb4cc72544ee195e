// Search among the orders of a pipeline schedule: the fast form of longcat_model/pipeline/schedules/walk.py, which
// defines it. Both count time in integers and draw the same random numbers, so they give the same orders.
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

// Rows of all devices one after another; an entry is 3 * stage + (0: F, 1: I, 2: W), and its k-th occurrence
// microbatch k.
using Orders = std::vector<int32_t>;

// When the last action ends; -1 where a limit is exceeded or the devices wait for each other for ever.
int64_t schedule_makespan(const ScheduleCosts& costs, const Orders& orders);

// Moves one action at a time to another place of its row, at most `reach` places away, and keeps the move unless the
// schedule gets longer. Gives the makespan; -1 where `orders` already have none.
int64_t schedule_walk(const ScheduleCosts& costs, Orders& orders, int64_t moves, int reach, uint64_t seed);

}  // namespace longcat
