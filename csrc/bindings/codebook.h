// A codebook argument of any RVQ op.
#pragma once

#include <string>

#include "bindings/tensor_view.h"
#include "longcat/codebook.h"

namespace longcat {

// Checks that `book` is [entries, dim] float32; `name` begins the error, `beside` names the argument of width `dim`.
template <class View>
Codebook codebook_view(const char* name, const View& book, int64_t dim, const char* beside) {
    const auto* words = book.template matrix<float>(name, DType::float32);
    LC_CHECK(book.shape[1] == dim, std::string(name) + " must be as wide as " + beside);
    LC_CHECK(dim == 1 || book.strides[1] == 1, std::string(name) + " must have rows with adjacent elements");
    return {words, book.shape[0], book.strides[0]};
}

}  // namespace longcat
