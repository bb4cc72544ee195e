// A codebook argument of any RVQ op.
#pragma once

#include <string>

#include "bindings/tensor_view.h"
#include "longcat/codebook.h"

namespace longcat {

// Checks that `book` is [entries, dim] float32 with entries and dim at least 1; `name` begins the error, `beside` names
// the argument of width `dim`.
template <class View>
Codebook codebook_view(const char* name, const View& book, int64_t dim, const char* beside) {
    const auto* words = book.template matrix<float>(name, DType::float32);
    LC_CHECK(book.shape[1] == dim, std::string(name) + " must be as wide as " + beside);
    LC_CHECK(book.shape[0] >= 1 && dim >= 1, std::string(name) + " must have at least one row and one column");
    LC_CHECK(dim == 1 || book.strides[1] == 1, std::string(name) + " must have rows with adjacent elements");
    return {words, book.shape[0], book.strides[0]};
}

}  // namespace longcat
