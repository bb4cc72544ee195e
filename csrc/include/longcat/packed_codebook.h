// A codebook as the screen of rvq_encode reads it: panels of codewords, element by element, and the parts of the error
// bound that cpu/rvq_kernels.h proves. Opaque bytes to Python, which keeps them from call to call (PreparedCodebook).
//
// With c a codeword, m the centre (any vector: results do not depend on it) and d = c - m, the panels hold d^, which is
// d rounded to the screen's element type. Codewords with NaN or infinity, and those that fill up the last panel, are
// zero and start at -infinity: never chosen.
#pragma once

#include <cstdint>
#include <vector>

#include "longcat/codebook.h"
#include "longcat/isa.h"

namespace longcat {

// A view: pointers into a buffer of `packed_bytes`.
struct PackedCodebook {
    struct Header {
        uint64_t magic;
        int64_t entries, dim;
        int32_t isa, exhaustive;  // exhaustive: too long or wide for float32 sums, so every codeword is scored exactly
    };

    Isa isa;
    int64_t entries, dim;
    int64_t padded;  // entries, rounded up to whole panels
    Header* header;
    float* centre;                      // [dim]
    double* norm;                       // [padded] |c|^2 as the definition sums it; infinity where unusable
    float* start;                       // [padded] at least slack - |d|^2 / 2; -infinity where unusable
    float *slack, *length, *error;      // [padded] at least: the bound's part of |d|^2; |d|; |d - d^|
    float *panel_length, *panel_error;  // [panels] the largest in each panel
    uint32_t* panels;                   // [panels, dim / step, panel]: floats, or pairs of bfloat16
};

// Bytes of the buffer, which must lie on a 64-byte boundary.
int64_t packed_bytes(int64_t entries, int64_t dim, Isa isa);

// Lays a view over `memory`; reads nothing.
PackedCodebook packed_view(void* memory, int64_t entries, int64_t dim, Isa isa);

// Whether the bytes under `packed` were written by `finish_packing` for a codebook of this size and instruction set.
bool is_packed(const PackedCodebook& packed);

// Writes the centre: the mean of a sample of the codewords where they have one worth subtracting, else zero.
void pack_centre(const Codebook& book, const PackedCodebook& packed);

// Packs codewords one by one, in the order of their indices up to `padded`, from the first of any panel on.
class PanelPacker {
  public:
    PanelPacker(const Codebook& book, const PackedCodebook& packed);
    void pack(int64_t k);

  private:
    const Codebook& book_;
    const PackedCodebook& packed_;
    int64_t pitch_;
    std::vector<uint32_t> units_;  // of the panel's words so far
    std::vector<double> terms_;
};

int64_t tree_terms(int64_t dim);  // doubles that a sum of `dim` products takes
int panel_words(Isa isa);

// Takes repeated codewords out of the screen and writes the header, once all panels are packed.
void finish_packing(const Codebook& book, const PackedCodebook& packed);

// All of it but the centre.
void pack_codebook(const Codebook& book, const PackedCodebook& packed, int threads);

}  // namespace longcat
