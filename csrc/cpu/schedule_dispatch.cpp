// Devices that do what is most urgent: see longcat_model/pipeline/schedules/dispatch.py, the definition.
#include <algorithm>
#include <cstddef>
#include <functional>
#include <queue>
#include <tuple>
#include <utility>

#include "longcat/schedule_search.h"

namespace longcat {
namespace {

enum Kind { F, I, W };

struct Ready {
    int32_t task, microbatch;  // task: 3 * stage + kind
    int64_t since;
};

struct Device {
    std::vector<Ready> ready;
    int64_t free = 0, live = 0, live_first = 0;  // when it is free; what it holds, and its first stage of that
    std::vector<int32_t> between;                // forward through its first stage and not yet through its second
    Orders ran;
};

class Dispatch {
  public:
    Dispatch(const ScheduleCosts& costs, const DispatchRules& rules)
        : costs_(costs), rules_(rules), devices_(costs.limits.size()) {}

    Orders run() {
        for (size_t d = 0; d < devices_.size(); ++d) events_.emplace(0, d);
        devices_[0].ready.push_back({F, rules_.entry[0], 0});
        while (!events_.empty()) {
            const auto [time, d] = events_.top();
            events_.pop();
            if (devices_[d].free > time) continue;
            const size_t chosen = choose(d, time);
            if (chosen < devices_[d].ready.size()) begin(d, chosen, time);
        }
        Orders found;
        for (const Device& device : devices_) found.insert(found.end(), device.ran.begin(), device.ran.end());
        if (found.size() < size_t(costs_.stages) * 3 * size_t(costs_.microbatches)) found.clear();
        return found;
    }

  private:
    int64_t saved(int32_t stage, int32_t microbatch) const {
        return costs_.saved[size_t(stage) * size_t(costs_.microbatches) + size_t(microbatch)];
    }

    // The place among what is ready, or its end.
    size_t choose(size_t d, int64_t time) const {
        const auto& ready = devices_[d].ready;
        auto key = [&](const Ready& one) {
            const size_t half = size_t(one.task / 3) == d ? 0 : 1;
            return std::tuple(rules_.urgency[3 * half + size_t(one.task % 3)], rules_.rank[size_t(one.microbatch)],
                              one.task, one.microbatch);
        };
        size_t best = ready.size();
        for (size_t i = 0; i < ready.size(); ++i) {
            if (ready[i].since > time || (best < ready.size() && key(ready[best]) < key(ready[i]))) continue;
            if (ready[i].task % 3 != F || fits(d, ready[i].task / 3, ready[i].microbatch)) best = i;
        }
        return best;
    }

    bool fits(size_t d, int32_t stage, int32_t microbatch) const {
        const Device& device = devices_[d];
        const int64_t limit = costs_.limits[d], size = saved(stage, microbatch);
        if (size_t(stage) != d) return device.live + size <= limit;
        const int32_t second = costs_.stages - 1 - stage;
        int64_t needed = saved(second, microbatch);
        for (const int32_t k : device.between) needed = std::max(needed, saved(second, k));
        return device.live_first + size <= limit - rules_.kept[d] && device.live + size <= limit - needed;
    }

    void begin(size_t d, size_t chosen, int64_t time) {
        Device& device = devices_[d];
        const auto [task, microbatch, since] = device.ready[chosen];
        device.ready.erase(device.ready.begin() + std::ptrdiff_t(chosen));
        const int32_t stage = task / 3, kind = task % 3;
        const bool is_first = size_t(stage) == d;
        const int64_t change = kind == F ? saved(stage, microbatch) : kind == W ? -saved(stage, microbatch) : 0;
        device.live += change;
        if (is_first) device.live_first += change;
        auto& between = device.between;
        if (kind == F && is_first) between.push_back(microbatch);
        if (kind == F && !is_first) between.erase(std::find(between.begin(), between.end(), microbatch));
        device.ran.push_back(task * costs_.microbatches + microbatch);
        device.free = time + costs_.durations[size_t(device.ran.back())];
        events_.emplace(device.free, d);
        make_ready(stage, kind, microbatch, device.free);
    }

    void make_ready(int32_t stage, int32_t kind, int32_t microbatch, int64_t end) {
        if (kind == F && stage == 0 && ++entered_ < rules_.entry.size()) add(F, rules_.entry[entered_], 0);
        if (kind == F && stage + 1 < costs_.stages)
            add(3 * (stage + 1) + F, microbatch, arrival(stage, stage + 1, microbatch, end));
        else if (kind == F)
            add(3 * stage + I, microbatch, end);
        if (kind == I) {
            add(3 * stage + W, microbatch, end);
            if (stage > 0) add(3 * (stage - 1) + I, microbatch, arrival(stage, stage - 1, microbatch, end));
        }
    }

    int64_t arrival(int32_t from, int32_t to, int32_t microbatch, int64_t end) const {
        const bool stays = costs_.placement[from] == costs_.placement[to];
        const size_t row = size_t(std::min(from, to)) * size_t(costs_.microbatches);
        return stays ? end : end + costs_.transfers[row + size_t(microbatch)];
    }

    void add(int32_t task, int32_t microbatch, int64_t since) {
        const auto d = size_t(costs_.placement[task / 3]);
        devices_[d].ready.push_back({task, microbatch, since});
        events_.emplace(std::max(since, devices_[d].free), d);
    }

    using Event = std::pair<int64_t, size_t>;
    const ScheduleCosts& costs_;
    const DispatchRules& rules_;
    std::vector<Device> devices_;
    std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
    size_t entered_ = 0;
};

}  // namespace

Orders schedule_dispatch(const ScheduleCosts& costs, const DispatchRules& rules) {
    return Dispatch(costs, rules).run();
}

}  // namespace longcat
