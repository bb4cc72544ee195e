// Rows grouped by their code.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "longcat/check.h"

namespace longcat {

// The rows of code k are order[starts[k]] to order[starts[k + 1]], ascending; rows with a negative code are left out.
struct Segments {
    std::vector<int64_t> starts, order;

    // `codes` are `rows` numbers, `stride` apart; `name` of them begins the error.
    Segments(const char* name, const int64_t* codes, int64_t stride, int64_t rows, int64_t entries)
        : starts(size_t(entries) + 1) {
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t code = codes[i * stride];
            LC_CHECK(code < entries,
                     std::string(name) + " must be below " + std::to_string(entries) + ", got " + std::to_string(code));
            if (code >= 0) ++starts[size_t(code) + 1];
        }
        for (size_t k = 0; k < size_t(entries); ++k) starts[k + 1] += starts[k];
        order.resize(size_t(starts.back()));
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t i = 0; i < rows; ++i)
            if (codes[i * stride] >= 0) order[size_t(next[size_t(codes[i * stride])]++)] = i;
    }

    const int64_t* begin(int64_t k) const { return order.data() + starts[size_t(k)]; }
    const int64_t* end(int64_t k) const { return begin(k + 1); }
    int64_t size(int64_t k) const { return end(k) - begin(k); }
};

}  // namespace longcat
