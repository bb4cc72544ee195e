// Gradients of ngram_embedding: of the word table, of the rows of the other tables that were looked up, and of the
// projections. reference/ngram_embedding.py defines them.
//
// With g the gradient of a live token (one with a hash that is not 0) and x its row of table i, both divided by 1 + N
// in the end, that of the row is g projections[i], and that of the projection the sum over tokens of g x^T. What
// belongs to one row is summed in float32 in the order of the tokens, whatever the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "longcat/ngram_embedding.h"

namespace longcat {

struct NgramEmbeddingWeightGrad {
    struct Table {
        NgramEmbedding::Matrix rows;        // [rows, width]
        NgramEmbedding::Matrix projection;  // [dim, width]
        void* grad_rows;                    // [size, width]; size 0: not wanted
        int64_t size;
        void* grad_projection;  // [dim, width]; null: not wanted
    };

    NgramEmbedding::Matrix grad;  // [tokens, dim]
    IdsView ids;                  // [batch, length]
    int64_t length;
    NgramRule rule;
    DType dtype;
    const int64_t *hashes, *slots;  // [tokens, tables]: rows of the tables, and where their gradients go
    std::vector<Table> tables;
    void* grad_word;  // [words, dim]; no words: not wanted
    int64_t words;
    int threads;
    Isa isa;
};

void ngram_embedding_weight_grad(const NgramEmbeddingWeightGrad& p);

}  // namespace longcat
