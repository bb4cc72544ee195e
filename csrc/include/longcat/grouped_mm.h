// Matrix products of groups that lie side by side in one tensor: out_g = a_g b_g.
#pragma once

#include <cstdint>
#include <vector>

#include "longcat/dtypes.h"
#include "longcat/isa.h"

namespace longcat {

struct GroupedMM {
    struct Matrix {
        void* data;
        int64_t row_stride, column_stride;  // in elements; one of them is 1
    };
    struct Group {
        int64_t rows, columns, depth;
        int64_t a, b, out;  // where its matrices begin, in elements
    };

    DType dtype;
    DType products;  // `dtype`, or of float32 bfloat16: to what a and b are rounded where it has kernels
    Matrix a, b;     // [rows, depth] and [depth, columns] of each group
    Matrix out;      // column stride 1
    std::vector<Group> groups;
    Group tail;  // of `out`: rows and columns past the last group, which become zero
    int threads;
    Isa isa;
};

void grouped_mm(const GroupedMM& p);

}  // namespace longcat
