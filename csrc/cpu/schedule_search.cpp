// A move changes one row between two places, so everything that starts before the first of them stays as it is: times
// are computed again from there on, and no further than it takes to see that the schedule gets longer.
#include "longcat/schedule_search.h"

#include <algorithm>
#include <cstddef>
#include <limits>

namespace longcat {
namespace {

constexpr int64_t NONE = std::numeric_limits<int64_t>::max();
enum Kind { F, I, W };

// SplitMix64 (Steele, Lea and Flood 2014).
struct Random {
    uint64_t state;

    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t n) { return int64_t(((next() >> 32) * uint64_t(n)) >> 32); }
};

struct Entry {
    int32_t task, microbatch;  // task: 3 * stage + kind
    int64_t duration;
};

struct Row {
    std::vector<Entry> entries;
    std::vector<int64_t> live;                  // held after each entry
    std::vector<int64_t> rest;                  // work after each entry
    std::vector<int64_t> starts, ends;          // of the schedule as it is
    std::vector<int64_t> new_starts, new_ends;  // of the one that is being tried
    size_t from = 0, next = 0;                  // where new times begin; what runs next
    bool waits = false;
};

class Search {
  public:
    Search(const ScheduleCosts& costs, const Orders& orders) : costs_(costs), rows_(costs.limits.size()) {
        const size_t m = size_t(costs.microbatches);
        place_.resize(size_t(costs.stages) * 3 * m);
        std::vector<size_t> length(rows_.size());
        for (int stage = 0; stage < costs.stages; ++stage) length[size_t(costs.placement[stage])] += 3 * m;
        auto order = orders.begin();
        for (size_t d = 0; d < rows_.size(); ++d) {
            for (size_t i = 0; i < length[d]; ++i) {
                const int32_t action = *order++;
                rows_[d].entries.push_back({action / int32_t(m), action % int32_t(m), costs.durations[size_t(action)]});
            }
            for (auto* times : {&rows_[d].live, &rows_[d].rest, &rows_[d].starts, &rows_[d].ends, &rows_[d].new_starts,
                                &rows_[d].new_ends})
                times->resize(length[d]);
            index(d, 0, length[d]);
        }
    }

    int64_t first_makespan() {
        for (size_t d = 0; d < rows_.size(); ++d) {
            if (!index(d, 0, rows_[d].entries.size())) return -1;
            rows_[d].from = 0;
        }
        const int64_t makespan = run(NONE - 1);
        if (makespan == NONE) return -1;
        keep();
        return makespan;
    }

    int64_t walk(int64_t moves, int reach, bool overtakes, uint64_t seed) {
        int64_t makespan = first_makespan();
        if (makespan < 0) return -1;
        Random random{seed};
        for (int64_t move = 0; move < moves; ++move) {
            const auto d = size_t(random.below(int64_t(rows_.size())));
            const auto length = int64_t(rows_[d].entries.size());
            const int64_t from = random.below(length), distance = 1 + random.below(reach);
            const int64_t to = (random.next() >> 63) != 0 ? from + distance : from - distance;
            if (to < 0 || to >= length || !may_pass(rows_[d].entries, from, to, overtakes)) continue;
            const auto low = size_t(std::min(from, to)), high = size_t(std::max(from, to)) + 1;
            rotate(d, from, to);
            if (index(d, low, high)) {
                start_from(d, low);
                const int64_t tried = run(makespan);
                if (tried != NONE) {
                    makespan = tried;
                    keep();
                    continue;
                }
                forget();
            }
            rotate(d, to, from);
            index(d, low, high);
        }
        return makespan;
    }

    void read(Orders& orders) const {
        auto order = orders.begin();
        for (const Row& row : rows_)
            for (const Entry& entry : row.entries) *order++ = entry.task * costs_.microbatches + entry.microbatch;
    }

  private:
    // Whether the entry may pass those up to `to`: none of its microbatch that must stay on its side, and none of its
    // own task unless it `overtakes`.
    bool may_pass(const std::vector<Entry>& entries, int64_t from, int64_t to, bool overtakes) const {
        const Entry& moved = entries[size_t(from)];
        const int64_t step = from < to ? 1 : -1;
        for (int64_t i = from; i != to;) {
            const Entry& passed = entries[size_t(i += step)];
            if (passed.task == moved.task && !overtakes) return false;
            if (passed.microbatch != moved.microbatch) continue;
            if (step > 0 ? before(moved.task, passed.task) : before(passed.task, moved.task)) return false;
        }
        return true;
    }

    // Whether, for one microbatch, a task must be done before another: F up the stages, I down again, W after its I.
    bool before(int32_t first, int32_t second) const {
        return first % 3 != W && rank(first) < rank(second) + (second % 3 == W ? 1 : 0);
    }
    int rank(int32_t task) const { return task % 3 == F ? task / 3 : 2 * costs_.stages - 1 - task / 3; }

    void rotate(size_t d, int64_t from, int64_t to) {
        const auto begin = rows_[d].entries.begin();
        if (from < to)
            std::rotate(begin + from, begin + from + 1, begin + to + 1);
        else
            std::rotate(begin + to, begin + from, begin + from + 1);
    }

