// Numbers grouped by a key that may have far more values than there are numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace longcat {

// Numbers [0, count) of which `key` is not negative, sorted by key and then by number, and where each key starts.
struct Runs {
    std::vector<int64_t> order, starts;

    template <class Key>
    Runs(int64_t count, const Key& key) {
        std::vector<std::pair<int64_t, int64_t>> keyed;
        for (int64_t i = 0; i < count; ++i)
            if (key(i) >= 0) keyed.emplace_back(key(i), i);
        std::sort(keyed.begin(), keyed.end());
        for (size_t i = 0; i < keyed.size(); ++i) {
            if (i == 0 || keyed[i].first != keyed[i - 1].first) starts.push_back(int64_t(i));
            order.push_back(keyed[i].second);
        }
        starts.push_back(int64_t(order.size()));
    }
    int64_t count() const { return int64_t(starts.size()) - 1; }
};

}  // namespace longcat
