// The draw of one code from the logits of one row, as longcat_kernels/reference/sampling.py defines it.
//
// With c the logits (mixed with a follower's by guidance) and y those after the repetition penalty, ids past the limit
// left out, the code is the id with the largest y / T + g among those that are kept; g is Gumbel noise made of a Philox
// word, in float64. What is kept is always a prefix of the ids in descending order of y, equal ones by id: all that
// truncation has to find is its last y, and how many of those equal to it belong to it. So nothing is sorted: lists are
// split at a value until all that is left is equal.
//
// The largest y / T + g is the largest e^((y - m) / T) / E, E = -log1p(-u) the exponential variate of the word. Float32
// finds it to within a share of 2^-13; ids within 2^-10 of the largest are compared in float64.
#pragma once

#include <cstdint>

#include "longcat/depth_decode.h"
#include "longcat/isa.h"

namespace longcat {

struct Draw {
    const float *logits, *others;  // [classes]; those of the follower, or null
    int64_t classes, level;
    const float* params;  // [kDrawParams]
    int64_t seed, step;
    const int64_t* history;  // or null: codes of earlier positions, `history_pitch` apart
    int64_t history_count, history_pitch;
    int64_t forced;  // the code, or negative: to be drawn
};

struct Drawn {
    int64_t code;
    float logprob, drawn_logprob;
};

// Floats of memory for a draw of so many classes.
inline int64_t draw_room(int64_t classes) { return 8 * (classes + 64); }

using DrawCode = Drawn (*)(const Draw& draw, float* room);

DrawCode draw_code(Isa isa);

}  // namespace longcat