    // Brings up to date what is known of entries [low, high); false where the device would hold too much.
    bool index(size_t d, size_t low, size_t high) {
        Row& row = rows_[d];
        const auto m = size_t(costs_.microbatches);
        bool fits = true;
        int64_t live = low > 0 ? row.live[low - 1] : 0;
        for (size_t i = low; i < high; ++i) {
            const Entry& entry = row.entries[i];
            const auto task = size_t(entry.task), k = size_t(entry.microbatch);
            place_[task * m + k] = i;
            const int64_t size = costs_.saved[task / 3 * m + k];
            live += task % 3 == F ? size : task % 3 == W ? -size : 0;
            row.live[i] = live;
            fits = fits && live <= costs_.limits[d];
        }
        int64_t rest = high < row.entries.size() ? row.rest[high] + row.entries[high].duration : 0;
        for (size_t i = high; i-- > low;) {
            row.rest[i] = rest;
            rest += row.entries[i].duration;
        }
        return fits;
    }

    void start_from(size_t d, size_t low) {
        const int64_t time = low > 0 ? rows_[d].ends[low - 1] : 0;
        for (Row& row : rows_)
            row.from = size_t(std::lower_bound(row.starts.begin(), row.starts.end(), time) - row.starts.begin());
        rows_[d].from = std::min(rows_[d].from, low);
    }

    // New times of all entries from `from` on. NONE where the makespan would exceed the limit, or never come.
    int64_t run(int64_t limit) {
        runnable_.clear();
        for (size_t d = rows_.size(); d-- > 0;) {
            rows_[d].next = rows_[d].from;
            rows_[d].waits = false;
            runnable_.push_back(d);
        }
        while (!runnable_.empty()) {
            const size_t d = runnable_.back();
            runnable_.pop_back();
            if (!run_device(d, limit)) return NONE;
        }
        int64_t makespan = 0;
        for (const Row& row : rows_) {
            if (row.next < row.entries.size()) return NONE;
            if (!row.entries.empty()) makespan = std::max(makespan, row.new_ends.back());
        }
        return makespan;
    }

    // Runs a device until it must wait; false where the limit is exceeded.
    bool run_device(size_t d, int64_t limit) {
        Row& row = rows_[d];
        int64_t time = row.next > 0 ? row.new_ends[row.next - 1] : 0;
        for (; row.next < row.entries.size(); ++row.next) {
            const Entry& entry = row.entries[row.next];
            const int64_t there = arrival(d, entry);
            if (there == NONE) {
                row.waits = true;
                return true;
            }
            time = std::max(time, there);
            row.new_starts[row.next] = time;
            time += entry.duration;
            row.new_ends[row.next] = time;
            if (time + row.rest[row.next] > limit) return false;
            wake(entry.task, d);
        }
        return true;
    }

    // When what an entry needs from another stage is on its device; NONE where nobody has done it yet.
    int64_t arrival(size_t d, const Entry& entry) const {
        const int stage = entry.task / 3, kind = entry.task % 3;
        const int other = kind == F ? stage - 1 : kind == I ? stage + 1 : -1;
        if (other < 0 || other >= costs_.stages) return 0;
        const auto m = size_t(costs_.microbatches), k = size_t(entry.microbatch);
        const auto e = size_t(costs_.placement[other]);
        const size_t place = place_[size_t(3 * other + kind) * m + k];
        if (place >= rows_[e].next) return NONE;
        return rows_[e].new_ends[place] + (e == d ? 0 : costs_.transfers[size_t(std::min(stage, other)) * m + k]);
    }

    void wake(int32_t task, size_t d) {
        const int other = task % 3 == F ? task / 3 + 1 : task % 3 == I ? task / 3 - 1 : -1;
        if (other < 0 || other >= costs_.stages) return;
        const auto e = size_t(costs_.placement[other]);
        if (e == d || !rows_[e].waits) return;
        rows_[e].waits = false;
        runnable_.push_back(e);
    }

    // What was tried becomes the schedule as it is.
    void keep() {
        for (Row& row : rows_) {
            const auto from = std::ptrdiff_t(row.from);
            std::copy(row.new_starts.begin() + from, row.new_starts.end(), row.starts.begin() + from);
            std::copy(row.new_ends.begin() + from, row.new_ends.end(), row.ends.begin() + from);
        }
    }

    // The other way round, as far as was tried.
    void forget() {
        for (Row& row : rows_) {
            const auto from = std::ptrdiff_t(row.from), to = std::ptrdiff_t(std::min(row.next + 1, row.ends.size()));
            std::copy(row.ends.begin() + from, row.ends.begin() + to, row.new_ends.begin() + from);
        }
    }

    const ScheduleCosts& costs_;
    std::vector<Row> rows_;
    std::vector<size_t> place_;     // [task, microbatch] -> place in its row
    std::vector<size_t> runnable_;  // devices
};

}  // namespace

int64_t schedule_makespan(const ScheduleCosts& costs, const Orders& orders) {
    return Search(costs, orders).first_makespan();
}

int64_t schedule_walk(const ScheduleCosts& costs, Orders& orders, int64_t moves, int reach, bool overtakes,
                      uint64_t seed) {
    Search search(costs, orders);
    const int64_t makespan = search.walk(moves, reach, overtakes, seed);
    if (makespan >= 0) search.read(orders);
    return makespan;
}

}  // namespace longcat
