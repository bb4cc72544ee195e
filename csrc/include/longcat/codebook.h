// A codebook in memory, as the RVQ ops take it.
#pragma once

#include <cstdint>

namespace longcat {

struct Codebook {
    const float* words;  // [entries, dim], a row's elements adjacent
    int64_t entries, stride;
    bool operator==(const Codebook& other) const {
        return words == other.words && entries == other.entries && stride == other.stride;
    }
};

}  // namespace longcat
